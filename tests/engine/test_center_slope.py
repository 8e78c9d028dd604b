"""Weights on a slope: what the chains gain by going down, against its exact value, and what the verdict says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax._io import digest_of_arrays
from slt_jax.diagnostics.bias import Bias
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.limits import TILT_SHARE, TILT_SIGMA
from slt_jax.diagnostics.sensitivity import Slope, tilt_of
from slt_jax.diagnostics.verdict import assess
from slt_jax.engine import center_slope
from slt_jax.engine.center_slope import SlopeSchedule, slope_schedule
from slt_jax.engine.memory import estimate_memory
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.plan import Schedule
from slt_jax.engine.problem import Problem
from slt_jax.posterior.data import as_source
from tests.engines import engine_of
from tests.small import estimate, refuses, square, traces_of
from tests.sources import Rows

NUM, DIMENSION, NBETA, GAMMA = 64, 6, 60.0, 2.0
RNG = np.random.default_rng(0)
X = RNG.normal(size=(NUM, DIMENSION)).astype(np.float32)
Y = (X @ np.ones(DIMENSION) + RNG.normal(size=NUM)).astype(np.float32)
ROWS = np.concatenate([X, Y[:, None]], axis=1)
BEST = np.linalg.lstsq(X.astype(np.float64), Y.astype(np.float64), rcond=None)[0]
HESSIAN = X.astype(np.float64).T @ X / NUM
AWAY = 0.4 * RNG.normal(size=DIMENSION)


def loss_fn(w, batch):
    return 0.5 * (batch[:, :-1] @ w - batch[:, -1]) ** 2


def regression(away=AWAY, loss=loss_fn, data=ROWS, **changed):
    """An estimate at the minimum of the loss plus ``away``."""
    posterior = slt.LocalPosterior(loss, jnp.asarray(BEST + away, jnp.float32), NUM, NBETA, GAMMA)
    options = {
        "sampler": slt.underdamped(2e-3, 0.4), "num_chains": 4, "num_draws": 2000, "num_warmup": 200, "batch_size": 16,
        "key": 1,
    }  # fmt: skip
    return slt.estimate_llc(posterior, data, **{**options, **changed})


def exact(away=AWAY):
    """Of the Gaussian that the posterior is: -nbeta^2 g' (nbeta H + gamma)^-1 g / 2."""
    slope = HESSIAN @ away
    return -0.5 * NBETA**2 * slope @ np.linalg.solve(NBETA * HESSIAN + GAMMA * np.eye(DIMENSION), slope)


def around_the_minimum(away):
    """nbeta (L(w) - L(w*)) of the same Gaussian, less what it gains by going down."""
    spread = np.linalg.inv(NBETA * HESSIAN + GAMMA * np.eye(DIMENSION))
    mean = GAMMA * spread @ away  # from the minimum
    raw = NBETA / 2 * (np.trace(HESSIAN @ spread) + mean @ HESSIAN @ mean - away @ HESSIAN @ away)
    return raw - exact(away)


WAYS = {
    "minibatches": {},
    "over all data": {"batch_size": NUM},
    "L_n(w*) as baseline": {"baseline": "full"},
    "control variates": {"control_variate": True},
    "in parts": {"micro_batches": 4, "thinning": 3, "num_draws": 800},
    "from the host": {"data": Rows(ROWS)},
    "two at once": {"chain_batch": 2, "mesh": chain_mesh(4, jax.devices()[:2])},
    "in a short step": {"sampler": slt.sgld(1e-3), "num_draws": 4000},
    "exact": {"sampler": slt.hmc(2e-3, 8), "num_draws": 500, "batch_size": None},
}


@pytest.fixture
def forward(monkeypatch):
    """No pass over the data is cheap."""
    monkeypatch.setattr(center_slope, "_PASS_SHARE", 0.0)


@pytest.mark.usefixtures("forward")
@pytest.mark.parametrize("way", WAYS)
def test_the_tilt_is_exact_on_a_quadratic(way):
    """Kills: half or twice of it; the slope at w in place of w*; the batch that moved the chain; the pull left out."""
    result = regression(**WAYS[way])
    tilt = result.health.evidence.tilt
    assert exact() < -1
    assert abs(tilt.value - exact()) < 4 * tilt.stderr
    assert tilt.stderr < 0.15 * abs(exact())
    assert result.to_dict()["tilt"] == tilt.value


@pytest.mark.parametrize("way", ["minibatches", "from the host", "exact"])
def test_the_gradient_over_all_data_leaves_no_noise(way):
    """Where it costs little. Kills: that of the last block alone, or blocks of unequal size weighed alike."""
    result = regression(**{**WAYS[way], "num_draws": 500, "batch_size": None if way == "exact" else 24})
    tilt = result.health.evidence.tilt
    assert abs(tilt.value - exact()) < 4 * tilt.stderr
    assert tilt.stderr < 0.06 * abs(exact())
    assert np.isfinite(result.traces.tilt[:, ::2]).all()
    still = regression(0 * AWAY, batch_size=24, num_draws=500).health.evidence.tilt
    assert abs(still.value) < 1e-4


