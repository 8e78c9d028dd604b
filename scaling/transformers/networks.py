"""Two small networks besides the decoders of ``slt_jax.models``: a perceptron, and one block of attention."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

Shapes = dict[str, Any]  # nested: name -> shape


@dataclass(frozen=True)
class MLPConfig:
    """``width[0]`` inputs -> ... -> ``width[-1]`` logits; ``activation`` after every layer but the last.

    Parameters of layer k: ``layerk/weight (width[k], width[k + 1])`` and, with ``biases``, ``layerk/bias``.
    """

    widths: tuple[int, ...]
    activation: Literal["tanh", "gelu_tanh", "relu"] = "tanh"
    biases: bool = True

    def __post_init__(self):
        if len(self.widths) < 3 or min(self.widths) < 2:
            raise ValueError(f"widths must be at least three numbers >= 2 (input, hidden, logits), got {self.widths}.")


@dataclass(frozen=True)
class AttentionConfig:
    """One block of causal attention without norms, biases and MLP, learned positions, untied head.

    logits = (x + sum over heads of softmax(x Q K' x' / sqrt(head_width)) x V O) U', x = tokens + positions. Parameters:
    ``tokens (vocab_size, width)``, ``positions (context_length, width)``, ``q``, ``k``, ``v`` ``(width, num_heads,
    head_width)``, ``o (num_heads, head_width, width)``, ``head (vocab_size, width)``.
    """

    vocab_size: int
    context_length: int
    width: int
    num_heads: int
    head_width: int


def mlp_shapes(config: MLPConfig) -> Shapes:
    shapes = {}
    for k, (before, after) in enumerate(itertools.pairwise(config.widths)):
        bias = {"bias": (after,)} if config.biases else {}
        shapes[f"layer{k}"] = {"weight": (before, after), **bias}
    return shapes


def attention_shapes(config: AttentionConfig) -> Shapes:
    vocabulary, width, inner = config.vocab_size, config.width, (config.num_heads, config.head_width)
    return {
        "tokens": (vocabulary, width), "positions": (config.context_length, width), "q": (width, *inner),
        "k": (width, *inner), "v": (width, *inner), "o": (*inner, width), "head": (vocabulary, width),
    }  # fmt: skip
