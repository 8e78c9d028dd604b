"""The decoder of each of Hugging Face's architectures, from the fields of its ``config.json``.

A field that a function reads is one that it answers for: see ``Fields.check_rest``.
"""

from typing import Any

from slt_jax.models.config import DecoderConfig
from slt_jax.models.fields import Fields, Rope, activation, local_rope, rope, windows


def gpt2(fields: Fields) -> DecoderConfig:
    mlp_width: Any = fields.get("n_inner")  # None in most files: four times the width
    return DecoderConfig(
        fields["vocab_size"], fields["n_positions"], fields["n_embd"], fields["n_layer"], fields["n_head"],
        norm_epsilon=fields.get("layer_norm_epsilon", 1e-5), mlp_width=mlp_width,
        activation=activation(fields, "activation_function", "gelu_new"),
        tied_head=fields.get("tie_word_embeddings", True),
        attention_scale=None if fields.get("scale_attn_weights", True) else 1.0,
        scale_by_layer=fields.given("scale_attn_by_inverse_layer_idx", False),
    )  # fmt: skip


def gpt_neo(fields: Fields) -> DecoderConfig:
    width, layers, mlp_width = fields["hidden_size"], fields["num_layers"], fields.get("intermediate_size")
    types = fields.given("attention_types", [[["global", "local"], layers // 2]])
    kinds = [kind for pattern, count in types for kind in pattern * count]
    if set(kinds) - {"global", "local"} or len(kinds) != layers:
        raise ValueError(f"attention_types = {types} must name global or local for each of {layers} layers.")
    window = fields.get("window_size", 256)
    return DecoderConfig(
        fields["vocab_size"], fields["max_position_embeddings"], width, layers, fields["num_heads"],
        norm_epsilon=fields.get("layer_norm_epsilon", 1e-5), mlp_width=4 * width if mlp_width is None else mlp_width,
        activation=activation(fields, "activation_function", "gelu_new"), qkv_bias=False, attention_scale=1.0,
        tied_head=fields.get("tie_word_embeddings", True),
        windows=tuple(window if kind == "local" else 0 for kind in kinds),
    )  # fmt: skip


def gptj(fields: Fields) -> DecoderConfig:
    mlp_width: Any = fields.get("n_inner")
    tied_head = fields.get("tie_word_embeddings", False)
    return DecoderConfig(
        fields["vocab_size"], fields["n_positions"], fields["n_embd"], fields["n_layer"], fields["n_head"],
        norm_epsilon=fields.get("layer_norm_epsilon", 1e-5), mlp_width=mlp_width, positions="rotary",
        rotary_width=fields.get("rotary_dim", 64), rotary_pairs="neighbours",
        activation=activation(fields, "activation_function", "gelu_new"), qkv_bias=False, out_bias=False,
        head_bias=True, parallel_residual=True, shared_norm=True, tied_head=tied_head,
    )  # fmt: skip


def opt(fields: Fields) -> DecoderConfig:
    width = fields["hidden_size"]
    unlike = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "word_embed_proj_dim": width,
              "layer_norm_elementwise_affine": True}  # fmt: skip
    for field, supported in unlike.items():
        if (value := fields.given(field, supported)) != supported:
            raise ValueError(f"{field} = {value!r} changes the mathematics and is not supported.")
    bias = fields.get("enable_bias", True)
    return DecoderConfig(
        fields["vocab_size"], fields["max_position_embeddings"], width, fields["num_hidden_layers"],
        fields["num_attention_heads"], mlp_width=fields["ffn_dim"], qkv_bias=bias, out_bias=bias, mlp_bias=bias,
        activation=activation(fields, "activation_function", "relu"), tied_head=fields.get("tie_word_embeddings", True),
    )  # fmt: skip


def _rotary(fields: Fields, positions: Rope, **own: Any) -> DecoderConfig:
    """A decoder with rotary positions. ``own``: fields of ``DecoderConfig`` that differ between architectures."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_width = own.get("head_width") or width // heads
    own.setdefault("tied_head", fields.get("tie_word_embeddings", False))
    context = own.pop("context_length", None) or fields["max_position_embeddings"]
    return DecoderConfig(
        fields["vocab_size"], context, width, fields["num_hidden_layers"], heads,
        positions="rotary", rotary_width=int(head_width * positions.fraction), rope_theta=positions.theta,
        rope_scaling=positions.scaling, local_rope_theta=positions.local_theta, **own,
    )  # fmt: skip


def neox(fields: Fields) -> DecoderConfig:
    positions = rope(fields, fraction=0.25, names=("rotary_emb_base", "rotary_pct"))
    bias = fields.get("attention_bias", True)
    return _rotary(
        fields, positions, norm_epsilon=fields.get("layer_norm_eps", 1e-5), mlp_width=fields["intermediate_size"],
        activation=activation(fields, "hidden_act", "gelu"), qkv_bias=bias, out_bias=bias,
        parallel_residual=fields.get("use_parallel_residual", True),
    )  # fmt: skip


def falcon(fields: Fields) -> DecoderConfig:
    if not fields.given("multi_query", True):
        raise ValueError("multi_query = False is not supported in this architecture.")
    parallel, bias = fields.given("parallel_attn", True), fields.given("bias", False)
    return _rotary(
        fields, rope(fields), norm_epsilon=fields.get("layer_norm_epsilon", 1e-5), num_kv_heads=1,
        context_length=fields.given("max_position_embeddings", 2048),
        mlp_width=fields.given("ffn_hidden_size", 4 * fields["hidden_size"]),
        activation=activation(fields, "activation", "gelu"), qkv_bias=bias, out_bias=bias, mlp_bias=bias,
        parallel_residual=parallel, shared_norm=parallel, tied_head=fields.get("tie_word_embeddings", True),
    )  # fmt: skip


def _whole(positions: Rope) -> Rope:
    if positions.fraction != 1:
        raise ValueError(f"partial_rotary_factor = {positions.fraction} is not supported in this architecture.")
    return positions


def _llama_like(fields: Fields, positions: Rope, **own: Any) -> DecoderConfig:
    """Without biases, with a gated MLP and RMS norms, unless ``own`` says otherwise."""
    if "norm_epsilon" not in own:
        own["norm_epsilon"] = fields.get("rms_norm_eps", 1e-6)
    if "activation" not in own:
        own["activation"] = activation(fields, "hidden_act", "silu")
    usual = {"norm": "rms", "gated_mlp": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False}
    heads = {"num_kv_heads": fields.get("num_key_value_heads"), "head_width": fields.get("head_dim")}
    return _rotary(fields, positions, mlp_width=fields["intermediate_size"], **{**usual, **heads, **own})


def _biases(fields: Fields) -> dict[str, bool]:
    bias = fields.get("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": fields.get("mlp_bias", False)}


def llama(fields: Fields) -> DecoderConfig:
    return _llama_like(fields, _whole(rope(fields)), **_biases(fields))


def mistral(fields: Fields) -> DecoderConfig:
    return _llama_like(fields, _whole(rope(fields)), windows=windows(fields))


def _qwen_windows(fields: Fields) -> tuple[int, ...] | None:
    layers, use = fields["num_hidden_layers"], fields.given("use_sliding_window", False)
    full = fields.get("max_window_layers", 28) if use and fields.get("sliding_window") is not None else layers
    return windows(fields, ["sliding_attention" if layer >= full else "full_attention" for layer in range(layers)], use)


def qwen2(fields: Fields) -> DecoderConfig:
    _ = fields["num_key_value_heads"]
    return _llama_like(fields, _whole(rope(fields)), qkv_bias=True, windows=_qwen_windows(fields))


def qwen3(fields: Fields) -> DecoderConfig:
    _ = fields["num_key_value_heads"]
    bias = fields.get("attention_bias", False)
    return _llama_like(
        fields, _whole(rope(fields)), qkv_bias=bias, out_bias=bias, head_width=fields.get("head_dim", 128),
        qk_norm=True, windows=_qwen_windows(fields),
    )  # fmt: skip


def olmo(fields: Fields) -> DecoderConfig:
    bias = fields.get("attention_bias", False)
    return _llama_like(
        fields, _whole(rope(fields)), norm="layer", norm_scale=False, norm_bias=False, norm_epsilon=1e-5,
        qkv_bias=bias, out_bias=bias,
    )  # fmt: skip


def olmo2(fields: Fields) -> DecoderConfig:
    return _normed_after(fields, _whole(rope(fields)), None)


def olmo3(fields: Fields) -> DecoderConfig:
    layers, theta = fields["num_hidden_layers"], fields.given("rope_theta", 5e5)
    default = ["full_attention" if (layer + 1) % 4 == 0 else "sliding_attention" for layer in range(layers)]
    return _normed_after(fields, _whole(local_rope(fields, theta, theta)), windows(fields, default))


def _normed_after(fields: Fields, positions: Rope, sliding: tuple[int, ...] | None) -> DecoderConfig:
    bias = fields.get("attention_bias", False)
    return _llama_like(
        fields, positions, norm_epsilon=fields.get("rms_norm_eps", 1e-5), norm_placement="after", qk_norm=True,
        joint_qk_norm=True, qkv_bias=bias, out_bias=bias, windows=sliding,
    )  # fmt: skip


def _gemma_like(fields: Fields, positions: Rope, default_activation: str, **own: Any) -> DecoderConfig:
    bias = fields.get("attention_bias", False)
    acts = {"gelu": "gelu_tanh"} if default_activation == "hidden_act" else {}  # the first files say gelu and mean this
    name = activation(fields, default_activation, "gelu_pytorch_tanh")
    return _llama_like(
        fields, positions, activation=acts.get(name, name), qkv_bias=bias, out_bias=bias, norm_offset=1.0,
        head_width=fields.get("head_dim", 256), embedding_scale=float(fields["hidden_size"]) ** 0.5,
        tied_head=fields.get("tie_word_embeddings", True), **own,
    )  # fmt: skip


def gemma(fields: Fields) -> DecoderConfig:
    return _gemma_like(fields, _whole(rope(fields)), "hidden_act")


def _sandwich(fields: Fields, period: int, positions: Rope, cap: float | None, **own: Any) -> DecoderConfig:
    layers = fields["num_hidden_layers"]
    default = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]
    return _gemma_like(
        fields, positions, "hidden_activation", norm_placement="around", windows=windows(fields, default),
        attention_scale=fields.get("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=fields.get("final_logit_softcapping", cap), **own,
    )  # fmt: skip


def gemma2(fields: Fields) -> DecoderConfig:
    softcap = fields.get("attn_logit_softcapping", 50.0)
    return _sandwich(fields, 2, _whole(rope(fields)), 30.0, attention_softcap=softcap)


def gemma3(fields: Fields) -> DecoderConfig:
    period = fields.given("sliding_window_pattern", 6)
    return _sandwich(fields, period, local_rope(fields, 1e6, 1e4), None, qk_norm=True)


def phi3(fields: Fields) -> DecoderConfig:
    epsilon = fields.get("rms_norm_eps", 1e-5)
    return _llama_like(fields, rope(fields), norm_epsilon=epsilon, windows=windows(fields))


def phi(fields: Fields) -> DecoderConfig:
    return _llama_like(
        fields, rope(fields, fraction=0.5), norm="layer", norm_epsilon=fields.get("layer_norm_eps", 1e-5),
        activation=activation(fields, "hidden_act", "gelu_new"), gated_mlp=False, qkv_bias=True, out_bias=True,
        mlp_bias=True, head_bias=True, parallel_residual=True, shared_norm=True,
    )  # fmt: skip


def granite(fields: Fields) -> DecoderConfig:
    return _llama_like(
        fields, _whole(rope(fields)), embedding_scale=fields.get("embedding_multiplier", 1.0),
        residual_scale=fields.get("residual_multiplier", 1.0), logit_scale=1 / fields.get("logits_scaling", 1.0),
        attention_scale=fields.get("attention_multiplier", 1.0), **_biases(fields),
    )  # fmt: skip


def smollm3(fields: Fields) -> DecoderConfig:
    layers, period = fields["num_hidden_layers"], fields.get("no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers") or [int((layer + 1) % period != 0) for layer in range(layers)]
    use = fields.given("use_sliding_window", False)
    sliding = use and fields.get("sliding_window") is not None
    default = ["full_attention" if rotates or not sliding else "sliding_attention" for rotates in rotated]
    return _llama_like(
        fields, _whole(rope(fields, 2e6)), windows=windows(fields, default, use),
        unrotated_layers=tuple(layer for layer, rotates in enumerate(rotated) if not rotates),
        tied_head=fields.get("tie_word_embeddings", True), **_biases(fields),
    )  # fmt: skip


def stablelm(fields: Fields) -> DecoderConfig:
    parallel = fields.get("use_parallel_residual", False)
    return _llama_like(
        fields, rope(fields, fraction=0.25), norm="layer", norm_epsilon=fields.get("layer_norm_eps", 1e-5),
        qkv_bias=fields.get("use_qkv_bias", False), parallel_residual=parallel, shared_norm=parallel,
    )  # fmt: skip


def starcoder2(fields: Fields) -> DecoderConfig:
    bias = fields.get("use_bias", True)
    return _llama_like(
        fields, _whole(rope(fields)), norm="layer", norm_epsilon=fields.get("norm_epsilon", 1e-5), gated_mlp=False,
        activation=activation(fields, "hidden_act", "gelu_pytorch_tanh"), qkv_bias=bias, out_bias=bias, mlp_bias=bias,
        windows=windows(fields), tied_head=fields.get("tie_word_embeddings", True),
    )  # fmt: skip


def cohere(fields: Fields) -> DecoderConfig:
    bias = fields.get("attention_bias", False)
    return _llama_like(
        fields, _whole(rope(fields, 5e5)), norm="layer", norm_bias=False, rotary_pairs="neighbours",
        norm_epsilon=fields.get("layer_norm_eps", 1e-5), parallel_residual=True, shared_norm=True, qkv_bias=bias,
        out_bias=bias, logit_scale=fields.get("logit_scale", 0.0625), tied_head=fields.get("tie_word_embeddings", True),
    )  # fmt: skip
