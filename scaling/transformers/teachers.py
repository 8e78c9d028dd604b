"""Teachers: networks with random weights of known learning coefficient, of many layouts and sizes.

The weights are normal, a matrix's entries with the variance GAIN^2 / (number of inputs), gains 1 + 0.3 normal, biases
0.3 normal: generic, so that the rank of the Jacobian is the largest there is, and the learning coefficient half of it.
Shapes differ from teacher to teacher, so that the coefficients of a layout have an order.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from flax import nnx

from scaling.transformers.gauge import Config, gauge_dimension
from scaling.transformers.networks import AttentionConfig, MLPConfig, attention_shapes, mlp_shapes
from slt_jax.models import Decoder, DecoderConfig

GAIN = 1.5
BIAS = 0.3  # standard deviation of biases, and of gains around 1
TARGETS = {"1K": 1_000, "10K": 10_000, "100K": 100_000, "1M": 1_000_000, "10M": 10_000_000, "100M": 100_000_000}
NUM_DATA = {"1K": 512, "10K": 256, "100K": 4096, "1M": 16_384, "10M": 65_536, "100M": 65_536}  # sequences
PER_VECTOR = 4  # inputs of a perceptron for each sequence: they have one prediction each
_LLAMA = {
    "positions": "rotary", "norm": "rms", "activation": "silu", "gated_mlp": True, "qkv_bias": False,
    "out_bias": False, "mlp_bias": False, "rope_theta": 100.0,
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "layernorm": {"tied_head": False},
    "layernorm parallel": {"tied_head": False, "parallel_residual": True, "shared_norm": True},
    "layernorm tied": {"tied_head": True},
    "rms rotary": {**_LLAMA, "tied_head": False},
    "rms rotary tied": {**_LLAMA, "tied_head": True},
    "norms around": {**_LLAMA, "tied_head": True, "norm_placement": "around", "logit_softcap": 20.0,
                     "activation": "gelu_tanh"},
    "query-key norm": {**_LLAMA, "tied_head": False, "qk_norm": True},
}  # fmt: skip
OTHERS = ("mlp tanh", "mlp relu", "attention")
KINDS = (*LAYOUTS, *OTHERS)
GROUPED = ("rms rotary", "rms rotary tied", "norms around", "query-key norm")


@dataclass(frozen=True)
class Teacher:
    """weights: w*, nested dicts of float32. truth: its learning coefficient. gauge: d minus the Jacobian's rank."""

    layout: str
    size: str
    seed: int
    config: Config
    weights: dict[str, Any]
    truth: Fraction
    gauge: int

    @property
    def num_weights(self) -> int:
        return count(self.weights)


def count(tree: Any) -> int:
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def shapes_of(config: Config) -> dict[str, Any]:
    """Nested dicts of shapes, under the names of the parameters."""
    if isinstance(config, MLPConfig):
        return mlp_shapes(config)
    if isinstance(config, AttentionConfig):
        return attention_shapes(config)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda leaf: tuple(leaf.shape), pure)


def num_weights(config: Config) -> int:
    shapes = jax.tree.leaves(shapes_of(config), is_leaf=lambda x: isinstance(x, tuple))
    return sum(int(np.prod(shape)) for shape in shapes)


