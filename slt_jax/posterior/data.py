"""Minibatches as pure functions of (key, step), drawn with replacement, from memory or from disk."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Integer, Key, PyTree

from slt_jax._checks import shown
from slt_jax.kernels.langevin import uniform_index
from slt_jax.posterior.tree import (
    addressable,
    check_pytree,
    is_on_cpu,
    on_one_device,
    path_of,
    tree_digest,
    without_torch,
)

MEMORY_LIMIT = 2**30  # bytes of a further data set, which is kept in memory
_MOST_LEAVES = 32  # arrays of a data set; more are a list with an array for each example


def draw_indices(key: Key[Array, ""], num_data: int, batch_size: int) -> Int32[Array, " {batch_size}"]:
    """Indices of one minibatch, uniform over the data set, with replacement.

    If ``batch_size`` equals ``num_data`` the batch is the data set: each index once, in order.
    """
    if batch_size == num_data:
        return jnp.arange(num_data, dtype=jnp.int32)
    return uniform_index(key, batch_size, num_data)


def check_batch_size(batch_size: Any, num_data: int) -> None:
    """Raise TypeError or ValueError unless ``batch_size`` is an integer between 1 and the number of examples."""
    got = shown(batch_size)
    message = f"batch_size must be between 1 and num_data = {num_data}, got {got}. A few hundred is usual."
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise TypeError(message)
    if batch_size > num_data:
        raise ValueError(
            f"batch_size = {got} is more than the {num_data} examples of the data. Take batch_size={num_data}, or "
            "fewer, or give more data."
        )
    if batch_size < 1:
        raise ValueError(message)


def gather(arrays: PyTree, indices: Integer[Array, " *batch"]) -> PyTree:
    """The rows ``indices`` of every leaf: a leaf of shape ``(num_data, ...)`` gives ``(*batch, ...)``."""
    return jax.tree.map(lambda a: a.at[indices].get(mode="promise_in_bounds"), arrays)


_jitted_gather = jax.jit(gather)


class ArrayData:
    """A data set in memory: a pytree of arrays with equal leading dimension. Batches are gathered on the device.

    Args:
        data: one row per example in every leaf; torch's tensors are converted.

    Raises:
        TypeError: a leaf that is not an array of numbers with one row per example.
        ValueError: no leaves, no rows, more than 32 leaves, leaves with different numbers of rows, or integers beyond
            32 bits.
    """

    on_host = False

    def __init__(self, data: PyTree):
        check_pytree("the data", data)
        data = without_torch(data)
        flat = jax.tree_util.tree_flatten_with_path(data)[0]
        if not flat:
            raise ValueError("the data has no arrays. Pass an array or a dict of arrays, one row per example.")
        named = {"/".join(path_of(path)) or "data": leaf for path, leaf in flat}
        for name, leaf in named.items():
            _check_leaf(name, leaf)
        sizes = {name: leaf.shape[0] for name, leaf in named.items()}
        if len(named) > _MOST_LEAVES:
            raise ValueError(
                f"the data have {len(named)} arrays, the first of shape {flat[0][1].shape}; a data set is at most "
                f"{_MOST_LEAVES} arrays with one row per example. Make one array of equal examples with "
                "np.stack(list), or of batches with np.concatenate(list); pad examples of unequal length first."
            )
        if len(set(sizes.values())) > 1:
            some = dict(list(sizes.items())[:6])
            raise ValueError(
                f"the data's leaves must have one row per example, but their first dimensions are {some}"
                f"{f' and {len(sizes) - 6} more' if len(sizes) > 6 else ''}. Pass as many rows of each; join a list of "
                "batches with np.concatenate, and pad examples of unequal length."
            )
        self.num_data = int(next(iter(sizes.values())))
        if self.num_data == 0:
            raise ValueError("the data has no examples: its first dimension is 0. Pass at least one row.")
        self.arrays = jax.tree.map(lambda x: on_one_device(jnp.asarray(x)), data)

    def fetch(self, indices: Integer[np.ndarray, " *batch"]) -> PyTree:
        """The rows ``indices`` of every leaf, each of shape ``(*batch, ...)``: on the device, of a CPU in NumPy."""
        leaves = jax.tree.leaves(self.arrays)
        if all(x.is_fully_addressable and is_on_cpu(x) for x in leaves):
            return jax.tree.map(lambda x: np.asarray(x)[indices], self.arrays)  # no program to compile for each shape
        return _jitted_gather(self.arrays, jnp.asarray(indices))

    def fingerprint(self) -> str:
        """SHA-256 over structure, types, shapes and bytes."""
        return tree_digest(addressable(self.arrays))


class HostData:
    """A data set larger than memory, which the host reads batch by batch.

    For a format of your own, derive a class, set ``num_data`` and define both methods.
    """

    on_host = True
    arrays: PyTree = ()
    num_data: int

    def fetch(self, indices: Integer[np.ndarray, " *batch"]) -> PyTree:
        """The examples ``indices``: a pytree of NumPy arrays of shape ``(*batch, ...)``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A string that changes when the data do."""
        raise NotImplementedError


Source = ArrayData | HostData


def as_source(data: Source | PyTree) -> Source:
    """``data`` unchanged if it is a data set of ``slt_jax``, else a pytree of arrays as an ``ArrayData``.

    Raises:
        TypeError, ValueError: as ``ArrayData``.
    """
    return data if isinstance(data, Source) else ArrayData(data)


def named_data(also: Mapping[str, Any] | None) -> dict[str, ArrayData]:
    """Further data sets by name, loaded into memory.

    Raises:
        TypeError: not a dict of names and data sets, or data that ``ArrayData`` refuses.
        ValueError: a data set on the host of more than ``MEMORY_LIMIT`` bytes.
    """
    if also is None:
        return {}
    if not isinstance(also, Mapping) or not all(isinstance(name, str) and name for name in also):
        raise TypeError(f"also must be a dict of names and data sets, got {shown(also)}. Write also={{'code': data}}.")
    return {name: held_data(f"also['{name}']", name, data) for name, data in also.items()}


def held_data(argument: str, name: str, data: Any) -> ArrayData:
    """The data set ``name``, given as ``argument``, in memory. Raises as ``named_data``, with the argument's name."""
    try:
        source = as_source(data)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument}: {error}") from error
    return _in_memory(source, name)


