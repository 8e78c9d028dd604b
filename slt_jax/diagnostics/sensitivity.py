"""How an estimate depends on nbeta, localization and w*, and how steep the loss is: numbers found from the draws."""

import math
from typing import NamedTuple

import numpy as np

from slt_jax.diagnostics.limits import NOISE_SHARE
from slt_jax.diagnostics.series import ess_and_rhat


class Slope(NamedTuple):
    """A number found from the draws, such as d LLC / d log nbeta, and its standard error."""

    value: float
    stderr: float


UNKNOWN = Slope(math.nan, math.nan)
DROWNED = 1 / 3  # of the LLC: a slope with a larger error is not told


def slopes(
    draws: np.ndarray, gap_var: np.ndarray, distance_sq: np.ndarray, nbeta: float, localization: float
) -> tuple[Slope, Slope]:
    """(d LLC / d log nbeta, d LLC / d log localization), from the draws alone.

    Derivation: with p proportional to exp(-nbeta L - localization D), D = |w - w*|^2 / 2, the derivative of E[L] by
    nbeta is -Var(L) and by localization -Cov(L, D). So LLC = nbeta (E[L] - L(w*)) has the slopes LLC - nbeta^2 Var(L)
    and -localization nbeta Cov(L, D). Var(L) is that of the whole loss: ``gap_var``, the variance of a minibatch's
    mean, is subtracted from what the draws show. Standard errors from the spread over quarters of the chains; the first
    is at least that of the law that nbeta (L - L(w*)) has at the asymptotic temperature: where no draw went far, the
    variance is too small and its spread is too.

    Args:
        draws: nbeta (L_m(w) - L_m(w*)), (chain, draw). gap_var: per draw, of L_m(w) - L_m(w*). distance_sq: |w - w*|^2.
    """
    if (
        parts := _quarters(draws, nbeta * (nbeta * gap_var.astype(np.float64)), localization / 2 * distance_sq)
    ) is None:
        return UNKNOWN, UNKNOWN
    energy, noise, pull = parts
    up = _mean_of(energy - (_product(energy, energy) - noise))
    away = np.abs(draws - draws.mean())
    least = gamma_error(float(energy.mean()), ess_and_rhat((away / (away.max() or 1.0)) ** 2)[0])  # in float32's range
    return Slope(up.value, max(up.stderr, least)), _mean_of(-_product(energy, pull))


def bounded(slope: Slope, llc: float) -> Slope:
    """A slope of the LLC as it may be told: within what is possible, and unknown where noise drowns it.

    d LLC / d log nbeta is LLC - nbeta^2 Var(L), which is no more than the LLC; on a quadratic it lies between 0 and the
    LLC, and that in localization between minus the LLC and 0. An error of a third of that range says nothing.
    """
    size = abs(llc)
    if not slope.stderr <= DROWNED * size:
        return UNKNOWN
    return Slope(min(max(slope.value, -size), size), slope.stderr)


def gamma_error(shape: float, count: float) -> float:
    """Standard error of mean - variance over ``count`` independent draws of a Gamma law of scale 1.

    Its cumulants are shape (n - 1)!, so that the mean, the variance and their covariance have the variances
    shape / count, (6 shape + 2 shape^2) / count and 2 shape / count.
    """
    return math.sqrt(max(0.0, shape * (2 * shape + 3)) / count) if count > 0 else 0.0


def covariance_with_loss(draws: np.ndarray, gap_var: np.ndarray, drift_sq: np.ndarray, nbeta: float) -> Slope:
    """Cov(nbeta L, |G|^2) over all draws; unknown where minibatches make it up.

    A minibatch of large examples has a large loss and a large gradient both: where its part of the loss's variance is
    above ``NOISE_SHARE``, the covariance is of no use. Standard error from the spread over quarters of the chains.

    Args:
        draws: nbeta (L_m(w) - L_m(w*)), (chain, draw). gap_var: per draw, of L_m(w) - L_m(w*). drift_sq: G'PG.
    """
    parts = _quarters(draws, drift_sq)
    if parts is None or not nbeta**2 * gap_var.mean(dtype=np.float64) <= NOISE_SHARE * draws.var():
        return UNKNOWN
    return _mean_of(_product(*parts))


