"""Data sets on disk, larger than memory: token files, and Hugging Face data sets."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer, PyTree

from slt_jax._checks import check_count
from slt_jax._io import user_path
from slt_jax.posterior.data import HostData

SCAN_LIMIT = 2**28  # tokens; all ids of a file up to this size are checked when it is opened
HASH_LIMIT = 2**30  # bytes; the fingerprint of a file up to this size covers all of them
BLOCK = 2**20


class TokenFile(HostData):
    """Examples of ``seq_len`` consecutive tokens from a memory-mapped file.

    Of a stream, example i starts at token i seq_len. Rows are cut one by one, each from its beginning.
    """

    def __init__(self, path: str | os.PathLike, seq_len: int, dtype: Any = None, vocab_size: int | None = None):
        self.path = user_path(path)
        check_count("seq_len", seq_len, 2, "It is the number of tokens in one example.")
        if vocab_size is not None:
            check_count("vocab_size", vocab_size, 1)
        self.seq_len, self.vocab_size = int(seq_len), vocab_size
        stored = _open_tokens(self.path, dtype, vocab_size)
        self.columns = stored.shape[-1] if stored.ndim == 2 else stored.size
        self.tokens = stored.reshape(-1)
        self.num_data = self.columns // self.seq_len * (stored.size // max(self.columns, 1))
        if self.num_data == 0:
            kind = "rows of " if stored.ndim == 2 else ""
            raise ValueError(f"{self.path} holds {kind}{self.columns} tokens, less than one seq_len = {seq_len}.")
        if len(self.tokens) <= SCAN_LIMIT:
            for start in range(0, len(self.tokens), BLOCK):
                self._check(np.asarray(self.tokens[start : start + BLOCK]), lambda i, s=start: s + int(i))

    def fetch(self, indices: Integer[np.ndarray, " *batch"]) -> Int32[np.ndarray, "*batch {self.seq_len}"]:
        """Tokens of the examples ``indices``."""
        flat = np.asarray(indices).reshape(-1)
        per_row = self.columns // self.seq_len
        row, piece = np.divmod(flat, per_row)
        starts = row * self.columns + piece * self.seq_len
        if self.columns == len(self.tokens):
            rows = np.asarray(self.tokens[: self.num_data * self.seq_len].reshape(self.num_data, self.seq_len)[flat])
        else:
            whole = self.tokens.reshape(-1, self.columns)[row][:, : per_row * self.seq_len]
            rows = whole.reshape(len(flat), per_row, self.seq_len)[np.arange(len(flat)), piece]
        self._check(rows.reshape(-1), lambda i: int(starts[i // self.seq_len]) + int(i % self.seq_len))
        return rows.astype(np.int32).reshape(*np.shape(indices), self.seq_len)

    def fingerprint(self) -> str:
        """SHA-256 over type, length, ``seq_len`` and the bytes.

        For files larger than 1 GiB, 64 evenly spaced 1-MiB blocks and the modification time take the place of the
        bytes.
        """
        raw = self.tokens.view(np.uint8)
        rows = "" if self.columns == len(self.tokens) else f" in rows of {self.columns}"
        digest = hashlib.sha256(f"{self.tokens.dtype} {len(self.tokens)} {self.seq_len}{rows}".encode())
        if raw.size <= HASH_LIMIT:
            starts = range(0, raw.size, BLOCK)
        else:
            digest.update(str(self.path.stat().st_mtime_ns).encode())
            starts = np.linspace(0, raw.size - BLOCK, 64).astype(int)
        for start in starts:
            digest.update(raw[start : start + BLOCK].tobytes())
        return digest.hexdigest()

    def _check(self, tokens: Integer[np.ndarray, " token"], position: Callable[[Any], int]) -> None:
        """Raise ValueError for an id out of range. ``position``: index in ``tokens`` -> position in the file."""
        limit = 2**31 if self.vocab_size is None else self.vocab_size  # without a vocabulary the limit of int32
        representable = np.iinfo(tokens.dtype)
        if representable.min >= 0 and representable.max < limit:
            return
        if (bad := np.flatnonzero((tokens >= limit) | (tokens < 0))).size:
            size = "the range of int32" if self.vocab_size is None else f"the vocabulary of {self.vocab_size}"
            raise ValueError(
                f"token id {int(tokens[bad[0]])} at position {position(bad[0])} of {self.path} is outside {size}. "
                f"Is this the right tokenizer, and the right dtype for the file?"
            )


class HFDataset(HostData):
    """A Hugging Face data set saved on disk with ``save_to_disk``; one row is one example."""

    def __init__(self, path: str | os.PathLike, columns: list[str] | None = None):
        try:
            import datasets
        except ImportError:
            raise ImportError('reading a Hugging Face data set needs the extra: pip install "slt-jax[hf]"') from None
        try:
            table = datasets.load_from_disk(str(path))
        except (FileNotFoundError, NotADirectoryError, ValueError, IndexError) as error:  # IndexError: zero shards
            raise ValueError(f"{path} is not a data set with rows, written by save_to_disk: {error}") from None
        if not isinstance(table, datasets.Dataset):
            raise ValueError(f"{path} holds the splits {list(table)}; pass the folder of one of them.")
        self.columns = list(columns or table.column_names)
        if missing := set(self.columns) - set(table.column_names):
            raise ValueError(f"columns {sorted(missing)} are not in {path}, which has {table.column_names}.")
        if not len(table):
            raise ValueError(f"{path} has no rows.")
        self.path, self.num_data = user_path(path), len(table)
        self.table = table.with_format("numpy", columns=self.columns)
        self.fetch(np.zeros(1, np.int64))

    def fetch(self, indices: Integer[np.ndarray, " *batch"]) -> PyTree:
        """Rows as a dict column -> array of shape ``(*batch, ...)``; for a single column the array itself."""
        unique, inverse = np.unique(np.asarray(indices).reshape(-1), return_inverse=True)
        rows = {name: self._stack(name, value)[inverse] for name, value in self.table[unique.tolist()].items()}
        rows = {name: value.reshape(*np.shape(indices), *value.shape[1:]) for name, value in rows.items()}
        return rows[self.columns[0]] if len(self.columns) == 1 else rows

    def _stack(self, name: str, values: Any) -> np.ndarray:
        shapes = sorted({np.shape(v) for v in values})
        if len(shapes) > 1:
            raise ValueError(
                f"column '{name}' of {self.path} has rows of different shapes, {shapes[0]} and {shapes[-1]}. "
                f"Cut them to one length before saving, or leave the column out."
            )
        stacked = np.stack(list(values))
        if stacked.dtype.kind not in "biuf":
            raise ValueError(f"column '{name}' of {self.path} holds {stacked.dtype}, not numbers.")
        return stacked

    def fingerprint(self) -> str:
        """The data set's own content fingerprint, and the columns read."""
        return f"{self.table._fingerprint}:{','.join(self.columns)}"


