"""Pytrees of arrays: names of their leaves, copies on the host, and a digest of their content."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, SingleDeviceSharding
from jaxtyping import PyTree


def path_of(key_path: tuple[Any, ...]) -> tuple[str, ...]:
    """A pytree key path as plain strings, e.g. ``("blocks", "0", "attention", "kernel")``."""
    return tuple(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in key_path)


def check_pytree(name: str, tree: PyTree) -> None:
    """Raise ValueError unless jax can take ``tree`` apart: a dict whose keys cannot be sorted, for instance."""
    try:
        jax.tree.leaves(tree)
    except (TypeError, ValueError) as error:
        cause = error.__cause__ or error.__context__ or error
        raise ValueError(
            f"{name} cannot be read as a pytree of arrays ({cause}). The keys of each dict must be of one type, "
            "such as strings."
        ) from error


def without_torch(tree: PyTree) -> PyTree:
    """``tree`` with NumPy arrays in the place of torch's tensors; itself where there are none."""
    if not any(_is_torch(leaf) for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda x: _of_torch(x) if _is_torch(x) else x, tree)


def _is_torch(leaf: Any) -> bool:
    return type(leaf).__module__.split(".")[0] == "torch" and hasattr(leaf, "detach")


def _of_torch(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy has no such type of its own
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def tree_digest(tree: PyTree) -> str:
    """SHA-256 over structure, types, shapes and bytes of a pytree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        value = np.asarray(leaf)
        digest.update(f"{path_of(path)} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).data if value.size else b"")
    return digest.hexdigest()


def is_on_cpu(x: jax.Array) -> bool:
    """Whether its devices are CPUs, whose memory NumPy reads without a copy."""
    return all(device.platform == "cpu" for device in x.devices())


def to_host(tree: PyTree) -> PyTree:
    """Every leaf as a complete NumPy copy, on every process."""
    return jax.tree.map(_complete_copy, tree)


def _complete_copy(x: Any) -> np.ndarray:
    if getattr(x, "is_fully_addressable", True):
        return np.array(x)
    return multihost_utils.process_allgather(x, tiled=True)


def on_one_device(x: jax.Array) -> jax.Array:
    """An array that several devices of this process hold, on the first of them, and otherwise ``x`` as it is."""
    sharding = x.sharding
    if (len(sharding.device_set) == 1 and not isinstance(sharding, NamedSharding)) or not x.is_fully_addressable:
        return x
    # Given only a device, device_put keeps the type of an explicit mesh's array.
    return jax.device_put(x, SingleDeviceSharding(x.addressable_shards[0].device))


def addressable(tree: PyTree) -> PyTree:
    """Leaves that span processes as complete NumPy copies on every process; the others unchanged."""
    return jax.tree.map(lambda x: x if getattr(x, "is_fully_addressable", True) else _complete_copy(x), tree)
