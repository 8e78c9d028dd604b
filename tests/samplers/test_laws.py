"""The stationary law of every stochastic-gradient sampler, its bias by step and by gradient noise."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_jax.samplers.base import Hyper
from slt_jax.samplers.preconditioned import preconditioned_sgld
from tests.samplers.cases import CASES, FRICTION, every


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def averages(sampler, gradient, steps, start, key, hyper, noise):
    """Each chain's mean over ``steps`` of (w^2, w^4, kinetic): (chains, d), the last (chains,).

    ``start``: (chains, d), in equilibrium.
    """
    center = (jnp.zeros(start.shape[1]),)

    def chain(key, w):
        state = sampler.init((w,))
        if "momentum" in state._fields:
            state = state._replace(momentum=(jax.random.normal(jax.random.fold_in(key, 2**30), w.shape),))

        def body(carry, i):
            state, sums = carry
            own = jax.random.fold_in(key, i)
            disturbance = jnp.sqrt(noise) * jax.random.normal(jax.random.fold_in(own, 1), w.shape)
            w_now = state.position[0]
            state, info = sampler.step(
                jax.random.fold_in(own, 0), state, lambda p: (0.0, (gradient(p[0]) + disturbance,)), center, hyper
            )
            return (state, (sums[0] + w_now**2, sums[1] + w_now**4, sums[2] + info.kinetic)), None

        zero = (jnp.zeros_like(w), jnp.zeros_like(w), jnp.float32(0))
        (_, sums), _ = jax.lax.scan(body, (state, zero), jnp.arange(steps))
        return jax.tree.map(lambda s: s / steps, sums)

    return jax.vmap(chain)(jax.random.split(key, start.shape[0]), start)


CURVATURE = np.geomspace(1.0, 1000.0, 8)


def stiff(w):
    return jnp.asarray(CURVATURE, w.dtype) * w


def quartic_gradient(w):
    return w**3


def z_scores(values, exact):
    """Over chains, which are independent; values (chains, d)."""
    values = np.asarray(values, np.float64)
    return (values.mean(0) - exact) / (values.std(0, ddof=1) / math.sqrt(len(values)))


def law_of(name, eps, noise, chains=300, steps=3000, seed=0):
    case, rng = CASES[name], np.random.default_rng(seed)
    exact = case.variance(CURVATURE, eps, noise)
    start = jnp.asarray(rng.normal(size=(chains, len(CURVATURE))) * np.sqrt(exact), jnp.float32)
    hyper = Hyper(*map(jnp.float32, (1.0, 0.0, eps, FRICTION)), jnp.bool_(False))
    squares, _, heat = averages(case.sampler, stiff, steps, start, jax.random.key(seed), hyper, jnp.float32(noise))
    return z_scores(squares, exact), np.asarray(squares, np.float64).mean(0) / exact, heat


@every
def test_anisotropic_gaussian_has_the_exact_law(name):
    """Condition number 1000, half of the largest stable step for the stiffest direction but one."""
    z, ratio, _ = law_of(name, eps=1e-3, noise=0.0)  # of eight directions, SGNHT's own error is below what is seen
    assert np.abs(z).max() < 4, ratio


@pytest.mark.parametrize("name", ["sgld", "matthews", "underdamped", "sghmc"])
def test_gradient_noise_heats_as_the_docstring_says(name):
    """And ``Theory.heating`` is half the sum of curvature times excess variance, to first order in the step size.

    BAOAB's thermometer reads the heat of the positions, whatever the step; half of |p|^2 and of |q|^2 would not.
    """
    z, ratio, heat = law_of(name, eps=1e-3, noise=500.0)
    assert np.abs(z).max() < 4, ratio
    case, small = CASES[name], 1e-6
    if name == "underdamped":
        found = case.variance(CURVATURE, 1e-3, 500.0) / case.variance(CURVATURE, 1e-3, 0.0)
        assert abs(z_scores(heat, found.mean())) < 4
    excess = case.variance(CURVATURE, small, 500.0) - case.variance(CURVATURE, small, 0.0)
    first_order = case.sampler.theory.heating(small, FRICTION) * 500.0 * len(CURVATURE)
    assert first_order == pytest.approx(np.sum(CURVATURE * excess) / 2, rel=2e-3)


@every
def test_quartic_has_the_right_law(name):
    """w^4 / 4: E[w^4] = 1 exactly, and E[w^2] = 2 Gamma(3/4) / Gamma(1/4). The step's bias is below the error."""
    case, rng, chains = CASES[name], np.random.default_rng(1), 150
    eps = 0.004 if name == "sghmc" else 0.02
    # w = +-(4 g)^(1/4), g ~ Gamma(1/4)
    start = (4 * rng.gamma(0.25, size=(chains, 24))) ** 0.25 * rng.choice([-1, 1], size=(chains, 24))
    hyper = Hyper(*map(jnp.float32, (1.0, 0.0, eps, FRICTION)), jnp.bool_(False))
    start = jnp.asarray(start, jnp.float32)
    second, fourth, _ = averages(case.sampler, quartic_gradient, 500, start, jax.random.key(2), hyper, jnp.float32(0))
    assert abs(z_scores(np.asarray(fourth).mean(1, keepdims=True), 1.0)[0]) < 4
    exact = 2 * math.gamma(0.75) / math.gamma(0.25)
    assert abs(z_scores(np.asarray(second).mean(1, keepdims=True), exact)[0]) < 4


