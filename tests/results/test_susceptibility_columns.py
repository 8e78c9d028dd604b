"""Susceptibilities from the moments of draws: exact leverages, a plain loop, errors that are right, tokens, halves."""

import dataclasses

import numpy as np
import pytest

from slt_jax.results import susceptibility_columns as columns
from slt_jax.results.susceptibility_columns import column_of, reference_of, reliability_of
from tests.results.susceptible import D, Linear, observed

ESTIMATORS = ("one-chain", "two-chain")
FREE = [1, 3, 6]


def by_loop(own, full, estimator):
    """The definition on all values at once, float64."""
    values, losses = own.values.astype(np.float64), full.values.astype(np.float64)
    away, there = (x - x.mean(-1, keepdims=True) for x in (values, losses))
    products = (own.gap[..., None] * away).reshape(-1, away.shape[-1])
    phi, count = own.gap.mean(), len(products)
    if estimator == "two-chain":
        return -(products.mean(0) - phi * there.mean((0, 1)))
    return -(products.mean(0) - phi * away.mean((0, 1))) * count / (count - 1)


@pytest.mark.quick
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_moments_give_what_a_plain_loop_gives(estimator, monkeypatch):
    """Kills: a mean over blocks that forgets their means, one not centered over the probe, pieces that overlap."""
    model, rng = Linear(), np.random.default_rng(1)
    own, full = (model.observed(free, 4, 30, rng) for free in (FREE, list(range(D))))
    reference = reference_of(full) if estimator == "two-chain" else None
    column = column_of(own, estimator, reference)
    expected = by_loop(own, full, estimator)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(column.chi, expected, 1e-5, 1e-5 * scale)
    parts = column.count @ column.blocks / column.count.sum()
    np.testing.assert_allclose(parts, expected, 1e-5, 1e-5 * scale)
    assert abs(column.chi.mean()) < 1e-6 * scale
    monkeypatch.setattr(columns, "_PIECE", 7)
    reference = reference_of(full) if estimator == "two-chain" else None
    for name, value in column_of(own, estimator, reference)._asdict().items():
        np.testing.assert_allclose(value, getattr(column, name), 1e-5, 1e-5 * scale, err_msg=name)


@pytest.mark.quick
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_linear_model_has_its_leverages(estimator):
    """The mean of many short runs is exact, and their errors are those they report.

    Kills: a sign, a factor of n or beta, one estimator in the place of the other, an error without that of the means.
    """
    model, rng, runs = Linear(), np.random.default_rng(2), 400
    exact = model.chi(FREE, estimator)
    found, errors = [], []
    for _ in range(runs):
        reference = None
        if estimator == "two-chain":
            reference = reference_of(model.observed(list(range(D)), 4, 64, rng))
        column = column_of(model.observed(FREE, 4, 64, rng), estimator, reference)
        found.append(column.chi)
        errors.append(column.stderr)
    z = (np.array(found, float) - exact) / np.array(errors)
    assert 0.9 < z.std() < 1.15, z.std()
    away = np.mean(found, axis=0, dtype=float) - exact
    error = np.std(found, axis=0, ddof=1, dtype=float) / np.sqrt(runs)
    assert np.abs(away / error).max() < 4.5
    assert abs((away * exact).sum()) < 3 * np.std(found @ exact, ddof=1) / np.sqrt(runs)
    assert np.mean((away / error) ** 2) < 2.2  # of about nine independent directions
    assert error.max() < 0.1 * np.abs(exact).max()


def test_errors_allow_for_draws_that_follow_each_other():
    """Kills: blocks that are taken for independent where the chain moves slowly."""
    model, rng, runs = Linear(), np.random.default_rng(3), 150
    exact, found, errors, widened = model.chi(FREE, "one-chain"), [], [], []
    for _ in range(runs):
        column = column_of(model.observed(FREE, 4, 160, rng, correlation=0.9), "one-chain")
        found.append(column.chi)
        errors.append(column.stderr)
        widened.append(np.sqrt(column.widening))
    z = (np.array(found, float) - exact) / np.array(errors)
    spread = lambda z: np.median(np.abs(z)) / 0.6745  # noqa: E731
    assert 0.8 < spread(z) < 1.25 < spread(z * np.array(widened)[:, None])


def test_tokens_that_do_not_count_are_left_out():
    """Kills: padding in the mean over the probe, in an example's mean, in the reliability or the pooled variance."""
    rng = np.random.default_rng(4)
    values, gap = rng.gamma(2.0, size=(4, 24, 6, 5)), rng.gamma(1.0, size=(4, 24))
    values += gap[..., None, None] * np.linspace(-1, 1, 30).reshape(6, 5)
    valid = rng.random((6, 5)) < 0.7
    valid[2] = False
    values[:, :, ~valid] = 1e3
    center = np.ones((6, 5))
    by_token = column_of(observed(values, center, valid, gap), "one-chain")
    flat = column_of(observed(values[..., valid], center[valid], None, gap), "one-chain")
    assert np.isnan(by_token.chi[~valid]).all()
    np.testing.assert_allclose(by_token.chi[valid], flat.chi, 1e-5, 1e-6)
    np.testing.assert_allclose(by_token.stderr[valid], flat.stderr, 1e-5)
    assert by_token.reliability == pytest.approx(flat.reliability, rel=1e-5)
    assert np.isnan(by_token.blocks[:, 2]).all()
    mean = by_token.count @ by_token.blocks[:, 0] / by_token.count.sum()
    assert mean == pytest.approx(by_token.chi[0][valid[0]].mean(), rel=1e-4)


def test_reliability_is_the_correlation_of_two_runs():
    """Spearman and Brown. Kills: the correlation of halves as it is; halves that share the draws of all weights."""
    model, rng, runs = Linear(), np.random.default_rng(5), 150
    told, between = [], []
    for _ in range(runs):
        pair = []
        for _ in range(2):
            reference = reference_of(model.observed(list(range(D)), 4, 16, rng))
            pair.append(column_of(model.observed(FREE, 4, 16, rng), "two-chain", reference))
        told += [column.reliability for column in pair]
        between.append(np.corrcoef(pair[0].chi, pair[1].chi)[0, 1])
    assert 0.2 < np.mean(between) < 0.9
    assert abs(np.median(told) - np.median(between)) < 0.1
    assert reliability_of(np.arange(5.0), np.arange(5.0)) == pytest.approx(1)
    assert reliability_of(np.arange(5.0), -np.arange(5.0)) == -1
    one_chain = model.observed(FREE, 1, 16, rng)
    assert np.isnan(column_of(one_chain, "one-chain").reliability)


def test_no_chain_gives_nothing_and_no_error():
    """Kills: a division by no draws, where all chains of a component went non-finite."""
    own = Linear().observed(FREE, 2, 16, np.random.default_rng(6))
    empty = dataclasses.replace(
        own, values=None, gap=own.gap[:0], moments=type(own.as_moments())(*(x[:0] for x in own.as_moments()))
    )
    column = column_of(empty, "one-chain")
    assert np.isnan(column.chi).all()
    assert np.isnan(column.stderr).all()
    assert np.isnan(column.reliability)
