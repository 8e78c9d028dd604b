"""Accelerators that are not there, as JAX describes them to a compiler, and what they can do by their data sheets.

``jax.experimental.topologies`` makes devices that programs can be compiled for, but that hold no arrays.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from slt_jax._checks import check_count, shown

_GIB = 2**30
_PREALLOCATED = 0.75  # of a GPU's memory, which JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)
_EXTRAS = {"tpu": "tpu-compiler", "cuda": "gpu-compiler"}
_MODULES = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")}


@dataclass(frozen=True)
class Kind:
    """One kind of device, by its maker's data sheet.

    ``bfloat16``, ``float32``: dense products of matrices of that type, in operations per second and as JAX computes
    them by default: float32 in one pass of bfloat16 on a TPU, as TF32 on a GPU. ``memory``: bytes that programs may
    use. ``bandwidth``: of the memory, bytes per second. ``dimensions``: of a topology's name; 0 for GPUs, which are
    counted.
    """

    label: str
    platform: str
    bfloat16: float
    float32: float
    memory: float
    bandwidth: float
    dimensions: int = 0

    def peak(self, dtype: str) -> float:
        """Operations per second in products of matrices of this type."""
        return self.bfloat16 if dtype in ("bfloat16", "float16") else self.float32


KINDS: Mapping[str, Kind] = {
    "v5e": Kind("TPU v5e", "tpu", 197e12, 197e12, 15.75 * _GIB, 819e9, 2),
    "v5p": Kind("TPU v5p", "tpu", 459e12, 459e12, 95.74 * _GIB, 2765e9, 3),
    "v6e": Kind("TPU v6e", "tpu", 918e12, 918e12, 31.25 * _GIB, 1640e9, 2),
    "h100": Kind("H100 SXM", "cuda", 989.4e12, 494.7e12, _PREALLOCATED * 79.1 * _GIB, 3.35e12),
    "h200": Kind("H200 SXM", "cuda", 989.4e12, 494.7e12, _PREALLOCATED * 141.0 * _GIB, 4.8e12),
}
_NAMES = "v5e:2x2, v5p:2x2x1, v6e:4x4, h100, h100x8 and h200"


@dataclass(frozen=True)
class Devices:
    """Devices of one kind. ``name``: as it was given. ``count``: how many."""

    name: str
    kind: Kind
    count: int

    def describe(self) -> list[Any]:
        """The devices, for a mesh that programs can be compiled for.

        Raises:
            ImportError: the compiler for them is not installed.
            ValueError: the compiler has no such topology.
        """
        _check_compiler(self)
        try:
            found = _tpu_devices(self) if self.kind.platform == "tpu" else _gpu_devices(self)
        except Exception as error:
            raise ValueError(
                f"the compiler for {self.kind.label} knows no topology {self.name!r}: {str(error)[:300]}. Names are "
                f"{_NAMES}."
            ) from error
        if len(found) != self.count:
            raise ValueError(f"{self.name!r} should be {self.count} devices, and the compiler describes {len(found)}.")
        return list(found)


def devices_named(name: Any) -> Devices:
    """The devices of a name: ``v5e:2x2``, ``v5p:2x2x1``, ``h100``, ``h100x8`` and the like.

    Raises:
        TypeError, ValueError: another name.
    """
    if not isinstance(name, str):
        raise TypeError(f"device must be a name such as 'v5e:2x2' or 'h100x8', got {shown(name)}.")
    match = re.fullmatch(r"(?P<kind>[a-z]\d+[a-z]?)(?::(?P<shape>\d+(?:x\d+)*)|x(?P<count>\d+))?", name.strip().lower())
    kind = KINDS.get(match["kind"]) if match else None
    if match is None or kind is None:
        raise ValueError(f"device {name!r} is not known. Names are {_NAMES}.")
    if not kind.dimensions:
        if match["shape"]:
            raise ValueError(f"device {name!r}: GPUs are counted. Write {match['kind']}x8 for eight of them.")
        count = int(match["count"] or 1)
        check_count("the number of devices", count, 1)
        return Devices(name, kind, count)
    shape = tuple(map(int, (match["shape"] or "").split("x"))) if match["shape"] else ()
    if len(shape) != kind.dimensions or not math.prod(shape):
        example = "x".join(["2", "2", "1"][: kind.dimensions])
        raise ValueError(
            f"device {name!r}: a {kind.label} needs a topology of {kind.dimensions} numbers. Write "
            f"{match['kind']}:{example} for four of them."
        )
    return Devices(name, kind, math.prod(shape))


def described_mesh(devices: Devices, model: int = 1) -> Mesh:
    """All of them on the axis ``chain``, or in groups of ``model`` on a second axis that shards the weights.

    Raises as ``Devices.describe``, and ValueError where ``model`` does not divide them.
    """
    check_count("model", model, 1)
    if devices.count % model:
        raise ValueError(f"model = {model} does not divide the {devices.count} devices of {devices.name}.")
    there = np.empty(devices.count, object)
    there[:] = devices.describe()
    names = ("chain",) if model == 1 else ("chain", "model")
    shape = (devices.count,) if model == 1 else (devices.count // model, model)
    return Mesh(there.reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def has_compiler(platform: str) -> bool:
    """Whether programs can be compiled for ``"tpu"`` or ``"cuda"`` here."""
    return any(_is_installed(module) for module in _MODULES[platform])


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _check_compiler(devices: Devices) -> None:
    platform = devices.kind.platform
    if not has_compiler(platform):
        extra = _EXTRAS[platform]
        raise ImportError(
            f"a plan for {devices.name} needs the compiler for {devices.kind.label}, which is not installed; it runs "
            f"without the device: pip install 'slt-jax[{extra}]' (125 to 215 MB, Linux)."
        )


def _tpu_devices(devices: Devices) -> list[Any]:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it asks Google's cloud what machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it only compiles: several processes may
    name = devices.name.strip().lower()
    sides = [int(side) for side in name.partition(":")[2].split("x")]
    host = {} if 1 not in sides[:2] else {"chips_per_host_bounds": (*sides, 1)[:3]}
    return topologies.get_topology_desc(name, platform="tpu", **host).devices


_MOST_IN_A_HOST = 8
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  l2_cache_size: 52428800  memory_bandwidth: {bandwidth}  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10 }}
runtime_version {{ major: 12  minor: 8 }}
device_description_str: "NVIDIA {label}"
"""  # what the CUDA driver reports of a Hopper GPU, in the fields of XLA's GpuTargetConfigProto


def _gpu_devices(devices: Devices) -> list[Any]:
    kind = devices.kind
    text = _HOPPER.format(
        bandwidth=int(kind.bandwidth), memory=int(kind.memory / _PREALLOCATED), label=kind.label
    )  # fmt: skip
    hosts = -(-devices.count // _MOST_IN_A_HOST)
    return topologies.get_topology_desc(
        platform="cuda", target_config=text, topology=f"1x{hosts}x{devices.count // hosts}"
    ).devices
