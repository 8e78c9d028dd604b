"""The plain versions: the fused ones must equal them, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array


def normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Standard normal draws of ``shape`` by JAX's own generator."""
    return jax.random.normal(key, shape, jnp.dtype(dtype))


def uniform_index(hi: int, lo: int, num: int) -> int:
    """``floor(u * num / 2**64)`` for the 64-bit word ``u = hi * 2**32 + lo``, in Python integers."""
    return ((int(np.uint32(hi)) << 32 | int(np.uint32(lo))) * num) >> 64
