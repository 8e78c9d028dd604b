"""Compiled programs kept on disk, so that the next command does not compile them again."""

import os
import platform
import re
import zlib
from pathlib import Path
from typing import Any

import jax

MOST_BYTES = 2**30  # the least recently used go first
LEAST_SECONDS = 0.3  # what compiles faster is not kept


def keep_programs() -> Path | None:
    """Have JAX keep what it compiles in the user's cache folder; return the folder.

    ``$XDG_CACHE_HOME/slt-jax/programs`` or ``~/.cache/slt-jax/programs``, and there one folder for each kind of
    processor. None where nothing is changed: JAX was told of a cache, or told to use none
    (``JAX_COMPILATION_CACHE_DIR``, ``JAX_ENABLE_COMPILATION_CACHE``), or the folder cannot be written to. A program's
    weights, data and settings are its arguments: another checkpoint of the same shapes finds it.
    """
    settings: Any = jax.config  # whose class does not declare its settings
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return None
    try:
        base = os.environ.get("XDG_CACHE_HOME", "")
        cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
        folder = cache / "slt-jax" / "programs" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # Path.home() raises the second where there is none
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return folder


def _processor() -> str:
    """A home folder may be shared by machines, and a program compiled for one's instructions crashes another."""
    try:
        features = re.findall(r"^(?:flags|Features|model name)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        features = []
    return f"{platform.machine()}-{zlib.crc32(repr(features[:2] or platform.processor()).encode()):08x}"
