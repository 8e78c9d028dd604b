"""How far the step size and minibatch noise move an estimate, to first order, and when that may be taken off.

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
from dataclasses import dataclass

import numpy as np

from slt_jax.diagnostics.limits import CORRECTION_SHARE as LARGEST


@dataclass(frozen=True)
class Bias:
    """Estimated bias of the raw estimate, in units of the LLC; NaN where unknown.

    ``step_size``: of the discretization. ``noise``: of minibatch gradients. ``stderr``: of their sum. ``applied``: what
    was taken off. ``why``: how it was found, or why it was not applied.
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


def heating(family: str, step_size: float, friction: float, noise: float) -> float:
    """What minibatch noise adds to the estimate; ``noise``: trace of the covariance of nbeta grad L_m(w).

    Euler-Maruyama and Leimkuhler-Matthews: step_size / 8. BAOAB: step_size coth(friction / 2) / 8. SGHMC:
    step_size / (4 friction). Times ``noise``, each. NaN for samplers without a theory here.
    """
    factor = {
        "euler": lambda: 1 / 8,
        "matthews": lambda: 1 / 8,
        "baoab": lambda: 1 / (8 * math.tanh(friction / 2)),
        "sghmc": lambda: 1 / (4 * friction),
        "exact": lambda: 0.0,
    }.get(family, lambda: math.nan)()
    return step_size * factor * noise


def thermometer(kinetic: np.ndarray, num_free: int, ess: float) -> tuple[float, float]:
    """(excess, standard error) of the kinetic temperature, times d / 2: the heat, were it spread like the curvature.

    Exact where all directions that minibatch noise heats have a curvature far above the localization.
    """
    if kinetic.size < 8 or not np.isfinite(kinetic).all():
        return math.nan, math.nan
    error = kinetic.std(ddof=1, dtype=np.float64) / math.sqrt(max(1.0, ess))
    return float(num_free / 2 * (kinetic.mean(dtype=np.float64) - 1)), float(num_free / 2 * error)


def bias_of(
    family: str,
    raw: float,
    drift_sq: float,
    heat: tuple[float, float],
    noise: tuple[float, float],
    settings: dict,
    with_loss: tuple[float, float] = (math.nan, math.nan),
    degree: float = math.nan,
) -> Bias:
    """The bias of an estimate.

    Args:
        family: the sampler's.
        raw: nbeta times the mean gap.
        drift_sq: mean of G'PG over the draws, less localization times the mean of <w - w*, PG>, that is, the mean of
            <nbeta grad L, PG>: the localization's own share moves only directions that do not count.
        heat: what ``thermometer`` found, NaN for a sampler without momentum.
        noise: trace of the covariance of nbeta grad L_m(w), and its standard error; NaN when not measured.
        settings: of the run: step_size, friction.
        with_loss, degree: what ``covariance_with_loss`` and ``degree_of`` of ``diagnostics`` found; without them
            Euler-Maruyama's bias is that on a quadratic.
    """
    size, friction = settings["step_size"], settings.get("friction", 0.1)
    if family == "exact":
        return Bias(0.0, 0.0, 0.0, 0.0, "exact: every move passed a Metropolis test, over the whole data set")
    step, error = math.nan, 0.0
    added = heating(family, size, friction, noise[0])
    added_error = heating(family, size, friction, noise[1])
    why = "no minibatch noise" if noise[0] == 0 else "two half batches"
    smooth = drift_sq - (noise[0] if math.isfinite(noise[0]) else 0.0)
    if family == "euler":
        step, why = size / 8 * smooth, "step_size / 8 of the mean <nbeta grad L, G>"
        if math.isfinite(with_loss[0] + degree + added) and smooth > 0:
            shares = 2 - (with_loss[0] + with_loss[1] * np.array([0.0, 1.0, -1.0])) / smooth
            share, low, high = np.clip(shares, 2 / max(2.0, degree), 1.0).tolist()
            step, error = share * step, (high - low) / 2 * step
            why = f"{share:.2f} times {why}"
    elif family == "sghmc":
        step = size * smooth / (8 - 4 * friction)
        error = added_error
    elif family in ("matthews", "baoab"):
        step, error = 0.0, added_error
        if math.isfinite(heat[1]) and not 2 * added_error <= heat[1]:
            added, error, why = heat[0], heat[1], "the kinetic thermometer"
        if settings.get("control_variate") and math.isfinite(added):
            # Label noise times second derivatives heats flat directions too, which do not count: none to all of it.
            added, error, why = added / 2, math.hypot(error, added / math.sqrt(12)), f"half of {why}, give or take"
    if math.isnan(step) and math.isnan(added):
        return Bias(step, added, math.nan, 0.0, "no theory of its bias for this sampler")
    found = Bias(step, added, error if math.isfinite(error) else 0.0, 0.0, why)
    if not abs(found.total) <= LARGEST * abs(raw):
        return Bias(step, added, found.stderr, 0.0, f"over {LARGEST:.0%} of the raw estimate, so it is not taken off")
    return Bias(step, added, found.stderr, found.total, why)
