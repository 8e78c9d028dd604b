"""What is read off a grid: made-up grids whose answer is known."""

import math
import re

import numpy as np
import pytest
import xarray as xr

from slt_jax.results.plateau import read_grid, weighted_line, weighted_mean

STEPS = np.geomspace(1e-6, 1e-3, 6)
PULLS = np.array([1.0, 3.0, 10.0, 30.0])


def grid(llc, *, error=0.05, nbeta=(100.0,), verdict="converged", raw=None, held=0.99, seed=0):
    """``llc(nbeta, localization, step_size)`` with normal noise; ``verdict`` a string or a function of the same."""
    at = np.meshgrid(np.asarray(nbeta, float), PULLS, STEPS, indexing="ij")
    truth = np.vectorize(llc, otypes=[float])(*at)
    noise = error * np.random.default_rng(seed).normal(size=truth.shape)
    words = np.vectorize(verdict if callable(verdict) else lambda *_: verdict, otypes=[object])(*at)
    dims = ("nbeta", "localization", "step_size")
    base = truth if raw is None else np.vectorize(raw, otypes=[float])(*at)
    names = {
        "llc": truth + noise, "llc_raw": base + noise, "llc_stderr": np.full(truth.shape, error),
        "llc_raw_stderr": np.full(truth.shape, error), "verdict": words, "diverged": words == "diverged",
        "held": np.full(truth.shape, held),
    }  # fmt: skip
    found = {name: (dims, values) for name, values in names.items()}
    found["control"] = ("localization", np.full(len(PULLS), 7.0))
    return xr.Dataset(found, dict(zip(dims, (np.asarray(nbeta, float), PULLS, STEPS), strict=True)))


@pytest.mark.quick
def test_the_plateau_is_the_block_that_agrees():
    """Flat up to step 1e-4 and localization 10; other values above."""
    found = read_grid(grid(lambda b, g, e: 5.0 + 1.0 * (g > 10) + 2.0 * (e > 1e-4)))
    plateau = found.plateaus[100.0]
    assert plateau.step_size == (STEPS[0], STEPS[3])
    assert plateau.localization == (1.0, 10.0)
    assert plateau.cells == 12
    assert abs(plateau.llc - 5.0) < 4 * plateau.llc_stderr
    assert "past the smallest step_size and the smallest localization of the grid" in str(found)
    assert found.recommended is not None  # off the edges of the plateau
    assert found.recommended["localization"] == 3.0
    assert found.recommended["step_size"] in STEPS[1:3]


def test_cells_that_have_not_settled_are_on_no_plateau():
    found = read_grid(grid(lambda *_: 5.0, verdict=lambda b, g, e: "still rising" if e < 3e-5 else "converged"))
    assert found.plateaus[100.0].step_size == (STEPS[3], STEPS[5])
    assert found.recommended is not None
    assert found.recommended["step_size"] >= STEPS[3]


def test_a_slope_is_no_plateau():
    """15 % a cell along localization and step size, errors of 0.2 %."""
    found = read_grid(grid(lambda b, g, e: 5.0 * g**0.13 * (e / STEPS[0]) ** 0.1, error=0.01))
    assert not found.plateaus
    assert "the LLC depends on step_size and localization here" in str(found)
    assert found.recommended is not None


def test_where_nothing_settled_the_remedy_is_told():
    found = read_grid(grid(lambda *_: math.nan, verdict="diverged"))
    assert found.recommended is None
    assert "24 of 24 cells are 'diverged': use smaller step sizes" in str(found)
    assert "No cell can be recommended" in str(found)


@pytest.mark.parametrize("seed", range(5))
def test_the_raw_estimate_ends_at_its_value_without_a_step(seed):
    """Linear up to a step of 1e-4, then steeper. Kills: the corrected estimates taken; all steps taken."""

    def raw(b, g, e):
        return 5.0 + 2e4 * e + 5e8 * max(0.0, e - 1e-4) ** 1.0 / 1e4

    data = grid(lambda *_: 9.0, raw=raw, verdict=lambda b, g, e: "biased by the step size" if e > 1e-4 else "converged",
                seed=seed)  # fmt: skip
    for (_, _), end in read_grid(data).extrapolations.items():
        assert abs(end.llc - 5.0) < 4 * end.llc_stderr
        assert end.step_size[1] < 1e-3
        assert end.cells >= 3


def test_the_slope_along_nbeta_hints_at_the_multiplicity():
    """lambda - (m - 1) / log nbeta with lambda = 3, m = 3; and none where the LLC does not move."""
    nbeta = (10.0, 100.0, 1e4, 1e6)
    line = read_grid(grid(lambda b, g, e: 3.0 - 2.0 / math.log(b), error=0.01, nbeta=nbeta)).nbeta_line
    assert line is not None
    assert abs(line.limit - 3.0) < 4 * line.limit_stderr
    assert abs(line.slope + 2.0) < 4 * line.slope_stderr < 0.5
    found = read_grid(grid(lambda b, g, e: 3.0 - 2.0 / math.log(b), error=0.01, nbeta=nbeta))
    assert "as with a multiplicity near 3" in str(found)
    assert "it does not depend on nbeta" in str(read_grid(grid(lambda *_: 3.0, error=0.01, nbeta=nbeta)))


def test_the_largest_nbeta_with_a_plateau_is_taken():
    found = read_grid(grid(lambda b, g, e: 3.0 if b < 1e4 else 3.0 * g, error=0.01, nbeta=(10.0, 100.0, 1e5)))
    assert found.recommended is not None
    assert found.recommended["nbeta"] == 100.0
    assert re.search(
        r"nbeta 1e\+05: no plateau; the LLC is constant along step_size .* not along localization", str(found)
    )


@pytest.mark.quick
def test_where_the_localization_does_the_work_it_is_said():
    assert "as much as the data" in str(read_grid(grid(lambda *_: 3.0, held=0.3)))
    assert "as much as the data" not in str(read_grid(grid(lambda *_: 3.0, held=0.9)))


def test_weights_and_errors_are_those_of_least_squares():
    random = np.random.default_rng(1)
    means, lines = [], []
    errors = np.array([0.1, 0.2, 0.4, 0.1, 0.3])
    x = np.array([0.0, 1.0, 2.0, 4.0, 5.0])
    for _ in range(2000):
        y = 2.0 + errors * random.normal(size=5)
        means.append((weighted_mean(y, errors)[0] - 2.0, np.sum(errors**-2.0) ** -0.5))
        found, stderr, _ = weighted_line(x, y + 3.0 * x, errors)
        lines.append((found - [2.0, 3.0]) / stderr)
    pulls = np.array([m / s for m, s in means])
    for z in (pulls, *np.array(lines).T):  # mean and variance of 2000 standard normal numbers
        assert abs(z.mean()) < 4 / math.sqrt(2000)
        assert abs(z.var() - 1) < 4 * math.sqrt(2 / 2000)


def test_scatter_beyond_the_errors_widens_the_mean():
    mean, error, chi = weighted_mean(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.1, 0.1]))
    assert mean == pytest.approx(2.0)
    assert chi == pytest.approx(100.0)
    assert error == pytest.approx(1 / math.sqrt(3))
