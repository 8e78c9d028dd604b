"""What observables record in a compiled chunk: the values at its draws, or moments, which go on from chunk to chunk.

Moments are those of blocks of draws, by Welford's update, in which a draw has the weight of its step's time.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from slt_jax.posterior.observable import Evaluation

PARTS = 8  # blocks of each chain's draws
MOST_PARTS = 32  # the same of a run that may be lengthened: half of them at first; when they are full, two become one


class Watch(NamedTuple):
    """What of an observable a program depends on.

    ``shape``: of its values. ``blocks``: of equal size, in which its examples go through the model. ``parts``: blocks
    of draws whose moments are kept; 0 where the values are.
    """

    evaluate: Evaluation
    shape: tuple[int, ...]
    blocks: int
    parts: int

    @property
    def num_bytes(self) -> int:
        """Of one draw's values."""
        return 4 * math.prod(self.shape)


class Sums(NamedTuple):
    """Moments of one observable over blocks of draws, ``(chain, part, ...)`` float32; in a program without the chain.

    ``weight``: number of draws, or their time. ``mean``, ``m2``: weighted mean, and sum of squared deviations, of the
    values. ``loss_mean``, ``loss_m2``: the same of the run's own loss, less that at w* if the baseline is paired; they
    are without the axes of the values. ``co``: sum of products of both deviations.
    """

    weight: Any
    mean: Any
    m2: Any
    loss_mean: Any
    loss_m2: Any
    co: Any


class Seen(NamedTuple):
    """``values``: of the observables that keep them, ``(draw of the chunk, ...)``. ``sums``: of the others."""

    values: tuple[Array, ...]
    sums: tuple[Sums, ...]


def blank_sums(watch: Watch, leading: tuple[int, ...] = ()) -> Sums:
    """Of no draws."""
    parts = (*leading, watch.parts)
    few, many = jnp.zeros(parts, jnp.float32), jnp.zeros((*parts, *watch.shape), jnp.float32)
    return Sums(weight=few, mean=many, m2=many, loss_mean=few, loss_m2=few, co=many)


def blank_values(watches: tuple[Watch, ...], slots: int, leading: tuple[int, ...] = ()) -> tuple[Array, ...]:
    """Room for the values at ``slots`` draws, and one more row for what follows the last of them."""
    kept = [watch for watch in watches if not watch.parts]
    return tuple(jnp.full((*leading, slots + 1, *watch.shape), jnp.nan, jnp.float32) for watch in kept)


def in_blocks(tree: PyTree, blocks: int) -> PyTree:
    """Rows ``(example, ...)`` as ``(block, row, ...)``; the last block is filled up with the last example."""

    def split(x):
        size = -(-x.shape[0] // blocks)
        filled = jnp.concatenate([x, jnp.repeat(x[-1:], blocks * size - x.shape[0], axis=0)])
        return filled.reshape(blocks, size, *x.shape[1:])

    return jax.tree.map(split, tree)


def values_at(watch: Watch, position: PyTree, frozen: PyTree, data: PyTree) -> Array:
    """The values of all examples, ``watch.shape``, one block after another."""
    return _of_blocks(watch, lambda block: watch.evaluate(position, frozen, block), data)


def mask_at(watch: Watch, position: PyTree, frozen: PyTree, data: PyTree) -> Array | None:
    """Which of the values count, of the same shape; None if all do."""
    return _of_blocks(watch, lambda block: watch.evaluate.with_mask(position, frozen, block)[1], data)


def _of_blocks(watch: Watch, evaluate: Callable[[PyTree], Any], data: PyTree) -> Any:
    if watch.blocks == 1:
        found = evaluate(jax.tree.map(lambda x: x[0], data))
    else:
        found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(evaluate, data))
    return jax.tree.map(lambda x: x[: watch.shape[0]], found)


def values_of_all(
    watches: tuple[Watch, ...], position: PyTree, frozen: PyTree, data: tuple[PyTree, ...], kept: Array
) -> tuple[Array, ...]:
    """Each observable's values at a draw; NaN, without a forward pass, where ``kept`` is false."""

    def here():
        return tuple(values_at(watch, position, frozen, rows) for watch, rows in zip(watches, data, strict=True))

    def nothing():
        return tuple(jnp.full(watch.shape, jnp.nan, jnp.float32) for watch in watches)

    return jax.lax.cond(kept, here, nothing)


