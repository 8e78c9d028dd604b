"""What slow directions owe an estimate that stops early, on quadratics, where it is known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.calibration.probe import rounding_of
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.relaxation import (
    RELAXED,
    ChainLength,
    overdamped_relaxation,
    underdamped_relaxation,
    unrelaxed_bias,
)
from slt_jax.diagnostics.sensitivity import Slope
from slt_jax.diagnostics.verdict import assess
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.estimators.ends import curvature_probe, end_temporaries, measure_ends
from tests.engines import engine_of
from tests.small import gamma_draws

CURVATURE = np.array([100.0, 10.0, 1.0, 0.1, 0.01])
LOCALIZATION = 0.003
DATA = np.zeros((64, 1), np.float32)


def loss(params, batch):
    return 0.5 * jnp.sum(CURVATURE.astype(np.float32) * params**2) + jnp.sum(batch, -1)


def estimate(sampler, loss_fn=loss, **options):
    posterior = slt.LocalPosterior(loss_fn, jnp.zeros(5), 64, nbeta=1.0, localization=LOCALIZATION)
    return slt.estimate_llc(posterior, DATA, sampler=sampler, batch_size=8, hot=1, **options)


@pytest.mark.parametrize(
    "sampler",
    [
        slt.sgld(2e-4),
        slt.sgld(2e-4, noise="leimkuhler-matthews"),
        slt.underdamped(5e-4, 0.05),  # the stiffest direction oscillates, the others creep
        slt.underdamped(2e-3, 3.0),
    ],
    ids=lambda s: f"{s.name}-{s.friction}",
)
def test_a_short_run_lacks_what_it_owes(sampler):
    result = estimate(sampler, num_chains=400, num_warmup=200, num_draws=100, thinning=4, chain_batch=50, key=1)
    truth = (CURVATURE / (CURVATURE + LOCALIZATION)).sum() / 2
    owed = result.settings.probe["owed"]
    assert 0.2 * truth < owed < 0.8 * truth
    # chains are independent; their draws, which stand nearly still, are not
    error = result.llc_draws.mean(1).std(ddof=1) / np.sqrt(400)
    assert error < 0.02 * truth
    assert abs(result.llc + owed - truth) < 4 * error + 0.01 * truth
    assert result.verdict == "still rising"


def test_the_length_that_is_asked_for_is_enough():
    chain = ChainLength(underdamped_relaxation, 2e-3, 0.1, 100, 400)
    owed, times = unrelaxed_bias(CURVATURE, LOCALIZATION, chain)
    assert times > 2
    enough = chain._replace(first=times * chain.first, last=times * chain.last)
    truth = (CURVATURE / (CURVATURE + LOCALIZATION)).sum() / 2
    assert unrelaxed_bias(CURVATURE, LOCALIZATION, enough)[0] <= RELAXED * truth < owed
    shorter = chain._replace(first=0.7 * times * chain.first, last=0.7 * times * chain.last)
    assert unrelaxed_bias(CURVATURE, LOCALIZATION, shorter)[0] > RELAXED * truth


def test_relaxation_with_much_friction_is_sgld_s():
    curvature = np.array([1.0, 10.0, 100.0])
    plain = overdamped_relaxation(curvature, 1e-4, 0.1)
    np.testing.assert_allclose(underdamped_relaxation(curvature, 1e-4, 30.0), plain, rtol=0.01)
    np.testing.assert_allclose(underdamped_relaxation(curvature, 1e-4, 0.5)[:2], 2 * plain[:2] / 0.5, rtol=0.05)
    assert underdamped_relaxation(np.array([1e4]), 1e-2, 0.2) == pytest.approx(0.1, rel=0.01)  # it oscillates


def test_flat_directions_owe_nothing():
    """Nor do those whose curvature is rounding, or below zero; as much of it that is none is owed in full."""
    chain = ChainLength(underdamped_relaxation, 2e-3, 0.1, 100, 400)
    flat = np.concatenate([[-0.5, -1e-5], np.zeros(1000), np.full(1000, 1e-4), [100.0]])
    owed, times = unrelaxed_bias(flat, 1e-4, chain, rounding=2e-4)
    assert owed < 1e-6
    assert times == 1
    assert unrelaxed_bias(np.zeros(3), 1.0, chain) == (0.0, 1.0)
    assert unrelaxed_bias(flat, 1e-4, chain)[0] > 240  # of 250


def test_rounding_is_what_is_there():
    """Of a float32 Hessian: by its antisymmetric part, or by flat directions that come out negative.

    Kills: a fixed share of the largest curvature, 3e-6, under which directions count that the localization, 1e-6 of it,
    does not hold.
    """
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    exact = np.concatenate([np.zeros(20), np.logspace(-5, 0, 40)]) * 1e6
    rough = ((turn * exact) @ turn.T).astype(np.float32).astype(np.float64)
    for hessian in (rough, rough + np.triu(rng.normal(size=(60, 60))) * 1e-2):
        symmetric = (hessian + hessian.T) / 2
        eigenvalues = np.linalg.eigvalsh(symmetric)
        error = np.abs(eigenvalues[:20]).max()
        assert error <= rounding_of(hessian, eigenvalues) < 4 * error < 1e-6 * exact.max()
    saddle = np.diag([-5.0, 1.0, 2e5])
    assert rounding_of(saddle, np.diag(saddle)) == pytest.approx(0.6)
    assert rounding_of(np.diag([1e-3, 1.0]), np.array([1e-3, 1.0])) == 0.0


def test_directions_just_above_the_localization_count():
    """Least squares whose curvatures span six decades, from w*: estimate and bias together are the exact value.

    Kills: curvatures under 3e-6 of the largest taken for rounding, which called 1.5 of 3.2 converged.
    """
    width = np.array([1.0, 1.0, 1.0, 1.4e-3, 1.5e-3, 1.6e-3, 1.6e-3, 1.4e-3])
    x = (np.linalg.qr(np.random.default_rng(3).normal(size=(512, 8)))[0] * math.sqrt(512) * width).astype(np.float32)
    posterior = slt.LocalPosterior(lambda w, x: 0.5 * (x @ w) ** 2, jnp.ones(8) * 0, 512, nbeta=1e4, localization=1e-2)
    result = slt.estimate_llc(posterior, x, sampler=slt.underdamped(1e-5, 0.1), num_draws=2000, num_warmup=1000, key=77)
    curvature = 1e4 * width**2
    truth = (curvature / (curvature + 1e-2)).sum() / 2
    owed = result.settings.probe["owed"]
    assert owed > 0.3 * truth
    assert result.verdict == "still rising"
    assert abs(result.llc + owed - truth) < 4 * result.llc_stderr + 0.01 * truth < 0.3


def test_all_curvatures_at_w_star():
    """Those of the loss over all the data, in the free directions alone."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 4)).astype(np.float32)

    def squared(params, batch):
        return 0.5 * (batch @ params["w"] + params["b"]) ** 2

    center = {"w": jnp.zeros(4), "b": jnp.zeros(())}
    free = {"w": np.array([True, False, True, True]), "b": True}
    posterior = slt.LocalPosterior(squared, center, 512, nbeta=50.0, localization=1.0, mask=free)
    result = slt.estimate_llc(
        posterior, x, sampler=slt.sgld(1e-4), num_draws=400, num_warmup=300, thinning=3, batch_size=256
    )
    kept = np.concatenate([np.ones((512, 1)), x[:, [0, 2, 3]]], 1)
    exact = np.linalg.eigvalsh(50.0 * kept.T @ kept / 512)
    expected = unrelaxed_bias(exact, 1.0, ChainLength(overdamped_relaxation, 1e-4, 0.1, 303, 1500))[0]
    probe = result.settings.probe
    assert expected > 0.01
    assert probe["owed"] == pytest.approx(expected, rel=1e-3)
    assert probe["curvature_gradients"] == 2 * 4 * 2
    assert result.settings.gradients["probe"] == probe["gradients"] + 2 * 4 * 2


