"""Half the trace of nbeta H (nbeta H + localization)^-1: bounds, errors and negative eigenvalues on known spectra."""

import numpy as np
import pytest

from slt_jax.diagnostics.quadrature import Coefficients, from_eigenvalues, from_lanczos, nodes_of, with_node

NBETA, GAMMA = 50.0, 0.3
WIDE = np.logspace(-8, 1, 200)
SPECTRA = {
    "wide": WIDE,
    "with zeros": np.where(np.arange(200) < 80, 0.0, WIDE),
    "clusters": np.repeat([0.0, 0.02, 3.0], [50, 100, 50]) + np.tile([0.0, 1e-5], 100),
}


def lanczos(spectrum, order, probes, seed=0):
    """By Lanczos in float64 on a diagonal matrix, with full reorthogonalization."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(probes):
        basis, diagonal, beside = [], [], []
        v = rng.normal(size=len(spectrum))
        v /= np.linalg.norm(v)
        for _ in range(order):
            basis.append(v)
            w = spectrum * v
            diagonal.append(v @ w)
            for _ in range(2):
                w = w - np.array(basis).T @ (np.array(basis) @ w)
            beside.append(np.linalg.norm(w))
            v = w / beside[-1]
        found.append((diagonal, beside))
    diagonal, beside = (np.array(x) for x in zip(*found, strict=True))
    return Coefficients(diagonal, beside, len(spectrum), 2.2e-16)


def exact(spectrum):
    x = NBETA * spectrum
    return (x / (x + GAMMA)).sum() / 2


def trace(spectrum, order, probes, seed=0, semidefinite=True):
    found = lanczos(spectrum, order, probes, seed)
    return from_lanczos(found, 1e-12, NBETA, GAMMA, semidefinite=semidefinite)


@pytest.mark.quick
def test_the_sum_over_eigenvalues():
    """Kills: nbeta on one side of the fraction only, and a trace that is not halved."""
    found = from_eigenvalues(np.array([0.0, 0.006, 1e9]), 0.0, NBETA, GAMMA)
    assert found.value == pytest.approx(0.75, rel=1e-9)  # (0 + 1/2 + 1) / 2
    assert (found.probes, found.truncation, found.rounding, found.negative) == (0, 0, 0, 0)


@pytest.mark.quick
def test_negative_eigenvalues_count_zero_and_are_reported():
    """Kills: an eigenvalue at -localization / nbeta, which divides by 0; rounding that counts as negative."""
    h = np.array([-GAMMA / NBETA, -3.0, -1e-9, 0.006, 1.0])
    found = from_eigenvalues(h, 1e-8, NBETA, GAMMA)
    assert found.value == pytest.approx(exact(np.array([0.006, 1.0])), rel=1e-6)
    assert found.negative == 2
    assert found.negative_share == pytest.approx(3.006 / np.abs(h).sum())


@pytest.mark.quick
def test_rounding_is_what_moved_eigenvalues_may_add():
    found = from_eigenvalues(np.zeros(10), 1e-4, NBETA, GAMMA)
    assert found.rounding == pytest.approx(10 / 4 * 5e-3 / (5e-3 + GAMMA))


@pytest.mark.quick
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("order", [1, 2, 5, 9, 16])
def test_two_quadratures_are_bounds_for_each_vector(name, order):
    """Kills: a node of Gauss-Radau at the wrong end, or a last row of its matrix that is not the one for that node."""
    spectrum = SPECTRA[name]
    if order > len(set(spectrum)):
        pytest.skip("the space is exhausted")
    for seed in range(5):
        c = lanczos(spectrum, order, 1, seed)
        v = np.random.default_rng(seed).normal(size=len(spectrum))
        truth = v**2 @ (NBETA * spectrum / (NBETA * spectrum + GAMMA)) / (v @ v)
        held = lambda nodes: NBETA * nodes / (NBETA * nodes + GAMMA)  # noqa: E731
        nodes, weights = nodes_of(c.diagonal[0], c.beside[0, :-1])
        radau, radau_weights = nodes_of(*with_node(c.diagonal[0], c.beside[0], 0.0))
        assert radau[0] == pytest.approx(0.0, abs=1e-12)
        lower, upper = radau_weights @ held(radau), weights @ held(nodes)
        assert lower - 1e-12 <= truth <= upper + 1e-12
        middle = from_lanczos(c, 0.0, NBETA, GAMMA, semidefinite=True)
        size = len(spectrum) / 2
        assert middle.value == pytest.approx(size * (lower + upper) / 2, abs=1e-6)
        assert middle.truncation == pytest.approx(size * (upper - lower) / 2, abs=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_of_probes_is_their_scatter(name):
    """Kills: the variance of Gaussian vectors for the sphere's, an error not divided by sqrt(probes)."""
    spectrum = SPECTRA[name]
    runs = [trace(spectrum, 40 if name != "clusters" else 6, 4, seed) for seed in range(150)]
    z = np.array([(run.value - exact(spectrum)) / run.probes for run in runs])
    assert max(run.truncation / run.probes for run in runs) < 0.1
    assert abs(z.mean()) < 3 / np.sqrt(150)
    assert abs(z.std() - 1) < 3 / np.sqrt(2 * 150)


@pytest.mark.quick
def test_an_exhausted_space_ends_the_iteration():
    """Kills: coefficients of rounding behind a step that had nothing left, or NaN there."""
    three = np.repeat([0.0, 0.02, 3.0], [50, 100, 50])
    c = lanczos(three, 3, 50)
    nothing = np.full((50, 4), np.nan)
    padded = Coefficients(np.hstack([c.diagonal, nothing]), np.hstack([c.beside, nothing]), 200, 1e-14)
    found = from_lanczos(padded, 1e-12, NBETA, GAMMA, semidefinite=True)
    assert found.truncation == pytest.approx(0, abs=1e-9)
    assert abs(found.value - exact(three)) < 3 * found.probes


@pytest.mark.quick
def test_a_spectrum_with_negative_eigenvalues_has_a_truncation_without_bounds():
    """Kills: a pole between two nodes of the quadrature, and counts that are per vector instead of per spectrum."""
    spectrum = np.concatenate([-np.logspace(-3, -1, 40), [-GAMMA / NBETA] * 10, np.logspace(-6, 1, 150)])
    runs = [trace(spectrum, 30, 8, seed, semidefinite=False) for seed in range(20)]
    truth = exact(spectrum[50:])
    off = np.array([(run.value - truth) / np.hypot(run.probes, run.truncation) for run in runs])
    assert np.abs(off).max() < 3.5
    assert 5 < np.mean([run.negative for run in runs]) < 50
    share = -spectrum[:50].sum() / np.abs(spectrum).sum()
    assert np.mean([run.negative_share for run in runs]) == pytest.approx(share, rel=0.2)
    for order in (1, 2, 4, 8, 16):  # while the value still changes with the order, the truncation says so
        few = [trace(spectrum, order, 16, seed, semidefinite=False) for seed in range(4)]
        assert all(abs(run.value - truth) < 3 * run.probes + run.truncation for run in few)
