"""Averages over examples of what single losses do at the draws: mean, variance, predictive loss, with joint errors."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int

from slt_jax.diagnostics.estimate import Estimate
from slt_jax.results.observed import FEWEST_DRAWS, Observed

LARGE = 0.4  # variance of a loss above which the Bayes numbers are in doubt: Vehtari, Gelman, Gabry, arXiv:1507.04544
NAMES = ("gibbs", "variance", "summed", "bayes", "large")
_CHUNK = 1 << 22  # numbers of one array that are worked on at once


@dataclass(frozen=True)
class Averages:
    """Averages over the units of a set: its examples, or the tokens of them that count. Nats per unit.

    ``values``, in the order of ``NAMES``: mean over the draws of the loss; its variance; the variance of the sum over
    an example's units, per unit; -log of the mean of exp(-loss); the share of units whose variance is above ``LARGE``.
    NaN where it cannot be known. The variances and the predictive loss have no bias of first order in 1 / ESS.

    ``from_draws``: their covariance from a finite number of draws, by the jackknife over (chain, block): exact to
    first order if blocks are long against the correlation of the draws. ``from_examples``: the covariance from having
    taken ``num_examples`` of infinitely many. ``center``: average loss at w*. ``per_example``: mean number of units of
    an example. ``ess``: of the mean loss of a unit, typical of the units with the largest variances.
    """

    values: Float64[np.ndarray, " 5"]
    from_draws: Float64[np.ndarray, "5 5"]
    from_examples: Float64[np.ndarray, "5 5"]
    center: float
    num_examples: int
    per_example: float
    ess: float

    def combined(self, sampled: float, **weights: float) -> Estimate:
        """A linear combination, by names of ``NAMES``.

        Args:
            sampled: the share of the variance from choosing examples that counts: 1 less the share of the population
                that the set is.
        """
        w = np.array([weights.get(name, 0.0) for name in NAMES])
        used = w != 0
        v = w[used]
        covariance = self.from_draws + sampled * (self.from_examples if sampled else 0.0)
        variance = float(v @ covariance[np.ix_(used, used)] @ v)
        return Estimate(float(v @ self.values[used]), math.sqrt(variance) if variance >= 0 else math.nan)

    def cooled(self, factor: float) -> "Averages":
        """With every excess over the loss at w* and every variance times ``factor``, as a bias of the draws scales."""
        if factor == 1 or not math.isfinite(self.center):
            return self
        base = np.array([self.center, 0, 0, self.center, 0])
        scale = np.array([factor, factor, factor, factor, 1.0])
        values = base + scale * (self.values - base)
        return dataclasses.replace(self, values=values, from_draws=self.from_draws * np.outer(scale, scale))


def averages_of(observed: Observed) -> Averages:
    """The averages over the examples of ``observed``, or over its tokens.

    Raises:
        ValueError: a value that counts is not finite, or there are fewer than two draws.
    """
    observed = dataclasses.replace(observed, moments=observed.as_moments())
    moments = observed.as_moments()
    count = np.asarray(moments.count, np.float64).reshape(-1)
    if count.sum() < 2:
        raise ValueError(f"a variance over the draws needs at least 2, and {observed.name!r} has 1. Draw more.")
    if not np.isfinite(_counted(moments.m2, observed.valid)).all():
        raise ValueError(
            f"some values of {observed.name!r} are not finite. Leave their examples out, or mark their tokens as not "
            "valid."
        )
    exponentials = None if observed.values is None else _exponentials(observed, count)
    single = observed.center.ndim == 1
    summed = None if single or observed.values is None else observed.by_example().as_moments()
    blocks = len(count)
    totals = np.zeros((blocks + 1, len(NAMES)))  # of all units: without one block each, and at last with all
    noise, center, sums, sizes = 0.0, 0.0, [], []
    for rows in _chunks(observed.center.shape, blocks):
        valid = np.ones(observed.center[rows].shape, bool) if observed.valid is None else observed.valid[rows]
        example = np.nonzero(valid)[0]
        mean, m2 = (_units(x, rows, valid) for x in (moments.mean, moments.m2))
        means, variances = _without_each(mean, m2, count)
        parts = [means, variances, variances, np.full_like(means, np.nan), np.float64(variances > LARGE)]
        if exponentials is not None:
            held = _units(exponentials, rows, valid)
            sum_of = (count[:, None] * held).sum(0)
            others = [(sum_of - n * x) / (count.sum() - n) for n, x in zip(count, held, strict=True)]
            parts[3] = means[-1] - np.log([*others, sum_of / count.sum()])
        each = np.stack([part[-1] for part in parts], 1)
        totals += np.stack([part.sum(1) for part in parts], 1)
        noise += _jackknife_sum(means)
        center += float(observed.center[rows][valid].sum(dtype=np.float64))
        sums.append(_by_example(each, example, len(valid)))
        sizes.append(valid.sum(tuple(range(1, valid.ndim))))
    per, size = np.concatenate(sums), np.concatenate(sizes).astype(np.float64)
    if not single:
        totals[:, 2], per[:, 2] = _of_sums(summed, count, blocks, len(per))
    found = _assembled(totals / size.sum(), per, size, center / size.sum())
    if count.sum() < FEWEST_DRAWS:
        found = dataclasses.replace(found, from_draws=np.full_like(found.from_draws, np.nan))
    noise /= size.sum()
    return dataclasses.replace(found, ess=min(found.values[1] / noise, count.sum()) if noise > 0 else math.nan)


def _counted(values: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    return values if valid is None else np.where(valid, values, 0)


def _chunks(shape: tuple[int, ...], blocks: int) -> Iterator[slice]:
    step = max(1, _CHUNK // (blocks * int(np.prod(shape[1:]))))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _units(values: np.ndarray, rows: slice, valid: np.ndarray) -> Float64[np.ndarray, "block unit"]:
    part = np.asarray(values[:, :, rows], np.float64)
    return part.reshape(-1, *part.shape[2:])[:, valid]


def _exponentials(observed: Observed, count: np.ndarray) -> np.ndarray:
    """Mean of exp(mean loss - loss) over the draws of each block, in the shape of the moments."""
    moments = observed.as_moments()
    weights = count.reshape(moments.count.shape) / count.sum()
    mean = np.einsum("cb,cb...->...", weights, moments.mean, dtype=np.float64)
    found = np.zeros_like(moments.mean)
    for chain, block, _, values in observed.by_block():
        away = _counted(mean - values, observed.valid)
        found[chain, block] += np.exp(away).sum(0) / moments.count[chain, block]
    return found


def _without_each(mean: np.ndarray, m2: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances (over the number of draws) without each block, and at last of all: (block + 1, unit)."""
    total, n = count.sum(), count[:, None]
    center = (n * mean).sum(0) / total
    away = mean - center
    squares = (m2 + n * away**2).sum(0)
    rest = total - n
    means = np.concatenate([center - n * away / rest, center[None]])
    variances = (squares - m2 - n * total / rest * away**2) / rest
    return means, np.concatenate([np.maximum(variances, 0), squares[None] / total])


