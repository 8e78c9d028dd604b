"""The configuration of a decoder: one for all the architectures of ``slt_jax.models.layouts``."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slt_jax._checks import check_count, check_positive

_DERIVED: Any = None  # computed from the other fields
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
_SCALES = ("attention_softcap", "logit_softcap", "embedding_scale", "residual_scale", "logit_scale")
_CHOICES = {
    "positions": ("learned", "rotary"), "rotary_pairs": ("halves", "neighbours"), "norm": ("layer", "rms"),
    "norm_placement": ("before", "after", "around"), "keep": ("all", "products", "input"),
    "activation": get_args(Activation),
}  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """Lower rotary frequencies, for a context longer than the one the model was first trained with.

    ``linear``: every frequency is divided by ``factor``. ``llama3``: frequencies of wavelengths above
    ``original_context / low_frequency_factor`` are divided by ``factor``, those of wavelengths below ``original_context
    / high_frequency_factor`` stay, and those between are interpolated.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        _check_choice("kind", self.kind, ("linear", "llama3"))
        for field in ("factor", "low_frequency_factor", "high_frequency_factor", "original_context"):
            check_positive(field, getattr(self, field), "It comes from rope_scaling in the checkpoint's config.json.")
        if self.low_frequency_factor >= self.high_frequency_factor:
            raise ValueError(
                f"low_frequency_factor = {self.low_frequency_factor} must be below high_frequency_factor = "
                f"{self.high_frequency_factor}."
            )


@dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder. Defaults are GPT-2's; its small is ``DecoderConfig(50257, 1024, 768, 12, 12)``.

    Args:
        width: of the residual stream.
        num_kv_heads: heads of keys and values, each shared by ``num_heads / num_kv_heads`` neighbouring query heads;
            default ``num_heads``.
        head_width: default ``width / num_heads``.
        mlp_width: default ``4 * width``.
        positions: ``learned`` (vectors added to the embedding) or ``rotary``.
        rotary_width: number of components of a head that are rotated, from the first on; default all.
        rotary_pairs: which components are rotated together: i and i + rotary_width / 2 (``halves``), or 2 i and 2 i + 1
            (``neighbours``).
        windows: for each layer, how many tokens, up to and with its own, a token attends to; 0 for all of them. Default
            all, in every layer.
        local_rope_theta: ``rope_theta`` of the layers with a window, where ``rope_scaling`` does not apply; default the
            same in all layers, with ``rope_scaling``.
        unrotated_layers: layers without positions.
        norm_scale, norm_bias: whether norms have a scale and a bias; default a scale, and a bias for layer norms.
        norm_offset: added to the scale of every norm.
        norm_placement: whether a norm is applied to the input of attention and MLP, to their output before it is added
            to the residual stream, or to both.
        shared_norm: whether a parallel MLP reads the norm that attention reads, and has none of its own.
        qk_norm: whether an RMS norm is applied to each head's query and key, before the rotation.
        joint_qk_norm: whether that norm is over all heads of a token together.
        gated_mlp: ``down(activation(gate x) * up x)`` in place of ``down(activation(up x))``.
        qkv_bias, out_bias, mlp_bias, head_bias: whether there are biases on queries, keys and values; on attention's
            output; on both layers of the MLP; on the logits.
        parallel_residual: whether attention and MLP both take the block's input; otherwise the MLP takes the residual
            stream after attention.
        tied_head: whether the embedding is also the unembedding.
        attention_scale: factor on query times key; default ``1 / sqrt(head_width)``.
        scale_by_layer: whether that is divided by the number of the layer, from 1.
        attention_softcap, logit_softcap: c, if attention's scores or the logits x become ``c tanh(x / c)``.
        embedding_scale, residual_scale, logit_scale: factors on the embedding of a token, on what attention and MLP add
            to the residual stream, and on the logits.
        keep: what a block stores for its backward pass: ``all`` intermediate values; ``products``, the products with
            weight matrices; ``input``, only the block's input. The rest is recomputed. ``products`` is the fastest on a
            CPU, where memory traffic costs more than arithmetic.
    """

    vocab_size: int
    context_length: int
    width: int
    num_layers: int
    num_heads: int
    norm_epsilon: float = 1e-5
    num_kv_heads: int = _DERIVED
    head_width: int = _DERIVED
    mlp_width: int = _DERIVED
    positions: Literal["learned", "rotary"] = "learned"
    rotary_width: int = _DERIVED
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_pairs: Literal["halves", "neighbours"] = "halves"
    windows: tuple[int, ...] | None = None
    local_rope_theta: float | None = None
    unrotated_layers: tuple[int, ...] = ()
    norm: Literal["layer", "rms"] = "layer"
    norm_scale: bool = True
    norm_bias: bool = _DERIVED
    norm_offset: float = 0.0
    norm_placement: Literal["before", "after", "around"] = "before"
    shared_norm: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    activation: Activation = "gelu_tanh"
    gated_mlp: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    parallel_residual: bool = False
    tied_head: bool = True
    attention_scale: float | None = None
    scale_by_layer: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    keep: Literal["all", "products", "input"] = "products"

    def __post_init__(self):
        for field in ("vocab_size", "context_length", "width", "num_layers", "num_heads"):
            check_count(field, getattr(self, field), 1)
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} does not divide width = {self.width}.")
        for field, value in _derived(self).items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        for field in ("num_kv_heads", "head_width", "mlp_width", "rotary_width"):
            check_count(field, getattr(self, field), 1)
        for field in ("norm_epsilon", "rope_theta", "local_rope_theta", "attention_scale", *_SCALES):
            if getattr(self, field) is not None:
                check_positive(field, getattr(self, field), "")
        for field, choices in _CHOICES.items():
            _check_choice(field, getattr(self, field), choices)
        self._check_together()

    def _check_together(self) -> None:
        """Raise ValueError for fields that contradict each other."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}.")
        if self.positions == "rotary" and (self.rotary_width % 2 or self.rotary_width > self.head_width):
            raise ValueError(
                f"rotary_width must be even and at most head_width = {self.head_width}, got {self.rotary_width}."
            )
        if self.windows is not None and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(f"windows must hold num_layers = {self.num_layers} counts of tokens, got {self.windows}.")
        if self.shared_norm and not (self.parallel_residual and self.norm_placement == "before"):
            raise ValueError("shared_norm needs a parallel_residual and norm_placement 'before'.")

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "DecoderConfig":
        """The inverse of ``to_dict``. Raises TypeError for a field that is not one."""
        scaling, windows = record.get("rope_scaling"), record.get("windows")
        read = {
            "rope_scaling": RopeScaling(**scaling) if scaling else None,
            "windows": None if windows is None else tuple(windows),
            "unrotated_layers": tuple(record.get("unrotated_layers", ())),
        }
        return cls(**{**record, **read})


def _derived(config: DecoderConfig) -> dict[str, Any]:
    head_width = config.head_width or config.width // config.num_heads
    return {
        "num_kv_heads": config.num_heads, "head_width": head_width, "mlp_width": 4 * config.width,
        "rotary_width": head_width, "norm_bias": config.norm == "layer",
    }  # fmt: skip


def _check_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}.")
