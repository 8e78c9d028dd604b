"""The networks in differences from a teacher (``difference``): the logits of w*, and what those of w* + v have more."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scaling.transformers import difference as d
from scaling.transformers.difference import Pair
from scaling.transformers.gauge import Config
from scaling.transformers.networks import AttentionConfig, MLPConfig
from slt_jax.models import DecoderConfig
from slt_jax.models.attention import rotary_table, rotate

Pairs = dict[str, Any]  # nested like the weights, a Pair at each
_UNUSED = ("windows", "rope_scaling", "local_rope_theta")


def logits(config: Config, teacher: Any, change: Any, inputs: Array) -> Pair:
    """The teacher's logits, and the difference of those of ``teacher + change``.

    Args:
      config: of the network.
      teacher, change: nested dicts of arrays, under the names of the network's parameters.
      inputs: tokens ``(m, length)``, or ``(m, width)`` for a perceptron.

    Returns:
      Two arrays ``(m, length, vocab_size)``, or ``(m, logits)``.

    Raises:
      ValueError: a decoder with what is not written in differences.
    """
    pairs = jax.tree.map(Pair, teacher, change)
    if isinstance(config, MLPConfig):
        return _mlp(config, pairs, inputs)
    if isinstance(config, AttentionConfig):
        return _attention_net(config, pairs, inputs)
    return _decoder(config, pairs, inputs)


def divergences(config: Config, teacher: Any, change: Any, inputs: Array) -> Array:
    """KL(teacher's predictions || predictions at teacher + change), nats: ``(m,)``, means over tokens."""
    each = d.divergence(logits(config, teacher, change, inputs))
    return each if each.ndim == 1 else jnp.mean(each, axis=-1)


def _linear(x: Pair, weight: Pair, bias: Pair | None, spec: str) -> Pair:
    return d.plus(d.product(spec, x, weight), bias)


def _mlp(config: MLPConfig, pairs: Pairs, inputs: Array) -> Pair:
    x = Pair(inputs, jnp.zeros_like(inputs))
    for k in range(len(config.widths) - 1):
        layer = pairs[f"layer{k}"]
        x = _linear(
            x if k == 0 else d.ACTIVATIONS[config.activation](x), layer["weight"], layer.get("bias"), "mi,io->mo"
        )
    return x


def _mixed(q: Pair, k: Pair, v: Pair, scale: float, softcap: float | None = None) -> Pair:
    """Causal attention, ``(m, length, heads, inner)``; heads share keys and values in order."""
    m, length, heads, inner = q.base.shape
    groups = heads // k.base.shape[2]
    q = Pair(*(part.reshape(m, length, -1, groups, inner) for part in q))
    scores = d.softcapped(d.scaled(d.product("mtkgd,mskd->mkgts", q, k), scale), softcap)
    visible = jnp.tril(jnp.ones((length, length), bool))
    mixed = d.product("mkgts,mskd->mtkgd", d.softmax(scores, visible), v)
    return Pair(*(part.reshape(m, length, heads, inner) for part in mixed))


def _attention_net(config: AttentionConfig, pairs: Pairs, tokens: Array) -> Pair:
    x = d.plus(d.taken(pairs["tokens"], tokens), pairs["positions"])
    q, k, v = (d.product("mtw,whd->mthd", x, pairs[name]) for name in "qkv")
    x = d.plus(x, d.product("mthd,hdw->mtw", _mixed(q, k, v, config.head_width**-0.5), pairs["o"]))
    return d.product("mtw,vw->mtv", x, pairs["head"])


def _norm(config: DecoderConfig, weights: Pairs | None, x: Pair, kind: str) -> Pair:
    """A norm of the decoder. ``weights``: its gain and bias, none of them necessarily there."""
    x = d.normalized(d.centered(x) if kind == "layer" else x, config.norm_epsilon)
    weights = weights or {}
    if "scale" in weights:
        gain = d.shifted(weights["scale"], config.norm_offset)
        x = d.times(x, gain)
    return d.plus(x, weights.get("bias"))


def _turned(config: DecoderConfig, x: Pair, turns: Array) -> Pair:
    """Rotary positions; ``turns`` is 0 for a layer without them."""
    table = rotary_table(config, x.base.shape[1])
    cos, sin = (t.astype(x.base.dtype) for t in table)
    cos, sin = jnp.where(turns, cos, 1), jnp.where(turns, sin, 0)
    return Pair(*(rotate(part, (cos, sin), config.rotary_pairs) for part in x))


def _head_norm(config: DecoderConfig, weights: Pairs | None, x: Pair) -> Pair:
    if not config.joint_qk_norm:
        return _norm(config, weights, x, "rms")
    flat = Pair(*(part.reshape(*part.shape[:2], -1) for part in x))
    return Pair(*(part.reshape(x.base.shape) for part in _norm(config, weights, flat, "rms")))


def _attention(config: DecoderConfig, weights: Pairs, x: Pair, turns: Array, shrink: Array) -> Pair:
    q, k, v = (_linear(x, weights[n], weights.get(f"{n}_bias"), "mtw,whd->mthd") for n in "qkv")
    if config.qk_norm:
        q, k = (_head_norm(config, weights.get(f"{n}_norm"), part) for n, part in (("q", q), ("k", k)))
    if config.positions == "rotary":
        q, k = _turned(config, q, turns), _turned(config, k, turns)
    q = Pair(*(part * shrink for part in q)) if config.scale_by_layer else q
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    mixed = _mixed(q, k, v, scale, config.attention_softcap)
    return _linear(mixed, weights["o"], weights.get("o_bias"), "mthd,hdw->mtw")


def _perceptron(config: DecoderConfig, weights: Pairs, x: Pair) -> Pair:
    activation = d.ACTIVATIONS[config.activation]
    up = _linear(x, weights["up"], weights.get("up_bias"), "mtw,wf->mtf")
    if config.gated_mlp:
        gate = activation(_linear(x, weights["gate"], weights.get("gate_bias"), "mtw,wf->mtf"))
        inner = d.times(gate, up)
    else:
        inner = activation(up)
    return _linear(inner, weights["down"], weights.get("down_bias"), "mtf,fw->mtw")


def _block(config: DecoderConfig, x: Pair, layer: tuple[Pairs, Array, Array]) -> tuple[Pair, None]:
    weights, turns, shrink = layer
    norm = functools.partial(_norm, config, kind=config.norm)
    before, after = config.norm_placement != "after", config.norm_placement != "before"
    normed = norm(weights.get("norm1"), x) if before else x
    attended = _attention(config, weights["attention"], normed, turns, shrink)
    attended = norm(weights.get("post_norm1"), attended) if after else attended
    middle = d.plus(x, d.scaled(attended, config.residual_scale))
    if not config.shared_norm:
        source = x if config.parallel_residual else middle
        normed = norm(weights.get("norm2"), source) if before else source
    out = _perceptron(config, weights["mlp"], normed)
    out = norm(weights.get("post_norm2"), out) if after else out
    return d.plus(middle, d.scaled(out, config.residual_scale)), None


def _decoder(config: DecoderConfig, pairs: Pairs, tokens: Array) -> Pair:
    if used := [name for name in _UNUSED if getattr(config, name) is not None]:
        raise ValueError(f"a decoder with {', '.join(used)} is not written in differences. Leave them out.")
    if config.activation not in d.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(d.ACTIVATIONS)}, got {config.activation!r}.")
    embedding = pairs["embedding"]
    x = d.scaled(d.taken(embedding["tokens"], tokens), config.embedding_scale)
    if "positions" in embedding:
        x = d.plus(x, Pair(*(part[: tokens.shape[1]] for part in embedding["positions"])))
    layers = np.arange(config.num_layers)
    turns = jnp.asarray(~np.isin(layers, config.unrotated_layers))
    shrink = jnp.asarray(1 / (layers + 1), x.base.dtype)
    block = jax.checkpoint(functools.partial(_block, config), prevent_cse=False)
    x, _ = jax.lax.scan(block, x, (pairs["blocks"], turns, shrink))
    x = d.scaled(_norm(config, pairs.get("norm"), x, config.norm), config.logit_scale)
    head = embedding["tokens"] if config.tied_head else pairs["head"]
    found = _linear(x, head, pairs.get("head_bias"), "mtw,vw->mtv")
    return d.softcapped(found, config.logit_softcap)
