"""A decoder-only transformer, as a Flax NNX module whose blocks are stacked on a leading layer axis.

Parameter paths and shapes (biases and norms only where the configuration has them)::

    embedding/tokens                (vocab_size, width)
    embedding/positions             (context_length, width)
    blocks/norm1/{scale,bias}       (layers, width)                         read by attention
    blocks/attention/q              (layers, width, heads, head_width)      k, v: with kv_heads; q_bias: without width
    blocks/attention/{q,k}_norm/scale  (layers, head_width)
    blocks/attention/o              (layers, heads, head_width, width)      o_bias: (layers, width)
    blocks/norm2/{scale,bias}       (layers, width)                         read by the MLP
    blocks/mlp/{up,gate}            (layers, width, mlp_width)              up_bias, gate_bias: without width
    blocks/mlp/down                 (layers, mlp_width, width)              down_bias: (layers, width)
    norm/{scale,bias}               (width,)
    head                            (vocab_size, width)
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from slt_jax.kernels.cross_entropy import cross_entropy
from slt_jax.models.attention import attend, rotary_table, rotate
from slt_jax.models.config import DecoderConfig

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
_MANY_LOGITS = 2**24  # 64 MiB of them; below, all at once is faster
_KEPT = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "input": jax.checkpoint_policies.nothing_saveable,
}


class Norm(nnx.Module):
    """Layer norm, or RMS norm (no mean taken off, no bias), over the last axis; computed in float32 at least."""

    def __init__(self, shape: tuple[int, ...], kind: str, epsilon: float):
        self.centered, self.epsilon = kind == "layer", epsilon
        self.scale = nnx.Param(jnp.ones(shape))
        self.bias = nnx.Param(jnp.zeros(shape)) if self.centered else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.centered:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return _plus(wide * self.scale.get_value(), self.bias).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention of one layer; its weights are stacked over layers, and a call sees one layer's."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        layers, width, inner = config.num_layers, config.width, config.head_width
        self.scale = inner**-0.5 if config.attention_scale is None else config.attention_scale
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.q = _weight((layers, width, heads, inner), rngs)
        self.k = _weight((layers, width, kv_heads, inner), rngs)
        self.v = _weight((layers, width, kv_heads, inner), rngs)
        self.q_bias = _bias((layers, heads, inner), config.qkv_bias)
        self.k_bias = _bias((layers, kv_heads, inner), config.qkv_bias)
        self.v_bias = _bias((layers, kv_heads, inner), config.qkv_bias)
        self.o = _weight((layers, heads, inner, width), rngs)
        self.o_bias = _bias((layers, width), config.out_bias)
        self.q_norm = Norm((layers, inner), "rms", config.norm_epsilon) if config.qk_norm else None
        self.k_norm = Norm((layers, inner), "rms", config.norm_epsilon) if config.qk_norm else None

    def __call__(self, x: jax.Array, table: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        q, k, v = (
            _plus(jnp.einsum("mtw,whd->mthd", x, weight.get_value()), bias)
            for weight, bias in ((self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        mixed = attend(q, k, v, self.scale)
        return _plus(jnp.einsum("mthd,hdw->mtw", mixed, self.o.get_value()), self.o_bias)


class MLP(nnx.Module):
    """The MLP of one layer, gated or not; its weights are stacked over layers, and a call sees one layer's."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        layers, width, inner = config.num_layers, config.width, config.mlp_width
        self.activation = config.activation
        self.up, self.down = _weight((layers, width, inner), rngs), _weight((layers, inner, width), rngs)
        self.up_bias = _bias((layers, inner), config.mlp_bias)
        self.down_bias = _bias((layers, width), config.mlp_bias)
        self.gate = _weight((layers, width, inner), rngs) if config.gated_mlp else None
        self.gate_bias = _bias((layers, inner), config.mlp_bias and config.gated_mlp)

    def __call__(self, x: jax.Array) -> jax.Array:
        act, up = _ACTIVATIONS[self.activation], _plus(x @ self.up.get_value(), self.up_bias)
        inner = act(up) if self.gate is None else act(_plus(x @ self.gate.get_value(), self.gate_bias)) * up
        return _plus(inner @ self.down.get_value(), self.down_bias)


class Block(nnx.Module):
    """Attention and MLP, each after a norm and added to the residual stream. A call sees one layer's weights."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        shape = (config.num_layers, config.width)
        self.parallel = config.parallel_residual
        self.norm1, self.norm2 = (Norm(shape, config.norm, config.norm_epsilon) for _ in range(2))
        self.attention, self.mlp = Attention(config, rngs=rngs), MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, table: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        after = x + self.attention(self.norm1(x), table)
        return after + self.mlp(self.norm2(x if self.parallel else after))


class Embedding(nnx.Module):
    """A vector for each token, and for each position where positions are learned."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.tokens = _weight((config.vocab_size, config.width), rngs)
        learned = config.positions == "learned"
        self.positions = _weight((config.context_length, config.width), rngs) if learned else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jnp.take(self.tokens.get_value(), tokens, axis=0)
        return x if self.positions is None else x + self.positions.get_value()[: tokens.shape[1]]


class Decoder(nnx.Module):
    """tokens ``(m, T)`` -> logits ``(m, T, vocab_size)``."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.blocks = Block(config, rngs=rngs)
        self.norm = Norm((config.width,), config.norm, config.norm_epsilon)
        self.head = None if config.tied_head else _weight((config.vocab_size, config.width), rngs)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """What the head sees: ``(m, T, width)``. Raises ValueError when T is past the context length."""
        config, length = self.config, tokens.shape[1]
        if length > config.context_length:
            raise ValueError(f"sequences of {length} tokens do not fit context_length = {config.context_length}.")
        table = rotary_table(config, length) if config.positions == "rotary" else None
        graphdef, stacked = nnx.split(self.blocks)

        def one(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, layer)(x, table), None

        # One compiled block, run num_layers times: compile time does not grow with depth.
        body = one if config.keep == "all" else jax.checkpoint(one, prevent_cse=False, policy=_KEPT[config.keep])
        x, _ = jax.lax.scan(body, self.embedding(tokens), stacked)
        return self.norm(x)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.hidden(tokens) @ self._head().T

    def losses(self, tokens: jax.Array) -> jax.Array:
        """Mean next-token cross-entropy of each sequence, nats per token, float32 ``(m,)``.

        NaN for a sequence with an id outside the vocabulary. Where the logits of all tokens would be large they are
        made some rows at a time (``slt_jax.kernels.cross_entropy``).
        """
        x, targets = self.hidden(tokens)[:, :-1], tokens[:, 1:]
        each = _token_losses(x.reshape(-1, x.shape[-1]), self._head(), targets.reshape(-1)).reshape(targets.shape)
        inside = jnp.all((tokens >= 0) & (tokens < self.config.vocab_size), axis=1)
        return jnp.where(inside, jnp.mean(each, axis=-1), jnp.nan)

    def _head(self) -> jax.Array:
        return (self.embedding.tokens if self.head is None else self.head).get_value()


def _token_losses(x: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each row. Read as a product with its row of the table, the target's logit needs no gather."""
    if len(x) * len(table) > _MANY_LOGITS:
        return cross_entropy(x, table, targets)
    x, table = x.astype(jnp.float32), table.astype(jnp.float32)
    chosen = jnp.sum(x * jnp.take(table, targets, axis=0, mode="clip"), axis=-1)
    return jax.nn.logsumexp(x @ table.T, axis=-1) - chosen


def _weight(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


def _bias(shape: tuple[int, ...], present: bool) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape)) if present else None


def _plus(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return x if bias is None else x + bias.get_value()
