"""A run that has not settled in soft directions says so: by its rise since the start, by a descent from its ends."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.batches import as_source
from slt_jax.calibrate import Choice
from slt_jax.diagnostics import RISE_LIMIT, SOFT_LIMIT, Evidence, Slope, assess
from slt_jax.engine import Engine, Schedule
from slt_jax.mesh import chain_mesh
from slt_jax.outcome import _descent
from slt_jax.probe import Probe
from slt_jax.series import Rise, rise_of

RNG = np.random.default_rng(0)
NUM_DATA, NBETA = 64, 20.0
WIDTHS = np.geomspace(1, 0.02, 6).astype(np.float32)


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
    assert 0 < rise_of(approach[:, :1600], approach[:, 1603::4], 4).next < RISE_LIMIT * 50


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
        ({"rise": Rise(0.9 * RISE_LIMIT * 50, 0.9 * RISE_LIMIT * 50, 0.01)}, "converged"),
        ({"rise": Rise(-3.0, -3.0, 0.5)}, "converged"),
        ({"soft": Slope(1.2 * SOFT_LIMIT * 50, 0.1)}, "still rising"),
        ({"soft": Slope(1.2 * SOFT_LIMIT * 50, 1.0)}, "converged"),
        ({"soft": Slope(0.9 * SOFT_LIMIT * 50, 0.0)}, "converged"),
        ({"soft": Slope(1.2 * SOFT_LIMIT * 50, 0.1), "softest": 2.0}, "converged"),
    ],
)
def test_the_verdict_needs_a_large_and_sure_sign(evidence, verdict):
    assert assess(settled(RNG, 500, chains=4), Evidence(**evidence)).verdict == verdict


def linear(p, xy):
    return 0.5 * (xy[0] @ p["w"] - xy[1]) ** 2


def engine_of(batch_size=NUM_DATA, sampler=None, off=0.0, **plan):
    """Of a linear model with label noise, ``off`` from its minimum; curvatures near NBETA WIDTHS^2."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(NUM_DATA, 6)).astype(np.float32) * WIDTHS
    y = rng.normal(size=NUM_DATA).astype(np.float32)
    center = np.linalg.lstsq(x, y, rcond=None)[0]
    posterior = slt.LocalPosterior(linear, {"w": jnp.asarray(center + off)}, NUM_DATA, nbeta=NBETA, localization=0.1)
    lengths = {"num_warmup": 10, "num_draws": 10, **plan}
    schedule = Schedule(4, lengths["num_draws"], lengths["num_warmup"], 1, batch_size, 1, "paired", 1, 8)
    engine = Engine(posterior, as_source((x, y)), sampler or slt.sgld(1e-3), schedule, jax.random.key(0), chain_mesh(4))
    return engine, NBETA * x.T.astype(np.float64) @ x / NUM_DATA


@pytest.mark.quick
def test_a_descent_leaves_what_linear_algebra_says():
    """w <- w + h p, p <- e^-f p - h H (w - w*), again by hand; what is left is the energy of the softest directions."""
    engine, hessian = engine_of()
    away = RNG.normal(size=6) / WIDTHS
    size, friction, steps = 0.25 / np.linalg.eigvalsh(hessian)[-1], 0.1, 60
    probe = Probe(engine, 1, jax.random.key(1))
    found = probe.quench((probe.center[0] + away.astype(np.float32),), size, friction, steps)
    here, momentum = away.copy(), np.zeros(6)
    for _ in range(steps):
        momentum = math.exp(-friction) * momentum - math.sqrt(size) * hessian @ here
        here = here + math.sqrt(size) * momentum
    assert found[0] == pytest.approx(0.5 * here @ hessian @ here, rel=1e-3)
    assert 0.02 < found[0] / (0.5 * away @ hessian @ away) < 0.8
    assert found[1] == 0.0


