"""Trees of arrays on disk as zarr: written whole or not at all, and read back only as they were written."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax._io import user_path

if TYPE_CHECKING:
    import xarray as xr

RESULT, SWEEP, TRAJECTORY = "slt_jax_result", "slt_jax_sweep", "slt_jax_trajectory"  # what says what a file is
_NAMES = {RESULT: "result", SWEEP: "sweep", TRAJECTORY: "trajectory"}


def kind_of(path: Path) -> str | None:
    """``RESULT`` or ``SWEEP``; None for anything else."""
    record = path / "zarr.json"
    text = record.read_text(errors="replace") if record.is_file() else ""
    return next((kind for kind in _NAMES if f'"{kind}"' in text), None)


def digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 over types, shapes and bytes: zarr fills a missing chunk without a word."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def write(tree: "xr.DataTree", path: str | os.PathLike, kind: str, *, overwrite: bool) -> Path:
    """Write ``tree``, whose attributes name its ``kind``. Raises FileExistsError on an existing path, and OSError."""
    target, what = user_path(path), _NAMES[kind]
    target = target.resolve() if target.is_symlink() else target  # what a link points to is replaced, not the link
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Pass overwrite=True to replace it, or another path.")
    if target.exists() and kind_of(target) != kind:
        raise FileExistsError(f"{target} exists and is not a {what} of slt-jax, so it is kept. Give another path.")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")  # a save cut short leaves target as it was
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
    """What ``build`` makes of a tree that ``write`` wrote.

    Raises FileNotFoundError, or ValueError when the file is foreign or truncated, which ``build`` may say too.
    """
    import xarray as xr

    found = user_path(path)
    if not found.exists():
        raise FileNotFoundError(f"no {_NAMES[kind]} at {path}.")
    if (other := kind_of(found)) not in (None, kind):
        raise ValueError(f"{path} holds a {_NAMES[other]}, not a {_NAMES[kind]}. Read it with load_{_NAMES[other]}.")
    try:
        tree = xr.open_datatree(found, engine="zarr", consolidated=False)
        tree.load()
        return build(tree)
    except Exception as error:
        raise ValueError(
            f"{path} is not a {_NAMES[kind]} written by slt-jax, or it is truncated ({type(error).__name__}: {error})."
        ) from error
