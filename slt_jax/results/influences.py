"""The call that makes an influence of the observables of a result, and its checks."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from slt_jax._checks import shown
from slt_jax.results.llc import LLCResult
from slt_jax.results.loss_covariance import Influence
from slt_jax.results.loss_traces import Traces
from slt_jax.results.observed import Observed, observed_of


def influence(
    result: LLCResult | None, of: Any, on: Any, *, level: str | None = None, normalized: bool = True,
    within_chains: bool = False,
) -> Influence:  # fmt: skip
    """The influence of examples (or tokens) on others: covariances or correlations of their losses over the draws.

    To put the weight 1 + omega_i on the loss l_i of an example changes the mean loss of another by

        d<l_j> / d omega_i = -beta Cov(l_i, l_j),   <.> and Cov over exp(-nbeta L_n(w) - (localization / 2)|w - w*|^2),

    exactly. -Cov(l_i, l_j) is the Bayesian influence function. Times beta it is, to first order in 1 / nbeta, the
    classical one, -g_i' (n H + localization / beta)^-1 g_j with gradients g and the Hessian H of the mean loss at w*.
    The correlation (``normalized``) is between -1 and 1, and positive where i helps j.

    Args:
        result: of a run that observed the data sets, ``estimate_llc(observe=...)``; None for ``Observed`` from
            elsewhere.
        of: name of the observed data set whose weight is changed, or several names, whose units follow one another; or
            an ``Observed``.
        on: name, names or ``Observed`` of what is influenced.
        level: "token" for single tokens, "example" for the sum over the tokens of a text; default as it was observed.
        normalized: correlations; else -Cov, nats^2.
        within_chains: center the losses of each chain at their own mean. By default all have one center, as in the
            literature, so that a difference between chains looks like influence: see ``Influence.between_chains``.

    Returns:
        An ``Influence``, which computes rows, blocks and rankings when they are asked for.

    Raises:
        ValueError: a name that was not observed; values that were not kept; losses that do not change over the draws;
            fewer than 4 draws; tokens asked of data that was observed by example.
        TypeError: something else than names.

    Error: of a correlation about (1 - rho^2) / sqrt(ESS - 3): with few draws most entries are noise, which
    ``noise_floor`` and ``reliability`` measure. Step size and minibatch noise heat covariances as they do the LLC, and
    correlations hardly.

    Source: Bayesian influence functions, arXiv:2509.26544; loss kernel, arXiv:2509.26537.
    """
    sides = []
    for argument, names in (("of", of), ("on", on)):
        if not isinstance(names, str | Observed | Sequence):
            raise TypeError(f"{argument} must be the name of an observed data set, or several, got {shown(names)}.")
        given = [names] if isinstance(names, str | Observed) else list(names)
        parts = tuple(observed_of(result, name, argument) for name in given)
        sides.append(Traces(parts, _level_of(parts, level, argument), within_chains))
    if len(sides[0].parts) == len(sides[1].parts) and all(map(operator.is_, sides[0].parts, sides[1].parts)):
        sides[1] = sides[0]
    left, right = sides
    for argument, traces in (("of", left), ("on", right)):
        _check(traces, argument)
    Traces((left.parts[0], right.parts[0]), left.level)  # of the same draws
    first = left.parts[0]
    beta = first.nbeta / (first.num_data * _units_per_example(left.parts))
    return Influence(left, right, normalized, beta, first.nbeta, first.localization)


def _units_per_example(parts: tuple[Observed, ...]) -> float:
    """Mean number of losses that are averaged for the loss of an example: its tokens that count, or 1."""
    counts = [part.center.size if part.valid is None else int(part.valid.sum()) for part in parts]
    return sum(counts) / sum(len(part.center) for part in parts)


def _level_of(parts: tuple[Observed, ...], level: str | None, argument: str) -> str:
    if not parts:
        raise ValueError(f"{argument} names no data set. Give the name of one that was observed.")
    for part in parts:
        if part.center.ndim > (2 if part.level == "token" else 1):
            raise ValueError(
                f"{argument}={part.name!r} has values of shape {part.center.shape[1:]} for each example. Observe one "
                "number for each example, or for each of its tokens."
            )
    has_tokens = [part.center.ndim == 2 for part in parts]
    if level not in (None, "token", "example"):
        raise ValueError(f"level must be 'token' or 'example', got {level!r}.")
    if level == "token" and not all(has_tokens):
        name = parts[has_tokens.index(False)].name
        raise ValueError(
            f"{argument}={name!r} was observed by example. Observe it with level='token', or leave level out."
        )
    if level is None and len(set(has_tokens)) > 1:
        raise ValueError(f"{argument} has data of both levels. Give level='example', or name them apart.")
    return level or ("token" if all(has_tokens) else "example")


def _check(traces: Traces, argument: str) -> None:
    names = ", ".join(repr(part.name) for part in traces.parts)
    if traces.num_draws < 4:
        raise ValueError(f"covariances need at least 4 draws, and {names} has {traces.num_draws}. Draw more.")
    if not np.isfinite(traces.mean).all():
        bad = traces.labels[np.argmin(np.isfinite(traces.mean))]
        raise ValueError(
            f"{argument}={names} has values that are not finite, first of example {bad[1]}. Leave it out, or mark its "
            "tokens as not valid."
        )
    if np.isnan(traces.sd).all():
        raise ValueError(
            f"no loss of {argument}={names} changes over the draws, so that nothing correlates with it. Does the mask "
            "of the posterior leave out the weights that it depends on?"
        )
