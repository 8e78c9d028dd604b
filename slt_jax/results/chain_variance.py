"""The functional variance from the differences between chains at the same draw."""

import math

import numpy as np

from slt_jax.diagnostics.estimate import Estimate
from slt_jax.diagnostics.series import ess_and_rhat, standard_error
from slt_jax.results.observed import Observed

_PIECE = 1 << 22  # numbers that are read at once


def variance_between_chains(observed: Observed) -> Estimate | None:
    """Mean over draws and examples of the variance over chains, nats^2, where a loss is the sum over tokens.

    At each draw the losses of an example in C independent, stationary chains are C independent draws, so that their
    variance is unbiased however slowly a chain moves. It is too small while chains are still near their common start.

    Returns:
        None where the values were not kept, or for a single chain. Its error is from the series over draws, and from
        having observed some of the ``num_data`` examples.
    """
    chains, draws = observed.gap.shape
    if observed.values is None or chains < 2 or not draws:
        return None
    step, series, by_example = max(1, _PIECE // max(1, chains * observed.center.size)), [], 0.0
    for start in range(0, draws, step):
        values = np.asarray(observed.values[:, start : start + step])
        losses = values if observed.center.ndim == 1 else observed.summed(values)
        each = losses.astype(np.float64).var(0, ddof=1)
        series.append(each.mean(-1))
        by_example = by_example + each.sum(0) / draws
    count, over_draws = len(observed.center), np.concatenate(series)[None]
    error = standard_error(over_draws, ess_and_rhat(over_draws)[0])
    missed = max(0.0, 1 - count / observed.num_data)
    sampling = float(np.std(by_example, ddof=1)) * math.sqrt(missed / count) if missed and count > 1 else 0.0
    return Estimate(float(over_draws.mean()), math.hypot(error, sampling))
