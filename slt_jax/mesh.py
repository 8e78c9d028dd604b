"""Devices: a ``chain`` axis first, a ``model`` axis for weights that do not fit one device."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def chain_mesh(num_chains: int, devices: list | None = None) -> Mesh:
    """The default mesh: as many devices on the ``chain`` axis as divide ``num_chains``."""
    devices = jax.devices() if devices is None else devices
    used = max(k for k in range(1, min(len(devices), num_chains) + 1) if num_chains % k == 0)
    return jax.make_mesh((used,), ("chain",), axis_types=(AxisType.Auto,), devices=devices[:used])


def check_mesh(mesh: Mesh, num_chains: int) -> Mesh:
    """Raise ValueError unless ``mesh`` has an axis ``chain`` that divides ``num_chains``, and at most ``model`` too."""
    if "chain" not in mesh.axis_names or set(mesh.axis_names) - {"chain", "model"}:
        raise ValueError(f"mesh must have an axis 'chain' and may have an axis 'model', got {mesh.axis_names}.")
    if num_chains % mesh.shape["chain"]:
        raise ValueError(
            f"num_chains = {num_chains} is not a multiple of the mesh's chain axis of {mesh.shape['chain']} devices. "
            f"Take a multiple, or a smaller mesh."
        )
    return mesh


def chain_sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Sharding of ``leaf`` stacked over chains: ``chain`` first, then the leaf's own ``model`` sharding if any."""
    return NamedSharding(mesh, PartitionSpec("chain", *_model_spec(mesh, leaf)))


def shared_sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Sharding of ``leaf`` held once for all chains: its own ``model`` sharding, else replicated."""
    return NamedSharding(mesh, PartitionSpec(*_model_spec(mesh, leaf)))


def _model_spec(mesh: Mesh, leaf: Any) -> tuple:
    own = getattr(leaf, "sharding", None)
    if "model" not in mesh.axis_names or not isinstance(own, NamedSharding):
        return ()
    return tuple(axis if axis == "model" else None for axis in own.spec)
