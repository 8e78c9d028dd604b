"""Steps that shorten where the force is larger than the calibration met: the law, the draws, and who gets them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from scaling.known_answers import by_name
from slt_jax._checks import check_key
from slt_jax.calibration import choose
from slt_jax.engine.clock import Clock
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.plan import Schedule
from slt_jax.estimators.outcome import evenly_in_time, result_of
from slt_jax.estimators.shared import shared_calibration
from slt_jax.samplers.base import Hyper
from slt_jax.samplers.underdamped import BAOAB
from tests.engines import engine_of, numbers_of

CUSP = by_name("(y^2 - x^3)^2")
NBETA, PULL, STEP = 2000.0, 1.0, 4e-5
SHORT = Schedule(4, 500, 500, 4, 64, 1, "paired", 1, 512)


def losses(position):
    v = position[0]
    return (v[1] ** 2 - v[0] ** 3) ** 2


@functools.partial(jax.jit, static_argnums=0)
def along_the_valley(steps, key, limit):
    """Each chain's (time, time-weighted, plain) sums of nbeta L over the second half, and its largest nbeta L."""
    step, center = slt.underdamped(STEP).step, (jnp.zeros(2),)
    hyper = Hyper(NBETA, PULL, STEP, 0.03, False, (), limit)

    def chain(key):
        def body(carry, i):
            state, sums = carry
            state, info = step(jax.random.fold_in(key, i), state, jax.value_and_grad(losses), center, hyper)
            value = NBETA * info.loss
            now = jnp.where(i >= steps // 2, 1.0, 0.0) * jnp.array([info.time, info.time * value, value])
            return (state, (sums[0] + now, jnp.maximum(sums[1], value))), None

        start = (slt.underdamped(STEP).init(center), (jnp.zeros(3), jnp.float32(0)))
        return jax.lax.scan(body, start, jnp.arange(steps))[0][1]

    return jax.vmap(chain)(jax.random.split(key, 64))


def test_where_the_valley_narrows_steps_shorten_and_the_law_is_that_of_the_posterior():
    """The cusp's curvature grows with the fourth power of the distance. Weighted by time it is right, plainly not."""
    steps = 120_000
    (time, weighted, plain), most = (np.asarray(x, float).T for x in along_the_valley(steps, jax.random.key(0), 4e3))
    exact = CUSP.exact(NBETA, PULL)
    right = weighted / time
    error = right.std(ddof=1) / np.sqrt(len(right))
    assert error < 0.01
    assert abs(right.mean() - exact) < 4 * error
    assert time.sum() < 0.97 * len(time) * steps / 2
    assert plain.mean() / (steps / 2) > exact + 10 * error
    assert most.max() < 50


def test_without_a_limit_the_same_chains_are_thrown_off():
    *_, most = along_the_valley(120_000, jax.random.key(0), jnp.inf)
    assert not np.nanmax(np.asarray(most)) < 200


def test_below_the_limit_nothing_changes():
    results = [_result(limit) for limit in (np.inf, 1e30)]
    np.testing.assert_array_equal(results[0].loss_trace, results[1].loss_trace)
    assert results[0].settings.mean_time == 1.0


def _result(limit, target=CUSP, step_size=STEP, friction=0.03, plan=SHORT):
    """Of an engine with this limit."""
    posterior = slt.LocalPosterior(target.loss_fn, target.center, target.num_data, NBETA, PULL)
    sampler = slt.underdamped(step_size, friction)
    engine = engine_of(posterior, target.data, sampler, plan, check_key(0), chain_mesh(plan.num_chains))
    numbers = numbers_of(posterior, sampler, limit)
    inputs = engine.inputs(numbers)
    run = engine.start(inputs)
    for _ in engine.steps(run, inputs):
        pass
    return result_of(engine, run, posterior, numbers, Clock())


def test_a_result_s_draws_are_at_equal_times():
    short = _result(50.0)
    assert short.settings.mean_time < 0.95
    assert (np.diff(short.loss_trace, axis=1) == 0).any()  # a long step's draw is there more than once


def test_shortened_steps_are_heated_less_and_what_noise_adds_is_known():
    """Labels are noisy: full steps add eighteen times the estimate, these twice."""
    target, plan = by_name("noisy regression, d = 10"), Schedule(8, 4000, 500, 2, 256, 1, "paired", 1, 512)
    result = _result(3e3, target, 1e-4, 0.05, plan)
    assert result.settings.mean_time < 0.2
    probe = result.settings.probe
    added, of_added = (BAOAB.heating(1e-4, 0.05) * probe[name] for name in ("noise", "noise_stderr"))
    error = np.hypot(result.llc_stderr, of_added)
    assert error < 0.8
    assert abs(result.llc_raw - added - target.exact(NBETA, PULL)) < 4 * error


def test_draws_at_equal_times_are_the_time_weighted_mean():
    rng = np.random.default_rng(0)
    times = rng.uniform(0.1, 1.0, (3, 4000))
    times[1] = 0.5
    times[2, 7] = np.nan
    values = np.cumsum(rng.normal(size=times.shape), axis=1)
    evenly = evenly_in_time(times)
    found = evenly(values)
    assert found.shape == values.shape
    assert found[0].mean() == pytest.approx(np.average(values[0], weights=times[0]), rel=1e-3)
    np.testing.assert_array_equal(found[1:], values[1:])  # all the same, or a chain that was lost
    picks = evenly(np.broadcast_to(np.arange(4000), times.shape))[0]
    counts = np.bincount(picks, minlength=4000)
    assert (np.diff(picks) >= 0).all()
    assert np.abs(counts - times[0] / times[0].mean()).max() < 1  # as often as its time says, but for rounding
    also = evenly(np.stack([values, values], axis=-1))
    np.testing.assert_array_equal(also[..., 1], found)


@pytest.mark.parametrize(("name", "limited"), [("(y^2 - x^3)^2", True), ("quadratic, d = 2", False)])
def test_only_where_the_curvature_varies_is_there_a_limit(name, limited):
    target = by_name(name)
    posterior = slt.LocalPosterior(target.loss_fn, target.center, target.num_data)
    result = slt.estimate_llc(posterior, target.data, budget=100_000)
    choice = result.settings.calibration
    assert (choice["limit"] is not None) == limited
    assert any("shortened where" in line for line in choice["lines"]) == limited
    assert (result.settings.friction < 0.1) == limited
    assert (result.settings.mean_time < 1) == limited


def test_a_setting_that_many_estimates_share_has_no_limit():
    """A sweep's or a trajectory's chains take full steps, and so need the friction that goes with them."""
    posterior = slt.LocalPosterior(CUSP.loss_fn, CUSP.center, CUSP.num_data)
    plan = Schedule(4, 1000, 1000, 30, 256, 1, "paired", 1, 512)
    engine = engine_of(posterior, CUSP.data, slt.underdamped(), plan, check_key(0), chain_mesh(4))
    choice = shared_calibration(engine, posterior)
    assert choice["limit"] is None
    assert choice["friction"] >= 0.1


def test_with_few_gradients_too():
    posterior = slt.LocalPosterior(CUSP.loss_fn, CUSP.center, CUSP.num_data)
    result = slt.estimate_llc(posterior, CUSP.data, budget=20_000, key=2)
    assert result.settings.calibration["limit"] is not None
    assert result.settings.mean_time < 1
    assert result.settings.friction == 0.1  # for so small an estimate a lower one would leave too few draws


@pytest.mark.parametrize(("share", "limited"), [(0.9, True), (1.1, False)])
def test_a_pilot_whose_force_is_more_than_the_curvature_s_sets_no_limit(monkeypatch, share, limited):
    """In equilibrium the mean squared force is at most d times the largest curvature."""
    run_pilot = choose.run_pilot

    def with_force(*args):
        pilot = run_pilot(*args)
        return dataclasses.replace(pilot, force_sq=share * 2 * pilot.curvature)

    monkeypatch.setattr(choose, "run_pilot", with_force)
    posterior = slt.LocalPosterior(CUSP.loss_fn, CUSP.center, CUSP.num_data)
    choice = slt.estimate_llc(posterior, CUSP.data, budget=20_000).settings.calibration
    assert choice["limit"] == (pytest.approx(4 * 0.9 * 2 * choice["curvature"]) if limited else None)
