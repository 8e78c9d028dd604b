"""The stage that chooses the localization, from the largest curvature."""

import jax
import jax.numpy as jnp

from slt_jax.samplers.base import Position

KAPPA = 1e6  # largest curvature over localization, at most
KAPPA_METRIC = 1e9  # the same where a metric takes care of the range
REACH = 2.5  # of a flat direction, in typical weights
REACH_METRIC = 0.35  # the same in a metric's coordinates, in which chains do get that far


@jax.jit
def _squares(center: Position) -> Position:
    return tuple(w * w for w in center)


@jax.jit
def _sums(arrays: Position) -> Position:
    return tuple(jnp.sum(x) for x in arrays)


def choose_localization(curvature: float, center: Position, *, metric: bool) -> float:
    """A flat direction moves a weight by ``REACH`` typical weights, or by as little as curvature / ``KAPPA`` allows."""
    kappa, reach = (KAPPA_METRIC, REACH_METRIC) if metric else (KAPPA, REACH)
    count = sum(w.size for w in center)
    mean_square = sum(map(float, _sums(_squares(center)))) / count
    # All zeros have no scale of their own: flat directions then move by 1.
    return max(curvature / kappa, reach**-2 / mean_square if mean_square > 0 else 1.0)


def is_set_by_curvature(localization: float, curvature: float, *, metric: bool) -> bool:
    """Whether a localization that was chosen is the least that the largest curvature allows."""
    return localization * (KAPPA_METRIC if metric else KAPPA) < 1.01 * curvature


def localization_line(localization: float, curvature: float, *, metric: bool) -> str:
    """What was chosen, and why, for a person."""
    kappa, reach = (KAPPA_METRIC, REACH_METRIC) if metric else (KAPPA, REACH)
    why = f"a flat direction moves a weight by {reach} typical weights"
    if is_set_by_curvature(localization, curvature, metric=metric):
        why = f"largest curvature / {kappa:.0g}"
    return f"localization {localization:.3g}: {why}"
