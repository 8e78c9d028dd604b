"""Collectives of a compiled program: which operations exchange data between devices, and along which axis of the mesh.

Read from XLA's text of the program, in which a device is its number in the order of the mesh.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

_KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_BY_REPLICA = ("all-reduce", "all-gather", "reduce-scatter")  # of whole replicas, which are the mesh, if not of devices
_CALL = re.compile(rf"= .*?\b(?P<kind>{'|'.join(sorted(_KINDS, key=len, reverse=True))})(?:-start)?\(")
_LISTED = re.compile(r"replica_groups=\{(?P<groups>(?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")
_ARRAY = re.compile(r"\b(?:pred|bf|[a-z])(\d*)\[([\d,]*)\]")
_PAIRS = re.compile(r"source_target_pairs=\{(?P<groups>(?:\{\d+,\d+\},?)*)\}")


def collectives_of(text: str, mesh: Mesh) -> dict[str, dict[str, int]]:
    """Axis of the mesh -> kind of operation -> how often the program's text has it; {} where there are none.

    An operation along several axes counts for ``"chain and model"``. Groups of one device exchange nothing.
    """
    found: dict[str, Counter[str]] = {}
    for line in text.splitlines():
        if (call := _CALL.search(line)) is None:
            continue
        of_replicas = call["kind"] in _BY_REPLICA and "use_global_device_ids=true" not in line
        groups = [list(range(mesh.devices.size))] if of_replicas else list(_groups(line, mesh.devices.size))
        axes = _axes(groups, mesh)
        if axes:
            found.setdefault(" and ".join(axes), Counter())[call["kind"]] += 1
    return {axis: dict(counts) for axis, counts in found.items()}


def _groups(line: str, count: int) -> Iterator[list[int]]:
    """The devices that exchange data with one another; all of them where the line names none."""
    if match := _IOTA.search(line):
        dims = _numbers(match["dims"])
        order = _numbers(match["order"]) if match["order"] else list(range(len(dims)))
        devices = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        yield from devices.reshape(-1, _numbers(match["shape"])[-1]).tolist()
        return
    match = _LISTED.search(line) or _PAIRS.search(line)
    listed = re.findall(r"\{([\d,]*)\}", match["groups"]) if match else []
    yield from (_numbers(group) for group in listed)
    if not listed:
        yield list(range(count))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _axes(groups: list[list[int]], mesh: Mesh) -> list[str]:
    """The axes along which devices of one group differ."""
    differ = set()
    for group in groups:
        places = np.array(np.unravel_index(group, mesh.devices.shape))
        differ |= {name for name, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1}
    return [name for name in mesh.axis_names if name in differ]


def largest_result(text: str, kind: str) -> int:
    """Bytes on one device of the largest array that an operation of this kind (``"all-gather"``) returns; 0 without."""
    lines = (line for line in text.splitlines() if (call := _CALL.search(line)) and call["kind"] == kind)
    return max((_bytes(*array) for line in lines for array in _ARRAY.findall(line.split(kind)[0])), default=0)


def _bytes(bits: str, dims: str) -> int:
    return math.prod(_numbers(dims)) * max(8, int(bits or 8)) // 8