@pytest.mark.parametrize("name", ["sgld", "matthews", "underdamped", "sghmc"])
def test_order_of_convergence_in_the_step_size(name):
    """Bias on the stiffest direction at k = 1.6, 0.8, 0.4: first order for Euler, none for Matthews and BAOAB."""
    bias, error, expected = [], [], []
    for k in (1.6, 0.8, 0.4):
        eps = k / CURVATURE[-1]
        case = CASES[name]
        exact = case.variance(CURVATURE, eps, 0.0)
        start = jnp.asarray(np.random.default_rng(3).normal(size=(300, len(CURVATURE))) * np.sqrt(exact), jnp.float32)
        hyper = Hyper(*map(jnp.float32, (1.0, 0.0, eps, FRICTION)), jnp.bool_(False))
        squares = averages(case.sampler, stiff, 2000, start, jax.random.key(4), hyper, jnp.float32(0))[0]
        values = np.asarray(squares, np.float64)[:, -1] * CURVATURE[-1]
        bias.append(values.mean() - 1)
        error.append(values.std(ddof=1) / math.sqrt(len(values)))
        expected.append(exact[-1] * CURVATURE[-1] - 1)
    assert max(abs(b - x) / e for b, x, e in zip(bias, expected, error, strict=True)) < 4
    if CASES[name].order == 0:
        return
    order, exact = (math.log2(b[0] / b[2]) / 2 for b in (bias, expected))
    unsure = math.hypot(error[0] / bias[0], error[2] / bias[2]) / math.log(2) / 2
    assert abs(order - exact) < 4 * unsure < 0.15


def test_a_frozen_preconditioner_has_the_law_of_scaled_curvature():
    """P is the same in drift and noise: the variance is 1 / (a (1 - eps P a / 4)). Kills: P in one of them only."""
    sampler, eps, chains = preconditioned_sgld(1e-3), 0.02, 300
    moments = jnp.asarray(CURVATURE, jnp.float32)  # mean square gradient of a direction in equilibrium
    root = np.sqrt(CURVATURE)
    scale = math.sqrt(CURVATURE.mean()) / (root + 0.1 * math.sqrt(CURVATURE.mean()))
    exact = 1 / (CURVATURE * (1 - eps / 10 * scale * CURVATURE / 4))

    def init(position):
        state = sampler.init(position)
        return state._replace(moments=state.moments._replace(nu=(moments,)))

    start = jnp.asarray(np.random.default_rng(5).normal(size=(chains, 8)) * np.sqrt(exact), jnp.float32)
    hyper = Hyper(*map(jnp.float32, (1.0, 0.0, eps / 10, FRICTION)), jnp.bool_(False))
    fixed = sampler._replace(init=init)
    squares = averages(fixed, stiff, 3000, start, jax.random.key(6), hyper, jnp.float32(0))[0]
    assert np.abs(z_scores(squares, exact)).max() < 4


def test_the_thermostat_absorbs_even_noise_and_not_uneven():
    """Even noise: the law is right though the gradients are noisy. Uneven noise: right on average only.

    Noise four times as large takes 0.43 more friction: were the thermostat to hold half of T(q) and of T(p) at 1, the
    positions would be 8 % too cold.
    """
    case, chains = CASES["sgnht"], 200
    curvature = jnp.full(32, 100.0)
    hyper = Hyper(*map(jnp.float32, (1.0, 0.0, 2e-3, 0.1)), jnp.bool_(False))
    start = jnp.asarray(np.random.default_rng(7).normal(size=(chains, 32)) / 10, jnp.float32)
    even = jnp.float32(100.0)
    uneven = jnp.asarray(np.r_[np.full(8, 400.0), np.zeros(24)], jnp.float32)
    args = (lambda w: curvature * w, 3000, start, jax.random.key(8), hyper)
    right = np.asarray(averages(case.sampler, *args, even)[0], np.float64).mean() * 100
    wrong = np.asarray(averages(case.sampler, *args, uneven)[0], np.float64).mean(0) * 100
    quick = (*args[:-1], hyper._replace(friction=jnp.float32(0.3)))  # the thermostat settles nine times faster
    strong = np.asarray(averages(case.sampler, *quick, 4 * even)[0], np.float64).mean() * 100
    plain = np.asarray(averages(CASES["underdamped"].sampler, *args, even)[0], np.float64).mean() * 100
    assert abs(right - 1) < 0.02
    assert abs(strong - 1) < 0.02
    assert plain > 1.5
    assert wrong[:8].mean() > 1.3
    assert wrong[8:].mean() < 0.95