def tilt_of(tilt: np.ndarray, nbeta: float) -> Slope:
    """nbeta <grad L(w*), E[w] - w*> / 2: what lies on a slope at w* takes from the estimate; 0 at a minimum.

    Derivation, on a quadratic of Hessian H with gradient g at w*: the chains are centered on the minimum, w* less
    g / H, which lies nbeta g'g / (2 H) lower than w*, in units of the LLC. The estimate is by as much less than it
    would be around that minimum; and nbeta <g, E[w] - w*> is minus twice that, with the localization in H as well.

    Args:
        tilt: <grad L_m(w*), w - w*>, (chain, draw), NaN where it was not looked at.

    Error: from the spread over quarters of the chains and that over chains, whichever is larger.
    """
    if tilt.shape[0] == 0 or tilt.shape[1] < 4:
        return UNKNOWN
    values = nbeta / 2 * tilt.astype(np.float64)
    parts = [part[np.isfinite(part)] for chain in values for part in np.array_split(chain, 4)]
    if not all(len(part) for part in parts):
        return UNKNOWN
    means = np.array([part.mean() for part in parts])
    each = means.reshape(-1, 4).mean(1)
    errors = [x.std(ddof=1) / math.sqrt(len(x)) for x in (means, each) if len(x) > 1]
    return Slope(float(means.mean()), float(max(errors)))


def _quarters(*traces: np.ndarray) -> list[np.ndarray] | None:
    """Each as rows of float64, a quarter of a chain each; None with fewer than 8 draws in one."""
    count = traces[0].shape[1] // 4
    if traces[0].shape[0] == 0 or count < 8:
        return None
    return [x[:, : 4 * count].reshape(-1, count).astype(np.float64) for x in traces]


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Around the grand means: a quarter's own would hide what moves slowly."""
    return (a - a.mean()) * (b - b.mean())


def _mean_of(rows: np.ndarray) -> Slope:
    means = rows.mean(1)
    return Slope(float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means))))


def degree_of(draws: np.ndarray, virial: np.ndarray, distance_sq: np.ndarray, localization: float) -> Slope:
    """The power of the distance from w* with which the loss grows where the chains are, and its standard error.

    mean <w - w*, nbeta grad L> / mean nbeta (L - L(w*)): k, by Euler, for a homogeneous loss of degree k; 2 near a
    regular minimum, 4 for x^2 y^2. A valley that bends adds to it, and a value far above says that the localization
    holds the chains where w* no longer decides the shape of the loss.

    Args:
        draws: nbeta (L_m(w) - L_m(w*)), (chain, draw). virial: <w - w*, G>. distance_sq: |w - w*|^2.
    """
    if (parts := _quarters(draws, virial, distance_sq)) is None or not draws.mean() > 0:
        return UNKNOWN
    energy, total, away = parts
    fall = (total - localization * away).mean(1)
    ratio = fall.mean() / energy.mean()
    # of the ratio of two means, to first order
    error = (fall - ratio * energy.mean(1)).std(ddof=1) / math.sqrt(len(fall)) / energy.mean()
    return Slope(float(ratio), float(error))


def rises_with_nbeta(up: Slope, down: Slope, degree: float) -> tuple[Slope, ...]:
    """(``up``, the same as known from both slopes); () where either is unknown.

    A homogeneous loss of degree k reads a function of nbeta / localization^(k / 2): d LLC / d log nbeta is -2 / k times
    d LLC / d log localization. Their noise is nearly independent, and their mean weighted by 1 / error^2 is known
    better than either.
    """
    if not (up.stderr > 0 and down.stderr > 0):
        return ()
    ratio = 2 / degree if degree > 0 else 1.0
    share = 1 / (1 + (ratio * down.stderr / up.stderr) ** 2)
    return up, Slope(up.value - share * (up.value + ratio * down.value), math.sqrt(1 - share) * up.stderr)


def spacing_of(loss: float) -> float:
    """Distance from a loss to the next number of float32; 0 at 0, where it is the smallest number of all."""
    return float(np.spacing(np.float32(abs(loss)))) if loss else 0.0
