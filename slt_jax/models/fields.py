"""The fields of a ``config.json``: those that were read, and those that must not be overlooked."""

from typing import Any, NamedTuple

from slt_jax.models.config import RopeScaling

ACTIVATION_NAMES = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "swish": "silu", "relu": "relu",
}  # fmt: skip

# Fields that change the mathematics, with the values at which they do not. A layout that reads a field answers for it.
_NEUTRAL: dict[str, tuple] = {
    "scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False), "use_sliding_window": (None, False), "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,), "logit_softcapping": (None,), "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None, 1), "embedding_multiplier": (None, 1), "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1), "logit_scale": (None, 1), "clip_qkv": (None,), "alibi": (None, False),
    "quantization_config": (None,), "num_experts": (None, 0), "num_local_experts": (None, 0),
    "use_qk_norm": (None, False), "sliding_window": (None,), "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1), "qk_layernorm": (None, False), "qk_norm": (None, False),
    "use_bidirectional_attention": (None, False),
    "new_decoder_architecture": (None, False), "no_rope_layers": (None, []), "n_routed_experts": (None, 0),
    "attention_chunk_size": (None,), "num_kv_shared_layers": (None, 0), "residual_scale": (None, 1),
    "embedding_scale": (None, 1), "scale_emb": (None, 1), "scale_depth": (None, 1), "mup_scale": (None, 1),
    "parallel_attn": (None, False), "use_parallel_residual": (None, False), "final_w_init_variance_scale": (None,),
    "cross_layer_interval": (None,), "kv_lora_rank": (None,), "q_lora_rank": (None,), "moe_layers": (None, []),
    "multi_query": (None, False), "position_embedding_type": (None, "absolute", "rope"),
}  # fmt: skip
_FULL, _LOCAL = "full_attention", "sliding_attention"


class Fields(dict[str, Any]):
    """A ``config.json`` that remembers which of its fields were read."""

    def __init__(self, record: dict[str, Any]):
        super().__init__(record)
        self.read: set[str] = set()

    def __getitem__(self, field: str) -> Any:
        self.read.add(field)
        return super().__getitem__(field)

    def get(self, field: str, default: Any = None) -> Any:
        self.read.add(field)
        return super().get(field, default)

    def given(self, field: str, default: Any) -> Any:
        """The field, or ``default`` also where it is null."""
        value = self.get(field)
        return default if value is None else value

    def check_rest(self) -> None:
        """Raise ValueError for a field that was not read and changes the mathematics."""
        for field, neutral in _NEUTRAL.items():
            if field not in self.read and (value := super().get(field)) not in neutral:
                raise ValueError(f"{field} = {value!r} changes the mathematics and is not supported.")
        types = super().get("layer_types") or ()
        if "layer_types" not in self.read and (other := set(types) - {_FULL}):
            raise ValueError(f"layer_types holds {sorted(other)}; only {_FULL} is supported in this architecture.")
        code = (super().get("auto_map") or {}).get("AutoModelForCausalLM", "")
        # Older repositories have a copy of transformers' own code, which transformers does not run either.
        if code and not code.split("--")[-1].startswith(f"modeling_{super().get('model_type')}."):
            raise ValueError(f"auto_map names code of its own, {code!r}, which is not run.")


def activation(fields: Fields, field: str, default: str) -> Any:
    """The decoder's name of an activation. Raises ValueError for one that it does not have."""
    name = fields.given(field, default)
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"{field} = {name!r} is not known. Known: {', '.join(ACTIVATION_NAMES)}.")
    return ACTIVATION_NAMES[name]


def windows(fields: Fields, default: list[str] | None = None, use: bool = True) -> tuple[int, ...] | None:
    """The sliding window of each layer from ``sliding_window`` and ``layer_types``; 0 for full attention.

    Args:
        default: ``layer_types`` where the file has none; default, all sliding if there is a window.
        use: False if the file says that its ``sliding_window`` is not used.
    """
    layers, window = fields["num_hidden_layers"], fields.get("sliding_window") if use else None
    types = fields.get("layer_types") or default or [_FULL if window is None else _LOCAL] * layers
    if other := set(types) - {_FULL, _LOCAL}:
        raise ValueError(f"layer_types holds {sorted(other)}; known are {_FULL} and {_LOCAL}.")
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries for {layers} layers.")
    if _LOCAL not in types:
        return None
    if window is None:
        raise ValueError(f"layer_types holds '{_LOCAL}', but sliding_window is not set, or not used.")
    return tuple(window if kind == _LOCAL else 0 for kind in types)


class Rope(NamedTuple):
    """Rotary positions: base, scaling, the fraction of a head that is rotated, and the base of local layers."""

    theta: float
    scaling: RopeScaling | None
    fraction: float
    local_theta: float | None = None


_SCALING_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip


_NAMES = ("rope_theta", "partial_rotary_factor")


def rope(fields: Fields, theta: float = 1e4, fraction: float = 1.0, names: tuple[str, str] = _NAMES) -> Rope:
    """From the old fields or the newer ``rope_parameters``.

    Args:
        theta, fraction: where neither has them.
        names: of the old fields.
    """
    old = (fields.given(name, default) for name, default in zip(names, (theta, fraction), strict=True))
    given = dict(zip(_NAMES, old, strict=True))
    return _rope({**given, **(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})})


def local_rope(fields: Fields, theta: float, local_theta: float) -> Rope:
    """As ``rope``, where layers with a window have positions of their own, without scaling."""
    nested = fields.get("rope_parameters") or {}
    if other := set(nested) - {_FULL, _LOCAL}:
        raise ValueError(f"rope_parameters holds {sorted(other)}; it needs {_FULL} and {_LOCAL}.")
    common = {name: fields.given(name, default) for name, default in zip(_NAMES, (theta, 1.0), strict=True)}
    main = _rope({**common, **(fields.get("rope_scaling") or {}), **(nested.get(_FULL) or {})})
    own = {"rope_theta": fields.given("rope_local_base_freq", local_theta), "partial_rotary_factor": 1.0}
    local = _rope({**own, **(nested.get(_LOCAL) or {})})
    if local.scaling is not None or local.fraction != main.fraction:
        raise ValueError(f"rope_parameters of {_LOCAL} = {nested[_LOCAL]} are not supported; only a rope_theta is.")
    return main._replace(local_theta=local.theta)


def _rope(given: dict[str, Any]) -> Rope:
    theta, fraction = float(given.pop("rope_theta")), float(given.pop("partial_rotary_factor"))
    kind = given.pop("rope_type", given.pop("type", "default"))
    if kind not in _SCALING_FIELDS:
        raise ValueError(f"rope_scaling of type {kind!r} is not supported. Supported: {', '.join(_SCALING_FIELDS)}.")
    needed = _SCALING_FIELDS[kind]
    if set(given) != set(needed):
        raise ValueError(f"rope_scaling of type {kind!r} has the fields {sorted(given)}; it needs {sorted(needed)}.")
    return Rope(theta, RopeScaling(kind, *(given[name] for name in needed)) if needed else None, fraction)
