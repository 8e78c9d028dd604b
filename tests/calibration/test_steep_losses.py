"""Losses of high degree at w*, where the Hessian and many further derivatives vanish."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from scaling.known_answers import plane, radial
from slt_jax.calibration import choose
from slt_jax.calibration.pilot import Pilot
from slt_jax.calibration.probe import Probe
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.verdict import assess
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.problem import Problem
from slt_jax.posterior.data import as_source

NUM = 1000
FACTORS = np.tile(np.array([0.5, 1.0, 1.5, 1.0], np.float32), NUM // 4)[:, None]


def power(degree, dimension, **more):
    def loss_fn(w, factor):
        return jnp.sum((w - 1) ** 2) ** (degree // 2) * factor[:, 0]

    return slt.LocalPosterior(loss_fn, jnp.ones(dimension), NUM, **more)


@pytest.mark.parametrize("rounds", [6, 20])
@pytest.mark.parametrize("degree", range(2, 18, 2))
def test_the_length_of_the_secant_settles(degree, rounds):
    """At s with nbeta degree s^degree = 1, where the secant's curvature is 1 / s^2.

    Kills: a length that swings from degree 8 on, and one that shrinks where the loss is flat in float32 (degree 16).
    """
    posterior = power(degree, 3, nbeta=145.0)
    problem = Problem(posterior, as_source(np.ones((8, 1), np.float32)), chain_mesh(1, jax.devices()[:1]), 8)
    probe = Probe(problem, 145.0, 1, jax.random.key(1))
    assert probe.sharpness(probe.center, rounds) == pytest.approx(
        (145 * degree) ** (2 / degree), rel=0.05 if rounds == 6 else 1e-3
    )


@pytest.mark.parametrize(
    ("degree", "dimension"),
    [(8, 1), (16, 2), pytest.param(10, 2, marks=pytest.mark.slow), pytest.param(12, 3, marks=pytest.mark.slow)],
)
def test_steep_losses_have_their_value(degree, dimension):
    """LLC d / degree, with the localization by quadrature. Kills: a localization of 5e6 to 6e9, LLC 0 or NaN."""
    result = slt.estimate_llc(power(degree, dimension), FACTORS, budget=30_000, key=31)
    s = result.settings
    assert s.localization == pytest.approx(0.16, rel=1e-6)
    exact = radial(degree, dimension)(s.nbeta, s.localization)
    assert exact == pytest.approx(dimension / degree, rel=0.05)
    assert abs(result.llc - exact) < 4 * result.llc_stderr < 0.4 * exact


@pytest.mark.parametrize("powers", [(2, 2), (3, 3)])
def test_steep_products_have_their_value(powers):
    """x w1^a w2^b beside 0."""
    x = 2 * np.random.default_rng(1).normal(size=(NUM, 1)).astype(np.float32)
    a, b = powers
    posterior = slt.LocalPosterior(lambda w, x: 0.5 * (x[:, 0] * w[0] ** a * w[1] ** b) ** 2, jnp.zeros(2), NUM)
    result = slt.estimate_llc(posterior, x, budget=30_000, key=32)
    s = result.settings
    second = float(np.mean(x.astype(float) ** 2)) / 2
    exact = plane(lambda u, v: second * u ** (2 * a) * v ** (2 * b))(s.nbeta, s.localization)
    assert s.localization == 1.0
    assert abs(result.llc - exact) < 4 * result.llc_stderr < 0.4 * exact


@pytest.mark.parametrize("layers", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_deep_linear_networks_at_zero_are_sampled(layers):
    """By the virial identity of a loss of degree 2 L: 2 L LLC + localization <|w|^2> is the number of weights."""
    x = np.random.default_rng(2).normal(size=(NUM, 3)).astype(np.float32)

    def loss_fn(weights, x):
        for w in weights:
            x = x @ w
        return jnp.sum(x**2, axis=-1)

    posterior = slt.LocalPosterior(loss_fn, [jnp.zeros((3, 3)) + 0.0 * i for i in range(layers)], NUM)
    result = slt.estimate_llc(posterior, x, budget=30_000, key=33)
    s = result.settings
    away = result.traces.distance_sq[result.kept_chains].mean(dtype=float)
    assert s.localization == 1.0
    assert not result.stopped
    assert 2 * layers * result.llc + s.localization * away == pytest.approx(9 * layers, rel=0.1)


def test_a_calibration_that_failed_says_so(monkeypatch):
    """Kills: a guess told as a choice, and a remedy that names a step which nobody gave."""

    def diverged(engine, sampler, probe, effort, curvature, *_):
        return dataclasses.replace(Pilot(curvature, iter([probe.center])), failed=True)

    monkeypatch.setattr(choose, "run_pilot", diverged)
    result = slt.estimate_llc(power(2, 2), FACTORS, budget=2000, key=1)
    assert result.settings.calibration["lines"][0].startswith("the calibration failed")
    assert any("the calibration failed" in note for note in result.notes)


def test_the_remedy_for_a_divergence_names_the_step_that_was_chosen():
    draws = np.random.default_rng(0).gamma(4.0, size=(3, 400))
    chosen = assess(draws, Evidence(num_stopped=1, chosen_step=8e-3)).reason
    assert "the calibration chose step_size 0.008" in chosen
    assert "step_size=0.002" in chosen
    assert "take a smaller step_size" in assess(draws, Evidence(num_stopped=1)).reason
