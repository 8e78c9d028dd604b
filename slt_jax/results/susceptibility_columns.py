"""The susceptibility of one component from the moments of its draws, with errors.

Everything is linear in the losses of the probe, so that it is computed a few examples at a time. Blocks of draws are
those of ``Moments``, one chain after another.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from slt_jax.results.observed import FEWEST_DRAWS, Observed

TWO_CHAIN, ONE_CHAIN = "two-chain", "one-chain"
_PIECE = 1 << 18  # values of the probe at once, for each block


class Blocks(NamedTuple):
    """What was observed in the blocks of chosen chains. ``chain``: to which each belongs.

    ``count``, ``phi``: draws, and mean of L_m(w) - L_m(w*), of a block. ``mean``, ``co``: as in ``Moments``, as
    (block, example, token), with one token where losses are those of examples.
    """

    chain: np.ndarray
    count: np.ndarray
    phi: np.ndarray
    mean: np.ndarray
    co: np.ndarray

    def of(self, chosen: np.ndarray) -> "Blocks":
        return Blocks(*(x[chosen] for x in self))


class Reference(NamedTuple):
    """The mean loss of each unit of the probe less that of all, over the draws of the posterior of all weights.

    ``mean``, ``variance``: (example, token), and the squared standard error. ``halves``: the mean over the even and
    over the odd chains. ``blocks``: means over the tokens of an example, (block, example); ``count``: draws of each
    block. ``widening``: as in ``Column``.
    """

    mean: np.ndarray
    variance: np.ndarray
    halves: tuple[np.ndarray, np.ndarray]
    blocks: np.ndarray
    count: np.ndarray
    widening: float


class Column(NamedTuple):
    """The susceptibilities of one component, and what their errors are made of.

    ``chi``, ``stderr``: of the shape of the probe's losses, float32; NaN for tokens that do not count. ``blocks``: what
    each block of draws contributes to the mean over the tokens of an example, (block, example); ``count``: draws of
    each block. ``phi``: mean of L_m(w) - L_m(w*). ``widening``: factor on the variance of means over blocks, since
    neighbouring blocks are correlated. ``reliability``: see ``reliability_of``.
    """

    chi: np.ndarray
    stderr: np.ndarray
    blocks: np.ndarray
    count: np.ndarray
    phi: float
    widening: float
    reliability: float


class _Estimate(NamedTuple):
    """``value``: (example, token). ``parts``: (block, example, token), whose weighted mean is the value."""

    value: np.ndarray
    parts: np.ndarray


def column_of(observed: Observed, estimator: str, reference: Reference | None = None) -> Column:
    """chi_i = -Cov(phi, l_i - L) over the draws of one component, phi = L_m(w) - L_m(w*).

    The mean over the probe, L, is subtracted from each loss. Estimators::

        one-chain   -(<phi (l_i - L)>_C - <phi>_C <l_i - L>_C),   divided by the number of draws less 1
        two-chain   -(<phi (l_i - L)>_C - <phi>_C <l_i - L>_full)

    where <.>_C is the mean over the draws of the component, and <.>_full over those of all weights.

    Args:
        observed: the probe at the draws of the posterior restricted to the component.
        reference: of the two-chain estimator, from the draws of all weights.

    Error: batch means over blocks of the centered products. The one-chain estimator is biased by -1 / ESS, relatively.
    """
    blocks, valid = _blocks(observed), _valid(observed)
    halves = _by_halves(blocks)
    means = [_unit_means(each, valid) for each in (blocks, *halves)]
    phi = float(np.average(blocks.phi, weights=blocks.count)) if len(blocks.count) else math.nan
    pieces, spread = [], np.zeros(2)
    for part in _pieces(valid):
        chosen = [_centered(each, at, part) for each, at in zip((blocks, *halves), means, strict=True)]
        full = [None] * 3 if reference is None else [x[part] for x in (reference.mean, *reference.halves)]
        found, *half = [_estimate(each, estimator, at) for each, at in zip(chosen, full, strict=True)]
        variance, lag = _variance(found.parts, chosen[0])
        own = valid[part]
        spread += variance[own].sum(), lag[own].sum()
        extra = np.zeros(own.shape) if reference is None else phi**2 * reference.variance[part]
        pieces.append((found.value, variance, extra, _by_example(found.parts, own), *(x.value for x in half)))
    value, variance, extra, by_example, *half = (
        np.concatenate(x, axis=1 if k == 3 else 0) for k, x in enumerate(zip(*pieces, strict=True))
    )  # fmt: skip
    widening = _widening(*spread)
    stderr = np.sqrt(widening * variance + extra)
    shape = observed.center.shape
    return Column(
        chi=_shown(value, valid, shape), stderr=_shown(stderr, valid, shape), blocks=by_example.astype(np.float32),
        count=blocks.count, phi=phi, widening=widening, reliability=reliability_of(*(x[valid] for x in half)),
    )  # fmt: skip


def reference_of(observed: Observed) -> Reference:
    """Of the probe at the draws of all weights."""
    blocks, valid = _blocks(observed), _valid(observed)
    halves = _by_halves(blocks)
    means = [_unit_means(each, valid) for each in (blocks, *halves)]
    pieces, spread = [], np.zeros(2)
    for part in _pieces(valid):
        chosen = [_centered(each, at, part) for each, at in zip((blocks, *halves), means, strict=True)]
        variance, lag = _variance(chosen[0].mean, chosen[0])
        own = valid[part]
        spread += variance[own].sum(), lag[own].sum()
        each = [np.tensordot(_weights(one), one.mean, 1) for one in chosen]
        pieces.append((each[0], variance, _by_example(chosen[0].mean, own), *each[1:]))
    mean, variance, by_example, even, odd = (
        np.concatenate(x, axis=1 if k == 2 else 0) for k, x in enumerate(zip(*pieces, strict=True))
    )  # fmt: skip
    widening = _widening(*spread)
    return Reference(mean, widening * variance, (even, odd), by_example.astype(np.float32), blocks.count, widening)


def reliability_of(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation that two runs of this length would have: of the halves of the chains r, then 2 r / (1 + r).

    NaN where a half has no chain, or fewer than three units are known. Source: Spearman (1910), Brown (1910).
    """
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < 3 or not (first[known].std() > 0 and second[known].std() > 0):
        return math.nan
    r = float(np.corrcoef(first[known], second[known])[0, 1])
    return max(-1.0, 2 * r / (1 + r)) if r > -1 else -1.0


