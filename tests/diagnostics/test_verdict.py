"""Effective sample size, error bars and verdicts on series whose truth is known."""

import math
import re

import numpy as np
import pytest

from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.series import ess_and_rhat, standard_error, trend_of
from slt_jax.diagnostics.verdict import assess

RHO = 0.8
SHRINK = (1 - RHO) / (1 + RHO)  # effective draws per draw of an AR(1) series


def series(rng, chains=4, draws=1000, rho=RHO, mean=0.0):
    """Stationary AR(1) chains of unit variance."""
    out = np.empty((chains, draws))
    out[:, 0] = rng.normal(size=chains)
    for t in range(1, draws):
        out[:, t] = rho * out[:, t - 1] + math.sqrt(1 - rho**2) * rng.normal(size=chains)
    return out + mean


@pytest.mark.quick
@pytest.mark.parametrize("rho", [0.0, RHO])
def test_ess_is_that_of_the_process(rho):
    exact = 4000 * (1 - rho) / (1 + rho)
    found = [ess_and_rhat(series(np.random.default_rng(i), rho=rho))[0] for i in range(10)]
    spread = np.std(found, ddof=1)
    # Half of the estimates from independent draws are capped, at their number: a normal law so cut at its mean loses
    # 1 / sqrt(2 pi) of its deviation, which is 0.68 of the deviation that is left.
    capped = 0.68 * spread if rho == 0 else 0.0
    assert abs(np.mean(found) + capped - exact) < 4 * spread / math.sqrt(10) < 0.2 * exact


def test_standard_errors_are_calibrated():
    """Kills: the spread of the draws given as the error of their mean; autocorrelation ignored."""
    scores = []
    for i in range(200):
        draws = series(np.random.default_rng(i), draws=400, mean=3.0)
        scores.append((draws.mean() - 3.0) / standard_error(draws, ess_and_rhat(draws)[0]))
    # 200 squared z-scores have mean 1 and a mean's error of sqrt(2 / 200) = 0.1
    assert abs(np.mean(np.square(scores)) - 1) < 0.4
    assert abs(np.mean(scores)) < 4 / math.sqrt(200)


def test_trend_is_calibrated_and_sees_a_drift():
    still = [trend_of(series(np.random.default_rng(i), draws=400))[1] for i in range(100)]
    assert np.mean(np.abs(still) > 3) < 0.05
    draws = series(np.random.default_rng(0), draws=400)
    change, z = trend_of(draws + np.linspace(0, 2, 400))
    assert change - trend_of(draws)[0] == pytest.approx(400 / 399)  # half of the line, of 399 intervals
    assert z > 3


def test_rhat_sees_a_shifted_chain():
    draws = series(np.random.default_rng(0))
    assert abs(ess_and_rhat(draws)[1] - 1) < 0.03
    draws[2] += 2
    assert ess_and_rhat(draws)[1] > 1.2


GOOD = series(np.random.default_rng(3), mean=30.0)
CASES = {
    "converged": (GOOD, 0),
    "still rising": (GOOD + np.linspace(0, 10, 1000), 0),
    "still falling": (GOOD - np.linspace(0, 10, 1000), 0),
    "chains disagree": (GOOD + np.array([[0.0], [0.0], [3.0], [0.0]]), 0),
    "not a minimum": (GOOD - 60, 0),
    "too few draws": (GOOD[:, :3], 0),
    "diverged": (GOOD, 1),
}


@pytest.mark.quick
@pytest.mark.parametrize("verdict", CASES)
def test_every_verdict_has_its_case(verdict):
    draws, stopped = CASES[verdict]
    health = assess(draws, Evidence(num_stopped=stopped))
    assert health.verdict == verdict
    assert len(health.reason) > 20


def test_an_error_bar_as_large_as_the_estimate_is_too_few_draws():
    draws = series(np.random.default_rng(1), draws=40, rho=0.0)[:, :20] * 30 + 5
    assert assess(draws, Evidence()).verdict == "too few draws"


def test_so_many_more_draws_are_enough():
    """Kills: the ratio of the errors in place of its square; the limit of the few draws' error bars left out."""
    few = series(np.random.default_rng(6), draws=120) + 0.9  # an error of 0.12, where 0.045 is 5 %
    said = assess(few, Evidence(gradients=1000.0)).reason
    found = re.search(r"budget=([\d_]+) \(or num_draws=([\d_]+)\) would bring it to 5.0%", said)
    budget, count = (int(found[k].replace("_", "")) for k in (1, 2))
    assert 5 < count / 120 < 11
    assert budget / 1000 == pytest.approx(count / 120, rel=0.1)
    many = assess(series(np.random.default_rng(3), draws=count) + 0.9, Evidence())
    assert "too few draws" not in many.flags
    errors = [series(np.random.default_rng(seed), draws=count) for seed in range(20)]
    reached = np.sqrt(np.mean([x.mean() ** 2 for x in errors])) / 0.9
    assert 0.03 < reached < 0.07  # a standard deviation of twenty is known to a sixth, the first error to a fifth
    short = assess(series(np.random.default_rng(4), draws=5, rho=0.0) + 5, Evidence())
    assert short.ess <= 20
    assert "too few draws" in short.flags
    (fault,) = [check.fault for check in short.checks if check.name == "Effective draws (ESS)"]
    assert f"num_draws={math.ceil(5 * 30 / short.ess)} would bring it to" in fault.reason
    centered = few - few.mean()
    assert "over 100 times as many would bring it to 5%" in assess(centered, Evidence()).reason


@pytest.mark.parametrize("shape", [(0, 10), (1, 1), (4, 1), (4, 3)])
def test_too_little_to_say_is_nan(shape):
    draws = np.random.default_rng(0).normal(size=shape)
    assert math.isnan(ess_and_rhat(draws)[0])
    assert assess(draws, Evidence(num_stopped=0 if shape[0] else 4)).verdict in ("too few draws", "diverged")


def test_draws_that_do_not_move_have_no_error_bar():
    health = assess(np.full((4, 50), 2.0), Evidence())
    assert math.isnan(health.ess)
    assert health.verdict != "converged"
