"""How an estimate depends on nbeta, localization and where the chains are, on draws whose law is known."""

import math
from itertools import pairwise

import numpy as np
import pytest

from scaling.known_answers import by_name
from slt_jax.diagnostics.evidence import Evidence
from slt_jax.diagnostics.sensitivity import Slope, bounded, degree_of, gamma_error, slopes
from slt_jax.diagnostics.verdict import assess
from tests.small import gamma_draws


def test_slopes_of_a_hidden_direction():
    """One direction x w^2 / 2 held by g w^2 / 2: LLC = x / (x + g) / 2, slopes +-x g / (x + g)^2 / 2."""
    x, g = 3.0, 2.0
    w = np.random.default_rng(0).normal(size=(16, 20_000)) / math.sqrt(x + g)
    noise = np.random.default_rng(1).normal(size=w.shape) * 0.7
    up, down = slopes(x * w**2 / 2 + noise, np.full(w.shape, 0.49), w**2, 1.0, g)
    exact = x * g / (x + g) ** 2 / 2
    assert abs(up.value - exact) < 4 * up.stderr
    assert abs(down.value + exact) < 4 * down.stderr
    assert up.stderr < 0.1 * exact


def test_slopes_at_any_nbeta_are_those_in_its_units():
    """Kills: nbeta squared before it meets float32, of which it is out of range above 2e19."""
    rng, nbeta = np.random.default_rng(2), 1e22
    draws = 1e4 * rng.normal(size=(64, 40)) ** 2
    noise = 1e8 * rng.normal(size=draws.shape) ** 2
    distance = rng.normal(size=draws.shape) ** 2
    usual = slopes(draws, noise, distance, 1.0, 1.0)
    found = slopes(draws, (noise / nbeta**2).astype(np.float32), distance, nbeta, 1.0)
    np.testing.assert_allclose(found, usual, rtol=1e-3)


def test_slopes_of_draws_whose_squares_are_out_of_float32_s_range():
    draws = 1e22 * np.random.default_rng(3).random((4, 200))
    up, _ = slopes(draws, np.zeros(draws.shape), draws, 1.0, 1.0)
    assert math.isfinite(up.value)
    assert 0 < up.stderr < math.inf
    assert slopes(np.ones((4, 200)), np.zeros((4, 200)), np.ones((4, 200)), 1.0, 1.0)[0] == (1.0, 0.0)


def test_slopes_vanish_at_the_asymptotic_temperature():
    draws = gamma_draws(3.5)
    up, down = slopes(draws, np.zeros_like(draws), np.random.default_rng(1).normal(size=draws.shape) ** 2, 1.0, 1.0)
    assert abs(up.value) < 4 * up.stderr
    assert abs(down.value) < 4 * down.stderr


@pytest.mark.parametrize("shape", [0.25, 5.0])
def test_the_least_error_of_the_slope_is_that_of_its_law(shape):
    """A standard deviation of 4000 has a relative error of 1 / sqrt(8000), more as the law is skewed."""
    x = np.random.default_rng(4).gamma(shape, size=(4000, 500))
    assert gamma_error(shape, 500) == pytest.approx((x.mean(1) - x.var(1)).std(), rel=0.05)


def test_a_slope_of_few_draws_is_not_taken_for_one():
    """One direction, z^2 / 2, drawn by a slow chain. Where no draw went far, variance and spread are both too small: by
    the spread alone, or with the error of as many independent draws, one in six of these is an alarm.
    """
    rng, kept = np.random.default_rng(5), 0.97
    z = np.empty((2000, 120, 4))
    z[0] = rng.normal(size=z[0].shape)
    for before, now in pairwise(z):
        now[...] = kept * before + math.sqrt(1 - kept**2) * rng.normal(size=now.shape)
    found = [slopes(draws, np.zeros(draws.shape), draws, 1.0, 1.0)[0] for draws in z.T.swapaxes(0, 1) ** 2 / 2]
    assert sum(up.value > 2.5 * up.stderr for up in found) <= 4  # at 0.6 % each, five are one set in 1000
    spread = np.std([up.value for up in found])
    assert 0.9 * spread < np.mean([up.stderr for up in found]) < 1.5 * spread


