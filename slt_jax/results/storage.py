"""Trees of arrays on disk as zarr. They are written completely or not at all, and damage is detected on reading."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

# Attributes that mark the kind of a file.
RESULT, SWEEP, TRAJECTORY = "slt_jax_result", "slt_jax_sweep", "slt_jax_trajectory"
_NAMES = {RESULT: "result", SWEEP: "sweep", TRAJECTORY: "trajectory"}


def kind_of(path: Path) -> str | None:
    """``RESULT``, ``SWEEP`` or ``TRAJECTORY``; None for anything else."""
    record = path / "zarr.json"
    text = record.read_text(errors="replace") if record.is_file() else ""
    return next((kind for kind in _NAMES if f'"{kind}"' in text), None)


def digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 over types, shapes and bytes. It is needed because zarr silently fills missing chunks."""
    sha256 = hashlib.sha256()
    for array in arrays:
        sha256.update(f"{array.dtype.str}{array.shape}".encode())
        sha256.update(np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()


def write(tree: "xr.DataTree", path: str | os.PathLike, kind: str, *, overwrite: bool) -> Path:
    """Write ``tree``, which has the attribute ``kind``.

    Raises:
        FileExistsError: the path exists and ``overwrite`` is false, or it is not a file of this kind.
        OSError: the file cannot be written.
    """
    target, what = Path(path), _NAMES[kind]
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Pass overwrite=True to replace it, or another path.")
    if target.exists() and kind_of(target) != kind:
        raise FileExistsError(f"{target} exists and is not a {what} of slt-jax, so it is kept. Give another path.")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")  # an interrupted save leaves target unchanged
    try:
        tree.to_zarr(partial, mode="w", consolidated=False)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not write {target}: {error}. The {what} is still in memory: save it elsewhere."
        ) from error
    return target


def load(path: str | os.PathLike, kind: str, build: "Callable[[xr.DataTree], Any]") -> Any:
    """``build(tree)`` of a tree that ``write`` wrote.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the file is of another kind, foreign or truncated, or ``build`` raised.
    """
    import xarray as xr

    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"no {_NAMES[kind]} at {path}.")
    if (other := kind_of(source)) is not None and other != kind:
        raise ValueError(f"{path} holds a {_NAMES[other]}, not a {_NAMES[kind]}. Read it with load_{_NAMES[other]}.")
    try:
        tree = xr.open_datatree(path, engine="zarr", consolidated=False)
        tree.load()
        return build(tree)
    except Exception as error:
        raise ValueError(
            f"{path} is not a {_NAMES[kind]} written by slt-jax, or it is truncated ({type(error).__name__}: {error})."
        ) from error
