"""The plain versions: what the fused ones must equal, bit for bit where JAX offers the same function."""

import jax
import numpy as np


def normal(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Standard normal draws of ``shape`` by JAX's own generator."""
    return jax.random.normal(key, shape, dtype)


def uniform_index(hi: int, lo: int, num: int) -> int:
    """``floor(u * num / 2**64)`` for the 64-bit word ``u = hi * 2**32 + lo``, in Python integers."""
    return ((int(np.uint32(hi)) << 32 | int(np.uint32(lo))) * num) >> 64
