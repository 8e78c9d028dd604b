"""A decoder-only transformer, as a Flax NNX module whose blocks are stacked on a leading layer axis.

Parameter paths and shapes (biases and norms only if the configuration has them)::

    embedding/tokens                (vocab_size, width)
    embedding/positions             (context_length, width)
    blocks/norm1/{scale,bias}       (layers, width)                         before attention
    blocks/attention/q              (layers, width, heads, head_width)      k, v: with kv_heads; q_bias: without width
    blocks/attention/{q,k}_norm/scale  (layers, head_width)              joint: (layers, heads * head_width)
    blocks/attention/o              (layers, heads, head_width, width)      o_bias: (layers, width)
    blocks/norm2/{scale,bias}       (layers, width)                         before the MLP
    blocks/post_norm1/{scale,bias}  (layers, width)                         after attention; post_norm2: after the MLP
    blocks/mlp/{up,gate}            (layers, width, mlp_width)              up_bias, gate_bias: without width
    blocks/mlp/down                 (layers, mlp_width, width)              down_bias: (layers, width)
    norm/{scale,bias}               (width,)
    head                            (vocab_size, width)                     head_bias: (vocab_size,)
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Integer, PyTree

from slt_jax.models.attention import attend, rotary_kinds, rotary_table, rotary_tables, rotate
from slt_jax.models.config import DecoderConfig
from slt_jax.models.losses import mean_of_first, own_predictions, softcapped, token_cross_entropy
from slt_jax.models.model_axis import Split, keep_all_but_gathered, over_model_axis
from slt_jax.posterior.outputs import OUTPUTS, OutputLoss
from slt_jax.posterior.program import TOKEN_LOSSES

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
_KEPT = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "input": jax.checkpoint_policies.nothing_saveable,
    "all": keep_all_but_gathered,
}


class Norm(nnx.Module):
    """Layer norm, or RMS norm (without centering), over the last axis; computed in float32 at least."""

    def __init__(self, shape: tuple[int, ...], config: DecoderConfig, *, kind: str | None = None):
        kind = config.norm if kind is None else kind
        self.centered, self.epsilon, self.offset = kind == "layer", config.norm_epsilon, config.norm_offset
        self.scale = nnx.Param(jnp.full(shape, 1 - self.offset)) if config.norm_scale else None
        self.bias = nnx.Param(jnp.zeros(shape)) if self.centered and config.norm_bias else None

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.centered:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        if self.scale is not None:
            wide = wide * (self.scale.get_value() + self.offset if self.offset else self.scale.get_value())
        return _plus(wide, self.bias).astype(x.dtype)


class LayerConstants(NamedTuple):
    """What differs between layers besides their weights; None where they do not differ, or have none.

    ``kind``: which of the rotary tables. ``window``: as in ``attend``. ``scale``: factor on attention's scores.
    """

    kind: Array | None = None
    window: Array | None = None
    scale: Array | None = None


class Attention(nnx.Module):
    """Causal attention. The weights are stacked over layers; a call uses a copy that has one layer's weights."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        layers, width, inner = config.num_layers, config.width, config.head_width
        self.scale = inner**-0.5 if config.attention_scale is None else config.attention_scale
        self.softcap, self.pairs, self.joint_norm = config.attention_softcap, config.rotary_pairs, config.joint_qk_norm
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.q = _weight((layers, width, heads, inner), rngs)
        self.k = _weight((layers, width, kv_heads, inner), rngs)
        self.v = _weight((layers, width, kv_heads, inner), rngs)
        self.q_bias = _bias((layers, heads, inner), config.qkv_bias)
        self.k_bias = _bias((layers, kv_heads, inner), config.qkv_bias)
        self.v_bias = _bias((layers, kv_heads, inner), config.qkv_bias)
        self.o = _weight((layers, heads, inner, width), rngs)
        self.o_bias = _bias((layers, width), config.out_bias)
        together = (heads, kv_heads) if config.joint_qk_norm else (1, 1)
        self.q_norm, self.k_norm = (
            Norm((layers, count * inner), config, kind="rms") if config.qk_norm else None for count in together
        )

    def __call__(self, x: Array, table: tuple[Array, Array] | None, constants: LayerConstants) -> Array:
        q, k, v = (
            _plus(_product(x, weight.get_value()), bias)
            for weight, bias in ((self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if table is not None:
            q, k = rotate(q, table, self.pairs), rotate(k, table, self.pairs)
        if constants.scale is not None:
            q = q * constants.scale.astype(q.dtype)
        mixed = attend(q, k, v, self.scale, constants.window, self.softcap)
        return _plus(_product(mixed, self.o.get_value(), axes=2), self.o_bias)

    def _normed(self, norm: Norm, x: Array) -> Array:
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape) if self.joint_norm else norm(x)


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
        activation, up = ACTIVATIONS[self.activation], _plus(_product(x, self.up.get_value()), self.up_bias)
        if self.gate is None:
            inner = activation(up)
        else:
            inner = activation(_plus(_product(x, self.gate.get_value()), self.gate_bias)) * up
        return _plus(_product(inner, self.down.get_value()), self.down_bias)


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream, with norms before or after. Weights are stacked."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        shape = (config.num_layers, config.width)
        self.parallel, self.residual_scale = config.parallel_residual, config.residual_scale
        before, after = config.norm_placement != "after", config.norm_placement != "before"
        self.norm1 = Norm(shape, config) if before else None
        self.norm2 = Norm(shape, config) if before and not config.shared_norm else None
        self.post_norm1, self.post_norm2 = (Norm(shape, config) if after else None for _ in range(2))
        self.attention, self.mlp = Attention(config, rngs=rngs), MLP(config, rngs=rngs)

    def __call__(self, x: Array, table: tuple[Array, Array] | None, constants: LayerConstants) -> Array:
        normed = _through(self.norm1, x)
        attended = x + self._scaled(_through(self.post_norm1, self.attention(normed, table, constants)))
        if self.norm2 is not None or not self.parallel:
            normed = _through(self.norm2, x if self.parallel else attended)
        return attended + self._scaled(_through(self.post_norm2, self.mlp(normed)))

    def _scaled(self, x: Array) -> Array:
        return x if self.residual_scale == 1 else self.residual_scale * x


class Embedding(nnx.Module):
    """A vector for each token, and for each position if positions are learned."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.tokens = _weight((config.vocab_size, config.width), rngs)
        learned = config.positions == "learned"
        self.positions = _weight((config.context_length, config.width), rngs) if learned else None
        self.scale = config.embedding_scale

    def __call__(self, tokens: Array, split: Split | None = None) -> Array:
        table = self.tokens.get_value()
        x = jnp.take(table, tokens, axis=0) if split is None else split.lookup(table, tokens)
        x = x if self.scale == 1 else self.scale * x
        return x if self.positions is None else x + self.positions.get_value()[: tokens.shape[1]]


class Decoder(nnx.Module):
    """A decoder-only transformer: tokens ``(batch, length)`` -> logits ``(batch, length, vocab_size)``."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.blocks = Block(config, rngs=rngs)
        self.norm = Norm((config.width,), config)
        self.head = None if config.tied_head else _weight((config.vocab_size, config.width), rngs)
        self.head_bias = _bias((config.vocab_size,), config.head_bias)

    def hidden(self, tokens: Integer[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The final hidden states, from which the logits are computed.

        Raises:
            ValueError: the sequences are longer than the context.
        """
        return over_model_axis(Decoder._hidden, self, tokens)

    def _hidden(self, split: Split | None, tokens: Array) -> Array:
        config, length = self.config, tokens.shape[1]
        if length > config.context_length:
            raise ValueError(f"sequences of {length} tokens do not fit context_length = {config.context_length}.")
        constants = _layer_constants(config, length)
        graphdef, stacked = nnx.split(self.blocks)
        rotary = config.positions == "rotary"
        table = rotary_table(config, length) if rotary and constants.kind is None else None
        tables = rotary_tables(config, length) if rotary and constants.kind is not None else None

        def apply_layer(x: Array, layer: tuple[nnx.State, LayerConstants]) -> tuple[Array, None]:
            state, own = layer
            state = state if split is None else split.gathered(state)
            turn = table if tables is None else (tables[0][own.kind], tables[1][own.kind])
            return nnx.merge(graphdef, state)(x, turn, own), None

        if config.keep != "all" or split is not None:
            apply_layer = jax.checkpoint(apply_layer, prevent_cse=False, policy=_KEPT[config.keep])
        # One compiled block runs num_layers times: compile time does not grow with depth.
        x, _ = jax.lax.scan(apply_layer, self.embedding(tokens, split), (stacked, constants))
        return self.norm(x)

    def __call__(self, tokens: Integer[Array, "batch length"]) -> Float[Array, "batch length vocab_size"]:
        logits = _plus(self._scaled(self.hidden(tokens)) @ self._head().T, self.head_bias)
        return softcapped(logits, self.config.logit_softcap)

    def losses(
        self, tokens: Integer[Array, "batch length"], count: Integer[Array, " batch"] | None = None
    ) -> Float32[Array, " batch"]:
        """Mean next-token cross-entropy of each sequence, nats per token; of its first ``count`` tokens, default all.

        NaN for a sequence with an id outside the vocabulary. If the logits of all tokens would take much memory, they
        are computed a chunk at a time (``slt_jax.kernels.cross_entropy``).
        """
        each, inside = self._next_tokens(tokens), self._inside(tokens)
        return jnp.where(inside, mean_of_first(each, count), jnp.nan)

    def token_losses(
        self, tokens: Integer[Array, "batch length"], count: Integer[Array, " batch"] | None = None
    ) -> tuple[Float32[Array, "batch predicted"], Bool[Array, "batch predicted"]]:
        """(next-token cross-entropy of each token but the first, nats; whether it is among the first ``count`` tokens).

        NaN for a sequence with an id outside the vocabulary. The mean over those that count is ``losses``.
        """
        each, inside = self._next_tokens(tokens), self._inside(tokens)
        own = jnp.ones(each.shape, bool) if count is None else own_predictions(each.shape[1], count)
        return jnp.where(inside[:, None], each, jnp.nan), own

    def _next_tokens(self, tokens: Array) -> Array:
        return over_model_axis(Decoder._token_losses, self, tokens)

    def _token_losses(self, split: Split | None, tokens: Array) -> Array:
        x, targets = self._scaled(self._hidden(split, tokens))[:, :-1], tokens[:, 1:]
        bias = None if self.head_bias is None else self.head_bias.get_value()
        rows, cross_entropy = x.reshape(-1, x.shape[-1]), token_cross_entropy if split is None else split.cross_entropy
        token_losses = cross_entropy(rows, self._head(), targets.reshape(-1), bias, self.config.logit_softcap)
        return token_losses.reshape(targets.shape)

    def _inside(self, tokens: Array) -> Array:
        return jnp.all((tokens >= 0) & (tokens < self.config.vocab_size), axis=1)

    def _scaled(self, x: Array) -> Array:
        return x if self.config.logit_scale == 1 else self.config.logit_scale * x

    def _head(self) -> Array:
        return (self.embedding.tokens if self.head is None else self.head).get_value()


def sequence_loss(model: Decoder, batch: PyTree) -> Float32[Array, " batch"]:
    """``Decoder.losses`` of tokens, or of ``{"tokens", "count"}`` where rows are filled up; for ``from_nnx``.

    With a per-token version (``Decoder.token_losses``), which an ``Observable`` of level "token" takes.
    """
    return model.losses(*_arranged(batch))


def _token_losses(model: Decoder, batch: PyTree) -> tuple[Array, Array]:
    return model.token_losses(*_arranged(batch))


def _arranged(batch: PyTree) -> tuple[Array, Array | None]:
    return (batch["tokens"], batch["count"]) if isinstance(batch, Mapping) else (batch, None)


def _predictions(model: Decoder, batch: PyTree) -> Float[Array, "batch predicted vocabulary"]:
    """The logits of all tokens but the first."""
    logits = model(_arranged(batch)[0])[:, :-1]
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _losses_of_predictions(logits: Array, batch: PyTree) -> Float[Array, " batch"]:
    tokens, count = _arranged(batch)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1, mode="clip")[..., 0]
    return mean_of_first(jax.nn.logsumexp(logits, axis=-1) - chosen, count)


setattr(sequence_loss, TOKEN_LOSSES, _token_losses)
setattr(sequence_loss, OUTPUTS, OutputLoss(_predictions, _losses_of_predictions))


def _layer_constants(config: DecoderConfig, length: int) -> LayerConstants:
    """Arrays over layers. Windows that hold the whole sequence are none."""
    kinds = rotary_kinds(config) if config.positions == "rotary" else [0]
    kind = jnp.asarray(kinds, jnp.int32) if any(kinds) else None
    windows = [window or length for window in config.windows or ()]
    window = jnp.asarray(windows, jnp.int32) if min(windows, default=length) < length else None
    scale = 1 / jnp.arange(1, config.num_layers + 1, dtype=jnp.float32) if config.scale_by_layer else None
    return LayerConstants(kind, window, scale)


def _weight(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


def _bias(shape: tuple[int, ...], present: bool) -> nnx.Param | None:
    return nnx.Param(jnp.zeros(shape)) if present else None


def _product(x: Array, weight: Array, axes: int = 1) -> Array:
    """``tensordot`` over the last ``axes`` axes of x, and the first ones of the weight, as one product of two matrices.

    With rows and columns alone XLA copies no activations on a CPU to bring them into order for the gradients.
    """
    rows = x.reshape(-1, math.prod(weight.shape[:axes]))
    return (rows @ weight.reshape(rows.shape[1], -1)).reshape(*x.shape[: x.ndim - axes], *weight.shape[axes:])


def _plus(x: Array, bias: nnx.Param | None) -> Array:
    return x if bias is None else x + bias.get_value()


def _through(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)
