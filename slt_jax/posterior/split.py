"""How weights are cut over the axis ``model`` of a mesh."""

import math
from typing import Any

from jax.sharding import AxisType, Mesh, PartitionSpec

from slt_jax._checks import shown

LARGE = 2**18  # weights (1 MiB) of an array from which on it is split over the axis `model`


def automatic(mesh: Any) -> Mesh:
    """The same devices with automatic axes: ``jax.make_mesh`` gives explicit ones by default."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh with an axis 'chain', got {shown(mesh)}. "
            "Use jax.make_mesh((num_devices,), ('chain',))."
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def split_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Where a weight array is cut: over ``model`` along its ``split_dimension``."""
    cut = split_dimension(shape, mesh.shape.get("model", 1))
    return PartitionSpec() if cut is None else PartitionSpec(*[None] * cut, "model")


def split_dimension(shape: tuple[int, ...], parts: int) -> int | None:
    """The dimension along which a weight array is cut into equal ``parts``, one for each device of the axis ``model``.

    The longest that they divide, of equal ones the last; the first dimension only where no other will do, since it may
    be that of layers, one of which is gathered at a time. None for an array of fewer than ``LARGE`` weights, and where
    nothing is divisible: such an array is whole on every device.
    """
    if parts == 1 or math.prod(shape) < LARGE:
        return None
    divisible = [k for k, size in enumerate(shape) if size % parts == 0]
    return max(divisible, key=lambda k: (k > 0, shape[k], k), default=None)
