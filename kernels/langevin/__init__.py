"""Random numbers and the Langevin update, written so that XLA fuses them into one pass over the weights."""

from slt_jax.kernels.langevin.fused import (
    Block,
    fold_in_on_host,
    normal,
    normal_side_by_side,
    random_words,
    uniform_index,
    words_on_host,
)

__all__ = [
    "Block",
    "fold_in_on_host",
    "normal",
    "normal_side_by_side",
    "random_words",
    "uniform_index",
    "words_on_host",
]