@pytest.mark.quick
@pytest.mark.parametrize("degree", [2, 4])
def test_degree_of_a_homogeneous_loss(degree):
    """sum |w_i|^k: nbeta L is gamma distributed with shape d / k, and <w, nbeta grad L> is k nbeta L."""
    rng = np.random.default_rng(0)
    energy = rng.gamma(1 / degree, size=(8, 4000, 3))
    away = (energy ** (2 / degree)).sum(-1)
    noise = rng.normal(size=away.shape) * 0.5  # of a minibatch
    found = degree_of(energy.sum(-1) + noise, degree * energy.sum(-1) + 0.7 * away, away, 0.7)
    assert abs(found.value - degree) < 4 * found.stderr
    assert found.stderr < 0.1
    assert math.isnan(degree_of(-energy.sum(-1), away, away, 0.7).value)


NAN = (math.nan, math.nan)
DEPENDS = {
    "with both: off a minimum chains run downhill, and a localization keeps them from it": ((20, 3, 15, 2), NAN, True),
    "with nbeta and against the localization, either alone unsure": ((4, 2, -4, 2), NAN, True),
    "a quadratic's slope with nbeta is minus that with the localization": ((2, 3, -2, 0.2), (2, 0.1), True),
    "a quartic's is half of it": ((2, 3, -2, 0.2), (4, 0.1), False),
    "a degree that is hardly known makes it no less than for the largest that goes": ((2, 3, -8, 1), (40, 20), True),
    "a degree below a quadratic's makes it no more": ((2, 3, -1, 0.2), (0.5, 0.1), False),
    "a small slope, however sure, makes no large one with nbeta": ((2, 1, -0.1, 0.03), (2, 0.1), False),
}


@pytest.mark.parametrize("case", DEPENDS)
def test_estimates_that_depend_on_nbeta_or_localization(case):
    (up, up_error, down, down_error), degree, depends = DEPENDS[case]
    evidence = Evidence(
        num_free=100, nbeta_slope=Slope(up, up_error), localization_slope=Slope(down, down_error),
        degree=Slope(*degree),
    )  # fmt: skip
    expected = "depends on nbeta or localization" if depends else "converged"
    assert assess(gamma_draws(30.0, 4, 1000), evidence).verdict == expected


@pytest.mark.parametrize(("name", "degree"), [("quadratic, d = 1", 2), ("x^4", 4), ("|w|^6, d = 3", 6)])
def test_the_slopes_of_a_homogeneous_loss_are_of_one_cause(name, degree):
    """By quadrature: the one with nbeta is -2 / degree times that with the localization."""
    exact, step = by_name(name).exact, 1e-3
    up = (exact(20 * math.exp(step), 9.0) - exact(20 * math.exp(-step), 9.0)) / (2 * step)
    down = (exact(20.0, 9 * math.exp(step)) - exact(20.0, 9 * math.exp(-step))) / (2 * step)
    assert up > 0.02
    assert up == pytest.approx(-2 / degree * down, rel=1e-3)


@pytest.mark.quick
def test_a_slope_is_told_within_what_is_possible_and_with_an_error_that_says_something():
    """Kills: +154 told where the LLC is 102; -42,216 in JSON where noise drowns it."""
    assert bounded(Slope(154.0, 20.0), 102.0) == Slope(102.0, 20.0)
    assert bounded(Slope(-154.0, 20.0), -102.0) == Slope(-102.0, 20.0)
    assert bounded(Slope(4.0, 1.0), 102.0) == Slope(4.0, 1.0)
    for drowned in (Slope(-42216.0, 5000.0), Slope(4.0, math.nan)):
        assert math.isnan(bounded(drowned, 102.0).value)
