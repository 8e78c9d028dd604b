"""A decoder-only transformer, as a Flax NNX module whose blocks are stacked on a leading layer axis.

Parameter paths and shapes (biases and norms only if the configuration has them)::

    embedding/tokens                (vocab_size, width)
    embedding/positions             (context_length, width)
    blocks/norm1/{scale,bias}       (layers, width)                         before attention
    blocks/attention/q              (layers, width, heads, head_width)      k, v: with kv_heads; q_bias: without width
    blocks/attention/{q,k}_norm/scale  (layers, head_width)
    blocks/attention/o              (layers, heads, head_width, width)      o_bias: (layers, width)
    blocks/norm2/{scale,bias}       (layers, width)                         before the MLP
    blocks/mlp/{up,gate}            (layers, width, mlp_width)              up_bias, gate_bias: without width
    blocks/mlp/down                 (layers, mlp_width, width)              down_bias: (layers, width)
    norm/{scale,bias}               (width,)
    head                            (vocab_size, width)
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Integer

from slt_jax.kernels.cross_entropy import cross_entropy
from slt_jax.models.attention import attend, rotary_table, rotate
from slt_jax.models.config import DecoderConfig

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
MANY_LOGITS = 2**24  # 64 MiB; below that, computing all logits at once is faster
_KEPT = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "input": jax.checkpoint_policies.nothing_saveable,
}


class Norm(nnx.Module):
    """Layer norm, or RMS norm (without centering and bias), over the last axis; computed in float32 at least."""

    def __init__(self, shape: tuple[int, ...], kind: str, epsilon: float):
        self.centered, self.epsilon = kind == "layer", epsilon
        self.scale = nnx.Param(jnp.ones(shape))
        self.bias = nnx.Param(jnp.zeros(shape)) if self.centered else None

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.centered:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return _plus(wide * self.scale.get_value(), self.bias).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention. The weights are stacked over layers; a call uses a copy that has one layer's weights."""

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

    def __call__(self, x: Array, table: tuple[Array, Array] | None) -> Array:
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
    """The MLP, gated or not. The weights are stacked over layers; a call uses a copy that has one layer's weights."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        layers, width, inner = config.num_layers, config.width, config.mlp_width
        self.activation = config.activation
        self.up, self.down = _weight((layers, width, inner), rngs), _weight((layers, inner, width), rngs)
        self.up_bias = _bias((layers, inner), config.mlp_bias)
        self.down_bias = _bias((layers, width), config.mlp_bias)
        self.gate = _weight((layers, width, inner), rngs) if config.gated_mlp else None
        self.gate_bias = _bias((layers, inner), config.mlp_bias and config.gated_mlp)

    def __call__(self, x: Array) -> Array:
        activation, up = ACTIVATIONS[self.activation], _plus(x @ self.up.get_value(), self.up_bias)
        if self.gate is None:
            inner = activation(up)
        else:
            inner = activation(_plus(x @ self.gate.get_value(), self.gate_bias)) * up
        return _plus(inner @ self.down.get_value(), self.down_bias)


class Block(nnx.Module):
    """Attention and MLP, each after a norm and added to the residual stream. The weights are stacked over layers."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        shape = (config.num_layers, config.width)
        self.parallel = config.parallel_residual
        self.norm1, self.norm2 = (Norm(shape, config.norm, config.norm_epsilon) for _ in range(2))
        self.attention, self.mlp = Attention(config, rngs=rngs), MLP(config, rngs=rngs)

    def __call__(self, x: Array, table: tuple[Array, Array] | None) -> Array:
        attended = x + self.attention(self.norm1(x), table)
        return attended + self.mlp(self.norm2(x if self.parallel else attended))


class Embedding(nnx.Module):
    """A vector for each token, and for each position if positions are learned."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.tokens = _weight((config.vocab_size, config.width), rngs)
        learned = config.positions == "learned"
        self.positions = _weight((config.context_length, config.width), rngs) if learned else None

    def __call__(self, tokens: Array) -> Array:
        x = jnp.take(self.tokens.get_value(), tokens, axis=0)
        return x if self.positions is None else x + self.positions.get_value()[: tokens.shape[1]]


class Decoder(nnx.Module):
    """A decoder-only transformer: tokens ``(batch, length)`` -> logits ``(batch, length, vocab_size)``."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.blocks = Block(config, rngs=rngs)
        self.norm = Norm((config.width,), config.norm, config.norm_epsilon)
        self.head = None if config.tied_head else _weight((config.vocab_size, config.width), rngs)

    def hidden(self, tokens: Integer[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The final hidden states, from which the logits are computed.

        Raises:
            ValueError: the sequences are longer than the context.
        """
        config, length = self.config, tokens.shape[1]
        if length > config.context_length:
            raise ValueError(f"sequences of {length} tokens do not fit context_length = {config.context_length}.")
        table = rotary_table(config, length) if config.positions == "rotary" else None
        graphdef, stacked = nnx.split(self.blocks)

        def apply_layer(x: Array, layer: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graphdef, layer)(x, table), None

        if config.keep != "all":
            apply_layer = jax.checkpoint(apply_layer, prevent_cse=False, policy=_KEPT[config.keep])
        # One compiled block runs num_layers times: compile time does not grow with depth.
        x, _ = jax.lax.scan(apply_layer, self.embedding(tokens), stacked)
        return self.norm(x)

    def __call__(self, tokens: Integer[Array, "batch length"]) -> Float[Array, "batch length vocab_size"]:
        return self.hidden(tokens) @ self._head().T

    def losses(self, tokens: Integer[Array, "batch length"]) -> Float32[Array, " batch"]:
        """Mean next-token cross-entropy of each sequence, nats per token.

        NaN for a sequence with an id outside the vocabulary. If the logits of all tokens would take much memory, they
        are computed a chunk at a time (``slt_jax.kernels.cross_entropy``).
        """
        x, targets = self.hidden(tokens)[:, :-1], tokens[:, 1:]
        token_losses = _token_losses(x.reshape(-1, x.shape[-1]), self._head(), targets.reshape(-1))
        token_losses = token_losses.reshape(targets.shape)
        inside = jnp.all((tokens >= 0) & (tokens < self.config.vocab_size), axis=1)
        return jnp.where(inside, jnp.mean(token_losses, axis=-1), jnp.nan)

    def _head(self) -> Array:
        return (self.embedding.tokens if self.head is None else self.head).get_value()


def _token_losses(x: Array, table: Array, targets: Array) -> Array:
    """Cross-entropy of each row. The target's logit is a product with its row of the table: it needs no gather."""
    if len(x) * len(table) > MANY_LOGITS:
        return cross_entropy(x, table, targets)
    x, table = x.astype(jnp.float32), table.astype(jnp.float32)
    chosen = jnp.sum(x * jnp.take(table, targets, axis=0, mode="clip"), axis=-1)
    return jax.nn.logsumexp(x @ table.T, axis=-1) - chosen


def _weight(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


def _bias(shape: tuple[int, ...], present: bool) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape)) if present else None


def _plus(x: Array, bias: nnx.Param | None) -> Array:
    return x if bias is None else x + bias.get_value()