def draw_weights(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """float64; of a decoder or a small network, under the names of its parameters."""

    def one(path: tuple, shape: tuple[int, ...]) -> np.ndarray:
        name = path[-1].key
        normal = rng.standard_normal(shape)
        if name == "scale":
            return 1 - getattr(config, "norm_offset", 0.0) + BIAS * normal
        if name.endswith("bias"):
            return BIAS * normal
        if name in ("tokens", "positions"):
            return normal
        return GAIN / np.sqrt(_inputs(name, shape)) * normal

    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    weights = jax.tree_util.tree_map_with_path(one, shapes_of(config), is_leaf=is_shape)
    if isinstance(config, MLPConfig) and config.activation == "relu" and config.biases:
        _balance(config, weights, rng)
    return weights


def _balance(config: MLPConfig, weights: dict[str, Any], rng: np.random.Generator) -> None:
    """Set the biases of hidden ReLU units so that each is on for 20 to 80 % of the inputs: none is dead or linear."""
    x = rng.standard_normal((4096, config.widths[0]))
    for k in range(len(config.widths) - 2):
        layer = weights[f"layer{k}"]
        inner = x @ layer["weight"]
        off = rng.uniform(0.2, 0.8, inner.shape[1])
        layer["bias"] = -np.array([np.quantile(column, q) for column, q in zip(inner.T, off, strict=True)])
        x = np.maximum(inner + layer["bias"], 0)


def _inputs(name: str, shape: tuple[int, ...]) -> int:
    """How many inputs a matrix has: q, k, v end with (width, heads, inner), o with (heads, inner, width)."""
    if name in ("q", "k", "v"):
        return shape[-3]
    if name == "o":
        return shape[-3] * shape[-2]
    return shape[-1] if name == "head" else shape[-2]


def draw_config(layout: str, size: str, rng: np.random.Generator) -> Config:
    """A shape of about the size's number of weights (within a factor of 1.5), drawn.

    Raises:
      ValueError: an unknown layout or size.
    """
    if layout not in KINDS or size not in TARGETS:
        raise ValueError(f"layout must be one of {KINDS}, size one of {tuple(TARGETS)}; got {layout!r}, {size!r}.")
    target = TARGETS[size]
    draw = {"mlp": _draw_mlp, "attention": _draw_attention}.get(layout.split()[0], _draw_decoder)
    for _ in range(10_000):
        config = draw(layout, size, rng)
        if config is not None and target / 1.5 <= num_weights(config) <= target * 1.5:
            return config
    raise ValueError(f"no shape of {layout} has about {target:,} weights.")


def _draw_decoder(layout: str, size: str, rng: np.random.Generator) -> DecoderConfig | None:
    at = list(TARGETS).index(size)
    scale = 10 ** (at / 2)
    heads = int(rng.choice([2, 4] if at == 0 else [2, 4, 8]))
    inner = 2 * int(rng.integers(1, 1 + max(1, round(1.5 * scale))))
    width = heads * inner
    given = {
        "vocab_size": width + 2 + int(rng.integers(0, 2 * width)), "context_length": int(rng.integers(4, 9)) * (1 + at),
        "width": width, "num_layers": int(rng.integers(1, 2 + at)), "num_heads": heads,
        "mlp_width": int(rng.integers(width, 3 * width)),
        **({"num_kv_heads": heads // 2} if layout in GROUPED else {}),
    }  # fmt: skip
    config = DecoderConfig(**{**given, **LAYOUTS[layout]})
    try:
        gauge_dimension(config)
    except ValueError:
        return None
    return config


def _draw_mlp(layout: str, size: str, rng: np.random.Generator) -> MLPConfig:
    at = list(TARGETS).index(size)
    most = int(16 * 10 ** (at / 2))
    hidden = rng.integers(4, most + 4, int(rng.integers(1, 4)))
    widths = (int(rng.integers(4, most + 4)), *map(int, hidden), int(rng.integers(3, 8 + 4 * at)))
    return MLPConfig(widths, "tanh" if layout.endswith("tanh") else "relu")


def _draw_attention(layout: str, size: str, rng: np.random.Generator) -> AttentionConfig:
    at = list(TARGETS).index(size)
    inner = int(rng.integers(2, 2 + max(2, int(3 * 10 ** (at / 2)))))
    heads = int(rng.integers(1, 4))
    width = inner * heads + int(rng.integers(0, inner))
    return AttentionConfig(
        width + 1 + int(rng.integers(0, 4 * width)), int(rng.integers(4, 9)) * (1 + at), width, heads, inner
    )


def make_teacher(layout: str, size: str, seed: int) -> Teacher:
    """The teacher of this layout, size and seed, always the same.

    Raises:
      ValueError: an unknown layout or size.
    """
    known = [KINDS.index(layout) if layout in KINDS else -1, list(TARGETS).index(size) if size in TARGETS else -1]
    rng_shape, rng_weights = (
        np.random.default_rng(s) for s in np.random.SeedSequence([*map(abs, known), seed]).spawn(2)
    )
    config = draw_config(layout, size, rng_shape)
    weights = jax.tree.map(lambda w: w.astype(np.float32), draw_weights(config, rng_weights))
    gauge = gauge_dimension(config)
    return Teacher(layout, size, seed, config, weights, Fraction(count(weights) - gauge, 2), gauge)


def num_data_of(layout: str, size: str) -> int:
    """How many examples the data set of a teacher has, where it is not given."""
    return NUM_DATA[size] * (PER_VECTOR if layout.startswith("mlp") else 1)


def make_inputs(config: Config, num: int, seed: int) -> np.ndarray:
    """``num`` sequences of uniform tokens, int32 ``(num, context_length)``; of a perceptron normal vectors, float32."""
    rng = np.random.default_rng([seed, 1])
    if isinstance(config, MLPConfig):
        return rng.standard_normal((num, config.widths[0])).astype(np.float32)
    return rng.integers(0, config.vocab_size, (num, config.context_length), dtype=np.int32)