def test_on_minibatches_it_is_right_within_its_error():
    """Kills: the energy read on the batches that were descended on; grad L_m(w*) left in."""
    engine, hessian = engine_of(batch_size=2)
    away = (RNG.normal(size=6) / WIDTHS).astype(np.float32)
    probe = Probe(engine, 1, jax.random.key(1))
    left, error = probe.quench((probe.center[0] + away,), 1e-9, 0.5, 1)
    assert abs(left - 0.5 * away @ hessian @ away) < 4 * error < 2 * left
    assert probe.gradients == 2 * (1 + 16)


@pytest.mark.quick
def test_the_slope_at_the_center_does_not_count():
    """Kills: grad L(w*) left in, where w* is 0.3 from the minimum."""
    engine, hessian = engine_of(off=0.3)
    away = (RNG.normal(size=6) / WIDTHS).astype(np.float32)
    probe = Probe(engine, 1, jax.random.key(1))
    left, _ = probe.quench((probe.center[0] + away,), 1e-9, 0.5, 1)
    assert left == pytest.approx(0.5 * away @ hessian @ away, rel=1e-3)


@pytest.mark.quick
@pytest.mark.parametrize("sampler", [slt.sgld(1e-3), slt.underdamped(1e-3, 0.4), slt.sghmc(1e-3, 0.05)])
def test_the_softest_direction_of_a_run_comes_from_the_law_of_its_variance(sampler):
    """The variance of a soft direction of curvature x after t steps is 1 - exp(-x rate t) of its last: by matrices.

    Kills: a factor in the rate of a family; the friction's own e^-f in place of coth(f / 2).
    """
    total = 20_000
    engine, _ = engine_of(sampler=sampler, num_warmup=total // 2, num_draws=total // 2)
    choice = Choice(1e-3, sampler.friction, 0.1, False, curvature=25.0)
    size, friction, steps, ratio, _ = _descent(engine, 4, 1e-3, sampler.friction, choice)
    curvature = math.tanh(friction / 2) / (size * steps) / ratio  # what the run has just settled in, by _descent
    eps = 1e-3
    if sampler.family == "euler":
        step, noise = np.array([[1 - eps * curvature / 2]]), np.array([[eps]])
    elif sampler.family == "baoab":
        h, keep = math.sqrt(eps), math.exp(-sampler.friction)
        kick, damp = np.array([[1, 0], [-h * curvature, 1]]), np.array([[1, 0], [0, keep]])
        half = np.array([[1, h / 2], [0, 1]])
        step = half @ damp @ half @ kick
        noise = (1 - keep**2) * half @ np.diag([0.0, 1.0]) @ half.T
    else:
        keep, h = 1 - sampler.friction, math.sqrt(eps)
        step = np.array([[1 - eps * curvature, h * keep], [-h * curvature, keep]])
        noise = 2 * sampler.friction * np.outer([h, 1], [h, 1])
    law, variances = np.zeros_like(step), []
    for _ in range(total):
        law = step @ law @ step.T + noise
        variances.append(law[0, 0])
    for _ in range(400_000):
        law = step @ law @ step.T + noise
    share = variances[-1] / law[0, 0]
    assert share == pytest.approx(1 - math.exp(-1), rel=0.05)


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


@pytest.mark.parametrize(("decades", "done"), [(1, True), (2.5, False)])
def test_an_estimate_that_stopped_on_its_way_is_not_called_converged(decades, done):
    """Thirty thousand gradients do for two decades of curvature and not for five; the draws alone look still."""
    posterior, data, exact = regression(decades)
    for key in range(2):
        result = slt.estimate_llc(posterior, data, budget=30_000, key=key)
        error = result.llc / exact(result.settings["localization"]) - 1
        soft, probe = result.health.evidence.soft, result.settings["probe"]
        assert probe["noise_stderr"] > 0  # its own, beside that of what is left
        assert 0.9 < probe["softest"] <= 6
        assert ("still rising" in result.health.flags) is not done
        if done:
            assert abs(error) < 0.06
            assert soft.value < 0.01 * result.llc
        else:
            assert error < -0.1
            assert soft.value > 0.06 * result.llc
