"""This machine: the memory that is in use and available on it, and the versions that results depend on."""

import ctypes
import importlib.metadata
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import psutil

_GIB = 2**30
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_LIMIT_AND_USAGE = (
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
    ("memory.max", "memory.current"),  # version 2
)


def versions() -> dict[str, str]:
    """Versions that a bit-for-bit result depends on."""
    packages = {name: importlib.metadata.version(name) for name in ("slt-jax", "jax", "jaxlib")}
    return {**packages, "python": ".".join(platform.python_version_tuple()[:2])}


def check_room(size: float, what: str) -> None:
    """Raise MemoryError unless ``size`` bytes are free: of the first device, or of this process if that is a CPU."""
    device = jax.local_devices()[0]
    where = "this process" if device.platform == "cpu" else "the device"
    if size > (free := taken_and_free([device])[2]):
        raise MemoryError(
            f"{what} takes {size_text(size)} of {where}, and {size_text(free)} are free. Take a machine with more "
            "memory."
        )


def taken_and_free(devices: Sequence[Any]) -> tuple[float, float, float]:
    """(peak, used, free) bytes. Of this process if the devices are CPUs, else the worst of each over the devices."""
    if devices[0].platform == "cpu":
        return peak_of_process(), used_of_process(), free_of_process()
    peak, used = (max(_stat(d, name, 0.0) for d in devices) for name in ("peak_bytes_in_use", "bytes_in_use"))
    return peak, used, free_of_accelerator(devices)


def _stat(device: Any, name: str, default: float) -> float:
    return float((device.memory_stats() or {}).get(name, default))


def used_of_process() -> float:
    """Resident bytes of this process, after its allocator has returned its unused pages to the system."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # compilers leave hundreds of MiB of unused pages, which the run will use again
    return float(psutil.Process().memory_info().rss)


def peak_of_process() -> float:
    """Largest resident size of this process since its start, in bytes; 0 on Windows, which does not report it."""
    if sys.platform == "win32":
        return 0.0
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def free_of_process() -> float:
    """Bytes this process may still allocate: what the system has available, or its control group if that is less."""
    return min([float(psutil.virtual_memory().available), *_free_of_control_group()])


def _free_of_control_group() -> list[float]:
    free = []
    for names in _LIMIT_AND_USAGE:
        files = [_CONTROL_GROUP / name for name in names]
        values = [file.read_text().strip() for file in files if file.exists()]
        if len(values) == 2 and values[0].isdigit():
            free.append(float(values[0]) - float(values[1]) + _reclaimable(files[0].parent))
    return free


def _reclaimable(group: Path) -> float:
    """Bytes of cached files that count as used by the control group and are freed on demand."""
    file = group / "memory.stat"
    lines = file.read_text().splitlines() if file.exists() else []
    stats = dict(line.split() for line in lines if len(line.split()) == 2)
    return float(stats.get("total_inactive_file", stats.get("inactive_file", 0)))


def free_of_accelerator(devices: Sequence[Any] | None = None) -> float:
    """Bytes free on the fullest of these devices, by default all of this process; infinite where it is not reported."""
    return min(
        _stat(device, "bytes_limit", math.inf) - _stat(device, "bytes_in_use", 0.0)
        for device in devices or jax.local_devices()
    )


def size_text(number: float) -> str:
    """Bytes as GiB or MiB, for a message."""
    return f"{number / _GIB:,.1f} GiB" if number >= 10 * _GIB else f"{number / 2**20:,.0f} MiB"
