"""The memory of this machine: what is taken of it, and what can be had."""

import ctypes
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax

_GIB = 2**30


def check_room(size: float, what: str) -> None:
    """Raise MemoryError unless ``size`` bytes fit into what the first device, or on a CPU the process, has free."""
    device = jax.local_devices()[0]
    where = "this process" if device.platform == "cpu" else "the device"
    if size > (free := taken_and_free([device])[2]):
        raise MemoryError(
            f"{what} takes {size_text(size)} of {where}, and {size_text(free)} are free. Take a machine with more "
            "memory."
        )


def taken_and_free(devices: list) -> tuple[float, float, float]:
    """(most so far, now, free): of the process for a CPU's devices, else the worst of each over the devices."""
    if devices[0].platform == "cpu":
        return peak_of_process(), used_of_process(), free_of_process()
    peak, now = (max(_stat(d, name, 0.0) for d in devices) for name in ("peak_bytes_in_use", "bytes_in_use"))
    return peak, now, free_of_accelerator(devices)


def _stat(device: Any, name: str, default: float) -> float:
    return float((device.memory_stats() or {}).get(name, default))


def used_of_process() -> float:
    """Resident bytes of this process, less what its allocator can give back; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0.0
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # compilers leave hundreds of MiB behind, which the run will use again
    return float(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


def peak_of_process() -> float:
    """Most resident bytes of this process since it began; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0.0
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def free_of_process() -> float:
    """Bytes this process may still take, by the system and by its control group; infinite where neither tells."""
    info = Path("/proc/meminfo")
    found = [math.inf]
    if info.exists():
        found += [1024.0 * int(x.split()[1]) for x in info.read_text().splitlines() if x.startswith("MemAvailable")]
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE"))
    old, new = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"), ("memory.max", "memory.current")
    for names in (old, new):
        group = [Path("/sys/fs/cgroup") / name for name in names]
        values = [path.read_text().strip() for path in group if path.exists()]
        if len(values) == 2 and values[0].isdigit():
            found.append(float(values[0]) - float(values[1]) + _cached(Path("/sys/fs/cgroup") / names[0]))
    return min(found)


def _cached(limit: Path) -> float:
    """Bytes of files that the control group is charged for and gives back on demand."""
    stat = limit.parent / "memory.stat"
    lines = stat.read_text().splitlines() if stat.exists() else []
    found = dict(line.split() for line in lines if len(line.split()) == 2)
    return float(found.get("total_inactive_file", found.get("inactive_file", 0)))


def free_of_accelerator(devices: list | None = None) -> float:
    """Bytes that can be had of each of these devices, default all of this process; infinite where they do not tell."""
    return min(
        _stat(device, "bytes_limit", math.inf) - _stat(device, "bytes_in_use", 0.0)
        for device in devices or jax.local_devices()
    )


def size_text(number: float) -> str:
    return f"{number / _GIB:,.1f} GiB" if number >= 10 * _GIB else f"{number / 2**20:,.0f} MiB"
