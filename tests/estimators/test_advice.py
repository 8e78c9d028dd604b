"""What a verdict says where a kind of model goes wrong in its own way, and whether remedies agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from scaling.checkpoints.problems import minimum
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.verdict import assess
from tests.diagnostics.test_checks import CASES


def test_chains_that_leave_a_local_minimum_one_after_another():
    """Of two wells w* is the upper one, a minimum. The chains fall into the lower one at different times, so that they
    disagree, and their error is a large part of the estimate.

    Kills: "chains disagree" for a negative estimate.
    """

    def loss_fn(w, factor):
        return ((w**2 - 1) ** 2 - 0.3 * w) * factor[:, 0]

    upper = float(np.real(np.roots([4, 0, -4, -0.3])).min())  # the derivative's roots
    factors = np.tile(np.array([0.5, 1.0, 1.5, 1.0], np.float32), 100)[:, None]
    posterior = slt.LocalPosterior(loss_fn, jnp.float32(upper), 400, nbeta=5.0, localization=0.01)
    given = {"sampler": slt.sgld(1e-2), "num_draws": 1500, "num_warmup": 0, "batch_size": 100}
    found = [slt.estimate_llc(posterior, factors, key=key, **given) for key in range(51, 54)]
    left = [result for result in found if result.llc < 0]
    assert len(left) > 1
    for result in left:
        assert result.verdict == "not a minimum"
    assert any("chains disagree" in result.health.flags for result in left)
    assert any(result.llc > -2 * result.llc_raw_stderr for result in left)


def test_draws_at_a_minimum_are_not_called_negative():
    """Mean 0.01 beside minibatch noise, in 200 runs: no more than two standard errors allow."""
    rng = np.random.default_rng(1)
    noisy = (rng.gamma(0.01, size=(4, 500)) + 2 * rng.normal(size=(4, 500)) for _ in range(200))
    error = 2 / np.sqrt(2000)
    called = sum(assess(draws, Evidence(scatter_error=error)).verdict == "not a minimum" for draws in noisy)
    assert called < 200 * 0.023 + 4 * np.sqrt(200 * 0.023)


@pytest.mark.slow
def test_no_end_by_curvatures_that_the_draws_contradict():
    """2-12-1 with four dead rectified linear units: the curvatures at w* give 12.8, and the draws 7.

    Kills: an end that is told by the Hessian where the loss bends as soon as a unit switches.
    """
    rng = np.random.default_rng(1)
    x, teacher = rng.normal(size=(1500, 2)), rng.normal(size=(3, 2))
    y = np.maximum(x @ teacher.T, 0) @ np.array([1.0, -1.0, 0.7]) + rng.normal(size=1500)
    start = {"w1": rng.normal(size=(2, 12)), "b1": 0.3 * rng.normal(size=12), "w2": 0.3 * rng.normal(size=12)}
    start["b1"][:4] = -30.0

    def loss_fn(p, xy):
        return 0.5 * (jax.nn.relu(xy[0] @ p["w1"] + p["b1"]) @ p["w2"] - xy[1]) ** 2

    center = minimum(lambda p: jnp.mean(loss_fn(p, (x, y))), start)
    posterior = slt.LocalPosterior(loss_fn, center, 1500)
    result = slt.estimate_llc(posterior, (x.astype(np.float32), y.astype(np.float32)), key=61, budget=60_000)
    probe = result.settings.probe
    assert probe["expected"] > 1.2 * result.llc
    check = next(c for c in result.health.checks if c.name == "Bias of unrelaxed directions")
    assert check.ok is None
    assert "by the curvatures" not in result.health.reason


def test_unscaled_inputs_are_named():
    """Six inputs in units of 1, six in units of 3e-4: the localization, 1e-6 of the largest curvature, hides these.

    Kills: the advice to draw more.
    """
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(400, 12)) * np.repeat([1.0, 3e-4], 6)).astype(np.float32)
    posterior = slt.LocalPosterior(lambda w, x: 0.5 * (x @ (w - 1e3)) ** 2, jnp.full(12, 1e3), 400)
    result = slt.estimate_llc(posterior, x, budget=20_000, key=64)
    curvature = result.settings.nbeta * np.linalg.eigvalsh(x.astype(float).T @ x / 400)
    pull = result.settings.localization
    assert result.settings.probe["hidden"] == (curvature < pull).sum() == 6
    assert result.settings.probe["hides"] == pytest.approx((pull / (curvature + pull)).sum() / 2, rel=0.01)
    assert "depends on nbeta or localization" in result.health.flags
    reason = next(c for c in result.health.checks if c.name == "Directions below the localization").fault.reason
    assert reason.startswith("6 of 12 directions")
    assert "Rescale the inputs" in reason
    assert result.verdict != "too few draws"


def test_a_localization_that_was_given_hides_what_it_should():
    x = np.random.default_rng(5).normal(size=(300, 3)).astype(np.float32) * np.array([1.0, 1.0, 1e-3], np.float32)
    posterior = slt.LocalPosterior(lambda w, x: 0.5 * (x @ w) ** 2, jnp.zeros(3), 300, localization=1.0)
    result = slt.estimate_llc(posterior, x, budget=20_000, key=65)
    assert result.settings.probe["hidden"] == 1
    assert next(c for c in result.health.checks if c.name == "Directions below the localization").ok is None


@pytest.mark.parametrize("case", CASES)
def test_remedies_agree(case):
    """A localization is raised only where w* is no minimum or chains leave the model: it hides directions.

    Kills: one sentence that raises it, for speed, beside another that lowers it.
    """
    draws, evidence, _, _ = CASES[case]
    for check in assess(draws, Evidence(num_free=100, **evidence)).checks:
        if check.ok is False and check.fault.verdict in ("still rising", "chains disagree", "too few draws"):
            assert "localization" not in check.fault.reason
        if (
            check.ok is False
            and check.fault.verdict.startswith("depends on")
            and "no minimum" not in check.fault.reason
        ):
            assert "aise localization" not in check.fault.reason
            assert "lower localization" not in check.fault.reason
