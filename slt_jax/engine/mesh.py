"""Devices: a ``chain`` axis first, a ``model`` axis for weights that do not fit one device; one process or many.

A mesh belongs to a single process, or has devices of every process (it *spans* them). In the second case all
processes run the same host code in step: what only one of them knows (a clock, a file) goes through ``allgather``.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slt_jax.posterior import split

Weights = jax.Array | jax.ShapeDtypeStruct
_SHORT = 64  # bytes that `allgather` sends at once


def chain_mesh(num_chains: int, devices: list | None = None) -> Mesh:
    """The default mesh: as many devices on the ``chain`` axis as divide ``num_chains``, equally many of each process.

    Raises:
        ValueError: the chains cannot be shared out equally among the processes.
    """
    by_process: dict[int, list] = {}
    for device in jax.devices() if devices is None else devices:
        by_process.setdefault(device.process_index, []).append(device)
    share, rest = divmod(num_chains, len(by_process))
    if rest:
        raise ValueError(
            f"num_chains = {num_chains} cannot be shared out equally among {len(by_process)} processes. Take "
            f"{len(by_process) * (share + 1)} chains, or a mesh of this process: "
            f"slt_jax.engine.mesh.chain_mesh({num_chains}, jax.local_devices())."
        )
    most = min(share, *map(len, by_process.values()))
    used = max(k for k in range(1, most + 1) if share % k == 0)
    chosen = [device for own in by_process.values() for device in own[:used]]
    return jax.make_mesh((len(chosen),), ("chain",), axis_types=(AxisType.Auto,), devices=chosen)


def check_mesh(mesh: Mesh, num_chains: int) -> Mesh:
    """Raise ValueError unless ``mesh`` has an axis ``chain`` that divides ``num_chains``, and at most ``model`` too.

    And unless its devices are this process's, or some of every process.
    """
    if "chain" not in mesh.axis_names or set(mesh.axis_names) - {"chain", "model"}:
        raise ValueError(f"mesh must have an axis 'chain' and may have an axis 'model', got {mesh.axis_names}.")
    if num_chains % mesh.shape["chain"]:
        raise ValueError(
            f"num_chains = {num_chains} is not a multiple of the mesh's chain axis of {mesh.shape['chain']} devices. "
            f"Take a multiple, or a smaller mesh."
        )
    owners = {device.process_index for device in mesh.devices.flat}
    if owners != {jax.process_index()} and len(owners) < jax.process_count():
        raise ValueError(
            f"mesh has devices of the processes {sorted(owners)}, and this is process {jax.process_index()} of "
            f"{jax.process_count()}. Take devices of every process, or jax.local_devices()."
        )
    return mesh


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether some of the devices are another process's; no mesh means this process only."""
    return mesh is not None and any(device.process_index != jax.process_index() for device in mesh.devices.flat)


def is_main_process(mesh: Mesh | None) -> bool:
    """Whether this process is the one that prints and writes for the mesh: process 0, or the only one."""
    return jax.process_index() == 0 or not spans_processes(mesh)


def allgather(value: Any, mesh: Mesh | None) -> list:
    """``value``, which JSON can hold, of every process of the mesh in turn; all must call this together."""
    if not spans_processes(mesh):
        return [value]
    text = json.dumps(value)
    rows = _exchanged(text if len(text) <= _SHORT else f"#{len(text)}", _SHORT)
    if longer := [int(row[1:]) for row in rows if row.startswith("#")]:
        rows = _exchanged(text, 1 << max(longer).bit_length())  # powers of two: few programs to compile
    return [json.loads(row) for row in rows]


def _exchanged(text: str, room: int) -> list[str]:
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(room).encode(), np.uint8))
    return [np.asarray(row).tobytes().decode() for row in rows]


