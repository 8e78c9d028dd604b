"""Influence against the exact covariances of a linear model, and against the matrix that is never made."""

import dataclasses
import math

import numpy as np
import pytest

import slt_jax as slt
from tests.results.exact_draws import linear, observed, of_linear
from tests.small import refuses


def reweighted_loss(model, i, omega):
    """Exact mean losses with the weight 1 + omega on the example i."""
    weights = np.ones(len(model.y))
    weights[i] += omega
    precision = model.beta * (model.x * weights[:, None]).T @ model.x + model.gamma * np.eye(model.x.shape[1])
    covariance = np.linalg.inv(precision)
    mean = covariance @ (model.beta * model.x.T @ (weights * model.y) + model.gamma * model.center)
    return ((model.y - model.x @ mean) ** 2 + np.einsum("ij,jk,ik->i", model.x, covariance, model.x)) / 2


@pytest.mark.quick
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.0), (0.1, 30.0)])
def test_the_linear_model_is_exact(beta, gamma):
    """Every entry of the matrix; and that matrix is the derivative by the weights of the examples.

    Kills: the sign of the influence function; nbeta in the place of beta; the term of second order; wrong errors.
    """
    model = linear(n=30, d=4, beta=beta, gamma=gamma)
    exact, step = model.exact()[0], 1e-5
    change = np.array([reweighted_loss(model, i, step) - reweighted_loss(model, i, -step) for i in range(30)]) / (
        2 * step
    )
    np.testing.assert_allclose(change, -beta * exact, rtol=1e-5, atol=1e-9)
    seen = of_linear(model, np.random.default_rng(1), draws=2500)
    found, everything = slt.influence(None, seen, seen, normalized=False), slice(None)
    assert found.beta == beta
    errors = found.stderr(everything, everything)
    z = (found.block(everything, everything) + exact) / errors
    assert 0.6 < np.mean(z**2) < 1.6
    assert np.abs(z).max() < 5.5
    residual = model.y - model.x @ model.mean
    first = np.outer(residual, residual) * (model.x @ model.covariance @ model.x.T)
    assert np.abs((exact - first) / errors).max() > 5  # the second is seen
    sd, apart = np.sqrt(np.diag(exact)), ~np.eye(30, dtype=bool)
    found = slt.influence(None, seen, seen)
    away = found.block(everything, everything) - exact / np.outer(sd, sd)
    z = away[apart] / found.stderr(everything, everything)[apart]
    assert 0.6 < np.mean(z**2) < 1.6


def matrix_of(values, normalized):
    flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
    return np.corrcoef(flat.T) if normalized else -np.cov(flat.T)


@pytest.fixture
def wide():
    """60 examples whose losses follow 5 directions, at 4 chains of 50 draws."""
    rng = np.random.default_rng(2)
    return observed(3 + rng.standard_normal((4, 50, 5)) @ rng.standard_normal((5, 60)), np.full(60, 3.0), 60, 6.0)


