"""Trees of arrays on disk as zarr: written whole or not at all, and read back only as they were written.

A saved tree holds a digest of everything in it: values, types, dimensions, names and attributes of all groups. Files of
format 1, which have one of their traces only, are still read, and their notes say so.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax._io import partial_of, place_of, remove_partials, user_path

if TYPE_CHECKING:
    import xarray as xr

RESULT, SWEEP, TRAJECTORY = "slt_jax_result", "slt_jax_sweep", "slt_jax_trajectory"  # what says what a file is
SUSCEPTIBILITIES = "slt_jax_susceptibilities"
FORMAT = 2
UNVERIFIED = "unverified: written by an older version, whose digest covers the traces only."
_NAMES = {RESULT: "result", SWEEP: "sweep", TRAJECTORY: "trajectory", SUSCEPTIBILITIES: "susceptibilities"}
_DIGEST = "contents_sha256"
TRACES_DIGEST = "sha256"  # of format 1
_FIRST_FORMAT = {  # its attributes, all of them: a file with another one is newer, or was changed
    RESULT: {RESULT, "settings", "stopped", "notes", TRACES_DIGEST},
    SWEEP: {SWEEP, "results", TRACES_DIGEST},
    TRAJECTORY: {TRAJECTORY, "results", TRACES_DIGEST},
}


def kind_of(path: Path) -> str | None:
    """``RESULT``, ``SWEEP``, ``TRAJECTORY`` or ``SUSCEPTIBILITIES``; None for anything else."""
    record = _readable(path) / "zarr.json"
    text = record.read_text(errors="replace") if record.is_file() else ""
    return next((kind for kind in _NAMES if f'"{kind}"' in text), None)


def write(tree: "xr.DataTree", path: str | os.PathLike, kind: str, *, overwrite: bool) -> Path:
    """Write ``tree``, whose attributes name its ``kind``, and the digest of its contents.

    At every moment either what was there before or the new tree can be read with ``load``. The target of a symbolic
    link is replaced, not the link. Raises FileExistsError on an existing path, and OSError.
    """
    target, what = user_path(path), _NAMES[kind]
    place = place_of(target)
    with contextlib.suppress(OSError):
        _recover(place)
    if place.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Pass overwrite=True to replace it, or another path.")
    if place.exists() and kind_of(place) != kind:
        raise FileExistsError(f"{target} exists and is not a {what} of slt-jax, so it is kept. Give another path.")
    tree.attrs = {**tree.attrs, _DIGEST: digest_of_tree(tree)}
    try:
        _replace(place, lambda partial: _write_zarr(tree, partial))
    except OSError as error:
        raise OSError(
            f"could not write {target}: {error}. The {what} is still in memory: save it elsewhere."
        ) from error
    return target


def _write_zarr(tree: "xr.DataTree", place: Path) -> None:
    """With consolidated metadata, without which ``xarray.open_datatree`` warns; ``load`` does not read them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        tree.to_zarr(place, mode="w", consolidated=True)


def _replace(place: Path, write_to: Callable[[Path], Any]) -> None:
    """Put what ``write_to`` writes in the place of ``place``, which is set aside first and removed last."""
    partial, aside = partial_of(place), _aside(place)
    try:
        write_to(partial)
        if place.exists():
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
        partial.rename(place)
    except BaseException:
        with contextlib.suppress(OSError):
            _recover(place)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):
        _remove(aside)


def _aside(place: Path) -> Path:
    """What was saved at ``place`` before, while it is being replaced."""
    return place.with_name(f".{place.name}.replaced")


def _readable(path: Path) -> Path:
    """Where what was saved at ``path`` is: set aside, if the process that was replacing it was killed in between."""
    place = place_of(path)
    return aside if not place.exists() and (aside := _aside(place)).exists() else path


def _recover(place: Path) -> None:
    """Put back what a process that was killed has set aside, and remove what such ones have left."""
    if (aside := _aside(place)).exists():
        if place.exists():
            _remove(aside)
        else:
            aside.rename(place)
    for path in (place, aside):
        remove_partials(path)


def _remove(aside: Path) -> None:
    if aside.exists():
        rest = aside.rename(partial_of(aside))  # read by nobody, so it may be torn
        shutil.rmtree(rest, ignore_errors=True)


def load(path: str | os.PathLike, kind: str, build: "Callable[[xr.DataTree], Any]") -> Any:
    """What ``build`` makes of a tree that ``write`` wrote.

    Raises FileNotFoundError, or ValueError when the file is foreign, truncated, changed or damaged, which ``build`` may
    say too.
    """
    import xarray as xr

    found = _readable(user_path(path))
    if not found.exists():
        raise FileNotFoundError(f"no {_NAMES[kind]} at {path}.")
    if (other := kind_of(found)) not in (None, kind):
        raise ValueError(f"{path} holds a {_NAMES[other]}, not a {_NAMES[kind]}. Read it with load_{_NAMES[other]}.")
    try:
        tree = xr.open_datatree(found, engine="zarr", consolidated=False)
        tree.load()
        _check_digest(tree, kind)
        return build(tree)
    except Exception as error:
        raise ValueError(
            f"{path} is not a {_NAMES[kind]} written by slt-jax, or it is truncated, or it was changed or damaged "
            f"after it was saved ({type(error).__name__}: {error}). Use another copy of it, or compute it again."
        ) from error


def _check_digest(tree: "xr.DataTree", kind: str) -> None:
    attributes = tree.attrs
    if attributes.get(kind) == 1 and attributes.keys() == _FIRST_FORMAT[kind]:
        return  # ``build`` compares the digest of the traces
    if attributes.get(kind) not in (1, FORMAT):
        raise ValueError(f"its format is {attributes.get(kind)!r}, and this version reads 1 and {FORMAT}")
    if _DIGEST not in attributes:
        raise ValueError("it has no digest of its contents")
    if attributes[_DIGEST] != digest_of_tree(tree):
        raise ValueError("its contents do not have the digest that was saved with them")


def digest_of_tree(tree: "xr.DataTree") -> str:
    """SHA-256 over all groups of a tree: names, dimensions, types, values and attributes, and no way to store them."""
    found = hashlib.sha256()
    for node in sorted(tree.subtree, key=lambda node: node.path):
        dataset = node.to_dataset(inherit=False)
        own = {name: value for name, value in node.attrs.items() if name != _DIGEST}
        found.update(_text([node.path, own]))
        for name in sorted(map(str, dataset.variables)):
            variable = dataset.variables[name]
            found.update(_text([name, name in dataset.coords, variable.dims, variable.shape, variable.attrs]))
            found.update(_bytes(variable.values))
    return found.hexdigest()


def _text(value: Any) -> bytes:
    return json.dumps(
        value, sort_keys=True, default=lambda x: x.item() if isinstance(x, np.generic) else str(x)
    ).encode()


def _bytes(values: np.ndarray) -> bytes:
    """Type and values, as they come back from a file, where strings have other types and every NaN is the same."""
    if values.dtype.kind in "OUT":
        return _text(values.tolist())
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), values.dtype.type(np.nan), values)
    return values.dtype.newbyteorder("<").str.encode() + np.ascontiguousarray(values).tobytes()
