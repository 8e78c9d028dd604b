"""Weights of groups of data that move the components of a model as wanted, and how far they would move them."""

import math
from typing import Any, NamedTuple

import numpy as np

from slt_jax._checks import shown
from slt_jax.results.observed import FEWEST_DRAWS
from slt_jax.results.susceptibility_columns import mean_error


class Response(NamedTuple):
    """The response matrix by blocks of draws, each value nbeta times the mean of chi over a group of examples.

    ``parts``: (component, block, group); ``count``: draws, (component, block). ``widening``: (component,), as in
    ``Column``. ``full``: (component, block, group), what the draws of all weights contribute, and ``full_count``; no
    blocks for the one-chain estimator. ``full_widening``: of these.
    """

    parts: np.ndarray
    count: np.ndarray
    widening: np.ndarray
    full: np.ndarray
    full_count: np.ndarray
    full_widening: float

    def times(self, factor: float) -> "Response":
        return self._replace(parts=factor * self.parts, full=factor * self.full)


def weights_for(matrix: np.ndarray, error: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """h that minimizes sum_c (sum_g h_g R_gc - wanted_c)^2 + sum_g h_g^2 sum_c s_gc^2.

    Args:
        matrix, error: R and its standard errors s, (group, component).
    """
    ridge = np.sqrt((error**2).sum(1))
    scaled = matrix / np.where(ridge > 0, ridge, np.inf)[:, None]
    weights = scaled @ np.linalg.solve(scaled.T @ scaled + np.eye(len(wanted)), wanted)
    return weights / np.where(ridge > 0, ridge, np.inf)


def matrix_of(response: Response) -> tuple[np.ndarray, np.ndarray]:
    """The response matrix and its standard errors, (group, component); NaN for components without draws."""
    value, error = np.full((2, *response.parts[:, 0].T.shape), np.nan)
    for c, (parts, count) in enumerate(zip(response.parts, response.count, strict=True)):
        if count.sum():
            value[:, c] = _mean(parts, count)
            error[:, c] = mean_error(parts, count, float(response.widening[c]))
    if len(response.full_count):
        more = [mean_error(full, response.full_count, response.full_widening) for full in response.full]
        error = np.hypot(error, np.stack(more, 1))
    return value, error


def reached_by(response: Response, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(component,) each: how far such weights move the components, and the standard error of that.

    Weights that fit the noise of a response matrix move that matrix as wanted, and the model less. So the effect in
    each block of draws is that of weights from all other blocks, and the result is the mean over blocks. NaN for fewer
    than four blocks, or five draws.
    """
    components, blocks, _ = response.parts.shape
    own, used = np.full((components, blocks), np.nan), response.count > 0
    if blocks < 4 or response.count.sum(1).min(initial=math.inf) <= FEWEST_DRAWS:
        return np.full(components, np.nan), np.full(components, np.nan)
    for block in np.flatnonzero(used.any(0)):
        rest, here = _without(response, int(block))
        own[:, block] = here @ weights_for(*matrix_of(rest), wanted)
    value, spread = np.zeros((2, components))
    for c in range(components):
        known = np.where(used[c], own[c], 0.0)
        value[c] = known @ response.count[c] / response.count[c].sum()
        widening = max(float(response.widening[c]), response.full_widening)
        (spread[c],) = mean_error(known[:, None], response.count[c], widening)
    return value, spread


def _without(response: Response, block: int) -> tuple[Response, np.ndarray]:
    """(the response of all blocks but one, that of this block alone: (component, group))."""
    count = response.count * (np.arange(response.count.shape[1]) != block)
    rest, here = response._replace(count=count), response.parts[:, block]
    full_count = response.full_count * (np.arange(len(response.full_count)) != block)
    if block < len(full_count) and full_count.sum():
        mean = _mean(response.full, response.full_count)
        shift = _mean(response.full, full_count) - mean
        rest = rest._replace(parts=response.parts + shift[:, None], full_count=full_count)
        here = here + (response.full[:, block] - mean)
    return rest, here


def _mean(parts: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Over the blocks of (..., block, group), weighted by their draws."""
    return np.tensordot(count, parts, (0, -2)) / count.sum()


def check_labels(groups: Any) -> None:
    """Raises TypeError if these are no labels of examples."""
    if isinstance(groups, str) or not hasattr(groups, "__len__"):
        raise TypeError(
            f"groups must be a list with a label for each example, or name -> indices, got {shown(groups)}."
        )
