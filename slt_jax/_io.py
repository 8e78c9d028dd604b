"""Small files, written completely or not at all, and digests of what files hold."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def user_path(path: str | os.PathLike) -> Path:
    """A path as a caller gives it, with the home directory in the place of ``~``."""
    return Path(path).expanduser()


def write_file(path: Path, value: str | bytes) -> Path:
    """Write ``value`` to ``path`` and return the path. An interrupted write leaves what was there before.

    A symbolic link stays one: its target is written. Raises OSError that names the path.
    """
    place = place_of(path)
    remove_partials(place)
    partial = partial_of(place)
    try:
        partial.write_bytes(value.encode() if isinstance(value, str) else value)
        partial.replace(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        text = f"could not write {path}: {error.strerror or error}"
        raise (OSError(text) if error.errno is None else OSError(error.errno, text)) from error
    return path


def place_of(path: Path) -> Path:
    """Where a write to ``path`` goes: to the target of a symbolic link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def partial_of(path: Path) -> Path:
    """Where this process writes what ``path`` will become."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_partials(path: Path) -> None:
    """Remove what processes that have ended left of their writes to ``path``."""
    for found in _siblings(path, "partial"):
        with contextlib.suppress(OSError):
            shutil.rmtree(found) if found.is_dir() else found.unlink()


def remove_all_partials(folder: Path) -> None:
    """Remove what processes that have ended left of their writes of small files into ``folder``."""
    for found in folder.glob(".*.partial"):
        if found.is_file() and (name := re.fullmatch(r"\.(.+)\.\d+\.partial", found.name)):
            remove_partials(folder / name[1])


def _siblings(path: Path, kind: str) -> list[Path]:
    """``.NAME.PID.KIND`` beside ``path``, of processes that have ended."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.{kind}")
    try:
        names = [name for name in os.listdir(path.parent) if name.endswith(f".{kind}")]
    except OSError:
        return []
    found = [(name, match) for name in names if (match := pattern.fullmatch(name))]
    return [path.with_name(name) for name, match in found if not _alive(int(match[1]))]


def _alive(process: int) -> bool:
    import psutil

    return psutil.pid_exists(process)


def digest_of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 over types, shapes and bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def digest_of_json(value: Any) -> str:
    """SHA-256 of plain JSON, whatever the order of its names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