@pytest.mark.quick
def test_the_gradient_takes_no_more_memory_than_a_step():
    """Kills: whole batches where a step takes parts; a gradient made, or left out, when memory is told."""
    sizes = set()

    def loss(w, batch):
        sizes.add(len(batch))
        return loss_fn(w[:DIMENSION], batch)

    many = 10**6  # weights, most of which do nothing
    center = jnp.zeros(many).at[:DIMENSION].set(BEST + AWAY)
    posterior = slt.LocalPosterior(loss, center, NUM, NBETA, GAMMA)
    plans = [Schedule(1, draws, 100, 1, 16, 4, "full", 1, 512) for draws in (15, 200)]
    engines = [engine_of(posterior, ROWS, slt.sgld(1e-3), plan, jax.random.key(0), chain_mesh(1)) for plan in plans]
    without, held = (estimate_memory(engine, [], saves=False).step for engine in engines)
    assert held - without == pytest.approx(4 * many, rel=0.05)
    assert [engine.slope.method for engine in engines] == ["", "gradient"]
    assert "center_grad" not in vars(engines[1].problem)
    np.testing.assert_allclose(engines[1].problem.center_grad[0][:DIMENSION], HESSIAN @ AWAY, rtol=1e-3, atol=1e-4)
    assert sizes == {4}


@pytest.mark.quick
def test_the_estimate_lacks_the_tilt():
    """Around the minimum it is d / 2 of the directions that the loss holds; and the sentence says so."""
    held = np.linalg.eigvalsh(NBETA * HESSIAN)
    around = float((held / (held + GAMMA)).sum() / 2)
    slope, bottom = (regression(away, batch_size=NUM, num_draws=8000) for away in (0.4 * AWAY, 0 * AWAY))
    assert abs(bottom.llc - around) < 4 * bottom.llc_stderr
    assert slope.health.flags == ("not a minimum",)
    tilt = slope.health.evidence.tilt
    there = slope.llc - tilt.value
    assert f"nearby it would be about {there:.4g}" in slope.health.reason
    # Loss and tilt rise together, so that their errors add to less than this.
    assert abs(there - around_the_minimum(0.4 * AWAY)) < 4 * math.hypot(slope.llc_stderr, tilt.stderr)
    assert bottom.verdict == "converged"
    assert abs(bottom.health.evidence.tilt.value) < 4 * bottom.health.evidence.tilt.stderr


@pytest.mark.usefixtures("forward")
def test_its_error_bar_is_calibrated():
    """At the minimum, forward on minibatches: z-scores of twenty runs have a spread of about 1."""
    found = [regression(0 * AWAY, key=key, num_draws=500).health.evidence.tilt for key in range(20)]
    scores = np.array([tilt.value / tilt.stderr for tilt in found])
    assert abs(scores.mean()) < 4 / math.sqrt(20)
    assert 0.5 < scores.std() < 2


@pytest.mark.usefixtures("forward")
def test_measurements_are_those_of_an_unbroken_run():
    """Of which steps, does not depend on chunks."""
    whole, cut = (regression(num_draws=100, num_warmup=210, **more) for more in ({}, {"chunk_size": 7}))
    np.testing.assert_array_equal(whole.traces.tilt, cut.traces.tilt)
    assert np.isfinite(whole.traces.tilt).sum() == 4 * 4
    assert np.isfinite(whole.traces.tilt[:, ::25]).all()


@jax.custom_vjp
def backward_only(value):
    return value


backward_only.defvjp(lambda value: (value, None), lambda _, g: (g,))


@pytest.mark.usefixtures("forward")
def test_a_loss_for_backward_alone_is_sampled_without_the_slope():
    result = regression(loss=lambda w, batch: backward_only(loss_fn(w, batch)), num_draws=100)
    assert np.isnan(result.traces.tilt).all()
    assert result.to_dict()["tilt"] is None
    np.testing.assert_allclose(result.loss_trace, regression(num_draws=100).loss_trace, rtol=1e-4)
    controlled = regression(loss=lambda w, batch: backward_only(loss_fn(w, batch)), control_variate=True)
    assert abs(controlled.health.evidence.tilt.value - exact()) < 4 * controlled.health.evidence.tilt.stderr


