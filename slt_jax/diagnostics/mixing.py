"""Effective sample size and R-hat of draws (chain, draw), in NumPy: ArviZ's numbers to the last bit.

ArviZ itself takes a second or two to import, before the first result can be printed. ``test_mixing`` compares the two.

Source: Vehtari, Gelman, Simpson, Carpenter, Buerkner, arXiv:1903.08008; the code follows ``arviz_stats`` 0.8.
"""

import math

import numpy as np
from jaxtyping import Float


def ess_of_mean(draws: Float[np.ndarray, "chain draw"]) -> float:
    """Effective sample size of the mean; NaN with fewer than 4 draws a chain, or where one is NaN."""
    if draws.shape[1] < 4 or np.isnan(draws).any():
        return math.nan
    halves = _halves(draws).astype(float)
    chains, count = halves.shape
    covariance = _autocovariance(halves)
    within = float(np.mean(covariance[:, 0])) * count / (count - 1.0)
    total = within * (count - 1.0) / count
    if chains > 1:
        total += float(np.var(halves.mean(axis=1), axis=None, ddof=1))
    size = chains * count
    with np.errstate(divide="ignore", invalid="ignore"):  # chains that stand still
        time = _autocorrelation_time(covariance, within, total)
    return size / max(time, 1 / float(np.log10(size)))


def rank_rhat(draws: Float[np.ndarray, "chain draw"]) -> float:
    """Rank-normalized split R-hat, the larger of those of the ranks and of the folded ranks.

    NaN with fewer than 4 draws a chain or 2 chains, or where a draw is NaN.
    """
    if draws.shape[0] < 2 or draws.shape[1] < 4 or np.isnan(draws).any():
        return math.nan
    halves = _halves(draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        return max(_rhat(_normal_scores(halves)), _rhat(_normal_scores(abs(halves - np.median(halves)))))


def _halves(draws: np.ndarray) -> np.ndarray:
    half = draws.shape[1] // 2
    return np.vstack((draws[:, :half], draws[:, -half:]))


def _autocovariance(values: np.ndarray) -> np.ndarray:
    """Along the last axis, at every lag, over the number of values."""
    count = values.shape[1]
    length = _smooth_from(2 * count)
    transform = np.fft.rfft(values - values.mean(1, keepdims=True), n=length, axis=1)
    transform *= np.conjugate(transform)
    covariance = np.fft.irfft(transform, n=length, axis=1)[:, :count]
    covariance /= count
    return covariance


def _smooth_from(least: int) -> int:
    """The smallest number from ``least`` on with no prime factor above 5, as ``scipy.fftpack.next_fast_len``."""
    powers = [3**i * 5**j for i in range(41) for j in range(28)]
    return min(odd << max(0, math.ceil(least / odd) - 1).bit_length() for odd in powers)


def _autocorrelation_time(covariance: np.ndarray, within: float, total: float) -> float:
    """By Geyer's initial positive, then monotone, sequence of pairs of autocorrelations."""
    count = covariance.shape[1]
    rho = np.zeros(count)
    rho[0], even = 1.0, 1.0
    rho[1] = odd = 1.0 - (within - np.mean(covariance[:, 1])) / total
    t = 1
    while t < count - 3 and even + odd > 0.0:
        even, odd = (1.0 - (within - np.mean(covariance[:, t + k])) / total for k in (1, 2))
        if even + odd >= 0:
            rho[t + 1], rho[t + 2] = even, odd
        t += 2
    last = t - 2
    if even > 0:
        rho[last + 1] = even
    for t in range(1, last - 1, 2):
        if rho[t + 1] + rho[t + 2] > rho[t - 1] + rho[t]:
            rho[t + 1] = rho[t + 2] = (rho[t - 1] + rho[t]) / 2.0
    if np.isnan(rho).any():
        return math.nan
    return float(-1.0 + 2.0 * np.sum(rho[: last + 1]) + np.sum(rho[last + 1 : last + 2]))


def _normal_scores(values: np.ndarray) -> np.ndarray:
    """Quantiles of the normal law at the ranks over all chains; equal values share the mean of their ranks."""
    from scipy.special import ndtri  # a tenth of a second, only when needed

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)]
    return ndtri((ranks - 3 / 8) / (values.size - 2 * (3 / 8) + 1)).reshape(values.shape)


def _rhat(values: np.ndarray) -> float:
    values = values.astype(float)
    count = values.shape[1]
    between = count * np.var(np.mean(values, axis=1), axis=None, ddof=1)
    within = np.mean(np.var(values, axis=1, ddof=1))
    return float(np.sqrt((between / within + count - 1) / count))
