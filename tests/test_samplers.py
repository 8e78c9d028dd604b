"""Every stochastic-gradient sampler: arithmetic, noise, randomness, traces, and the exact law of its discretization.

On a quadratic of curvature a, with gradient noise of variance S, all of them are linear, and their stationary variance
is known exactly (the docstrings give it). k = step_size a.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.corrections import heating
from slt_jax.kernels.langevin import normal
from slt_jax.samplers import preconditioned_sgld, sghmc, sgld, sgnht, underdamped
from slt_jax.samplers.base import Hyper, Sampler

CENTER = (jnp.linspace(-1, 1, 6).reshape(2, 3), jnp.array([0.5, -2.0]))
FRICTION = 0.3
OF_KICKED = (1 + 3 * math.exp(-FRICTION)) / (4 + 4 * math.exp(-FRICTION))  # weight of |q|^2 in the thermometer


class Case(NamedTuple):
    """``variance(a, eps, S)``: exact. ``order``: of the step-size bias on a quadratic; 0 for none."""

    sampler: Sampler
    variance: Callable
    order: int


def euler(a, eps, noise):
    return (1 + eps * noise / 4) / (a * (1 - eps * a / 4))


def matthews(a, eps, noise):
    return (1 + eps * noise / 4 / (1 - eps * a / 4)) / a


def baoab(a, eps, noise):
    return (1 + eps * noise / 4 / math.tanh(FRICTION / 2) / (1 - eps * a / 4)) / a


def hmc_euler(a, eps, noise):
    return (1 + eps * noise / (2 * FRICTION)) / (a * (1 - eps * a / (4 - 2 * FRICTION)))


CASES = {
    "sgld": Case(sgld(1e-3), euler, 1),
    "matthews": Case(sgld(1e-3, noise="leimkuhler-matthews"), matthews, 0),
    "rmsprop": Case(preconditioned_sgld(1e-3), euler, 1),
    "adam": Case(preconditioned_sgld(1e-3, moments="adam"), euler, 1),
    "underdamped": Case(underdamped(1e-3), baoab, 0),
    "sghmc": Case(sghmc(1e-3), hmc_euler, 1),
    "sgnht": Case(sgnht(1e-3), baoab, 0),
}
every = pytest.mark.parametrize("name", CASES)


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


# The stationary law


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
    z, ratio, _ = law_of(name, eps=1e-3, noise=0.0)
    if name == "sgnht":
        # Its thermostat moves with eight degrees of freedom: exact only as their number grows.
        assert np.abs(ratio - 1).max() < 0.05
    else:
        assert np.abs(z).max() < 4, ratio


@pytest.mark.parametrize("name", ["sgld", "matthews", "underdamped", "sghmc"])
def test_gradient_noise_heats_as_the_docstring_says(name):
    """And ``heating`` is half the sum of curvature times excess variance, to first order in the step size.

    BAOAB's thermometer reads the heat of the positions, whatever the step; half of |p|^2 and of |q|^2 would not.
    """
    z, ratio, heat = law_of(name, eps=1e-3, noise=500.0)
    assert np.abs(z).max() < 4, ratio
    case, small = CASES[name], 1e-6
    if name == "underdamped":
        found = case.variance(CURVATURE, 1e-3, 500.0) / case.variance(CURVATURE, 1e-3, 0.0)
        assert abs(z_scores(heat, found.mean())) < 4
    excess = case.variance(CURVATURE, small, 500.0) - case.variance(CURVATURE, small, 0.0)
    first_order = heating(case.sampler.family, small, FRICTION, 500.0 * len(CURVATURE))
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
    bias, error = [], []
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
    if CASES[name].order == 0:
        assert max(abs(b / e) for b, e in zip(bias, error, strict=True)) < 4
        return
    order = math.log2(bias[1] / bias[2])
    expected = case.variance(CURVATURE[-1], 0.8e-3, 0) * 1e3 - 1, case.variance(CURVATURE[-1], 0.4e-3, 0) * 1e3 - 1
    assert order == pytest.approx(math.log2(expected[0] / expected[1]), abs=0.1)
    assert 0.9 < order < 1.3


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


def test_statistics_freeze():
    sampler = preconditioned_sgld(1e-3)
    start = sampler.init(CENTER)
    for adapt in (True, False):
        state, _ = sampler.step(jax.random.key(0), start, cubic, CENTER, Hyper(1.0, 1.0, 1e-3, 0.1, adapt))
        changed = any(bool(jnp.any(a != b)) for a, b in zip(state.moments.nu, start.moments.nu, strict=True))
        assert changed == adapt


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
