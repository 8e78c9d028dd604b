"""Learning coefficients without L(w*), from finished results: far noisier, and wrong in other ways."""

import math
from typing import NamedTuple

import numpy as np

from slt_jax.diagnostics.series import ess_and_rhat, standard_error
from slt_jax.results.llc import LLCResult


class CrossCheck(NamedTuple):
    """An estimate of the LLC and its standard error."""

    llc: float
    llc_stderr: float


def variance_estimator(result: LLCResult) -> CrossCheck:
    """nbeta^2 Var(L_n(w)) over the draws.

    At the asymptotic temperature nbeta (L_n(w) - L_n(w*)) has a Gamma law of mean and variance LLC. The losses drawn
    are minibatch means; the variance that the spread of examples within the batch gives them is subtracted.

    This is the variance of the mean loss, an estimate of the LLC, and not the singular fluctuation, which is half of
    beta times the sum of the variances of single losses: ``generalization`` estimates that.

    Raises:
        ValueError: the losses came as batch means, so that their spread within a batch is not known.

    Error: agrees with ``result.llc`` only where that does not depend on nbeta, and is heated by step size and noise as
    it is. Source: Imai, arXiv:1906.01341; with the minibatch correction, arXiv:2606.22389.
    """
    draws = result.llc_draws
    noise = result.traces.gap_var[result.kept_chains].astype(np.float64) * result.settings.nbeta**2
    if not draws.size or not np.isfinite(noise).all():
        raise ValueError(
            "the variance estimator needs the losses of single examples, at every draw: let loss_fn return one loss "
            "per example (shape (m,)), and take batch_size of at least 2."
        )
    squares = (draws - draws.mean()) ** 2 * draws.size / (draws.size - 1) - noise
    return CrossCheck(float(squares.mean()), standard_error(squares, ess_and_rhat(squares)[0]))


def two_temperature_estimator(first: LLCResult, second: LLCResult) -> CrossCheck:
    """(E_1[L] - E_2[L]) / (1 / nbeta_1 - 1 / nbeta_2), with L_n(w*) nowhere.

    Both results are of one w*, data set and localization, at two values of nbeta; the further apart, the less noise.
    The losses are read as they were drawn, without their baseline.

    Raises:
        ValueError: the same nbeta twice, or results of different problems.

    Error: at second order in log(nbeta_1 / nbeta_2) where the LLC depends on nbeta. Source: Watanabe, JMLR 14 (2013),
    867-897, theorem 4.
    """
    a, b = first.settings, second.settings
    if not a.nbeta or not b.nbeta:
        raise ValueError("a result has nbeta = 0, which says nothing of the loss. Give two with nbeta > 0.")
    if math.isclose(a.nbeta, b.nbeta, rel_tol=1e-9):
        raise ValueError(f"both results have nbeta = {a.nbeta:.6g}; give two that differ, e.g. by a factor of 2.")
    for name in ("num_data", "num_free", "localization"):
        if (values := (getattr(a, name), getattr(b, name)))[0] != values[1]:
            raise ValueError(f"the results differ in {name}: {values[0]} and {values[1]}. Only nbeta may differ.")
    means, errors = [], []
    for result in (first, second):
        losses = result.traces.loss[result.kept_chains].astype(np.float64)
        means.append(losses.mean())
        errors.append(standard_error(losses, ess_and_rhat(losses)[0]))
    width = 1 / a.nbeta - 1 / b.nbeta
    return CrossCheck(float((means[0] - means[1]) / width), float(math.hypot(*errors) / abs(width)))
