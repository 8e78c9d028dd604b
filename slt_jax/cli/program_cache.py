"""A cache of compiled programs on disk, so that the next command does not compile them again."""

import os
import platform
import re
import zlib
from pathlib import Path
from typing import Any

import jax

MAX_BYTES = 2**30  # beyond it, the least recently used programs are removed
MIN_SECONDS = 0.3  # programs that compile faster are not cached


def keep_programs() -> Path | None:
    """Let JAX cache compiled programs in the user's cache folder, and return the folder.

    It is ``$XDG_CACHE_HOME/slt-jax/programs`` or ``~/.cache/slt-jax/programs``, with one folder for each kind of
    processor in it. Nothing is changed, and None returned, if the user has set or turned off JAX's cache
    (``JAX_COMPILATION_CACHE_DIR``, ``JAX_ENABLE_COMPILATION_CACHE``) or the folder cannot be written to. Weights, data
    and settings are arguments of a program: another checkpoint of the same shapes uses the same program.
    """
    settings: Any = jax.config  # its class does not declare its settings
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return None
    try:
        base = os.environ.get("XDG_CACHE_HOME", "")
        cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
        folder = cache / "slt-jax" / "programs" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # Path.home() raises a RuntimeError if there is no home folder
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return folder


def _processor() -> str:
    """A name for the kind of processor: machines may share a home folder, and a program for one can crash another."""
    try:
        features = re.findall(r"^(?:flags|Features|model name)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        features = []
    return f"{platform.machine()}-{zlib.crc32(repr(features[:2] or platform.processor()).encode()):08x}"