def recorded(
    watches: tuple[Watch, ...], seen: Seen, values: tuple[Array, ...], slot: Array, part: Array, kept: Array,
    weight: Array, gap: Array,
) -> Seen:  # fmt: skip
    """``seen`` with the values of a step, which are of a draw if ``kept``.

    Args:
        slot: how many draws the chunk has had before: of a step that is no draw the next draw overwrites the row.
        part: the block of this draw. weight, gap: of the draw, see ``Sums``.
    """
    whole = [x for watch, x in zip(watches, values, strict=True) if not watch.parts]
    summed = [x for watch, x in zip(watches, values, strict=True) if watch.parts]
    rows = [jax.lax.dynamic_update_index_in_dim(old, x, slot, 0) for old, x in zip(seen.values, whole, strict=True)]
    sums = [_added(old, x, part, kept, weight, gap) for old, x in zip(seen.sums, summed, strict=True)]
    return Seen(tuple(rows), tuple(sums))


def _added(sums: Sums, values: Array, part: Array, kept: Array, weight: Array, gap: Array) -> Sums:
    old = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, part, 0, keepdims=False), sums)
    total = old.weight + weight
    share, away, gap_away = weight / total, values - old.mean, gap - old.loss_mean
    mean, loss_mean = old.mean + share * away, old.loss_mean + share * gap_away
    new = Sums(
        weight=total, mean=mean, m2=old.m2 + weight * away * (values - mean), loss_mean=loss_mean,
        loss_m2=old.loss_m2 + weight * gap_away * (gap - loss_mean), co=old.co + weight * gap_away * (values - mean),
    )  # fmt: skip
    row = jax.tree.map(lambda a, b: jnp.where(kept, a, b), new, old)
    return jax.tree.map(lambda x, r: jax.lax.dynamic_update_index_in_dim(x, r, part, 0), sums, row)


def first_parts(watches: tuple[Watch, ...], num_draws: int) -> tuple[int, int] | tuple[()]:
    """(a, b) of ``Window.parts`` for a run of so many draws: equal blocks; () where no moments are kept."""
    most = max((watch.parts for watch in watches), default=0)
    if not most or not num_draws:
        return (1, 1) if most else ()
    return (min(PARTS, num_draws), num_draws) if most == PARTS else (1, -(-num_draws // (MOST_PARTS // 2)))


def lengthened_sums(
    sums: tuple[Sums, ...], parts: tuple[int, int] | tuple[()], num_draws: int
) -> tuple[tuple[Sums, ...], tuple[int, int] | tuple[()]]:
    """(sums, parts) with room for ``num_draws`` draws: two blocks become one, as often as needed."""
    while parts and -(-num_draws // parts[1]) > MOST_PARTS:
        sums, parts = _halved(sums), (parts[0], 2 * parts[1])
    return sums, parts


@jax.jit
def _halved(sums: tuple[Sums, ...]) -> tuple[Sums, ...]:
    """Every two blocks as one, by the formula of Chan, Golub and LeVeque; the second half is then empty."""
    return tuple(_pairs(each) for each in sums)


def _pairs(sums: Sums) -> Sums:
    a, b = jax.tree.map(lambda x: x[:, ::2], sums), jax.tree.map(lambda x: x[:, 1::2], sums)
    weight = a.weight + b.weight
    share = jnp.where(weight > 0, b.weight / weight, 0.0)

    def wide(x):
        return x.reshape(*x.shape, *[1] * (a.mean.ndim - 2))

    away, gap_away = b.mean - a.mean, b.loss_mean - a.loss_mean
    both = a.weight * share
    half = Sums(
        weight=weight, mean=a.mean + wide(share) * away, m2=a.m2 + b.m2 + wide(both) * away**2,
        loss_mean=a.loss_mean + share * gap_away, loss_m2=a.loss_m2 + b.loss_m2 + both * gap_away**2,
        co=a.co + b.co + wide(both * gap_away) * away,
    )  # fmt: skip
    return jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)], axis=1), half)