def _jackknife_sum(means: np.ndarray) -> float:
    """Sum over units of the variance of their mean."""
    blocks = len(means) - 1
    return float(((means[:-1] - means[:-1].mean(0)) ** 2).sum() * (blocks - 1) / blocks)


def _by_example(each: np.ndarray, example: Int[np.ndarray, " unit"], count: int) -> Float64[np.ndarray, "example 5"]:
    return np.stack([np.bincount(example, column, count) for column in each.T], 1)


def _of_sums(moments, count: np.ndarray, blocks: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Variances of sums over an example: in total (block + 1), and of each example."""
    if moments is None:
        return np.full(blocks + 1, np.nan), np.full(examples, np.nan)
    mean, m2 = (np.asarray(x, np.float64).reshape(blocks, examples) for x in (moments.mean, moments.m2))
    variances = _without_each(mean, m2, count)[1]
    return variances.sum(1), variances[-1]


def _assembled(
    totals: Float64[np.ndarray, "_ 5"], per: Float64[np.ndarray, "example 5"], size: Float[np.ndarray, " example"],
    center: float,
) -> Averages:  # fmt: skip
    others, full = totals[:-1], totals[-1]
    blocks, examples = len(others), len(size)
    values = blocks * full - (blocks - 1) * others.mean(0)
    values[[0, 4]] = full[[0, 4]]  # linear, and a step function
    away = others - others.mean(0)
    residual = per - size[:, None] * full
    spread = residual.T @ residual * examples / max(1, examples - 1) / size.sum() ** 2
    return Averages(
        values=values,
        from_draws=away.T @ away * (blocks - 1) / blocks if blocks > 1 else np.full((5, 5), np.nan),
        from_examples=spread if examples > 1 else np.full((5, 5), np.nan),
        center=center,
        num_examples=examples,
        per_example=float(size.sum() / examples),
        ess=math.nan,
    )
