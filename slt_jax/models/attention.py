"""Causal attention with grouped queries, and rotary positions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.models.config import DecoderConfig


def rotary_frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians per token of each rotated pair, float64 ``(rotary_width / 2,)``."""
    exponents = np.arange(0, config.rotary_width, 2) / config.rotary_width
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_context * frequencies / (2 * math.pi)  # in the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_table(config: DecoderConfig, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of position times frequency, each float32 ``(length, rotary_width / 2)``."""
    frequencies = jnp.asarray(rotary_frequencies(config), jnp.float32)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs ``(x_i, x_{i + rotary_width / 2})`` of ``(m, T, heads, head_width)`` by the table's angles.

    (a, b) -> (a cos - b sin, b cos + a sin); numbers past ``rotary_width`` stay as they are.
    """
    cos, sin = (t[:, None] for t in table)
    half = cos.shape[-1]
    a, b, rest = jnp.split(x, [half, 2 * half], axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Attention over the past: queries ``(m, T, heads, head_width)``, keys and values ``(m, T, kv_heads, head_width)``.

    Head h reads keys and values h // (heads / kv_heads). On a CPU plain products, elsewhere
    ``jax.nn.dot_product_attention``, with cuDNN's kernel where it takes these shapes and types.
    """
    plain = functools.partial(causal_attention, scale=scale)
    if jax.default_backend() == "cpu":
        return plain(q, k, v)
    return jax.lax.platform_dependent(q, k, v, cpu=plain, default=functools.partial(_device_attention, scale=scale))


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """What ``attend`` computes, as plain products; the softmax in float32 at least."""
    m, length, heads, width = q.shape
    groups = heads // k.shape[2]
    # An axis of size one costs 7 % of a CPU's step: grouped products only where there are groups.
    at, from_, pair = ("mthd", "mshd", "mhts") if groups == 1 else ("mtkgd", "mskd", "mkgts")
    queries = q * scale if groups == 1 else (q * scale).reshape(m, length, -1, groups, width)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(f"{at},{from_}->{pair}", queries, k, preferred_element_type=wide)
    seen = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min), axis=-1).astype(v.dtype)
    return jnp.einsum(f"{pair},{from_}->{at}", weights, v).reshape(q.shape)


def _device_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float) -> jax.Array:
    own = functools.partial(jax.nn.dot_product_attention, q, k, v, scale=scale, is_causal=True)
    if q.dtype in (jnp.bfloat16, jnp.float16):
        try:
            return own(implementation="cudnn")
        except (NotImplementedError, RuntimeError):
            pass  # another maker's device, no cuDNN, or a head width that it does not take: XLA's own
    return own()
