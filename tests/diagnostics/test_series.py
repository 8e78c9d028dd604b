"""Chains that still spread from w* say so by their rise over doublings of the run, where the draws alone look still."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.limits import RISE_SHARE
from slt_jax.diagnostics.series import Rise, error_of_mean, ess_and_rhat, rise_of, standard_error
from slt_jax.diagnostics.verdict import assess

RNG = np.random.default_rng(0)


def settled(rng, length, mean=50.0, chains=2):
    return mean + rng.normal(scale=5.0, size=(chains, length))


@pytest.mark.quick
def test_the_rise_is_that_of_a_logarithm():
    """Means of a + b log t over windows that double rise by b log 2. Kills: a warm-up not thinned; shifted windows."""
    t = np.arange(1, 8001)
    values = np.tile(40 + 10 * np.log(t), (2, 1))
    found = rise_of(values[:, :3200], values[:, 3203::4], 4)
    assert found.before == pytest.approx(10 * math.log(2), rel=0.01)
    assert found.value == pytest.approx(10 * math.log(2), rel=0.01)
    assert found.next == pytest.approx(10 * math.log(2), rel=0.03)


@pytest.mark.quick
def test_what_has_settled_does_not_rise():
    """|z| of the mean rise is above 3 in few of a hundred; after an exponential approach little is left to come."""
    found = [rise_of(settled(rng, 1600), settled(rng, 600), 4) for rng in map(np.random.default_rng, range(100))]
    assert np.mean([abs(r.mean) > 3 * r.stderr for r in found]) <= 0.03
    approach = np.tile(50 * (1 - np.exp(-np.arange(4000) / 500)), (2, 1))
    assert 0 < rise_of(approach[:, :1600], approach[:, 1603::4], 4).next < RISE_SHARE * 50


@pytest.mark.quick
def test_an_offset_of_the_warmup_is_in_the_error():
    rng = np.random.default_rng(0)
    sure, unsure = (rise_of(settled(rng, 1600), settled(rng, 600), 4, error) for error in (0.0, 8.0))
    assert unsure.stderr == pytest.approx(math.hypot(sure.stderr, 4.0), rel=0.05)


@pytest.mark.quick
@pytest.mark.parametrize("length", [0, 20])
def test_of_short_runs_nothing_is_known(length):
    assert math.isnan(rise_of(np.ones((2, 8)), np.ones((2, length)), 4).stderr)
    assert math.isnan(rise_of(np.full((2, 800), np.nan), np.ones((2, 200)), 4).stderr)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        ({}, "converged"),
        ({"rise": Rise(3.0, 3.0, 0.5)}, "still rising"),
        ({"rise": Rise(3.0, 3.0, 1.5)}, "converged"),  # not sure
        ({"rise": Rise(9.0, 1.5, 0.5)}, "converged"),  # nearly done
        ({"rise": Rise(0.9 * RISE_SHARE * 50, 0.9 * RISE_SHARE * 50, 0.01)}, "converged"),
        ({"rise": Rise(-3.0, -3.0, 0.5)}, "converged"),
        ({"rise": Rise(9.0, -4.0, 0.5)}, "converged"),  # up, and down again
    ],
)
def test_the_verdict_needs_a_large_and_sure_sign(evidence, verdict):
    assert assess(settled(RNG, 500, chains=4), Evidence(**evidence)).verdict == verdict


def regression(decades, seed=0, num_data=4000, size=60):
    """Linear regression with label noise: (posterior, data, exact LLC); curvatures over twice as many decades."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, 10.0**-decades, size)
    x = (rng.normal(size=(num_data, size)) * scales).astype(np.float32)
    y = (x @ (0.3 * rng.normal(size=size) / scales) + rng.normal(size=num_data)).astype(np.float32)
    wide = x.astype(np.float64)
    center = np.linalg.lstsq(wide, y.astype(np.float64), rcond=None)[0].astype(np.float32)
    posterior = slt.LocalPosterior(lambda w, b: 0.5 * (b[0] @ w - b[1]) ** 2, jnp.asarray(center), num_data)
    curvatures = num_data / math.log(num_data) * np.linalg.eigvalsh(wide.T @ wide / num_data)
    return posterior, (x, y), lambda pull: float((curvatures / (curvatures + pull)).sum() / 2)


def test_an_estimate_that_stopped_on_its_way_is_not_called_converged():
    """Ten thousand gradients leave 200 weights of five decades of curvature a third below what is exact."""
    posterior, data, exact = regression(2.5, size=200)
    found = [slt.estimate_llc(posterior, data, budget=10_000, key=key) for key in range(3)]
    for result in found:
        assert result.llc < 0.8 * exact(result.settings.localization)
        assert result.verdict != "converged"
    assert any("the last two doublings" in result.health.reason for result in found)


def test_an_estimate_that_is_done_does_not_rise():
    posterior, data, exact = regression(1)
    result = slt.estimate_llc(posterior, data, budget=40_000, key=0)
    assert abs(result.llc - exact(result.settings.localization)) < 4 * result.llc_stderr
    assert "still rising" not in result.health.flags


def noisy_series(seed, slow=150.0, scatter=4.4, size=(4, 4000)):
    """(draws, error of their mean): a slow series of variance 1 and this time, and noise of each draw."""
    from scipy.signal import lfilter

    rng, keep = np.random.default_rng(seed), math.exp(-1 / slow)
    kicks = rng.normal(size=size) * math.sqrt(1 - keep**2)
    kicks[:, 0] = rng.normal(size=size[0])
    draws = lfilter([1.0], [1.0, -keep], kicks, axis=1) + scatter * rng.normal(size=size)
    return draws, math.sqrt((2 * slow + scatter**2) / np.prod(size))


def test_slow_directions_count_where_minibatches_scatter_the_draws():
    """Kills: the error by the effective sample size alone, which here is a third too small."""
    found = []
    for seed in range(40):
        draws, exact = noisy_series(seed)
        ess = ess_and_rhat(draws)[0]
        by_ess, error = (error_of_mean(draws, ess, scatter) for scatter in (0.0, 0.95))
        assert error >= by_ess == standard_error(draws, ess)
        found.append((by_ess / exact, error / exact))
    by_ess, error = np.mean(found, 0)
    assert by_ess < 0.8
    assert 0.87 < error < 1.1


def test_scatter_that_is_not_known_counts():
    draws, _ = noisy_series(0)
    ess = ess_and_rhat(draws)[0]
    assert error_of_mean(draws, ess, math.nan) == error_of_mean(draws, ess, 0.95) > standard_error(draws, ess)
    assert error_of_mean(draws[:, :150], ess, math.nan) == standard_error(draws[:, :150], ess)
