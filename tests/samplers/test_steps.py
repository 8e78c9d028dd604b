"""Every stochastic-gradient sampler, step by step: arithmetic, noise, randomness, traces."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.kernels.langevin import normal
from slt_jax.samplers.base import Hyper
from slt_jax.samplers.preconditioned import preconditioned_sgld
from slt_jax.samplers.sgld import sgld
from tests.samplers.cases import CASES, FRICTION, every

CENTER = (jnp.linspace(-1, 1, 6).reshape(2, 3), jnp.array([0.5, -2.0]))
OF_KICKED = (1 + 3 * math.exp(-FRICTION)) / (4 + 4 * math.exp(-FRICTION))  # weight of |q|^2 in the thermometer


def cubic(position):
    """Loss with a gradient that is no multiple of the position: sum of w^3 / 3 + w."""
    return sum(jnp.sum(w**3 / 3 + w) for w in position), tuple(w**2 + 1 for w in position)


def flat(position):
    return jnp.float32(0), tuple(jnp.zeros_like(w) for w in position)


# One step against float64 NumPy. g: gradient of the loss; G: the whole drift; x: the noise; p, o: momentum, old noise.


def numpy_step(name, w, c, p, o, x, nbeta, gamma, eps, friction, moment, norms):
    g = w**2 + 1
    drift = nbeta * g + gamma * (w - c)
    h, keep = math.sqrt(eps), math.exp(-friction)
    if name == "sgld":
        return w - eps / 2 * drift + h * x
    if name == "matthews":
        return w - eps / 2 * drift + h * (x + o) / 2
    if name in ("rmsprop", "adam"):
        root, typical = np.sqrt(moment), math.sqrt(norms["moment"])
        scale = typical / (root + 0.1 * typical)
        return w - eps / 2 * scale * drift + np.sqrt(eps * scale) * x
    if name == "sghmc":
        return w + h * ((1 - friction) * p - h * drift + math.sqrt(2 * friction) * x)
    kicked = p - h * drift
    if name == "sgnht":
        z = friction + friction**2 / 2 * OF_KICKED * (norms["kicked"] - 1)
        return w + h / 2 * (kicked + math.exp(-z) * kicked + math.sqrt(friction * (1 - math.exp(-2 * z)) / z) * x)
    return w + h / 2 * (kicked + keep * kicked + math.sqrt(1 - keep**2) * x)


@pytest.mark.quick
@every
def test_one_step_against_numpy(name):
    """Kills: eps for eps/2; a pull to zero instead of w*; one key for all leaves; a loss after the move."""
    sampler, nbeta, gamma, eps = CASES[name].sampler, 7.0, 3.0, 0.02
    position = tuple(c + 0.3 for c in CENTER)
    hyper, key = Hyper(nbeta, gamma, eps, FRICTION, True), jax.random.key(5)
    state = sampler.init(position)
    extra = tuple(0.1 + 0.2 * jnp.arange(w.size, dtype=w.dtype).reshape(w.shape) for w in position)
    for field in ("momentum", "noise"):
        if field in state._fields:
            state = state._replace(**{field: extra})
    moved, info = sampler.step(key, state, cubic, CENTER, hyper)
    decay = {"rmsprop": 0.99, "adam": 0.999}.get(name, 0.0)
    weights = [np.asarray(w, np.float64) for w in position]
    grads = [w**2 + 1 for w in weights]
    drifts = [nbeta * g + gamma * 0.3 for g in grads]
    kicked = [np.asarray(p, np.float64) - math.sqrt(eps) * f for p, f in zip(extra, drifts, strict=True)]
    size = sum(w.size for w in weights)
    norms = {
        "kicked": sum(np.sum(q**2) for q in kicked) / size,
        "moment": (1 - decay) * sum(np.sum(g**2) for g in grads) / size,
    }
    for i, w in enumerate(weights):
        x = np.asarray(normal(jax.random.fold_in(key, i), w.shape), np.float64)
        c, old = np.asarray(CENTER[i], np.float64), np.asarray(extra[i], np.float64)
        expected = numpy_step(name, w, c, old, old, x, nbeta, gamma, eps, FRICTION, (1 - decay) * grads[i] ** 2, norms)
        np.testing.assert_allclose(moved.position[i], expected, rtol=2e-5, atol=2e-6)
    assert float(info.loss) == pytest.approx(sum(np.sum(w**3 / 3 + w) for w in weights), rel=1e-5)
    assert float(info.virial) == pytest.approx(sum(0.3 * np.sum(f) for f in drifts), rel=1e-5)
    assert float(info.distance_sq) == pytest.approx(0.09 * size, rel=1e-5)
    scales = [1.0 for _ in drifts]
    if name in ("rmsprop", "adam"):
        typical = math.sqrt(norms["moment"])
        scales = [typical / (np.sqrt((1 - decay) * g**2) + 0.1 * typical) for g in grads]
    expected = sum(np.sum(p * f**2) for p, f in zip(scales, drifts, strict=True))
    assert float(info.drift_sq) == pytest.approx(expected, rel=1e-5)
    if name in ("underdamped", "sgnht"):
        before = sum(np.sum(np.asarray(p) ** 2) for p in extra) / size
        heat = (1 - OF_KICKED) * before + OF_KICKED * norms["kicked"]
        assert float(info.kinetic) == pytest.approx(heat, rel=1e-5)


def noise_of(name, key, shapes):
    """What one step from rest adds to weights that feel no force, in units of its standard deviation."""
    sampler, eps = CASES[name].sampler, 0.04
    zero = tuple(jnp.zeros(s) for s in shapes)
    state, _ = sampler.step(key, sampler.init(zero), flat, zero, Hyper(1.0, 0.0, eps, FRICTION))
    kick = 1 - math.exp(-2 * FRICTION)
    if name == "sgnht":
        z = FRICTION - FRICTION**2 / 2 * OF_KICKED  # its thermometer reads 0 at rest
        kick = FRICTION * (1 - math.exp(-2 * z)) / z
    factor = {"matthews": 0.5, "sghmc": math.sqrt(2 * FRICTION)}.get(name, 1.0)
    if name in ("underdamped", "sgnht"):
        factor = 0.5 * math.sqrt(kick)
    return [np.asarray(w, np.float64) / (math.sqrt(eps) * factor) for w in state.position]


def correlation_z(a, b):
    return float(np.sum(a * b) / np.sqrt(a.size))


@every
def test_noise_has_unit_variance_and_leaves_are_independent(name):
    a, b = noise_of(name, jax.random.key(0), [(1000, 300), (1000, 300)])
    for leaf in (a, b):
        assert abs(leaf.mean()) * np.sqrt(leaf.size) < 4
        assert abs(leaf.var() - 1) / np.sqrt(2 / leaf.size) < 4
        assert abs(np.mean(leaf**4) - 3) / np.sqrt(96 / leaf.size) < 4
    assert abs(correlation_z(a, b)) < 4
    assert abs(correlation_z(a[:-1], a[1:])) < 4


@every
def test_same_key_same_bits(name):
    first, again, other = (noise_of(name, jax.random.key(k), [(50,)])[0] for k in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


@every
def test_one_trace_for_a_sweep(name):
    traces, sampler = [], CASES[name].sampler

    @jax.jit
    def step(key, state, hyper):
        traces.append(1)
        return sampler.step(key, state, cubic, CENTER, hyper)

    found = set()
    start = sampler.init(tuple(c + 1 for c in CENTER))
    for nbeta in (1.0, 5.0):
        for step_size in (1e-4, 1e-2):
            for friction in (0.1, 0.2):
                hyper = Hyper(*map(jnp.float32, (nbeta, 0.5, step_size, friction)), jnp.bool_(True))
                state, _ = step(jax.random.key(0), start, hyper)
                found.add(float(state.position[0][0, 0]))
    assert len(traces) == 1
    kinetic = name in ("underdamped", "sghmc", "sgnht")
    assert len(found) == (8 if kinetic else 4)


@every
def test_float64_weights_stay_float64(name):
    with jax.enable_x64(True):
        sampler, center = CASES[name].sampler, (jnp.zeros(4, jnp.float64),)
        state, _ = sampler.step(jax.random.key(0), sampler.init(center), flat, center, Hyper(1.0, 0.0, 0.04))
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(state.position))


def test_steps_and_chains_have_noise_of_their_own():
    """Through the engine: increments of weights that feel almost no force, over chains and steps."""
    posterior = slt.LocalPosterior(
        lambda p, x: p["w"] @ x[0] + 0 * x[:, 0], {"w": jnp.zeros(2)}, 100, nbeta=1.0, localization=1e-6
    )
    result = slt.estimate_llc(
        posterior,
        jnp.ones((100, 2)),
        sampler=sgld(1e-4),
        num_chains=40,
        num_draws=500,
        num_warmup=0,
        batch_size=4,
        key=1,
    )
    # the loss is w1 + w2: its increments are sqrt(eps) (xi1 + xi2) - eps
    moves = (np.diff(result.loss_trace.astype(np.float64), axis=1) + 1e-4) / np.sqrt(2e-4)
    assert abs(moves.var() - 1) / np.sqrt(2 / moves.size) < 4
    assert abs(correlation_z(moves[:, :-1], moves[:, 1:])) < 4
    assert abs(correlation_z(moves[:-1], moves[1:])) < 4


def test_statistics_freeze():
    sampler = preconditioned_sgld(1e-3)
    start = sampler.init(CENTER)
    for adapt in (True, False):
        state, _ = sampler.step(jax.random.key(0), start, cubic, CENTER, Hyper(1.0, 1.0, 1e-3, 0.1, adapt))
        changed = any(bool(jnp.any(a != b)) for a, b in zip(state.moments.nu, start.moments.nu, strict=True))
        assert changed == adapt
