"""Checks of the arguments of an estimate beyond those of single numbers. Each raises TypeError or ValueError."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from slt_jax._checks import check_count, check_positive, shown
from slt_jax.calibration.effort import default_batch
from slt_jax.posterior.data import ArrayData, Source, check_batch_size
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.observable import Observable
from slt_jax.samplers.base import Sampler


def check_posterior(posterior: Any, *, described: bool = False) -> None:
    """``described``: whether its weights may be shapes alone."""
    if not isinstance(posterior, LocalPosterior):
        raise TypeError(
            f"posterior must be a LocalPosterior, got a {type(posterior).__name__}. "
            "Pass slt_jax.LocalPosterior(loss_fn, center, num_data) first, then the data."
        )
    if posterior.is_described and not described:
        raise ValueError("center holds shapes in the place of weights, of which only plan takes. Give it the arrays.")


def check_target(target_error: Any, minutes: Any, num_draws: Any) -> None:
    if target_error is None:
        if minutes is not None:
            raise ValueError(f"minutes = {shown(minutes)} is a limit for target_error. Give target_error=0.03 with it.")
        return
    check_positive("target_error", target_error, "It is the relative error to reach: 0.03 for 3 %.")
    if target_error >= 1:
        raise ValueError(f"target_error must be below 1, got {shown(target_error)}. It is a share: 0.03 for 3 %.")
    if minutes is not None:
        check_positive("minutes", minutes, "It is the time after which no further steps are begun.")
    if num_draws is not None:
        raise ValueError(
            f"target_error = {target_error} and num_draws = {num_draws} both set the length. Give one of "
            "them; budget or minutes limits the steps for target_error."
        )


def check_observables(
    observables: Mapping[str, tuple[Observable, ArrayData]], also: Collection[str], target_error: float | None
) -> None:
    if both := [name for name in observables if name in also]:
        raise ValueError(f"observe and also both have the name {both[0]!r}. Give one of them another name.")
    for name, (observable, _) in observables.items():
        if observable.path is not None and target_error is not None:
            raise ValueError(
                f"observe['{name}'] is written to a path, and target_error leaves open how long the run is. Give a "
                "budget or num_draws, or leave path out."
            )


def check_no_path(observables: Mapping[str, tuple[Observable, ArrayData]]) -> None:
    for name, (observable, _) in observables.items():
        if observable.path is not None:
            raise ValueError(
                f"observe['{name}'] is written to a path, and the cells of a sweep are one run. Leave path out to keep "
                "the values in memory, take keep='moments', or call estimate_llc at the numbers of a cell."
            )


def check_control(sampler: Sampler, target_error: float | None) -> None:
    if target_error is not None:
        raise ValueError(
            f"target_error = {target_error} is a share of the LLC, which is 0 at nbeta = 0. Give num_draws or a budget."
        )
    if sampler.metric:
        raise ValueError(
            "at nbeta = 0 all directions have one curvature, the localization, and no metric can be measured. Take "
            "underdamped() without one."
        )


def check_dynamics(control_variate: Any, hot: Any) -> None:
    if control_variate is not None and not isinstance(control_variate, bool | np.bool_):
        raise TypeError(f"control_variate must be True, False or None, got {shown(control_variate)}.")
    if hot is not None:
        check_positive("hot", hot, "1 starts every chain at w*, 10 every other one at a tenth of nbeta.")
        if hot < 1:
            raise ValueError(f"hot must be at least 1, got {hot}. 10 starts every other chain at nbeta / 10.")


def checked_batch(
    source: Source, sampler: Sampler, num_weights: int, batch_size: int | None, micro_batches: int, baseline: str,
    chunk_size: int,
) -> tuple[int, float]:  # fmt: skip
    """(batch size, price of its gradient); see ``default_batch``. Raises TypeError, ValueError."""
    for name, value in {"chunk_size": chunk_size, "micro_batches": micro_batches}.items():
        check_count(name, value, 1)
    whole, price = sampler.theory.full_batch, 1.0
    if batch_size is None and whole:
        batch_size = source.num_data
    elif batch_size is None:
        in_parts = source.on_host or micro_batches > 1
        size = math.inf if in_parts else sum(x.nbytes for x in jax.tree.leaves(source.arrays))
        batch_size, price = default_batch(source.num_data, num_weights, size)
    check_batch_size(batch_size, source.num_data)
    if whole and (source.on_host or batch_size != source.num_data):
        raise ValueError(
            f"{sampler.name} takes every gradient over the whole data set: give the data as arrays in memory, and "
            "leave batch_size out."
        )
    if batch_size % micro_batches:
        raise ValueError(f"micro_batches = {micro_batches} does not divide batch_size = {batch_size}. Take a divisor.")
    if not isinstance(baseline, str) or baseline not in ("paired", "full"):
        raise ValueError(f"baseline must be 'paired' or 'full', got {shown(baseline)}. 'paired' has less variance.")
    return batch_size, price
