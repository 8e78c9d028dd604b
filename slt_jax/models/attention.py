"""Causal attention with grouped queries, and rotary positions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64

from slt_jax.models.config import DecoderConfig


def rotary_frequencies(config: DecoderConfig) -> Float64[np.ndarray, " pair"]:
    """Radians per token of each rotated pair, of which there are ``rotary_width / 2``."""
    exponents = np.arange(0, config.rotary_width, 2) / config.rotary_width
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_context * frequencies / (2 * math.pi)  # full rotations within the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    unscaled = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (unscaled + (1 - unscaled) / scaling.factor)


def rotary_table(
    config: DecoderConfig, length: int
) -> tuple[Float32[Array, "{length} pair"], Float32[Array, "{length} pair"]]:
    """Cosines and sines of position times frequency, for ``rotary_width / 2`` pairs."""
    frequencies = jnp.asarray(rotary_frequencies(config), jnp.float32)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_width"],
    table: tuple[Float[Array, "length pair"], Float[Array, "length pair"]],
) -> Float[Array, "batch length heads head_width"]:
    """Rotate the pairs ``(x_i, x_{i + rotary_width / 2})`` by the table's angles.

    (a, b) -> (a cos - b sin, b cos + a sin). Components from ``rotary_width`` on do not change.
    """
    cos, sin = (t[:, None] for t in table)
    half = cos.shape[-1]
    a, b, rest = jnp.split(x, [half, 2 * half], axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def attend(
    q: Float[Array, "batch length heads head_width"],
    k: Float[Array, "batch length kv_heads head_width"],
    v: Float[Array, "batch length kv_heads head_width"],
    scale: float,
) -> Float[Array, "batch length heads head_width"]:
    """Causal attention with grouped queries: head h uses the keys and values of h // (heads / kv_heads).

    A CPU computes it as matrix products. Other devices use ``jax.nn.dot_product_attention``, with cuDNN's kernel where
    it supports these shapes and types.
    """
    products = functools.partial(causal_attention, scale=scale)
    if jax.default_backend() == "cpu":
        return products(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cpu=products, default=functools.partial(device_attention, scale=scale))


def causal_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """``attend`` as matrix products; the softmax is computed in float32 at least."""
    m, length, heads, width = q.shape
    groups = heads // k.shape[2]
    # An axis of size one costs 7 % of a step on a CPU: it is there only if there are groups.
    at, from_, pair = ("mthd", "mshd", "mhts") if groups == 1 else ("mtkgd", "mskd", "mkgts")
    queries = q * scale if groups == 1 else (q * scale).reshape(m, length, -1, groups, width)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(f"{at},{from_}->{pair}", queries, k, preferred_element_type=wide)
    visible = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(wide).min), axis=-1).astype(v.dtype)
    return jnp.einsum(f"{pair},{from_}->{at}", weights, v).reshape(q.shape)


def device_attention(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    """``attend`` by ``jax.nn.dot_product_attention``."""
    attention = functools.partial(jax.nn.dot_product_attention, q, k, v, scale=scale, is_causal=True)
    if q.dtype in (jnp.bfloat16, jnp.float16):
        try:
            return attention(implementation="cudnn")
        except (NotImplementedError, RuntimeError):
            pass  # not an NVIDIA device, no cuDNN, or a head width it does not support: XLA's implementation
    return attention()