def place(value: Any, sharding: NamedSharding) -> jax.Array:
    """``value``, which every process holds whole (or which spans the processes already), as an array on the mesh.

    ``jax.device_put`` would send it around to compare it, which NaN and random keys do not survive.
    """
    if sharding.is_fully_addressable or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return place_keys(np.asarray(jax.random.key_data(value)), sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_keys(words: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Threefry keys of these words, ``(..., 2)``, which every process has, as an array on the mesh."""
    if sharding.is_fully_addressable:
        return jax.random.wrap_key_data(jax.device_put(words, sharding), impl="threefry2x32")
    return _wrapped(words, sharding)


@functools.partial(jax.jit, static_argnums=1)
def _wrapped(words, sharding):
    return jax.lax.with_sharding_constraint(jax.random.wrap_key_data(words, impl="threefry2x32"), sharding)


def own_rows(num_rows: int, sharding: NamedSharding) -> np.ndarray:
    """Which rows, of ``num_rows`` laid out by ``sharding`` on their first axis, this process's devices hold."""
    slices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[index or ()] for index in slices]))


def place_rows(rows: Any, num_rows: int, sharding: NamedSharding) -> jax.Array:
    """An array of ``num_rows`` rows, of which every process gives those of ``own_rows``."""
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)
    own = own_rows(num_rows, sharding)

    def at(index: tuple | None) -> np.ndarray:
        here = slice(None) if index is None else index[0]
        return rows[np.searchsorted(own, np.arange(num_rows)[here])]

    return jax.make_array_from_callback((num_rows, *rows.shape[1:]), sharding, at)


def shared_sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Sharding of ``leaf`` stored once for all chains: its own ``model`` sharding, else replicated."""
    return NamedSharding(mesh, PartitionSpec(*_own_spec(mesh, leaf)))


def weight_sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Sharding of an array of w*: its own ``model`` sharding if it has one, else by ``split_dimension``."""
    own = _own_spec(mesh, leaf)
    return NamedSharding(mesh, PartitionSpec(*own) if "model" in own else split.split_spec(mesh, leaf.shape))


def check_split(mesh: Mesh, weights: Sequence[Weights]) -> None:
    """Raise ValueError where the axis ``model`` splits none of the weights: its devices would all do the same."""
    parts = mesh.shape.get("model", 1)
    if parts > 1 and not any(map(_is_split, weights)):
        largest = max(weights, key=lambda w: w.size)
        raise ValueError(
            f"the mesh's axis 'model' of {parts} devices splits none of the {len(weights)} arrays of center: those of "
            f"at least {split.LARGE:,} weights are split along a dimension that {parts} divides, and the largest has "
            f"shape {largest.shape}. Leave the axis out, let it have another length, or place an array on it yourself: "
            "jax.device_put(w, NamedSharding(mesh, PartitionSpec('model')))."
        )


def split_notes(mesh: Mesh, weights: Mapping[str, Weights], examples: int) -> list[str]:
    """What the axis ``model`` does not split, for the result: large arrays, and the ``examples`` of one pass."""
    parts, notes = mesh.shape.get("model", 1), []
    large = {name: w.shape for name, w in weights.items() if w.size >= split.LARGE and not _is_split(w)}
    if parts > 1 and large:
        few = ", ".join(f"'{name}' {shape}" for name, shape in list(large.items())[:4])
        more = f" and {len(large) - 4} more" if len(large) > 4 else ""
        notes.append(
            f"every device of the mesh's axis 'model' holds all of {few}{more}, which have no dimension that {parts} "
            "divides."
        )
    if examples % parts:
        notes.append(
            f"{examples} examples of a minibatch (or micro-batch) are not a multiple of the mesh's axis 'model' of "
            f"{parts}: a decoder computes all of them on each of its devices."
        )
    return notes


def _is_split(weights: Weights) -> bool:
    return "model" in getattr(weights.sharding, "spec", ())


def _own_spec(mesh: Mesh, leaf: Any) -> tuple:
    own = getattr(leaf, "sharding", None)
    if "model" not in mesh.axis_names or not isinstance(own, NamedSharding):
        return ()
    return tuple(axis if axis == "model" else None for axis in own.spec)