def sgld_engine(steps, loss_fn=loss, center=None, data=DATA, batch_size=8, **more):
    """Two chains of SGLD of this many steps in batches of 8."""
    posterior = slt.LocalPosterior(loss_fn, jnp.zeros(5) if center is None else center, len(data), **more)
    mesh = chain_mesh(2, jax.devices()[:1])
    return engine_of(posterior, data, slt.sgld(2e-4), schedule(steps, batch_size), jax.random.key(0), mesh)


def schedule(steps, batch_size=8, control=False):
    return Schedule(2, steps, 0, 1, batch_size, 1, "paired", 1, 512, control)


def test_steps_that_cost_two_gradients_afford_it_sooner():
    engine = sgld_engine(400, nbeta=1.0, localization=LOCALIZATION)
    # 2 x 400 steps, of which 4 % are 32 gradients, in 10s
    assert curvature_probe(engine, 2, engine.key, 1.0).num_blocks == 3
    engine = engine.replanned(schedule(400, control=True))
    assert curvature_probe(engine, 2, engine.key, 1.0).num_blocks == 6


def test_shortened_steps_are_so_many_fewer():
    engine = sgld_engine(400, nbeta=1.0, localization=LOCALIZATION)
    inputs = engine.inputs(numbers := Numbers(1.0, LOCALIZATION, 2e-4))
    run = engine.start(inputs)
    for _ in engine.steps(run, inputs):
        pass
    found, failed = measure_ends(engine, run, numbers, range(2), 0.5, engine.key)
    expected = unrelaxed_bias(CURVATURE, LOCALIZATION, ChainLength(overdamped_relaxation, 2e-4, 0.1, 0.5, 200))
    assert not failed
    assert (found["owed"], found["longer"]) == pytest.approx(expected, rel=1e-4)


