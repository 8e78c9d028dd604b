"""Random numbers and the Langevin update, written so that XLA fuses them into one pass over the weights."""

from slt_jax.kernels.langevin.fused import normal, random_words, uniform_index

__all__ = ["normal", "random_words", "uniform_index"]
