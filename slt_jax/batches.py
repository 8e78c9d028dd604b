"""Minibatches as pure functions of (key, step), drawn with replacement, from memory or from disk."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.kernels.langevin import uniform_index
from slt_jax.posterior import check_count, path_of, tree_digest

PyTree = Any
_SCAN_LIMIT = 2**28  # tokens: a file up to this size is checked whole when it is opened
_HASH_WHOLE = 2**30  # bytes
_BLOCK = 2**20


def draw_indices(key: jax.Array, num_data: int, batch_size: int) -> jax.Array:
    """Indices of one minibatch, int32 ``(batch_size,)``, uniform over the data set, with replacement."""
    return uniform_index(key, batch_size, num_data)


def check_batch_size(batch_size: Any, num_data: int) -> None:
    """Raise unless ``batch_size`` is a whole number between 1 and the number of examples."""
    check_count("batch_size", batch_size, 1)
    if batch_size > num_data:
        raise ValueError(f"batch_size must be between 1 and the {num_data} examples of the data, got {batch_size}. Take a smaller batch.")


class ArrayData:
    """A data set in memory: a pytree of arrays with equal leading dimension. Batches are gathered on the device."""

    on_host = False

    def __init__(self, data: PyTree):
        flat = jax.tree_util.tree_flatten_with_path(data)[0]
        if not flat:
            raise ValueError("the data has no arrays. Pass an array, or a tuple or dict of arrays with one row per example.")
        sizes = {}
        for path, leaf in flat:
            name = "/".join(path_of(path)) or "data"
            if not getattr(leaf, "shape", ()):
                raise TypeError(f"data leaf '{name}' is {leaf!r}; every leaf must be an array with one row per example.")
            sizes[name] = leaf.shape[0]
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the data's leaves must have one row per example each, but their first dimensions are {sizes}.")
        self.num_data = next(iter(sizes.values()))
        if self.num_data == 0:
            raise ValueError("the data has no examples: its first dimension is 0.")
        self.arrays = jax.tree.map(jnp.asarray, data)

    def gather(self, arrays: PyTree, indices: jax.Array) -> PyTree:
        """The rows ``indices`` of every leaf; traced."""
        return jax.tree.map(lambda a: a.at[indices].get(mode="promise_in_bounds"), arrays)

    def fetch(self, indices: np.ndarray) -> PyTree:
        """The rows ``indices`` of every leaf, on the device."""
        return self.gather(self.arrays, jnp.asarray(indices))

    def fingerprint(self) -> str:
        """SHA-256 over structure, types, shapes and bytes."""
        return tree_digest(self.arrays)


class TokenFile:
    """Examples of ``seq_len`` consecutive tokens from a memory-mapped file: example i starts at token i seq_len."""

    on_host = True
    arrays: PyTree = ()

    def __init__(self, path: str | os.PathLike, seq_len: int, dtype: Any = None, vocab_size: int | None = None):
        self.path = Path(path)
        check_count("seq_len", seq_len, 2, "It is the number of tokens in one example.")
        self.seq_len, self.vocab_size = int(seq_len), vocab_size
        self.tokens = _open_tokens(self.path, dtype)
        self.num_data = len(self.tokens) // self.seq_len
        if self.num_data == 0:
            raise ValueError(f"{self.path} holds {len(self.tokens)} tokens, fewer than one example of seq_len = {seq_len}. Take a shorter seq_len or a longer file.")
        if vocab_size is not None and len(self.tokens) <= _SCAN_LIMIT:
            for start in range(0, len(self.tokens), _BLOCK):
                self._check(np.asarray(self.tokens[start : start + _BLOCK]), lambda i, s=start: s + int(i))

    def fetch(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of the examples ``indices``, int32, shape ``indices.shape + (seq_len,)``."""
        rows = self.tokens[: self.num_data * self.seq_len].reshape(self.num_data, self.seq_len)[indices.reshape(-1)]
        self._check(rows.reshape(-1), lambda i: int(indices.reshape(-1)[i // self.seq_len]) * self.seq_len + i % self.seq_len)
        return rows.astype(np.int32).reshape(*indices.shape, self.seq_len)

    def fingerprint(self) -> str:
        """SHA-256 over the bytes; past 1 GiB over 64 evenly spaced 1-MiB blocks and the time of modification."""
        raw = self.tokens.view(np.uint8)
        digest = hashlib.sha256(f"{self.tokens.dtype} {len(self.tokens)} {self.seq_len}".encode())
        if raw.size <= _HASH_WHOLE:
            starts = range(0, raw.size, _BLOCK)
        else:
            digest.update(str(self.path.stat().st_mtime_ns).encode())
            starts = np.linspace(0, raw.size - _BLOCK, 64).astype(int)
        for start in starts:
            digest.update(raw[start : start + _BLOCK].tobytes())
        return digest.hexdigest()

    def _check(self, tokens: np.ndarray, position) -> None:
        if self.vocab_size is None:
            return
        bad = np.flatnonzero((tokens >= self.vocab_size) | (tokens < 0))
        if bad.size:
            raise ValueError(
                f"token id {int(tokens[bad[0]])} at position {position(bad[0])} of {self.path} is outside the vocabulary of "
                f"{self.vocab_size}. Is this the right tokenizer, and the right dtype for the file?"
            )


class HFDataset:
    """A Hugging Face data set saved on disk with ``save_to_disk``; one row is one example."""

    on_host = True
    arrays: PyTree = ()

    def __init__(self, path: str | os.PathLike, columns: list[str] | None = None):
        try:
            import datasets
        except ImportError:
            raise ImportError('reading a Hugging Face data set needs the extra: pip install "slt-jax[hf]"') from None
        try:
            table = datasets.load_from_disk(str(path))
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            raise ValueError(f"{path} is not a data set written by save_to_disk: {error}") from None
        if not isinstance(table, datasets.Dataset):
            raise ValueError(f"{path} holds the splits {list(table)}; pass the folder of one of them, e.g. {path}/{next(iter(table))}.")
        self.columns = list(columns or table.column_names)
        missing = set(self.columns) - set(table.column_names)
        if missing:
            raise ValueError(f"columns {sorted(missing)} are not in {path}, which has {table.column_names}.")
        self.table, self.num_data = table.with_format("numpy", columns=self.columns), len(table)

    def fetch(self, indices: np.ndarray) -> PyTree:
        """Rows as a dict column -> array of shape ``indices.shape + row shape``; the array itself for one column."""
        unique, inverse = np.unique(indices.reshape(-1), return_inverse=True)
        rows = {name: np.stack(list(value))[inverse] for name, value in self.table[unique.tolist()].items()}
        rows = {name: value.reshape(*indices.shape, *value.shape[1:]) for name, value in rows.items()}
        return rows[self.columns[0]] if len(self.columns) == 1 else rows

    def fingerprint(self) -> str:
        """The data set's own content fingerprint, and the columns read."""
        return f"{self.table._fingerprint}:{','.join(self.columns)}"


Source = ArrayData | TokenFile | HFDataset


def token_file(path: str | os.PathLike, seq_len: int, *, dtype: Any = None, vocab_size: int | None = None) -> TokenFile:
    """A token file larger than memory as a data set of ``seq_len``-token examples.

    Args:
        path: ``.npy`` (one-dimensional, integer), or raw little-endian ``.bin``.
        seq_len: tokens in one example; a shorter remainder at the end of the file is left out.
        dtype: of a ``.bin`` file, uint16 (default) or uint32.
        vocab_size: when given, ids outside it raise ValueError, at opening (up to 2**28 tokens) and at every fetch.
    """
    return TokenFile(path, seq_len, dtype, vocab_size)


def hf_dataset(path: str | os.PathLike, columns: list[str] | None = None) -> HFDataset:
    """A Hugging Face data set saved on disk; needs the extra ``hf``."""
    return HFDataset(path, columns)


def as_source(data: Any) -> Source:
    """``data`` itself if it is a source, else a pytree of arrays as one."""
    return data if isinstance(data, Source) else ArrayData(data)


class Prefetcher:
    """Fetches the next chunk's batches on one background thread while the device works on this one."""

    def __init__(self, source: Source):
        self._source, self._pool = source, ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def submit(self, indices: Any) -> None:
        self._pending = self._pool.submit(lambda: self._source.fetch(np.asarray(indices)))

    def result(self) -> PyTree:
        if self._pending is None:
            raise RuntimeError("submit indices before asking for the result.")
        return self._pending.result()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _open_tokens(path: Path, dtype: Any) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"no token file at {path}.")
    if path.suffix == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} is not a readable .npy file (truncated or foreign): {error}") from None
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"{path} must hold a one-dimensional array of integers, it holds shape {tokens.shape} of {tokens.dtype}.")
        return tokens
    kind = np.dtype(np.uint16 if dtype is None else dtype).newbyteorder("<")
    if kind not in (np.dtype("<u2"), np.dtype("<u4")):
        raise ValueError(f"dtype of a raw token file must be uint16 or uint32, got {dtype!r}.")
    size = path.stat().st_size
    if size == 0 or size % kind.itemsize:
        raise ValueError(f"{path} has {size} bytes, not a positive multiple of the {kind.itemsize} of {kind.name}: truncated, or another dtype?")
    return np.memmap(path, dtype=kind, mode="r")