def check_same_structure(argument: str, other: ArrayData, source: Source) -> None:
    """Raise ValueError unless the data set given as ``argument`` has its arrays under the same names as the data."""
    own = source.fetch(np.zeros(1, np.int64)) if source.on_host else source.arrays
    paths = [[path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(x)[0]] for x in (other.arrays, own)]
    if paths[0] != paths[1]:
        given, wanted = (str(jax.tree.structure(x)).removeprefix("PyTreeDef")[:200] for x in (other.arrays, own))
        raise ValueError(
            f"{argument} has the structure {given}, the data have {wanted}. loss_fn gets batches of either: give "
            "both the same structure."
        )


def _in_memory(source: Source, name: str) -> ArrayData:
    if isinstance(source, ArrayData):
        return source
    row = sum(np.asarray(x).nbytes for x in jax.tree.leaves(source.fetch(np.zeros(1, np.int64))))
    if row * source.num_data > MEMORY_LIMIT:
        raise ValueError(
            f"the data set '{name}' would take {row * source.num_data / 2**20:,.0f} MiB of memory; a further data set "
            f"may take {MEMORY_LIMIT // 2**20:,} MiB. Pass part of it: {MEMORY_LIMIT // row:,} examples at most."
        )
    return ArrayData(source.fetch(np.arange(source.num_data)))


class Prefetcher:
    """Fetches the next chunk's batches in a background thread while the device computes the current chunk."""

    def __init__(self, source: Source):
        self._source, self._pool = source, ThreadPoolExecutor(1)
        self._pending: Future[PyTree] | None = None

    def submit(self, indices: Integer[Array | np.ndarray, " *batch"]) -> None:
        """Start fetching the examples ``indices``. Raises RuntimeError while another fetch is pending."""
        if self._pending is not None:
            raise RuntimeError("a fetch is under way: take its result() before submitting the next.")
        self._pending = self._pool.submit(lambda: self._source.fetch(np.asarray(indices)))

    def result(self) -> PyTree:
        """Wait for the submitted examples and return them. Raises what the fetch raised."""
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
        raise TypeError(f"data leaf '{name}' is {shown(leaf)}; every leaf must be an array with one row per example.")
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(
            f"data leaf '{name}' is a masked array, whose mask would be lost. Leave out the masked rows, or give "
            "leaf.filled(0) and the mask as an array of its own for loss_fn to use."
        )
    if isinstance(leaf, jax.Array):
        return
    dtype = np.asarray(leaf).dtype
    if not (jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_):
        raise TypeError(f"data leaf '{name}' is an array of {dtype}; every leaf must hold numbers. Encode it first.")
    on_device = jax.dtypes.canonicalize_dtype(dtype)
    if dtype.kind in "iu" and on_device != dtype and np.size(leaf):
        smallest, largest, limits = int(np.min(leaf)), int(np.max(leaf)), np.iinfo(on_device)
        if smallest < limits.min or largest > limits.max:
            raise ValueError(
                f"data leaf '{name}' has values from {smallest} to {largest}, which do not fit {on_device}. "
                "Use smaller numbers, or turn on x64 in JAX."
            )
