"""Where an estimate that is still moving would end, and how sure that is."""

import itertools
import math

import numpy as np
from jaxtyping import Float

from slt_jax.diagnostics.sensitivity import UNKNOWN, Slope
from slt_jax.diagnostics.series import ess_and_rhat

_WINDOWS = 14  # of the run, each longer than the one before by the same factor
_KIN = 3.0  # octaves of relaxation time over which what directions add is alike
_SPREAD = 0.7  # of what an octave adds, relative to the mean of those that have been seen
_SHAPE = 0.002  # of the mean: what a sum of exponentials on octaves misses of a curve
_BLOCKS = 12
_LONGEST = 4.0  # runs: the slowest exponential that is fitted to draws alone


def end_of_spread(values: Float[np.ndarray, "chain step"], num_warmup: int, slowest: float) -> Slope:
    """Where the mean of chains that spread from w* would end.

    A direction adds c (1 - exp(-t / tau)) after t steps, and tau lies between one step and ``slowest``, which is that
    of a flat direction, held by the localization alone. What each octave of tau adds is a Gaussian process over log
    tau, conditioned on the means over windows of the run: the windows decide about the octaves that were seen, and for
    slower ones the process says "half of what an octave added so far, give or take", so that its end covers both a
    model without softer directions and one with as many in each octave.

    Args:
        values: nbeta (L_m(w) - L(w*)), from the first step on; one column may stand for several steps.
        num_warmup: columns before the first draw. slowest: in columns.

    Returns:
        Value and standard error; unknown without draws, or where ``slowest`` is.
    """
    chains, total = values.shape
    if chains == 0 or total - num_warmup < 8 or not slowest > 0 or not np.isfinite(values).all():
        return UNKNOWN
    draws = values[:, num_warmup:]
    ess, _ = ess_and_rhat(draws)
    if not ess > 0:
        return UNKNOWN
    edges = np.unique(np.geomspace(1, total, _WINDOWS + 1).astype(int))
    windows = list(itertools.pairwise(edges))
    means = np.array([values[:, a:b].mean(dtype=np.float64) for a, b in windows])
    if means[-1] == 0:  # chains that ended where the loss is that of w*, and stay
        return UNKNOWN
    taus = np.append(2.0 ** np.arange(max(1.0, math.log2(slowest))), max(slowest, 2.0))
    reached = np.array([[np.mean(-np.expm1(-np.arange(a, b) / tau)) for tau in taus] for a, b in windows])
    typical = means[-1] / max(1, (taus < total / 2).sum())
    octave = np.arange(len(taus))
    kin = (_SPREAD * typical) ** 2 * np.exp(-np.abs(octave[:, None] - octave) / _KIN)
    noise = _noise_of(draws.var(dtype=np.float64), draws.size / ess, chains, np.diff(edges), means)
    before = np.full(len(taus), typical / 2)
    gain = kin @ reached.T @ np.linalg.inv(reached @ kin @ reached.T + np.diag(noise))
    after = before + gain @ (means - reached @ before)
    variance = (kin - gain @ reached @ kin).sum()
    return Slope(float(after.sum()), math.sqrt(max(0.0, variance)))


def slowest_draws(rates: Float[np.ndarray, " direction"], thinning: int) -> float:
    """Draws in which the loss of the slowest of these directions relaxes; ``rates``: of its weights, for a step."""
    rate = float(rates.min())
    return 1 / (2 * rate * thinning) if rate > 0 else math.nan


def _noise_of(variance: float, correlated: float, chains: int, lengths: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Variance of each window's mean; while the chains are near w*, the loss varies as little as it has risen."""
    each = np.minimum(1.0, 2 * correlated / lengths) * variance / chains  # twice: slow modes last longer than they show
    return each * np.clip(means / means[-1], 0.1, 1.0) + (_SHAPE * means[-1]) ** 2


def end_of_trend(draws: Float[np.ndarray, "chain draw"]) -> Slope:
    """Where draws that move would end, by their trend alone: the a of a + b exp(-t / tau).

    By least squares over block means, averaged over tau up to four runs by how well each explains them.

    Error: of the fit, of tau, and as much as it lies beyond the last third of the run, since there may be slower
    directions than those that are seen to move. Unknown where it is no smaller than the end itself, as for draws that
    go on in a straight line.
    """
    length = draws.shape[1] // _BLOCKS
    if length < 1 or draws.shape[0] == 0:
        return UNKNOWN
    blocks = draws[:, : _BLOCKS * length].reshape(len(draws), _BLOCKS, length).mean(2, dtype=np.float64)
    means, t = blocks.mean(0), np.arange(_BLOCKS) + 0.5
    noise = blocks.var(0, ddof=1).mean() / len(blocks) if len(blocks) > 1 else np.diff(means).var() / 2
    fits = []
    for tau in np.geomspace(1.0, _LONGEST * _BLOCKS, 25):
        basis = np.stack([np.ones(_BLOCKS), np.exp(-t / tau)], 1)
        inverse = np.linalg.inv(basis.T @ basis)
        solution = inverse @ basis.T @ means
        fits.append((np.sum((basis @ solution - means) ** 2), solution[0], inverse[0, 0]))
    misfit, ends, spread = np.array(fits).T
    noise = max(noise, misfit.min() / (_BLOCKS - 3), 1e-30)
    weights = np.exp((misfit.min() - misfit) / (2 * noise)) / np.sqrt(spread)
    weights /= weights.sum()
    end = float(weights @ ends)
    variance = float(weights @ (noise * spread + (ends - end) ** 2))
    error = math.hypot(math.sqrt(variance), end - means[-_BLOCKS // 3 :].mean())
    return Slope(end, error) if error < abs(end) else UNKNOWN