@jax.custom_vjp
def own(x):
    return x


own.defvjp(lambda x: (x, None), lambda _, g: (own(g),))


@pytest.mark.parametrize("why", ["too short", "a metric", "another sampler", "no second derivative"])
def test_where_nothing_is_said_of_it(why):
    options = {"num_chains": 4, "num_draws": 400, "num_warmup": 400, "key": 2}
    sampler, loss_fn = slt.underdamped(2e-3, 0.1), loss
    if why == "too short":
        options |= {"num_draws": 30, "num_warmup": 30}
    elif why == "another sampler":
        sampler = slt.preconditioned_sgld(2e-4)
    elif why == "a metric":
        sampler = slt.underdamped(metric="kronecker")
        options |= {"budget": 4000, "num_draws": None}
    else:
        loss_fn = lambda params, batch: loss(own(params), batch)  # noqa: E731
    probe = estimate(sampler, loss_fn, **options).settings.probe
    assert "owed" not in probe
    if why != "too short":
        assert probe["gradients"] > 0
    assert "curvature_gradients" not in probe


def test_a_debt_is_named_with_its_end_and_remedy():
    draws = gamma_draws(5.0)
    mean = float(draws.mean())
    health = functools.partial(assess, draws)
    assert health(Evidence(unrelaxed_bias=0.02 * mean, times_longer=1.5)).verdict == "converged"
    found = health(Evidence(unrelaxed_bias=0.2 * mean, times_longer=7.5))
    assert found.verdict == "still rising"
    assert found.extrapolated == pytest.approx(1.2 * mean)
    told = {"unrelaxed_bias": 0.2 * mean, "times_longer": 7.5}
    assert health(Evidence(**told, expected=1.05 * mean)).verdict == "still rising"
    assert health(Evidence(**told, expected=1.3 * mean)).verdict == "converged"
    downhill = health(Evidence(**told, expected=1.3 * mean, tilt=Slope(-0.3 * mean, 0.01)))
    assert downhill.flags == ("not a minimum", "still rising")
    assert "Run 7.5 times as long: num_draws=30_000." in found.reason
    assert "longer step_size" in health(Evidence(unrelaxed_bias=0.2 * mean, times_longer=1e5)).reason
    falling = draws + np.linspace(1, -1, draws.shape[1])
    assert assess(falling, Evidence(unrelaxed_bias=0.2 * mean, times_longer=7.5)).verdict == "still falling"
    rising = assess(draws - np.linspace(1, -1, draws.shape[1]), Evidence(unrelaxed_bias=0.2 * mean, times_longer=7.5))
    assert rising.extrapolated == pytest.approx(1.2 * mean)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the temporaries of XLA's CPU compiler")
def test_few_free_weights_of_a_wide_model_take_no_more_room_than_is_told():
    """Sixteen rows of the Hessian side by side would take as many forward passes' room."""
    hidden = {"deep": [jnp.ones((128, 128)) / 128] * 6, "bias": jnp.zeros(8)}

    def deep(params, batch):
        x = jnp.ones((batch.shape[0], 128)) * (batch[:, :1] + params["bias"].sum())
        for weight in params["deep"]:
            x = jnp.tanh(x @ weight)
        return x.mean(1) ** 2

    options = {"data": np.ones((4096, 1), np.float32), "mask": lambda path: "bias" in path}
    bytes_of = {}
    for steps in (10, 4000):
        engine = sgld_engine(steps, deep, hidden, batch_size=512, **options)
        bytes_of[steps] = end_temporaries(engine, 2)
    assert bytes_of[10] == []  # too short for any measurement
    forward = 6 * 512 * 128 * 4
    assert len(bytes_of[4000]) == 3
    assert forward < bytes_of[4000][-1] < 4 * forward
