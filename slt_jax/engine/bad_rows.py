"""Which rows of the data make the loss at w* or its gradient non-finite: looked for when a chain has stopped."""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from slt_jax.engine.loop import Engine, Inputs, Run, chunk_indices
from slt_jax.engine.problem import Problem
from slt_jax.posterior.data import Source
from slt_jax.posterior.program import LossProgram
from slt_jax.posterior.tree import to_host

_MOST_CHAINS, _MOST_BLOCKS, _NAMED = 4, 1024, 8


def cause_of_stops(engine: Engine, run: Run, inputs: Inputs) -> dict[int, str]:
    """Chain -> why it went non-finite, for the first ones whose batch at that step is not finite at w* either."""
    finite = np.isfinite(run.trace.loss[:, : run.step]) & np.isfinite(run.trace.drift_sq[:, : run.step])
    causes = {}
    for chain in np.flatnonzero(~finite.all(1))[:_MOST_CHAINS].tolist():
        step = int(np.argmin(finite[chain]))
        by_loss = not np.isfinite(run.trace.loss[chain, step])
        indices = _indices(engine, inputs, chain, step)
        if text := _text(engine.problem, None, [indices], by_gradient=not by_loss, all_too=True):
            causes[chain] = text
    return causes


def bad_rows_text(problem: Problem, data: Source | None = None, *, by_gradient: bool = False) -> str:
    """A sentence that names rows whose loss (or its gradient) at w* is not finite; "" where none are found, or all are.

    ``data``: another data set than the problem's own. At most 1,024 batches are looked at.
    """
    num, size = (problem.source if data is None else data).num_data, problem.batch_size
    begins = range(0, min(num, size * _MOST_BLOCKS), size)
    blocks = (np.arange(begin, min(begin + size, num)) for begin in begins)
    return _text(problem, data, blocks, by_gradient=by_gradient, all_too=False)


def joined(causes: Mapping[int, str], stopped: Iterable[int]) -> str:
    """What stopped these chains, as far as it is known; "" where it is not."""
    text = " ".join(dict.fromkeys(causes[chain] for chain in stopped if chain in causes))
    return f"{text[:600]} ..." if len(text) > 600 else text


def _indices(engine: Engine, inputs: Inputs, chain: int, step: int) -> np.ndarray:
    """The examples of one chain's step."""
    num, size = engine.problem.source.num_data, engine.plan.batch_size
    if engine.static.full_batch or engine.problem.takes_all:
        return np.arange(num)
    return to_host(chunk_indices(inputs.keys, step, 1, num, size))[chain, 0]


def _text(
    problem: Problem, data: Source | None, blocks: Iterable[np.ndarray], *, by_gradient: bool, all_too: bool
) -> str:
    """Of the first of ``blocks`` with such rows. ``all_too``: also where every row of a block is one."""
    what = "the gradient of the loss" if by_gradient else "the loss"
    center, found, seen = problem.on_first_device(problem.center), [], 0
    for indices in blocks:
        batch = problem.fetch(indices, data)
        if not by_gradient and np.isfinite(problem.loss_at(center, batch)):
            continue
        seen += len(indices)
        try:
            frozen = problem.on_first_device(problem.frozen)
            fine = to_host(_fine_rows(problem.program, by_gradient, center, frozen, batch))
        except Exception:  # a loss that takes no single rows
            return f"{what} at w* is not finite on a batch that holds row {indices[0]}."
        found += indices[~fine].tolist()
        if len(set(found)) > _NAMED:
            break
        if not found and not by_gradient:
            return (
                f"{what} at w* is not finite on a batch that holds row {indices[0]}, though it is on every row by "
                "itself: look for a division by zero, such as a mean over a mask that leaves out all rows."
            )
    rows = sorted(set(found))
    if not rows or (len(found) == seen > 1 and not all_too):
        return ""
    named = ", ".join(map(str, rows[:_NAMED])) + (" and others" if len(rows) > _NAMED else "")
    if len(found) == seen > 1:
        return (
            f"{what} at w* is not finite on a batch, nor on any of its rows by itself ({named}): look for a division "
            "by zero, such as a mean over a mask that leaves out all of them."
        )
    if len(rows) == 1:
        return f"{what} at w* is not finite on row {named} of the data. Repair or remove it."
    return f"{what} at w* is not finite on rows {named} of the data. Repair or remove them."


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fine_rows(
    program: LossProgram, by_gradient: bool, center: PyTree, frozen: PyTree, batch: PyTree
) -> Bool[Array, " row"]:
    """Whether the loss at w*, or its gradient, of each row by itself is finite."""

    def fine(row: PyTree) -> Bool[Array, ""]:
        one = jax.tree.map(lambda x: x[None], row)
        if not by_gradient:
            return jnp.isfinite(program.mean_loss(center, frozen, one))
        grad = jax.grad(program.mean_loss)(center, frozen, one)
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(g)) for g in grad]))

    return jax.lax.map(fine, jax.tree.map(jnp.asarray, batch))
