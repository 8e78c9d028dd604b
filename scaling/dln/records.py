"""Results on disk, one JSON object a line, and the statistics of their errors."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Pair = tuple[float, float | None]  # (truth, estimate); None or NaN where no chain stayed finite


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(rows, bytes they take up) of a file of JSON lines; no file is no rows.

    What stands after the last end of line is a row that was not written to its end, unless it can be read.

    Raises:
      ValueError: a line before the last that is no JSON object.
    """
    raw = path.read_bytes() if path.exists() else b""
    *lines, tail = raw.split(b"\n")
    rows = [_parsed(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    try:
        rows += [_parsed(path, len(lines) + 1, tail)] if tail.strip() else []
    except ValueError:
        return rows, len(raw) - len(tail)
    return rows, len(raw)


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(
            f"line {number} of {path} is not a JSON object: {line[:60].decode(errors='replace')!r}. Remove that line; "
            "its row is then run again."
        )
    return row


class Store:
    """Rows by key, read once and then only added to, whole lines at a time.

    Two runs must not write one file at the same time.

    Args:
      path: created with the first row.
      fields: the names whose values make a row's key; one that a row lacks counts as None.
    """

    def __init__(self, path: Path, fields: Sequence[str]):
        self.path, self.fields = path, tuple(fields)
        rows, self._size = read_rows(path)
        self.rows = {self.key(row): row for row in rows}

    def key(self, row: dict[str, Any]) -> str:
        return json.dumps([row.get(name) for name in self.fields], sort_keys=True)

    def __contains__(self, row: dict[str, Any]) -> bool:
        """Whether a row of this one's key is there."""
        return self.key(row) in self.rows

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is on disk when this returns. Half a line at the end of the file is removed first."""
        # as it will be read back; refuses NaN, which is not JSON
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(self._size)
            if self._size:
                file.seek(self._size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(line)
        self.rows[self.key(row)] = json.loads(line)


class Errors(NamedTuple):
    """How estimates compare with truths. ``median`` and ``ninetieth`` are of |estimate / truth - 1|."""

    count: int
    non_finite: int
    median: float
    ninetieth: float
    ranked: float


def finite(pairs: Iterable[Pair]) -> list[tuple[float, float]]:
    return [(t, e) for t, e in pairs if e is not None and math.isfinite(e)]


def relative_errors(pairs: Iterable[Pair]) -> np.ndarray:
    """estimate / truth - 1 of the finite ones."""
    return np.array([e / t - 1 for t, e in finite(pairs)])


def ranked_right(pairs: Iterable[Pair]) -> float:
    """Share of the couples of finite estimates, with different truths, that stand in the order of their truths."""
    truths, estimates = np.array(finite(pairs)).reshape(-1, 2).T
    above = np.sign(truths[:, None] - truths)
    right = above * np.sign(estimates[:, None] - estimates) > 0
    return float(right[above != 0].mean()) if above.any() else math.nan


def errors_of(pairs: Sequence[Pair]) -> Errors:
    sizes = np.abs(relative_errors(pairs))
    middle, high = np.quantile(sizes, [0.5, 0.9]).tolist() if sizes.size else (math.nan, math.nan)
    return Errors(len(pairs), len(pairs) - sizes.size, middle, high, ranked_right(pairs))