@pytest.mark.quick
@pytest.mark.parametrize(
    ("num_data", "draws", "thinning", "expected"),
    [
        (4000, 99, 1, SlopeSchedule("")),
        (4000, 100, 1, SlopeSchedule("forward", 25)),
        (4000, 400, 1, SlopeSchedule("forward", 64)),
        (4000, 400, 4, SlopeSchedule("forward", 16)),
        (80_000, 10_240, 32, SlopeSchedule("forward", 40)),
        (8, 90, 1, SlopeSchedule("gradient", 1)),
        (8, 30, 1, SlopeSchedule("")),
        (40, 1024, 1, SlopeSchedule("gradient", 4)),
        (40, 100, 1, SlopeSchedule("forward", 25)),
        (4000, 10_240, 64, SlopeSchedule("gradient", 40)),
    ],
)
def test_measurements_are_rare(num_data, draws, thinning, expected):
    """At least four in a chain, at most 256, and forward one in 64 steps; a pass over the data costs 2 % of a chain."""
    plan = Schedule(2, draws, 10, thinning, 8, 1, "paired", 1, 512)
    data = np.ones((num_data, 3), np.float32)
    posterior = slt.LocalPosterior(square, jnp.zeros(3), num_data)
    assert slope_schedule(plan, Problem(posterior, as_source(data), chain_mesh(2), 8)) == expected


@pytest.mark.quick
def test_the_error_is_the_larger_of_that_over_time_and_over_chains():
    """Noise around known means of the chains' quarters. Kills: the spread of single looks for that of their means."""
    noise = np.random.default_rng(0).normal(size=(4, 4, 100))
    sparse = np.where(np.arange(100) % 5 == 0, noise, np.nan)
    noise, sparse = (x - np.nanmean(x, -1, keepdims=True) for x in (noise, sparse))
    quarters = np.array([2.0, -1.0, 1.0, -2.0])[:, None]  # of sixteen, the squares add to 40; of four chains, to 0
    moving, sparse = ((x + quarters).reshape(4, 400) for x in (noise, sparse))
    apart = noise.reshape(4, 400) + np.array([[0.0], [3.0], [-3.0], [0.0]])
    for tilt in (moving, sparse):
        assert tilt_of(tilt, 20.0).stderr == pytest.approx(10 * math.sqrt(40 / 15 / 16))
    assert tilt_of(apart, 20.0).stderr == pytest.approx(10 * math.sqrt(18 / 3 / 4))
    assert tilt_of(sparse, 20.0).value == pytest.approx(10 * np.nanmean(sparse))
    for unknown in (np.full((4, 400), np.nan), np.ones((0, 10)), np.ones((2, 3))):
        assert math.isnan(tilt_of(unknown, 20.0).value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("tilt", "verdict"),
    [
        (Slope(-1.1 * TILT_SHARE * 50, 0.1), "not a minimum"),
        (Slope(-0.9 * TILT_SHARE * 50, 0.1), "converged"),
        (Slope(-5.0, 5.0 / (0.9 * TILT_SIGMA)), "converged"),  # not sure
        (Slope(-5.0, 5.0 / (1.1 * TILT_SIGMA)), "not a minimum"),
        (Slope(5.0, 0.1), "converged"),  # a loss that bends
        (Slope(math.nan, math.nan), "converged"),
    ],
)
def test_the_verdict_needs_a_large_and_sure_sign(tilt, verdict):
    draws = 50 + np.random.default_rng(0).normal(scale=5.0, size=(4, 500))
    assert assess(draws, Evidence(tilt=tilt)).verdict == verdict


@pytest.mark.quick
def test_what_is_taken_off_is_not_around_the_minimum_either():
    draws = 50 + np.random.default_rng(0).normal(scale=5.0, size=(4, 500))
    bias = Bias(2.0, 1.0, 0.1, 3.0, "")
    reason = assess(draws, Evidence(tilt=Slope(-5.0, 0.1), bias=bias)).reason
    assert f"takes 5 from the estimate: around the minimum nearby it would be about {draws.mean() + 2:.4g}." in (reason)


def test_results_of_before_are_read(tmp_path):
    """Without the trace of it; and one that lost it is refused."""
    result = estimate()
    tree = result.to_xarray()
    sample = tree["sample_stats"].to_dataset().drop_vars("tilt")
    tree["sample_stats"] = type(tree)(sample)
    kept = [sample[name].values for name in sample.data_vars]
    tree.attrs |= {"slt_jax_result": 1, "sha256": digest_of_arrays([*kept, result.warmup_loss])}
    tree.to_zarr(tmp_path / "before", consolidated=False)
    found = slt.load_result(tmp_path / "before")
    assert np.isnan(found.traces.tilt).all()
    np.testing.assert_array_equal(found.loss_trace, result.loss_trace)
    tree.attrs["sha256"] = digest_of_arrays([*traces_of(result).values()])
    tree.to_zarr(tmp_path / "lost", consolidated=False)
    refuses(ValueError, lambda: slt.load_result(tmp_path / "lost"), "its traces are not those that were saved")
