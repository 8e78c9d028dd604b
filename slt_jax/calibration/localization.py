"""The stage that chooses the localization, from the largest curvature."""

import jax.numpy as jnp

from slt_jax.samplers.base import Position

KAPPA = 1e6  # largest curvature over localization, at most
KAPPA_METRIC = 1e9  # the same where a metric takes care of the range
REACH = 2.5  # of a flat direction, in typical weights
REACH_METRIC = 0.35  # the same in a metric's coordinates, in which chains do get that far


def choose_localization(curvature: float, center: Position, *, metric: bool) -> float:
    """A flat direction moves a weight by ``REACH`` typical weights, or by as little as curvature / ``KAPPA`` allows."""
    kappa, reach = (KAPPA_METRIC, REACH_METRIC) if metric else (KAPPA, REACH)
    count = sum(w.size for w in center)
    mean_square = sum(float(jnp.sum(w * w)) for w in center) / count
    # All zeros have no scale of their own: flat directions then move by 1.
    return max(curvature / kappa, reach**-2 / mean_square if mean_square > 0 else 1.0)


def localization_line(localization: float, curvature: float, *, metric: bool) -> str:
    """What was chosen, and why, for a person."""
    kappa, reach = (KAPPA_METRIC, REACH_METRIC) if metric else (KAPPA, REACH)
    why = f"a flat direction moves a weight by {reach} typical weights"
    why = f"largest curvature / {kappa:.0g}" if localization * kappa < 1.01 * curvature else why
    return f"localization {localization:.3g}: {why}"
