"""Is a loss that returns one number the mean over its batch? A few small batches tell, before anything is sampled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from slt_jax.engine.problem import Problem
from slt_jax.posterior.program import LossProgram

_PART = 4  # rows; small batches hold one part or two
_GREW, _SAME = 1.8, 0.02  # least factor of a sum when its rows are doubled; share within which two sums are equal
_STEP = 0.05  # from w*, where a loss may be 0 whatever it does with its rows


def check_loss(problem: Problem) -> None:
    """Raise ValueError when a scalar loss adds up its batch, or uses the first rows alone.

    One compiled forward pass over batches of four and eight rows, near w*; nothing is compiled for a loss that returns
    one value per example. A loss that takes no such batches is not looked at.
    """
    source, rows = problem.source, _PART * 3
    if source.num_data < rows or not _returns_scalar(problem):
        return
    indices = np.linspace(0, source.num_data - 1, rows).astype(np.int64)
    center, frozen = problem.on_first_device(problem.center), problem.on_first_device(problem.frozen)
    try:
        values = np.asarray(_on_parts(problem.program, center, frozen, problem.fetch(indices)), np.float64)
    except Exception:  # it may need a batch of its own size
        return
    a, b, double, ab, ac, ba, bc = values
    if not np.isfinite(values).all():
        return
    added = double - a
    if a and double / a > _GREW and abs(ab - b - added) < _SAME * abs(added):
        raise ValueError(
            f"loss_fn adds up its batch: with the same {_PART} rows given twice, its value grew by a factor of "
            f"{double / a:.3g}, from {a:.5g} to {double:.5g}. Return the mean, or one loss per example of shape (m,)."
        )
    if ab == ac and ba == bc and ab != ba:
        raise ValueError(
            f"loss_fn does not use all rows of its batch: of {2 * _PART} rows, the last {_PART} can be replaced, and "
            f"its value stays {ab:.5g}. If it takes batch[0], batch[1] as inputs and targets, pass the data as (X, Y)."
        )


@functools.partial(jax.jit, static_argnums=0)
def _on_parts(program: LossProgram, center: PyTree, frozen: PyTree, rows: PyTree) -> Float[Array, " value"]:
    """Mean losses near ``center``: over the parts A and B of ``rows``, and over the pairs AA, AB, AC, BA and BC."""
    near = tuple(
        w + _STEP * (1 + jnp.abs(w)) * jnp.cos(jnp.arange(1, w.size + 1, dtype=w.dtype)).reshape(w.shape)
        for w in center
    )

    def on(parts: Any) -> Float[Array, ""]:
        chosen = (jnp.asarray(parts)[:, None] * _PART + jnp.arange(_PART)).reshape(-1)
        return program.mean_loss(near, frozen, jax.tree.map(lambda x: jnp.asarray(x)[chosen], rows))

    singles = jax.lax.map(on, jnp.array([[0], [1]]))
    return jnp.concatenate([singles, jax.lax.map(on, jnp.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 2]]))])


def _returns_scalar(problem: Problem) -> bool:
    row = problem.source.fetch(np.zeros(1, np.int64))
    size = problem.batch_size // problem.micro_batches
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)), row
    )
    leaves, treedef = jax.tree.flatten((problem.center, problem.frozen, batch))
    return _shape_of(problem.program, treedef, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)) == ()


@functools.lru_cache(maxsize=16)
def _shape_of(program: LossProgram, treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[int, ...]:
    """Of what ``loss_fn`` returns on such a batch."""
    return jax.eval_shape(program.losses, *jax.tree.unflatten(treedef, leaves)).shape
