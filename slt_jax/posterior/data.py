"""Minibatches as pure functions of (key, step), drawn with replacement, from memory or from disk."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.kernels.langevin import uniform_index
from slt_jax.posterior.tree import addressable, path_of, tree_digest

PyTree = Any
_HELD = 2**30  # bytes


def draw_indices(key: jax.Array, num_data: int, batch_size: int) -> jax.Array:
    """Indices of one minibatch, int32 ``(batch_size,)``, uniform over the data set, with replacement.

    A batch as large as the data set is the data set: each index once, in order.
    """
    if batch_size == num_data:
        return jnp.arange(num_data, dtype=jnp.int32)
    return uniform_index(key, batch_size, num_data)


def check_batch_size(batch_size: Any, num_data: int) -> None:
    """Raise unless ``batch_size`` is a whole number between 1 and the number of examples."""
    sentence = f"batch_size must be between 1 and num_data = {num_data}, got {batch_size!r}. A few hundred is usual."
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise TypeError(sentence)
    if not 1 <= batch_size <= num_data:
        raise ValueError(sentence)


def gather(arrays: PyTree, indices: jax.Array) -> PyTree:
    """The rows ``indices`` of every leaf."""
    return jax.tree.map(lambda a: a.at[indices].get(mode="promise_in_bounds"), arrays)


_gathered = jax.jit(gather)


class ArrayData:
    """A data set in memory: a pytree of arrays with equal leading dimension. Batches are gathered on the device."""

    on_host = False

    def __init__(self, data: PyTree):
        flat = jax.tree_util.tree_flatten_with_path(data)[0]
        if not flat:
            raise ValueError("the data has no arrays. Pass an array or a dict of arrays, one row per example.")
        named = {"/".join(path_of(path)) or "data": leaf for path, leaf in flat}
        for name, leaf in named.items():
            _check_leaf(name, leaf)
        sizes = {name: leaf.shape[0] for name, leaf in named.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"the data's leaves must have one row per example, but their first dimensions are {sizes}. Cut some."
            )
        self.num_data = int(next(iter(sizes.values())))
        if self.num_data == 0:
            raise ValueError("the data has no examples: its first dimension is 0. Pass at least one row.")
        self.arrays = jax.tree.map(jnp.asarray, data)

    def fetch(self, indices: np.ndarray) -> PyTree:
        """The rows ``indices`` of every leaf, on the device."""
        return _gathered(self.arrays, jnp.asarray(indices))

    def fingerprint(self) -> str:
        """SHA-256 over structure, types, shapes and bytes."""
        return tree_digest(addressable(self.arrays))


class HostData:
    """A data set larger than memory, read by the host. Your own format: set ``num_data``, write both methods."""

    on_host = True
    arrays: PyTree = ()
    num_data: int

    def fetch(self, indices: np.ndarray) -> PyTree:
        """The examples ``indices`` (any shape): a pytree of NumPy arrays of shape ``indices.shape + row shape``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A string that changes when the data do."""
        raise NotImplementedError


Source = ArrayData | HostData


def as_source(data: Any) -> Source:
    """``data`` itself if it is a source, else a pytree of arrays as one.

    Raises:
        TypeError: a leaf that is not an array of numbers with one row per example.
        ValueError: no leaves, no rows, leaves with different numbers of rows, or whole numbers beyond 32 bits.
    """
    return data if isinstance(data, Source) else ArrayData(data)


def named_data(also: Mapping[str, Any] | None) -> dict[str, ArrayData]:
    """Further data sets by name, in memory.

    Raises:
        TypeError: no dict of names, or data that is none.
        ValueError: a source on the host of more than ``_HELD`` bytes.
    """
    if also is None:
        return {}
    if not isinstance(also, Mapping) or not all(isinstance(name, str) and name for name in also):
        raise TypeError(f"also must be a dict of names and data sets, got {also!r:.60}. Write also={{'code': data}}.")
    return {name: _in_memory(as_source(data), name) for name, data in also.items()}


def _in_memory(source: Source, name: str) -> ArrayData:
    if isinstance(source, ArrayData):
        return source
    row = sum(np.asarray(x).nbytes for x in jax.tree.leaves(source.fetch(np.zeros(1, np.int64))))
    if row * source.num_data > _HELD:
        raise ValueError(
            f"the data set '{name}' would take {row * source.num_data / 2**20:,.0f} MiB in memory, more than the "
            f"{_HELD // 2**20:,} MiB that are held for one. Give part of it: {_HELD // row:,} examples at most."
        )
    return ArrayData(source.fetch(np.arange(source.num_data)))


class Prefetcher:
    """Fetches the next chunk's batches on one background thread while the device works on this one."""

    def __init__(self, source: Source):
        self._source, self._pool = source, ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def submit(self, indices: Any) -> None:
        """Start fetching the examples ``indices``."""
        if self._pending is not None:
            raise RuntimeError("a fetch is under way: take its result() before submitting the next.")
        self._pending = self._pool.submit(lambda: self._source.fetch(np.asarray(indices)))

    def result(self) -> PyTree:
        """The examples last submitted; waits for them, and raises what the fetch raised."""
        if self._pending is None:
            raise RuntimeError("nothing was submitted: submit(indices) before asking for the result.")
        pending, self._pending = self._pending, None
        return pending.result()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _check_leaf(name: str, leaf: Any) -> None:
    if not getattr(leaf, "shape", ()):
        raise TypeError(f"data leaf '{name}' is {leaf!r}; every leaf must be an array with one row per example.")
    if isinstance(leaf, jax.Array):
        return
    kind = np.asarray(leaf).dtype
    if not (jnp.issubdtype(kind, jnp.number) or kind == np.bool_):
        raise TypeError(f"data leaf '{name}' is an array of {kind}; every leaf must hold numbers. Encode it first.")
    narrow = jax.dtypes.canonicalize_dtype(kind)
    if kind.kind in "iu" and narrow != kind and np.size(leaf):
        least, most, holds = int(np.min(leaf)), int(np.max(leaf)), np.iinfo(narrow)
        if least < holds.min or most > holds.max:
            raise ValueError(f"data leaf '{name}' has values from {least} to {most}, which do not fit {narrow}.")
