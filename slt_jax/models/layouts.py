"""Hugging Face's architectures: the decoder that a ``config.json`` describes, and the tensor of each parameter."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from slt_jax.models.config import DecoderConfig, RopeScaling

Record = dict[str, Any]


class Source(NamedTuple):
    """Where a parameter is: the name of a tensor, with ``{}`` for the layer, and the axes of each of its dimensions.

    ``width (3 heads head_width)`` has two dimensions, the second of which contains queries, keys and values one after
    the other, each with all its heads. ``part`` is the index of the parameter among the three.
    """

    name: str
    axes: str
    part: int = 0


class Layout(NamedTuple):
    """One architecture. ``buffers``: pattern of tensors in older files that are not parameters."""

    prefix: str
    to_config: Callable[[Record], DecoderConfig]
    sources: dict[str, Source]
    head_names: tuple[str, ...]
    buffers: str = "$^"

    def is_buffer(self, name: str) -> bool:
        return re.fullmatch(self.buffers, name) is not None


def _qkv(name: str, axes: str, bias_axes: str) -> dict[str, Source]:
    """Queries, keys and values from one tensor with 3 parts."""
    sources = {}
    for part, letter in enumerate("qkv"):
        for suffix, kind, kind_axes in (("", "weight", axes), ("_bias", "bias", bias_axes)):
            part_axes = kind_axes if letter == "q" else kind_axes.replace("heads", "kv_heads")
            sources[f"blocks/attention/{letter}{suffix}"] = Source(f"{name}.{kind}", part_axes, part)
    return sources


def _norm(path: str, name: str) -> dict[str, Source]:
    return {f"{path}/scale": Source(f"{name}.weight", "width"), f"{path}/bias": Source(f"{name}.bias", "width")}


_GPT2 = {
    "embedding/tokens": Source("wte.weight", "vocab width"),
    "embedding/positions": Source("wpe.weight", "context width"),
    **_norm("blocks/norm1", "h.{}.ln_1"),
    **_qkv("h.{}.attn.c_attn", "width (3 heads head_width)", "(3 heads head_width)"),
    "blocks/attention/o": Source("h.{}.attn.c_proj.weight", "(heads head_width) width"),
    "blocks/attention/o_bias": Source("h.{}.attn.c_proj.bias", "width"),
    **_norm("blocks/norm2", "h.{}.ln_2"),
    "blocks/mlp/up": Source("h.{}.mlp.c_fc.weight", "width mlp"),
    "blocks/mlp/up_bias": Source("h.{}.mlp.c_fc.bias", "mlp"),
    "blocks/mlp/down": Source("h.{}.mlp.c_proj.weight", "mlp width"),
    "blocks/mlp/down_bias": Source("h.{}.mlp.c_proj.bias", "width"),
    **_norm("norm", "ln_f"),
    "head": Source("lm_head.weight", "vocab width"),
}

_NEOX = {
    "embedding/tokens": Source("embed_in.weight", "vocab width"),
    **_norm("blocks/norm1", "layers.{}.input_layernorm"),
    **_qkv("layers.{}.attention.query_key_value", "(heads 3 head_width) width", "(heads 3 head_width)"),
    "blocks/attention/o": Source("layers.{}.attention.dense.weight", "width (heads head_width)"),
    "blocks/attention/o_bias": Source("layers.{}.attention.dense.bias", "width"),
    **_norm("blocks/norm2", "layers.{}.post_attention_layernorm"),
    "blocks/mlp/up": Source("layers.{}.mlp.dense_h_to_4h.weight", "mlp width"),
    "blocks/mlp/up_bias": Source("layers.{}.mlp.dense_h_to_4h.bias", "mlp"),
    "blocks/mlp/down": Source("layers.{}.mlp.dense_4h_to_h.weight", "width mlp"),
    "blocks/mlp/down_bias": Source("layers.{}.mlp.dense_4h_to_h.bias", "width"),
    **_norm("norm", "final_layer_norm"),
    "head": Source("embed_out.weight", "vocab width"),
}


def _projection(path: str, name: str, out: str, into: str) -> dict[str, Source]:
    return {path: Source(f"{name}.weight", f"{out} {into}"), f"{path}_bias": Source(f"{name}.bias", out)}


_LLAMA = {
    "embedding/tokens": Source("embed_tokens.weight", "vocab width"),
    **_norm("blocks/norm1", "layers.{}.input_layernorm"),
    **_projection("blocks/attention/q", "layers.{}.self_attn.q_proj", "(heads head_width)", "width"),
    **_projection("blocks/attention/k", "layers.{}.self_attn.k_proj", "(kv_heads head_width)", "width"),
    **_projection("blocks/attention/v", "layers.{}.self_attn.v_proj", "(kv_heads head_width)", "width"),
    **_projection("blocks/attention/o", "layers.{}.self_attn.o_proj", "width", "(heads head_width)"),
    "blocks/attention/q_norm/scale": Source("layers.{}.self_attn.q_norm.weight", "head_width"),
    "blocks/attention/k_norm/scale": Source("layers.{}.self_attn.k_norm.weight", "head_width"),
    **_norm("blocks/norm2", "layers.{}.post_attention_layernorm"),
    **_projection("blocks/mlp/up", "layers.{}.mlp.up_proj", "mlp", "width"),
    **_projection("blocks/mlp/gate", "layers.{}.mlp.gate_proj", "mlp", "width"),
    **_projection("blocks/mlp/down", "layers.{}.mlp.down_proj", "width", "mlp"),
    **_norm("norm", "norm"),
    "head": Source("lm_head.weight", "vocab width"),
}

ACTIVATION_NAMES = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip

# Fields that change the mathematics, with the values at which they do not.
_NEUTRAL: dict[str, tuple] = {
    "scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False), "use_sliding_window": (None, False), "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,), "logit_softcapping": (None,), "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None, 1), "embedding_multiplier": (None, 1), "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1), "logit_scale": (None, 1), "clip_qkv": (None,), "alibi": (None, False),
    "quantization_config": (None,), "num_experts": (None, 0), "num_local_experts": (None, 0),
    "use_qk_norm": (None, False),
}  # fmt: skip


def read_config(record: Record, where: str) -> tuple[Layout, DecoderConfig]:
    """The architecture and the decoder that a ``config.json`` describes.

    Raises:
        ValueError: an architecture or a field that is not known, is missing, or changes the mathematics; the message
            names it.
    """
    kind = record.get("model_type")
    if kind not in LAYOUTS:
        named = f"{kind!r} (architectures {record.get('architectures')})"
        raise ValueError(f"{where}: model_type {named} is not known. Known: {', '.join(LAYOUTS)}.")
    try:
        _check_neutral(record)
        return LAYOUTS[kind], LAYOUTS[kind].to_config(record)
    except KeyError as error:
        raise ValueError(f"{where}: a {kind} needs the field {error}, which is missing.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_neutral(record: Record) -> None:
    for field, neutral in _NEUTRAL.items():
        if record.get(field) not in neutral:
            raise ValueError(f"{field} = {record[field]!r} changes the mathematics and is not supported.")
    if record.get("sliding_window") is not None and "use_sliding_window" not in record:
        raise ValueError(f"sliding_window = {record['sliding_window']!r} is not supported.")
    if other := set(record.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types holds {sorted(other)}; only full_attention is supported.")
    if "AutoModelForCausalLM" in (record.get("auto_map") or {}):
        name = record["auto_map"]["AutoModelForCausalLM"]
        raise ValueError(f"auto_map names code of its own, {name!r}, which is not run.")


def _activation(record: Record, field: str, default: str) -> Any:
    name = record.get(field, default)
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"{field} = {name!r} is not known. Known: {', '.join(ACTIVATION_NAMES)}.")
    return ACTIVATION_NAMES[name]


_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip


def _rope(record: Record, **defaults: Any) -> tuple[float, RopeScaling | None, float]:
    """(theta, scaling, fraction of a head that is rotated), from the old fields or the newer ``rope_parameters``."""
    given = {**defaults, **(record.get("rope_scaling") or {}), **(record.get("rope_parameters") or {})}
    theta, fraction = float(given.pop("rope_theta")), float(given.pop("partial_rotary_factor"))
    kind = given.pop("rope_type", given.pop("type", "default"))
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"rope_scaling of type {kind!r} is not supported. Supported: {', '.join(_ROPE_FIELDS)}.")
    needed = _ROPE_FIELDS[kind]
    if set(given) != set(needed):
        raise ValueError(f"rope_scaling of type {kind!r} has the fields {sorted(given)}; it needs {sorted(needed)}.")
    return theta, RopeScaling(kind, *(given[name] for name in needed)) if needed else None, fraction


def _gpt2(record: Record) -> DecoderConfig:
    mlp_width: Any = record.get("n_inner")  # None in most files: four times the width
    return DecoderConfig(
        record["vocab_size"], record["n_positions"], record["n_embd"], record["n_layer"], record["n_head"],
        norm_epsilon=record.get("layer_norm_epsilon", 1e-5), mlp_width=mlp_width,
        activation=_activation(record, "activation_function", "gelu_new"),
        tied_head=record.get("tie_word_embeddings", True),
        attention_scale=None if record.get("scale_attn_weights", True) else 1.0,
    )  # fmt: skip


def _neox(record: Record) -> DecoderConfig:
    width, heads = record["hidden_size"], record["num_attention_heads"]
    old = {"rope_theta": record.get("rotary_emb_base", 1e4), "partial_rotary_factor": record.get("rotary_pct", 0.25)}
    theta, scaling, fraction = _rope(record, **old)
    bias = record.get("attention_bias", True)
    return DecoderConfig(
        record["vocab_size"], record["max_position_embeddings"], width, record["num_hidden_layers"], heads,
        norm_epsilon=record.get("layer_norm_eps", 1e-5), mlp_width=record["intermediate_size"], positions="rotary",
        rotary_width=int(width // heads * fraction), rope_theta=theta, rope_scaling=scaling,
        activation=_activation(record, "hidden_act", "gelu"), qkv_bias=bias, out_bias=bias,
        parallel_residual=record.get("use_parallel_residual", True),
        tied_head=record.get("tie_word_embeddings", False),
    )  # fmt: skip


def _llama_like(record: Record, qkv_bias: bool, out_bias: bool, mlp_bias: bool, **shape: Any) -> DecoderConfig:
    old = {"rope_theta": record.get("rope_theta", 1e4), "partial_rotary_factor": record.get("partial_rotary_factor", 1)}
    theta, scaling, fraction = _rope(record, **old)
    if fraction != 1:
        raise ValueError(f"partial_rotary_factor = {fraction} is not supported in this architecture.")
    return DecoderConfig(
        record["vocab_size"], record["max_position_embeddings"], record["hidden_size"], record["num_hidden_layers"],
        record["num_attention_heads"], norm_epsilon=record.get("rms_norm_eps", 1e-6), norm="rms",
        mlp_width=record["intermediate_size"], positions="rotary", rope_theta=theta, rope_scaling=scaling,
        activation=_activation(record, "hidden_act", "silu"), gated_mlp=True, qkv_bias=qkv_bias, out_bias=out_bias,
        mlp_bias=mlp_bias, tied_head=record.get("tie_word_embeddings", False), **shape,
    )  # fmt: skip


def _llama(record: Record) -> DecoderConfig:
    bias = record.get("attention_bias", False)
    shape = {"num_kv_heads": record.get("num_key_value_heads"), "head_width": record.get("head_dim")}
    return _llama_like(record, bias, bias, record.get("mlp_bias", False), **shape)


def _qwen2(record: Record) -> DecoderConfig:
    shape = {"num_kv_heads": record["num_key_value_heads"], "head_width": record.get("head_dim")}
    return _llama_like(record, True, False, False, **shape)


def _qwen3(record: Record) -> DecoderConfig:
    bias = record.get("attention_bias", False)
    shape = {"num_kv_heads": record["num_key_value_heads"], "head_width": record.get("head_dim", 128)}
    return _llama_like(record, bias, bias, False, qk_norm=True, **shape)


_NEOX_BUFFERS = r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
_LLAMA_LIKE = (_LLAMA, ("lm_head.weight",), r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
LAYOUTS = {
    "gpt2": Layout("transformer.", _gpt2, _GPT2, ("lm_head.weight",), r"h\.\d+\.attn\.(bias|masked_bias)"),
    "gpt_neox": Layout("gpt_neox.", _neox, _NEOX, ("embed_out.weight", "lm_head.weight"), _NEOX_BUFFERS),
    "llama": Layout("model.", _llama, *_LLAMA_LIKE),
    "qwen2": Layout("model.", _qwen2, *_LLAMA_LIKE),
    "qwen3": Layout("model.", _qwen3, *_LLAMA_LIKE),
}
