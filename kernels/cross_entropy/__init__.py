"""Cross-entropy from hidden states and the unembedding, without the logits of all tokens in memory."""

from slt_jax.kernels.cross_entropy.chunked import cross_entropy

__all__ = ["cross_entropy"]
