"""Where a moving estimate would end, against modes whose equilibrium is known exactly."""

import math

import numpy as np
import pytest

from slt_jax.diagnostics.end import end_of_spread, end_of_trend


def spread(rng, curvatures, localization, steps, chains=4, step_size=0.25):
    """(energies of chains of independent modes from w* on, their exact mean in the end, steps of a flat direction).

    A mode of curvature a = x + localization is an exact Ornstein-Uhlenbeck process with the rate step_size a / 2, and
    adds x w^2 / 2, whose mean ends at x / (2 a).
    """
    total = curvatures + localization
    decay = np.exp(-step_size * total / 2)
    noise, w = np.sqrt((1 - decay**2) / total), np.zeros((chains, len(curvatures)))
    energies = []
    for _ in range(steps):
        w = w * decay + noise * rng.standard_normal(w.shape)
        energies.append((curvatures * w**2).sum(1) / 2)
    return np.array(energies).T, (curvatures / total).sum() / 2, 1 / (step_size * localization)


SPECTRA = {  # lowest and highest curvature, number of modes, localization, steps, warm-up
    "all octaves": (1e-4, 1.0, 1000, 3e-4, 450, 50),
    "softer than the localization": (1e-5, 1.0, 1000, 1e-3, 800, 400),
    "no soft ones": (0.3, 1.0, 200, 1e-4, 450, 50),
    "settled": (1e-4, 1.0, 1000, 1e-2, 800, 400),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", SPECTRA)
def test_the_end_of_a_spread_covers_the_equilibrium(name):
    """z over eight runs. Kills: one exponential for all (4 standard errors short); no error bar."""
    low, high, modes, localization, steps, warmup = SPECTRA[name]
    found = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        curvatures = np.exp(rng.uniform(np.log(low), np.log(high), modes))
        energies, truth, slowest = spread(rng, curvatures, localization, steps)
        end = end_of_spread(energies, warmup, slowest)
        found.append([(end.value - truth) / end.stderr, end.stderr / truth])
    z, share = np.array(found).T
    assert np.abs(z).max() < 2.5
    assert math.sqrt((z**2).mean()) < 1.2
    assert share.max() < (0.03 if name == "settled" else 0.5)


def test_what_is_still_to_come_is_foreseen():
    """A third is missing in the draws of "all octaves"; the end is nearer than these, on both sides of the truth."""
    low, high, modes, localization, steps, warmup = SPECTRA["all octaves"]
    errors, missing = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        curvatures = np.exp(rng.uniform(np.log(low), np.log(high), modes))
        energies, truth, slowest = spread(rng, curvatures, localization, steps)
        errors.append(end_of_spread(energies, warmup, slowest).value / truth - 1)
        missing.append(energies[:, warmup:].mean() / truth - 1)
    assert np.mean(missing) < -0.2
    assert abs(np.mean(errors)) < 0.3 * abs(np.mean(missing))


def test_without_draws_or_a_slowest_direction_there_is_no_end():
    values = np.random.default_rng(0).gamma(5.0, size=(4, 100))
    assert math.isnan(end_of_spread(values[:0], 20, 100.0).value)
    assert math.isnan(end_of_spread(values, 95, 100.0).value)
    assert math.isnan(end_of_spread(values, 20, math.nan).value)
    assert math.isnan(end_of_spread(np.ones((4, 100)), 20, 100.0).value)


@pytest.mark.quick
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_the_end_of_a_trend_is_found(scale):
    """One exponential, which is what it fits: it lies within its error, which is under the way that is left."""
    t = np.linspace(0, 2.5, 1200)
    for seed in range(10):
        draws = 10 + scale * 4 * np.exp(-t) + np.random.default_rng(seed).normal(size=(8, 1200)) * 0.5
        end = end_of_trend(draws)
        assert abs(end.value - 10) < 2 * end.stderr < 2 * 4 * np.exp(-1.2)


def test_the_end_of_a_straight_line_is_not_sure():
    """Its error is more than all the way so far. Kills: an end of 1.1 after draws from 0 to 1."""
    assert end_of_trend(np.linspace(0, 1, 1200)[None, :].repeat(4, 0)).stderr > 1
    assert math.isnan(end_of_trend(np.zeros((0, 100))).value)


@pytest.mark.quick
def test_chains_that_end_at_the_loss_of_the_center_have_no_end():
    """Kills: a division by zero, and an end of NaN."""
    energies = np.random.default_rng(0).exponential(size=(4, 400))
    energies[:, 200:] = 0.0
    assert math.isnan(end_of_spread(energies, 50, 100.0).value)