@pytest.mark.quick
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("piece", [1 << 24, 500])
def test_rows_blocks_and_rankings_are_those_of_the_matrix(wide, normalized, piece, monkeypatch):
    """Kills: a draw left out between pieces; harms for helps; the unit itself ranked; columns for rows."""
    monkeypatch.setattr("slt_jax.results.observed._PIECE", piece)
    full, found = matrix_of(wide.values, normalized), slt.influence(None, wide, wide, normalized=normalized)
    np.testing.assert_allclose(found.block(slice(3, 7), [5, 40]), full[3:7][:, [5, 40]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.row(4), full[4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.column(9), full[:, 9], rtol=1e-5, atol=1e-5)
    good = (full if normalized else -full)[:, 9].copy()
    good[9] = 0
    ranking = found.top(9, 5)
    assert [i for i, *_ in ranking.helps] == np.argsort(-good)[:5].tolist()
    assert [i for i, *_ in ranking.harms] == np.argsort(good)[:5].tolist()
    np.testing.assert_allclose(
        [value for _, value, _ in ranking.harms], full[[i for i, *_ in ranking.harms], 9], rtol=1e-4
    )
    masked = found.block(slice(None), slice(None), masked=True)
    assert np.array_equal(np.isnan(masked), np.abs(matrix_of(wide.values, True)) < 2 * found.noise_floor)


@pytest.mark.quick
def test_embedding_keeps_inner_products(wide):
    """Kills: singular values left out; a scale of draws; covariances embedded where correlations were asked for."""
    for normalized in (True, False):
        found = slt.influence(None, wide, wide, normalized=normalized)
        places = found.embedding(5)
        full = matrix_of(wide.values, normalized)
        np.testing.assert_allclose(places @ places.T, full if normalized else -full, atol=2e-4)
        assert math.isclose(found.spectrum(5).sum(), 1, rel_tol=1e-5)
        assert (np.diff(found.spectrum(5)) <= 0).all()
        two = found.embedding()
        assert two.shape == (60, 2)
        assert (two.max(0) == np.abs(two).max(0)).all()


def autoregressive(rng, first, second, units=300):
    """x_t = first x_{t-1} + second x_{t-2} + noise at 4 chains of 400 draws, and its autocorrelations."""
    x = rng.standard_normal((4, 700, units))
    rho = np.ones(400)
    rho[1] = first / (1 - second)
    for t in range(2, 700):
        x[:, t] += first * x[:, t - 1] + second * x[:, t - 2]
    for k in range(2, 400):
        rho[k] = first * rho[k - 1] + second * rho[k - 2]
    return x[:, 300:], rho


@pytest.mark.quick
@pytest.mark.parametrize(("first", "second"), [(0.0, 0.0), (0.8, 0.0), (1.8, -0.95)])
def test_the_noise_floor_is_the_spread_of_independent_losses(first, second):
    """Draws that are independent, that are slow, and that swing, as underdamped ones do.

    Kills: the number of draws for ESS; the ESS of a mean, half of it; a sum that ends where they swing back.
    """
    values, rho = autoregressive(np.random.default_rng(3), first, second)
    found = slt.influence(None, *2 * [observed(values, np.zeros(300), 300, 30.0)])
    assert abs(found.effective_draws / (1600 / (1 + 2 * np.sum(rho[1:] ** 2))) - 1) < 0.12
    entries = found.block(slice(None), slice(None))[np.triu_indices(300, 1)]
    assert abs(entries.std() / found.noise_floor - 1) < 0.08
    assert abs(found.reliability) < 0.05
    assert found.top(0).helps == () or found.top(0).helps[0][1] < 5 * found.noise_floor
    expected = 3 / (1600 / (1 + 2 * np.sum(rho[1:])))
    assert abs(found.between_chains / expected - 1) < 0.25


@pytest.mark.quick
def test_reliability_is_the_correlation_of_two_runs():
    """Kills: the correlation of the halves without Spearman-Brown; the diagonal counted."""
    model, rng = linear(n=60, d=8, beta=0.5), np.random.default_rng(4)
    reliability, runs = [], []
    for _ in range(30):
        found = slt.influence(None, *2 * [of_linear(model, rng, draws=12)])
        reliability.append(found.reliability)
        runs.append(found.block(slice(None), slice(None))[np.triu_indices(60, 1)])
    between = np.corrcoef(runs)[np.triu_indices(30, 1)]
    assert abs(np.mean(reliability) - between.mean()) < 0.05
    assert 0.3 < between.mean() < 0.8


@pytest.mark.quick
def test_a_difference_of_chains_is_told_apart():
    """Two chains that sit elsewhere. Kills: the difference of their means called influence with ``within_chains``."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal((4, 200, 20)) + 3 * np.array([0, 0, 1, 1])[:, None, None]
    seen = observed(values, np.zeros(20), 20, 20.0)
    pooled, within = slt.influence(None, seen, seen), slt.influence(None, seen, seen, within_chains=True)
    assert pooled.block(0, 1) > 0.5
    assert abs(within.block(0, 1)) < 5 * within.noise_floor
    assert pooled.between_chains == within.between_chains > 0.6
    centered = (values - values.mean(1, keepdims=True)).reshape(-1, 20)
    np.testing.assert_allclose(within.row(2), np.corrcoef(centered.T)[2], atol=1e-4)


@pytest.mark.quick
def test_tokens_and_several_data_sets():
    """Kills: padding among the units; labels in another order than the columns; sums that count padding."""
    rng = np.random.default_rng(6)
    values, valid = rng.standard_normal((4, 30, 6, 3)), np.ones((6, 3), bool)
    valid[1, 2] = valid[4, 1:] = False
    gap = rng.standard_normal((4, 30))
    texts = observed(np.where(valid, values, np.nan), np.zeros((6, 3)), 6, 6.0, valid=valid, gap=gap, name="a")
    more = observed(values[:, :, :2] * 2 + 1, np.zeros((2, 3)), 6, 6.0, gap=gap, name="b")
    found = slt.influence(None, [texts, more], texts)
    flat = np.concatenate([values[:, :, valid], values[:, :, :2].reshape(4, 30, 6)], 2).reshape(120, -1)
    assert found.of.size == 15 + 6
    np.testing.assert_allclose(found.block(slice(None), 7)[:, 0], np.corrcoef(flat.T)[:, 7], atol=1e-5)
    np.testing.assert_allclose(found.column(7), np.corrcoef(flat.T)[:, 7], atol=1e-5)
    assert found.of.labels[5].tolist() == [0, 2, 0]
    assert found.of.labels[15].tolist() == [1, 0, 0]
    assert "example 0, token 0 of 'b'" in str(found.top(0))  # its own values, times 2
    assert slt.influence(None, texts, texts).beta == 6 / 15
    mixed = slt.influence(None, texts, texts.by_example())
    sums = np.where(valid, values, 0).sum(-1).reshape(120, 6)
    np.testing.assert_allclose(mixed.row(2), np.corrcoef(flat[:, 2], sums.T)[0, 1:], atol=1e-5)
    summed = slt.influence(None, texts, texts, level="example")
    np.testing.assert_allclose(summed.block(slice(None), slice(None)), np.corrcoef(sums.T), atol=1e-5)


class OnDisk:
    """An array of which only one chain's draws can be read at a time, and which remembers how many."""

    def __init__(self, values):
        self.held, self.most = values, 0

    def __getitem__(self, at):
        found = self.held[at]
        self.most = max(self.most, found.size)
        return found


def test_values_on_disk_are_read_in_pieces(wide, monkeypatch):
    monkeypatch.setattr("slt_jax.results.observed._PIECE", 600)
    stored = dataclasses.replace(wide, values=OnDisk(wide.values))
    a, b = slt.influence(None, stored, stored), slt.influence(None, wide, wide)
    assert np.array_equal(a.row(3), b.row(3))
    assert np.allclose(a.embedding(), b.embedding())
    assert a.reliability == b.reliability
    assert stored.values.most <= 600


@pytest.mark.quick
def test_what_is_shown(wide):
    found = slt.influence(None, wide, wide)
    assert "60 x 60 correlations of the losses" in repr(found)
    assert "noise floor" in found._repr_html_()
    ranking = found.top(2, 3)
    assert len(str(ranking).splitlines()) == 7
    assert "&lt;b&gt;" in ranking.to_html(["<b>"] * 60)
    assert "<script" not in ranking._repr_html_()
    one = slt.influence(None, *2 * [dataclasses.replace(wide, values=wide.values[:1], gap=wide.gap[:1])])
    assert "unknown (one chain)" in repr(one)
    assert "one chain" in one._repr_html_()


def test_refusals(wide, wrong_types):
    """Kills: a matrix of NaN without a word."""
    one = dataclasses.replace(wide, values=wide.values[:1], gap=wide.gap[:1])
    refuses(ValueError, lambda: slt.influence(None, one, one).reliability, "2 chains", "num_chains=4")
    refuses(ValueError, lambda: slt.influence(None, one, one).between_chains, "2 chains")
    still = dataclasses.replace(wide, values=np.full_like(wide.values, 0.1))
    refuses(ValueError, lambda: slt.influence(None, still, wide), "of='train'", "changes")
    half = dataclasses.replace(wide, values=np.where(np.arange(60) < 30, wide.values, np.float32(0.1)))
    found = slt.influence(None, half, half)
    assert found.constant == 30
    assert np.isnan(found.row(2)[30:]).all()
    assert np.isfinite(found.embedding()).all()
    assert all(i < 30 for i, *_ in found.top(2).helps)
    assert np.isfinite(found.reliability)
    kept = dataclasses.replace(wide, values=None, moments=wide.as_moments())
    refuses(ValueError, lambda: slt.influence(None, kept, wide), "only moments", "on disk")
    refuses(ValueError, lambda: slt.influence(None, wide, wide, level="token"), "by example")
    refuses(ValueError, lambda: slt.influence(None, wide, wide, level="word"), "'word'")
    refuses(ValueError, lambda: slt.influence(None, "a", wide), "'a'")
    refuses(TypeError, lambda: slt.influence(None, [3], wide), "of")
    other = dataclasses.replace(wide, gap=wide.gap + 1)
    refuses(ValueError, lambda: slt.influence(None, wide, other), "one run")
    refuses(ValueError, lambda: slt.influence(None, wide, wide).embedding(201), "200", "201")
    found = slt.influence(None, wide, wide)
    refuses(TypeError, lambda: found.embedding(1.5), "dims", "1.5")
    refuses(IndexError, lambda: found.top(60), "from 0 to 59", "60")
    refuses(TypeError, lambda: found.top([1, 2]), "one number from 0 to 59", "[1, 2]")
    refuses(TypeError, lambda: found.row(1.5), "one number", "1.5")
    refuses(IndexError, lambda: found.block("a", 0), "units must be numbers", "'a'")
    refuses(ValueError, lambda: found.top(0, -1), "k must be a whole number >= 1", "-1")
    refuses(TypeError, lambda: slt.influence(None, None, wide), "of must be the name", "None")
    refuses(TypeError, lambda: slt.influence(3, "a", wide), "result", "int")
    pair = observed(np.stack([wide.values] * 2, -1), np.zeros((60, 2)), 60, 6.0)
    own = dataclasses.replace(pair, level="custom")
    refuses(ValueError, lambda: slt.influence(None, own, own), "one number for each example")
    refuses(ValueError, lambda: own.by_example(), "(2,)", "no meaning")
    assert "60 examples x 2 at" in repr(own)
    broken = dataclasses.replace(wide, values=np.where(np.arange(60) == 7, np.nan, wide.values))
    refuses(ValueError, lambda: slt.influence(None, broken, wide), "example 7")


@pytest.mark.quick
def test_the_error_of_a_large_correlation_is_small():
    """(1 - rho^2) / sqrt(draws) for normal draws. Kills: the error of a covariance over the standard deviations."""
    rng = np.random.default_rng(7)
    common, own = rng.standard_normal((2, 8, 400, 1)), rng.standard_normal((8, 400, 40))
    values = math.sqrt(0.8) * common[0] + math.sqrt(0.2) * own
    seen = observed(values, np.zeros(40), 40, 4.0)
    upper, every = np.triu_indices(40, 1), slice(None)
    errors = slt.influence(None, seen, seen).stderr(every, every)
    assert abs(errors[upper].mean() / (0.36 / math.sqrt(3200)) - 1) < 0.1
    assert np.abs(np.diag(errors)).max() < 1e-6
    plain = slt.influence(None, seen, seen, normalized=False).stderr(every, every)
    assert abs(plain[upper].mean() / math.sqrt((1 + 0.64) / 3200) - 1) < 0.15


@pytest.mark.quick
def test_a_few_wild_draws_are_not_ranked():
    """Two examples whose losses leap together, once. Kills: a correlation of 1 that a single draw made."""
    rng = np.random.default_rng(8)
    values = rng.standard_normal((4, 100, 20))
    values[1, 50, [3, 4]] += 200.0
    seen = observed(values, np.zeros(20), 20, 4.0)
    found = slt.influence(None, seen, seen, normalized=False)
    assert abs(found.block(3, 4)) > 50
    assert found.top(3).helps == ()
