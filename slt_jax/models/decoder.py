"""A decoder-only transformer in GPT-2's layout, as a Flax NNX module."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from slt_jax.posterior import check_count


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. GPT-2 small is ``DecoderConfig(50257, 1024, 768, 12, 12)``."""

    vocab_size: int
    context_length: int
    width: int
    num_layers: int
    num_heads: int
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        for field in ("vocab_size", "context_length", "width", "num_layers", "num_heads"):
            check_count(field, getattr(self, field), 1)
        if self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} does not divide width = {self.width}.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Block(nnx.Module):
    """Pre-norm attention and MLP, both added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width, small = config.width, nnx.initializers.normal(0.02)
        self.heads = config.num_heads
        self.norm1 = nnx.LayerNorm(width, epsilon=config.norm_epsilon, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, kernel_init=small, rngs=rngs)
        self.proj = nnx.Linear(width, width, kernel_init=small, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=config.norm_epsilon, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, kernel_init=small, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=small, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        m, length, width = x.shape
        q, k, v = jnp.split(self.qkv(self.norm1(x)).reshape(m, length, 3 * self.heads, -1), 3, axis=2)
        mixed = jax.lax.platform_dependent(q, k, v, cpu=causal_attention, default=_flash_attention)
        x = x + self.proj(mixed.reshape(m, length, width))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=True))


class Decoder(nnx.Module):
    """tokens ``(m, T)`` -> logits ``(m, T, vocab_size)``; learned positions, head tied to the embedding."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.config = config
        self.embedding = nnx.Embed(config.vocab_size, config.width, embedding_init=small, rngs=rngs)
        self.positions = nnx.Embed(config.context_length, config.width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, rngs=rngs)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """What the head sees: ``(m, T, width)``. Raises ValueError when T is past the context length."""
        if tokens.shape[1] > self.config.context_length:
            raise ValueError(
                f"sequences of {tokens.shape[1]} tokens do not fit context_length = {self.config.context_length}."
            )
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding.attend(self.hidden(tokens))

    def losses(self, tokens: jax.Array) -> jax.Array:
        """Mean next-token cross-entropy of each sequence, nats per token, float32 ``(m,)``.

        NaN for a sequence with an id outside the vocabulary. The target's logit is read as a product with its embedding
        row, which spares a gather and a scatter over the vocabulary-sized logits.
        """
        x, targets = self.hidden(tokens)[:, :-1].astype(jnp.float32), tokens[:, 1:]
        table = self.embedding.embedding.get_value().astype(jnp.float32)
        logits = x.reshape(-1, x.shape[-1]) @ table.T
        norm = jax.nn.logsumexp(logits, axis=-1).reshape(targets.shape)
        chosen = jnp.sum(x * jnp.take(table, targets, axis=0, mode="clip"), axis=-1)
        inside = jnp.all((tokens >= 0) & (tokens < self.config.vocab_size), axis=1)
        return jnp.where(inside, jnp.mean(norm - chosen, axis=-1), jnp.nan)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Scaled dot-product attention over the past, for ``(m, T, heads, head width)``."""
    scores = jnp.einsum("mthd,mshd->mhts", q * (1 / math.sqrt(q.shape[-1])), k)
    seen = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.einsum("mhts,mshd->mthd", weights, v)


def _flash_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)
