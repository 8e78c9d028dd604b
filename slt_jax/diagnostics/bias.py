"""How far the step size and minibatch noise move an estimate, to first order, and when that may be subtracted.

Every term is half a sum over directions of curvature times excess variance, so it is in units of the LLC. Derived for
quadratics, where the laws of the discretized chains are known exactly (the samplers' docstrings give them), and good
beyond as long as the term is small beside the estimate; that of Euler-Maruyama's step is derived for any loss:

Steps of size eps along -(eps/2) G, G = grad U, with noise of variance eps sample, to first order,

    exp(-U + (eps/2) (|G|^2 / 4 - lap U / 2))

(backward error analysis). The mean of V = nbeta L moves by eps/2 times V's covariance with the bracket. Integrating by
parts, Cov(V, lap U) = Cov(V, |G|^2) - E<G, grad V>, so that of everything the draws know every part:

    bias = (eps/8) (2 E<grad V, G> - Cov(V, |G|^2)).

On a quadratic the covariance is E<grad V, G>, and once that is left. On a homogeneous loss of degree k it is 2 / k of
that, exactly and at any step, since E<w - w*, G> = d + (eps/4) E|G|^2 holds for the chain itself. A long step inflates
the covariance by rare draws far out, so the share is kept between the two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from slt_jax.diagnostics.limits import CORRECTION_SHARE as LARGEST

# Standard error of what minibatch noise adds, relative to it, beside that of its measurement: the theory is that of a
# quadratic. In scaling.checkpoints.zscores, keys 100 to 105 of the MLP, estimates of which 2 to 3 had been subtracted
# were 0.5 +/- 0.5 too high.
BEYOND_FIRST_ORDER = 0.25


@dataclass(frozen=True)
class Bias:
    """Estimated bias of the raw estimate, in units of the LLC; NaN where unknown.

    ``step_size``: of the discretization. ``noise``: of minibatch gradients. ``stderr``: of their sum, with what is
    beyond first order. ``applied``: what
    was subtracted. ``why``: how it was found, or why it was not applied.
    """

    step_size: float
    noise: float
    stderr: float
    applied: float
    why: str

    @property
    def total(self) -> float:
        """Sum of the terms that are known; 0 when none is."""
        return float(np.nansum([self.step_size, self.noise]))


def overdamped_heating(step_size: float, friction: float) -> float:
    """What a unit of gradient noise adds to the estimate under Euler-Maruyama or Leimkuhler-Matthews steps."""
    return step_size * (1 / 8)


def underdamped_heating(step_size: float, friction: float) -> float:
    """The same under BAOAB steps."""
    return step_size * (1 / (8 * math.tanh(friction / 2)))


def euler_step_bias(step_size: float, friction: float, smooth: float) -> float:
    """What Euler-Maruyama's step adds on a quadratic; ``smooth``: mean <nbeta grad L, P G>, without minibatch noise."""
    return step_size / 8 * smooth


def no_step_bias(step_size: float, friction: float, smooth: float) -> float:
    """A scheme that is exact on quadratics: what is left is of second order."""
    return 0.0


def thermometer(kinetic: np.ndarray, num_free: int, ess: float) -> tuple[float, float]:
    """(excess, standard error) of the kinetic temperature, times d / 2: the heat, were it spread like the curvature.

    Exact where all directions that minibatch noise heats have a curvature far above the localization.
    """
    if kinetic.size < 8 or not np.isfinite(kinetic).all():
        return math.nan, math.nan
    error = kinetic.std(ddof=1, dtype=np.float64) / math.sqrt(max(1.0, ess))
    return float(num_free / 2 * (kinetic.mean(dtype=np.float64) - 1)), float(num_free / 2 * error)


@dataclass(frozen=True)
class Moments:
    """What a bias is computed from; NaN where it was not measured.

    ``raw``: nbeta times the mean gap. ``drift_sq``: mean of G'PG over the draws, less localization times the mean of
    <w - w*, PG>, that is, the mean of <nbeta grad L, PG>: the localization's own share moves only directions that do
    not count. ``heat``: value and standard error of ``thermometer``, NaN without momentum. ``noise``: trace of the
    covariance of nbeta grad L_m(w), and its standard error. ``with_loss``: what ``covariance_with_loss`` gives, and
    ``degree`` that of ``degree_of``; without them Euler-Maruyama's bias is that on a quadratic.
    """

    raw: float
    drift_sq: float
    heat: tuple[float, float]
    noise: tuple[float, float]
    step_size: float
    friction: float = 0.1
    control_variate: bool = False
    with_loss: tuple[float, float] = (math.nan, math.nan)
    degree: float = math.nan


def bias_of(
    moments: Moments, heating: Callable[[float, float], float], step_bias: Callable[[float, float, float], float], *,
    covariance_corrects: bool = False, second_order: bool = False,
) -> Bias:  # fmt: skip
    """The bias of an estimate by a sampler with this theory; see ``samplers.base.Theory`` for the arguments."""
    m, step, error, why = moments, math.nan, 0.0, "two half batches"
    each = heating(m.step_size, m.friction)
    noise, noise_error = each * m.noise[0], each * m.noise[1]
    if m.noise[0] == 0:
        why = "no minibatch noise"
    smooth = m.drift_sq - (m.noise[0] if math.isfinite(m.noise[0]) else 0.0)
    step = step_bias(m.step_size, m.friction, smooth)
    if covariance_corrects:
        why = "step_size / 8 of the mean <nbeta grad L, G>"
        if math.isfinite(m.with_loss[0] + m.degree + noise) and smooth > 0:
            share, spread = _share_beyond_quadratics(m, smooth)
            step, error = share * step, spread * step
            why = f"{share:.2f} times {why}"
    else:
        error = math.hypot(noise_error, BEYOND_FIRST_ORDER * noise)
    if second_order:
        noise, error, why = _noise_alone(m, noise, noise_error, why)
    if math.isnan(step) and math.isnan(noise):
        return Bias(step, noise, math.nan, 0.0, "no theory of its bias for this sampler")
    estimated = Bias(step, noise, error if math.isfinite(error) else 0.0, 0.0, why)
    if not abs(estimated.total) <= LARGEST * abs(m.raw):
        return replace(estimated, why=f"over {LARGEST:.0%} of the raw estimate")
    return replace(estimated, applied=estimated.total)


def _share_beyond_quadratics(m: Moments, smooth: float) -> tuple[float, float]:
    """(by how much the bias on a quadratic is to be multiplied, half the width of its interval)."""
    shares = 2 - (m.with_loss[0] + m.with_loss[1] * np.array([0.0, 1.0, -1.0])) / smooth
    share, low, high = np.clip(shares, 2 / max(2.0, m.degree), 1.0).tolist()
    return share, (high - low) / 2


def _noise_alone(m: Moments, noise: float, error: float, why: str) -> tuple[float, float, str]:
    """(bias, its error, how it is known) where the step itself adds nothing: by the surer of probe and thermometer."""
    if math.isfinite(m.heat[1]) and not 2 * error <= m.heat[1]:
        noise, error, why = m.heat[0], m.heat[1], "the kinetic thermometer"
    if m.control_variate and math.isfinite(noise):
        # Label noise times second derivatives heats flat directions too, which do not count: none to all of it.
        return noise / 2, math.hypot(error, noise / math.sqrt(12)), f"half of {why}, give or take"
    return noise, math.hypot(error, BEYOND_FIRST_ORDER * noise), why
