"""Many small arrays of weights side by side in one vector: a program then has the code of one array, not of each."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slt_jax.kernels.langevin import Block

Position = tuple[Float[Array, "..."], ...]
LARGE = 2**20  # weights of a large model, at least


class Limits(NamedTuple):
    """``entries``: of a small array, at most. ``arrays``: small ones, of which more lie side by side."""

    entries: int
    arrays: int


LIMITS, LIMITS_LARGE = Limits(4096, 20), Limits(2**16, 8)


@dataclass(frozen=True)
class Packing:
    """Which arrays of a position lie side by side, in a vector that is then the position's last array.

    ``shapes``: of all arrays. ``packed``: numbers of those in the vector, in its order: small ones first.
    """

    shapes: tuple[tuple[int, ...], ...]
    packed: tuple[int, ...]

    @functools.cached_property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the other arrays, which stay as they are."""
        return tuple(i for i in range(len(self.shapes)) if i not in set(self.packed))

    @functools.cached_property
    def blocks(self) -> tuple[tuple[Block, ...], ...]:
        """For ``gaussian``: of each array of the packed position, its parts of equal size and their numbers."""
        sizes = {i: math.prod(shape) for i, shape in enumerate(self.shapes)}
        apart = tuple((Block((i,), sizes[i]),) for i in self.kept)
        by_size = {size: tuple(i for i in self.packed if sizes[i] == size) for size in {sizes[i] for i in self.packed}}
        return *apart, tuple(Block(by_size[size], size) for size in sorted(by_size))

    def pack(self, position: Position) -> Position:
        """The arrays, fewer: the inverse of ``unpack``."""
        vector = jnp.concatenate([position[i].reshape(-1) for i in self.packed])
        return *(position[i] for i in self.kept), vector

    def unpack(self, position: Position) -> Position:
        """All arrays, in their order."""
        *apart, vector = position
        parts = jax.lax.split(vector, [math.prod(self.shapes[i]) for i in self.packed])
        arrays = dict(zip(self.kept, apart, strict=True))
        arrays |= {i: x.reshape(self.shapes[i]) for i, x in zip(self.packed, parts, strict=True)}
        return tuple(arrays[i] for i in range(len(self.shapes)))


def packing_of(position: Sequence[Any]) -> Packing | None:
    """How to pack arrays, or shapes of arrays: the small ones of float32 that no mesh axis shards, if they are many."""
    shapes = tuple(tuple(x.shape) for x in position)
    limits = LIMITS if sum(map(math.prod, shapes)) < LARGE else LIMITS_LARGE
    small = [i for i, x in enumerate(position) if _can_be_packed(x) and math.prod(shapes[i]) <= limits.entries]
    if len(small) <= limits.arrays:
        return None
    return Packing(shapes, tuple(sorted(small, key=lambda i: math.prod(shapes[i]))))


def _can_be_packed(array: Any) -> bool:
    sharding = getattr(array, "sharding", None)
    return array.dtype == np.float32 and (sharding is None or sharding.is_fully_replicated)
