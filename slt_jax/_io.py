"""Small files, written whole or not at all."""

import os
from pathlib import Path


def write_file(path: Path, value: str | bytes) -> Path:
    """All of it, or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(value.encode() if isinstance(value, str) else value)
    return partial.replace(path)
