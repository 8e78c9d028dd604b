"""Numbers of draws in their order: effective sample size, R-hat, standard error, trend, rise since the start."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from slt_jax.diagnostics.mixing import ess_of_mean, rank_rhat

_BLOCKS = 100  # of a chain
_SCATTER = 0.5  # of the variance of the draws, from which on minibatch noise hides slow directions


class Rise(NamedTuple):
    """Of the mean over windows that double, [1/8, 1/4], [1/4, 1/2] and [1/2, 1] of a run: ``before``, from the first to
    the second; ``value``, from the second to the third; ``stderr``, of the mean of the two. NaN where unknown.
    """

    before: float = math.nan
    value: float = math.nan
    stderr: float = math.nan

    @property
    def mean(self) -> float:
        return (self.before + self.value) / 2

    @property
    def next(self) -> float:
        """What doubling the run would add, if it goes on as it did: never more than the last doubling did."""
        return self.value * min(1.0, abs(self.value) / self.before) if self.before > 0 else self.value


def ess_and_rhat(draws: Float[np.ndarray, "chain draw"]) -> tuple[float, float]:
    """Effective sample size of the mean, and rank-normalized split R-hat, of ``draws`` (chain, draw).

    NaN with fewer than 4 draws a chain, or draws that are all equal. A single chain's R-hat compares its quarters.

    Source: Vehtari, Gelman, Simpson, Carpenter, Buerkner, arXiv:1903.08008, as implemented in ArviZ.
    """
    if draws.shape[0] == 0 or draws.shape[1] < 4:
        return math.nan, math.nan
    around = draws - draws.mean()
    if (spread := around.std()) == 0:
        return math.nan, math.nan
    ess, rhat = (float(x) for x in _ess_and_rhat(around / spread))  # a range below 1e-15 is none to ArviZ
    return min(max(ess, 1.0), float(draws.size)), rhat


def _ess_and_rhat(draws: np.ndarray) -> tuple[float, float]:
    chains = draws
    if len(draws) == 1:
        half = draws.shape[1] // 2
        chains = np.concatenate([draws[:, :half], draws[:, -half:]])
    return ess_of_mean(draws), rank_rhat(chains)


def standard_error(draws: np.ndarray, ess: float) -> float:
    """Standard error of the mean over all chains and draws."""
    return float(draws.std(ddof=1) / math.sqrt(ess)) if draws.size > 1 else math.nan


def error_of_mean(draws: Float[np.ndarray, "chain draw"], ess: float, scatter: float) -> float:
    """``standard_error``; where minibatches scatter the draws, the larger of that and of that of means over blocks.

    Scatter that is independent from draw to draw hides slow directions: the sum of autocorrelations ends where they are
    lost in it. In means over blocks of draws it is averaged out.

    Args:
        ess: of the draws. scatter: share of their variance that is minibatch noise, NaN if unknown.
    """
    error, size = standard_error(draws, ess), draws.shape[1] // _BLOCKS
    if scatter <= _SCATTER or size < 2:
        return error
    blocks = draws[:, : _BLOCKS * size].reshape(len(draws), _BLOCKS, size).mean(2)
    both = (error, standard_error(blocks, ess_and_rhat(blocks)[0]))
    return max((float(x) for x in both if not math.isnan(x)), default=math.nan)


def trend_of(draws: Float[np.ndarray, "chain draw"]) -> tuple[float, float]:
    """Mean of the second half of the draws less that of the first, and the same over its standard error."""
    half = draws.shape[1] // 2
    if half < 4 or draws.shape[0] == 0:
        return math.nan, math.nan
    first, second = draws[:, :half], draws[:, -half:]
    errors = [standard_error(part, ess_and_rhat(part)[0]) for part in (first, second)]
    change = float(second.mean() - first.mean())
    return change, change / max(math.hypot(*errors), 1e-30)


def since_start(
    warmup: Float[np.ndarray, "chain step"], draws: Float[np.ndarray, "chain draw"], thinning: int
) -> tuple[np.ndarray, int]:
    """(means over ``thinning`` steps of the warm-up, then the draws; how many of the former), chain by chain."""
    count = warmup.shape[1] // thinning
    skipped = warmup.shape[1] - count * thinning
    early = warmup[:, skipped:].reshape(len(warmup), count, thinning).mean(2, dtype=np.float64)
    return np.concatenate([early, draws], axis=1), count


def rise_of(warmup: np.ndarray, draws: np.ndarray, thinning: int, offset_stderr: float = 0.0) -> Rise:
    """How the mean grew in the last two doublings of the run, of chains that started at w*.

    A chain that starts at w* has relaxed, after t steps, in the directions of a curvature above some c / t. Where
    directions of all curvatures are left, each doubling of the run adds as much as the last, and no trend over the
    draws alone need show it.

    Args:
        warmup: nbeta (L_m(w) - L(w*)), (chain, step), of all warm-up steps. draws: the same of the kept draws.
        thinning: steps from one draw to the next. offset_stderr: of what was subtracted in ``warmup``.
    """
    values, _ = since_start(warmup, draws, thinning)
    total = values.shape[1]
    windows = [values[:, total // 8 : total // 4], values[:, total // 4 : total // 2], values[:, total // 2 :]]
    if len(values) == 0 or windows[0].shape[1] < 8 or not np.isfinite(values).all():
        return Rise()
    first, second, third = (float(w.mean()) for w in windows)
    ends = [standard_error(w, ess_and_rhat(w)[0]) for w in (windows[0], windows[2])]
    return Rise(second - first, third - second, math.hypot(*ends, offset_stderr) / 2)
