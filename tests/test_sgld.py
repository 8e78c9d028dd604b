"""One SGLD step: its arithmetic, its noise, its randomness and its traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.kernels.langevin import normal
from slt_jax.samplers.base import Hyper

SAMPLER = slt.sgld(1e-3)
CENTER = (jnp.linspace(-1, 1, 6).reshape(2, 3), jnp.array([0.5, -2.0]))


def cubic(position):
    """Loss with a gradient that is no multiple of the position: sum of w^3 / 3 + w."""
    loss = sum(jnp.sum(w**3 / 3 + w) for w in position)
    return loss, tuple(w**2 + 1 for w in position)


def flat(position):
    return jnp.float32(0), tuple(jnp.zeros_like(w) for w in position)


@pytest.mark.quick
def test_one_step_against_numpy():
    """Kills: eps for eps/2; a pull to zero instead of w*; a loss after the move; one key for all leaves."""
    position = tuple(c + 0.3 for c in CENTER)
    hyper, key = Hyper(nbeta=7.0, localization=3.0, step_size=0.02), jax.random.key(5)
    state, info = SAMPLER.step(key, SAMPLER.init(position), cubic, CENTER, hyper)
    loss = drift_sq = virial = 0.0
    for i, (w, c) in enumerate(zip(position, CENTER, strict=True)):
        w, c = np.asarray(w, np.float64), np.asarray(c, np.float64)
        noise = np.asarray(normal(jax.random.fold_in(key, i), w.shape), np.float64)
        drift = 7.0 * (w**2 + 1) + 3.0 * (w - c)
        moved = w - 0.01 * drift + np.sqrt(0.02) * noise
        np.testing.assert_allclose(state.position[i], moved, rtol=1e-5, atol=1e-6)
        loss, drift_sq = loss + np.sum(w**3 / 3 + w), drift_sq + np.sum(drift**2)
        virial += np.sum((w - c) * drift)
    np.testing.assert_allclose([info.loss, info.drift_sq, info.virial], [loss, drift_sq, virial], rtol=1e-5)


def noise_of(key, shapes):
    """What one step adds to weights that feel no force, over the square root of the step size."""
    zero = tuple(jnp.zeros(s) for s in shapes)
    state, _ = SAMPLER.step(key, SAMPLER.init(zero), flat, zero, Hyper(1.0, 0.0, 0.04))
    return [np.asarray(w, np.float64) / 0.2 for w in state.position]


def correlation_z(a, b):
    return float(np.sum(a * b) / np.sqrt(a.size))


@pytest.mark.quick
def test_noise_has_unit_variance_and_leaves_are_independent():
    a, b = noise_of(jax.random.key(0), [(1000, 500), (1000, 500)])
    for leaf in (a, b):
        assert abs(leaf.mean()) * np.sqrt(leaf.size) < 4
        assert abs(leaf.var() - 1) / np.sqrt(2 / leaf.size) < 4
        assert abs(np.mean(leaf**4) - 3) / np.sqrt(96 / leaf.size) < 4
    assert abs(correlation_z(a, b)) < 4
    assert abs(correlation_z(a[:-1], a[1:])) < 4


def test_steps_and_chains_have_noise_of_their_own():
    """Through the engine: increments of weights that feel almost no force, over chains and steps."""
    posterior = slt.LocalPosterior(
        lambda p, x: p["w"] @ x[0] + 0 * x[:, 0], {"w": jnp.zeros(2)}, 100, nbeta=1.0, localization=1e-6
    )
    data = jnp.ones((100, 2))
    result = slt.estimate_llc(
        posterior, data, sampler=slt.sgld(1e-4), num_chains=40, num_draws=500, num_warmup=0, batch_size=4, key=1
    )
    # the loss is w1 + w2: its increments are sqrt(eps) (xi1 + xi2) - eps
    moves = (np.diff(result.loss_trace.astype(np.float64), axis=1) + 1e-4) / np.sqrt(2e-4)
    assert abs(moves.var() - 1) / np.sqrt(2 / moves.size) < 4
    assert abs(correlation_z(moves[:, :-1], moves[:, 1:])) < 4
    assert abs(correlation_z(moves[:-1], moves[1:])) < 4


def test_same_key_same_bits():
    first, again, other = (noise_of(jax.random.key(k), [(50,)])[0] for k in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_one_trace_for_a_sweep():
    traces = []

    @jax.jit
    def step(key, state, hyper):
        traces.append(1)
        return SAMPLER.step(key, state, cubic, CENTER, hyper)

    found = set()
    for nbeta in (1.0, 5.0):
        for localization in (0.1, 2.0):
            for step_size in (1e-4, 1e-2):
                hyper = Hyper(*map(jnp.float32, (nbeta, localization, step_size)))
                state, _ = step(jax.random.key(0), SAMPLER.init(tuple(c + 1 for c in CENTER)), hyper)
                found.add(float(state.position[0][0, 0]))
    assert len(traces) == 1
    assert len(found) == 8


def test_float64_weights_stay_float64():
    with jax.enable_x64(True):
        center = (jnp.zeros(4, jnp.float64),)
        state, _ = SAMPLER.step(jax.random.key(0), SAMPLER.init(center), flat, center, Hyper(1.0, 0.0, 0.04))
        assert state.position[0].dtype == jnp.float64
