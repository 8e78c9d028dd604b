"""Small files, written completely or not at all."""

import os
from pathlib import Path


def user_path(path: str | os.PathLike) -> Path:
    """A path as a caller gives it, with the home directory in the place of ``~``."""
    return Path(path).expanduser()


def write_file(path: Path, value: str | bytes) -> Path:
    """Write ``value`` to ``path`` and return the path. An interrupted write leaves what was there before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(value.encode() if isinstance(value, str) else value)
    return partial.replace(path)
