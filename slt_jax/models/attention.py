"""Causal attention with grouped queries and sliding windows, and rotary positions."""

import dataclasses
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


def rotary_tables(config: DecoderConfig, length: int) -> tuple[Float32[Array, "kind length pair"], ...]:
    """Cosines and sines of every kind of layer (``rotary_kinds``): as ``rotary_table``, local, and not rotated."""
    cos, sin = rotary_table(config, length)
    theta = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
    local = rotary_table(dataclasses.replace(config, rope_theta=theta, rope_scaling=None), length)
    return jnp.stack([cos, local[0], jnp.ones_like(cos)]), jnp.stack([sin, local[1], jnp.zeros_like(sin)])


def rotary_kinds(config: DecoderConfig) -> list[int]:
    """Which of the ``rotary_tables`` each layer uses."""
    windows = config.windows or (0,) * config.num_layers
    local = [int(config.local_rope_theta is not None and window > 0) for window in windows]
    return [2 if layer in config.unrotated_layers else kind for layer, kind in enumerate(local)]


def rotate(
    x: Float[Array, "batch length heads head_width"],
    table: tuple[Float[Array, "length pair"], Float[Array, "length pair"]],
    pairs: str = "halves",
) -> Float[Array, "batch length heads head_width"]:
    """Rotate the pairs ``(x_i, x_{i + rotary_width / 2})``, or neighbours ``(x_{2 i}, x_{2 i + 1})``, by the angles.

    (a, b) -> (a cos - b sin, b cos + a sin). Components from ``rotary_width`` on do not change.
    """
    cos, sin = (t[:, None] for t in table)
    half = cos.shape[-1]
    if pairs == "neighbours":
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(*x.shape[:-1], 2 * half)
        return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * half :]], axis=-1)
    a, b, rest = jnp.split(x, [half, 2 * half], axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)


def attend(
    q: Float[Array, "batch length heads head_width"],
    k: Float[Array, "batch length kv_heads head_width"],
    v: Float[Array, "batch length kv_heads head_width"],
    scale: float,
    window: Array | None = None,
    softcap: float | None = None,
) -> Float[Array, "batch length heads head_width"]:
    """Causal attention with grouped queries: head h uses the keys and values of h // (heads / kv_heads).

    A CPU computes it as matrix products. Other devices use ``jax.nn.dot_product_attention``, with cuDNN's kernel where
    it supports these shapes and types. The devices are those of the mesh that the caller is traced for, which need not
    be here.

    Args:
        window: number of tokens, up to and with its own, that a token attends to; default all.
        softcap: scores s become ``softcap * tanh(s / softcap)``.
    """
    platform = _platform_of_mesh()
    if (platform or jax.default_backend()) == "cpu" or softcap is not None:
        return causal_attention(q, k, v, scale, window, softcap)
    if platform is not None:
        return device_attention(q, k, v, window, scale=scale)

    def products(q: Array, k: Array, v: Array, window: Array | None = None) -> Array:
        return causal_attention(q, k, v, scale, window)

    device = functools.partial(device_attention, scale=scale)
    operands = (q, k, v) if window is None else (q, k, v, window)
    return jax.lax.platform_dependent(*operands, cpu=products, default=device)


def _platform_of_mesh() -> str | None:
    """That of the devices of the current mesh; None where there is none, or it does not say."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None)


def causal_attention(
    q: Array, k: Array, v: Array, scale: float, window: Array | None = None, softcap: float | None = None
) -> Array:
    """``attend`` as matrix products; the softmax is computed in float32 at least."""
    m, length, heads, width = q.shape
    groups = heads // k.shape[2]
    # An axis of size one costs 7 % of a step on a CPU: it is there only if there are groups.
    at, from_, pair = ("mthd", "mshd", "mhts") if groups == 1 else ("mtkgd", "mskd", "mkgts")
    queries = q * scale if groups == 1 else (q * scale).reshape(m, length, -1, groups, width)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum(f"{at},{from_}->{pair}", queries, k, preferred_element_type=wide)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(visible(length, window), scores, jnp.finfo(wide).min), axis=-1).astype(v.dtype)
    return jnp.einsum(f"{pair},{from_}->{at}", weights, v).reshape(q.shape)


def visible(length: int, window: Array | None) -> Array:
    """Whether the token of each row attends to that of each column, ``(length, length)``."""
    causal = jnp.tril(jnp.ones((length, length), bool))
    if window is None:
        return causal
    position = jnp.arange(length)
    return causal & (position[:, None] - position < window)


def device_attention(q: Array, k: Array, v: Array, window: Array | None = None, *, scale: float) -> Array:
    """``attend`` by ``jax.nn.dot_product_attention``."""
    attention = functools.partial(jax.nn.dot_product_attention, q, k, v, scale=scale)
    if window is None:
        attention = functools.partial(attention, is_causal=True)
    else:
        attention = functools.partial(attention, mask=visible(q.shape[1], window)[None, None])
    if q.dtype in (jnp.bfloat16, jnp.float16):
        try:
            return attention(implementation="cudnn")
        except (NotImplementedError, RuntimeError):
            pass  # not an NVIDIA device, no cuDNN, or a head width it does not support: XLA's implementation
    return attention()