def token_file(path: str | os.PathLike, seq_len: int, *, dtype: Any = None, vocab_size: int | None = None) -> TokenFile:
    """A token file larger than memory as a data set of ``seq_len``-token examples.

    Args:
        path: ``.npy`` of any integer type, or raw little-endian ``.bin``. The rows of a two-dimensional ``.npy`` are
            sequences of their own.
        seq_len: tokens in one example; a shorter remainder at the end of the file, or of a row, is dropped.
        dtype: of a raw file: uint16, uint32, or another integer type. Default: uint16 where the file can be nothing
            else. A ``.npy`` file contains its own.
        vocab_size: if given, every id must be below it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a token file, or shorter than one example; an id is negative, not below ``vocab_size`` or
            beyond int32 (checked when the file is opened; beyond 2**28 tokens, when an example is fetched).
    """
    return TokenFile(path, seq_len, dtype, vocab_size)


def hf_dataset(path: str | os.PathLike, columns: list[str] | None = None) -> HFDataset:
    """A Hugging Face data set saved on disk with ``save_to_disk``; needs the extra ``hf``.

    Args:
        path: the folder of one split.
        columns: the columns of a batch, default all. A batch is a dict column -> array; for a single column the array
            itself.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: the folder is not such a data set, it has no rows, a column is unknown, or its rows are not numbers
            of one shape.
    """
    return HFDataset(path, columns)


def columns_of(path: str | os.PathLike) -> int | None:
    """Tokens in a row of a two-dimensional ``.npy`` file; None for a stream."""
    path = user_path(path)
    if path.suffix != ".npy" or not path.is_file():
        return None
    tokens = _open_npy(path, None)
    return tokens.shape[1] if tokens.ndim == 2 else None


def _open_tokens(path: Path, dtype: Any, vocab_size: int | None) -> Integer[np.ndarray, "..."]:
    if not path.is_file():
        raise FileNotFoundError(f"no token file at {path}.")
    return _open_npy(path, dtype) if path.suffix == ".npy" else _open_raw(path, dtype, vocab_size)


def _open_npy(path: Path, dtype: Any) -> Integer[np.ndarray, "..."]:
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy raises many types for a damaged header
        raise ValueError(f"{path} is not a readable .npy file (truncated or foreign): {error}") from None
    if tokens.ndim not in (1, 2) or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{path} must hold a 1-D or 2-D array of integers, it holds shape {tokens.shape} of {tokens.dtype}."
        )
    if dtype is not None and np.dtype(dtype) != tokens.dtype:
        raise ValueError(f"{path} holds {tokens.dtype}, but dtype = {np.dtype(dtype)} was asked for. Leave dtype out.")
    return np.ascontiguousarray(tokens) if not tokens.flags.c_contiguous else tokens


def _open_raw(path: Path, dtype: Any, vocab_size: int | None) -> Integer[np.ndarray, " token"]:
    kind = np.dtype(np.uint16 if dtype is None else dtype).newbyteorder("<")
    if kind.kind not in "iu":
        raise ValueError(f"dtype of a raw token file must be an integer type such as uint16, got {dtype!r}.")
    size = path.stat().st_size
    if size == 0 or size % kind.itemsize:
        raise ValueError(f"{path} has {size} bytes, not a positive multiple of {kind.itemsize}. Is it truncated?")
    tokens = np.memmap(path, dtype=kind, mode="r")
    if dtype is None:
        _check_uint16(path, tokens, vocab_size)
    return tokens


def _check_uint16(path: Path, tokens: Integer[np.ndarray, " token"], vocab_size: int | None) -> None:
    """Raise ValueError if the file may be of a wider type."""
    if vocab_size is not None and vocab_size > 2**16:
        raise ValueError(
            f"{path} does not say its type, and uint16 cannot hold the ids of a vocabulary of {vocab_size}. Say "
            "--dtype uint32 (dtype='uint32'), or --dtype uint16 if it is."
        )
    if len(tokens) >= 2 and len(tokens) % 2 == 0 and not tokens[1 : 2 * BLOCK : 2].any():
        raise ValueError(
            f"{path} may be of uint16 or of uint32: every second 16-bit number is 0. Say --dtype uint32 "
            "(dtype='uint32'), or --dtype uint16 if every second id is 0."
        )
