"""Pytrees of arrays: names of their leaves, copies on the host, and a digest of everything in them."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any


def path_of(key_path: tuple) -> tuple[str, ...]:
    """A pytree key path as plain strings, e.g. ``("blocks", "0", "attention", "kernel")``."""
    return tuple(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in key_path)


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


def to_host(tree: Any) -> Any:
    """NumPy copies, whole on every process."""
    return jax.tree.map(_whole, tree)


def _whole(x: Any) -> np.ndarray:
    if getattr(x, "is_fully_addressable", True):
        return np.array(x)
    return multihost_utils.process_allgather(x, tiled=True)


def addressable(tree: Any) -> Any:
    """Leaves that span processes as NumPy copies, whole on every process; the others as they are."""
    return jax.tree.map(lambda x: x if getattr(x, "is_fully_addressable", True) else _whole(x), tree)
