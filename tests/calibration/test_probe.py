"""Curvature, gradient noise and acceptance at one position, against linear algebra."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.calibration.probe import Probe, hessian_product
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.problem import Problem
from slt_jax.posterior.data import as_source

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 5)).astype(np.float32) * np.geomspace(0.3, 3, 5, dtype=np.float32)
Y = RNG.normal(size=64).astype(np.float32)
Y -= X @ np.linalg.lstsq(X, Y, rcond=None)[0]
NBETA, PULL = 20.0, 0.5


def linear(p, xy):
    return 0.5 * (xy[0] @ p["w"] - xy[1]) ** 2


def probe_of(loss_fn, data=(X, Y), batch_size=16, blocks=4, size=5, nbeta=NBETA):
    posterior = slt.LocalPosterior(loss_fn, {"w": jnp.zeros(size)}, 64, nbeta=nbeta, localization=PULL)
    problem = Problem(posterior, as_source(data), chain_mesh(4), batch_size)
    return Probe(problem, nbeta, blocks, jax.random.key(1))


@pytest.mark.quick
def test_sharpness_is_the_largest_eigenvalue():
    probe = probe_of(linear)
    exact = NBETA * np.linalg.eigvalsh(X.T @ X / 64)[-1]
    assert probe.sharpness((jnp.ones(5),), 30) == pytest.approx(exact, rel=1e-3)
    assert probe.gradients == 2 * 30 * 4


def test_curvature_is_the_hessian_of_the_whole_exponent():
    """Kills: a one-sided length of the secant; a localization left out."""
    probe, direction = probe_of(linear), RNG.normal(size=5).astype(np.float32)
    (found,) = probe.curvature((jnp.ones(5),), (jnp.asarray(direction),), 0.1, PULL)
    np.testing.assert_allclose(found, (NBETA / 64 * X.T @ X + PULL * np.eye(5)) @ direction, rtol=1e-3, atol=1e-3)
    assert probe.gradients == 2 * 4


def test_a_product_with_the_hessian_needs_no_secant():
    """Of cos(x w) + (x w)^2 / 2 about w = 0.3. Kills: a mean over blocks that is their sum; a localization left out."""
    probe, direction = probe_of(lambda p, xy: jnp.cos(xy[0] @ p["w"]) + linear(p, xy)), RNG.normal(size=5)
    (found,) = probe.hessian((jnp.full(5, 0.3),), (jnp.asarray(direction, jnp.float32),), math.nan, PULL)
    weight = 1 - np.cos(X @ np.full(5, 0.3))
    exact = (NBETA / 64 * (X * weight[:, None]).T @ X + PULL * np.eye(5)) @ direction
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)
    assert probe.gradients == 2 * 4


def called_back(value):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(value.shape, value.dtype), value)


@jax.custom_vjp
def once(value):
    """The value, with a first derivative and no second."""
    return called_back(value)


once.defvjp(lambda value: (called_back(value), value), lambda value, g: (g * called_back(value) / value,))


def test_a_loss_without_second_derivatives_keeps_its_secants():
    probe = probe_of(lambda p, xy: once(linear(p, xy)))
    where = (jnp.ones(5),), (jnp.ones(5),), 0.1, PULL
    for _ in range(2):
        np.testing.assert_array_equal(probe.hessian(*where)[0], probe.curvature(*where)[0])
    assert probe.gradients == 4 * 2 * 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the temporaries of XLA's CPU compiler")
def test_a_metric_is_told_the_room_for_a_second_derivative():
    def deep(p, xy):
        hidden = xy[0] @ p["w"][:, None] * jnp.ones((1, 256))
        for _ in range(6):
            hidden = jnp.tanh(hidden @ (jnp.ones((256, 256)) / 256))
        return (hidden.mean(1) - xy[1]) ** 2

    room = [probe_of(deep).temporaries(calibrates=True, metric=metric) for metric in (False, True)]
    probe, one = probe_of(deep), (jnp.ones(5),)
    numbers = jnp.float32(1), jnp.float32(1)
    program = hessian_product.lower(probe.problem.program, one, one, probe.frozen, probe.blocks, *numbers).compile()
    taken = program.memory_analysis().temp_size_in_bytes
    assert max(room[1]) > 0.95 * taken > max(room[0])


def test_where_the_hessian_vanishes_the_curvature_is_that_of_the_posterior():
    """w^4: the secant over s has slope 4 nbeta s^2, and s^2 = 1 / that: 2 sqrt(nbeta)."""
    probe = probe_of(lambda p, x: p["w"][0] ** 4 + 0 * x[:, 0], np.zeros((64, 1), np.float32), size=1)
    assert probe.sharpness((jnp.zeros(1),), 12) == pytest.approx(2 * math.sqrt(NBETA), rel=1e-3)


def test_flat_ground_has_no_curvature():
    probe = probe_of(lambda p, x: 0 * p["w"][0] + 0 * x[:, 0], np.zeros((64, 1), np.float32), size=1)
    assert probe.sharpness((jnp.zeros(1),), 6) == 0.0


@pytest.mark.parametrize("batch_size", [1, 16])
def test_noise_is_the_trace_of_the_covariance(batch_size):
    """Of nbeta grad L_m at m = batch_size; with control variates that of its difference from w*."""
    probe, at = probe_of(linear, batch_size=batch_size), jnp.full(5, 0.7)
    mean, error = probe.noise((at,), 800)
    for found, spread, position in ((mean.plain, error.plain, 0.7), (mean.controlled, error.controlled, None)):
        residual = X @ np.full(5, 0.7) - (Y if position else 0)
        grads = NBETA * residual[:, None] * X
        exact = np.sum(grads.var(0)) / batch_size
        assert abs(found - exact) < 4 * spread
        assert spread < 0.1 * exact


def test_no_square_leaves_the_range_of_float32():
    """At nbeta 1e20 that of a curvature is above 1e38, and so near to w* that of a gradient below 1e-38."""
    nbeta, away = 1e20, 1e-20
    probe = probe_of(linear, (X, np.zeros(64, np.float32)), nbeta=nbeta)
    exact = nbeta * np.linalg.eigvalsh(X.T @ X / 64)[-1]
    assert probe.sharpness((jnp.zeros(5),), 30) == pytest.approx(exact, rel=1e-3)
    mean, error = probe.noise((jnp.full(5, away),), 800)
    grads = nbeta * away * X.sum(1, keepdims=True) * X
    assert abs(mean.plain - np.sum(grads.var(0)) / 16) < 4 * error.plain


def test_acceptance_is_that_of_mala():
    probe, at = probe_of(linear), (jnp.full(5, 0.2),)
    step = 0.5 / (NBETA * np.linalg.eigvalsh(X.T @ X / 64)[-1])
    found = np.mean([probe.acceptance(at, step, PULL) for _ in range(300)])
    hessian = NBETA * X.T @ X / 64 + PULL * np.eye(5)

    def energy(w):
        return NBETA * np.mean(0.5 * (X @ w - Y) ** 2) + 0.5 * PULL * w @ w

    rng, accepted, w = np.random.default_rng(3), [], np.full(5, 0.2)
    for _ in range(3000):
        g = hessian @ w
        new = w - step / 2 * g + math.sqrt(step) * rng.normal(size=5)
        back = w - new + step / 2 * (hessian @ new)
        ahead = new - w + step / 2 * g
        ratio = energy(w) - energy(new) - (back @ back - ahead @ ahead) / (2 * step)
        accepted.append(min(1.0, math.exp(ratio)))
    assert abs(found - np.mean(accepted)) < 4 * np.std(accepted) * math.sqrt(1 / 300 + 1 / 3000)
    assert probe.acceptance(at, 1e6, PULL) < 0.01