def mean_error(parts: np.ndarray, count: np.ndarray, widening: float) -> np.ndarray:
    """Standard error of the mean of ``parts`` (block, ...) with the weights ``count``; blocks of no draws are left out.

    NaN for fewer than two blocks, or four draws.
    """
    kept = count > 0
    if kept.sum() < 2 or count.sum() < FEWEST_DRAWS:
        return np.full(parts.shape[1:], math.nan)
    parts, weights = parts[kept], count[kept] / count.sum()
    away = parts - np.tensordot(weights, parts, 1)
    return np.sqrt(widening * np.tensordot(weights**2, away**2, 1) * len(parts) / (len(parts) - 1))


def _estimate(blocks: Blocks, estimator: str, full: np.ndarray | None) -> _Estimate:
    count, phi = blocks.count[:, None, None], blocks.phi[:, None, None]
    total = count.sum()
    if estimator == TWO_CHAIN:
        assert full is not None
        parts, scale = -(blocks.co / count + phi * (blocks.mean - full)), 1.0
    else:
        weights = _weights(blocks)
        away = blocks.mean - np.tensordot(weights, blocks.mean, 1)
        scale = total / (total - 1) if total > 1 else math.nan
        parts = -scale * (blocks.co / count + (phi - weights @ blocks.phi) * away)
    value = np.tensordot(_weights(blocks), parts, 1) if len(parts) else np.full(parts.shape[1:], math.nan)
    return _Estimate(value, parts)


def _blocks(observed: Observed) -> Blocks:
    moments = observed.as_moments()
    count = np.asarray(moments.count, np.float64)
    chain = np.broadcast_to(np.arange(len(count))[:, None], count.shape).reshape(-1)
    shape = (chain.size, *observed.center.shape) if observed.center.ndim == 2 else (chain.size, observed.center.size, 1)
    phi = np.asarray(moments.loss_mean, np.float64).reshape(-1)
    return Blocks(chain, count.reshape(-1), phi, np.reshape(moments.mean, shape), np.reshape(moments.co, shape))


def _valid(observed: Observed) -> np.ndarray:
    """(example, token)."""
    if observed.valid is None:
        return np.ones(observed.center.shape if observed.center.ndim == 2 else (observed.center.size, 1), bool)
    return np.reshape(observed.valid, (len(observed.center), -1))


def _by_halves(blocks: Blocks) -> tuple[Blocks, Blocks]:
    """Of the even and of the odd chains."""
    return blocks.of(blocks.chain % 2 == 0), blocks.of(blocks.chain % 2 == 1)


def _pieces(valid: np.ndarray) -> Iterator[slice]:
    """Examples, a few at a time."""
    step = max(1, _PIECE // valid.shape[1])
    return (slice(start, min(start + step, len(valid))) for start in range(0, len(valid), step))


def _unit_means(blocks: Blocks, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(block,) each: mean over the units that count of ``mean`` and of ``co``."""
    sums = np.zeros((2, len(blocks.count)))
    for part in _pieces(valid):
        for k, values in enumerate((blocks.mean, blocks.co)):
            sums[k] += values[:, part].astype(np.float64)[:, valid[part]].sum(1)
    mean, co = sums / valid.sum()
    return mean, co


def _centered(blocks: Blocks, means: tuple[np.ndarray, np.ndarray], part: slice) -> Blocks:
    """Of these examples, with the mean over the whole probe subtracted from each loss."""
    mean, co = (x[:, part] - at[:, None, None] for x, at in zip((blocks.mean, blocks.co), means, strict=True))
    return blocks._replace(mean=mean, co=co)


def _weights(blocks: Blocks) -> np.ndarray:
    return blocks.count / blocks.count.sum() if len(blocks.count) else blocks.count


def _variance(parts: np.ndarray, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """(variance of the mean as if blocks were independent, its first correction for neighbours in a chain)."""
    if len(parts) < 2 or blocks.count.sum() < FEWEST_DRAWS:
        unknown = np.full(parts.shape[1:], math.nan)
        return unknown, unknown
    weights = _weights(blocks)
    away = weights[:, None, None] * (parts - np.tensordot(weights, parts, 1))
    scale, neighbours = len(parts) / (len(parts) - 1), blocks.chain[1:] == blocks.chain[:-1]
    lag = (away[1:] * away[:-1])[neighbours].sum(0)
    return scale * (away**2).sum(0), 2 * scale * lag


def _widening(variance: float, lag: float) -> float:
    """Of all units together, since one of them does not determine it. At least 1."""
    return max(1.0, 1.0 + lag / variance) if variance > 0 else 1.0


def _by_example(parts: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over the tokens that count; NaN for an example without any."""
    with np.errstate(invalid="ignore"):
        return np.where(valid, parts, 0.0).sum(-1) / np.where(valid.any(-1), valid.sum(-1), math.nan)


def _shown(values: np.ndarray, valid: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.where(valid, values, math.nan).reshape(shape).astype(np.float32)
