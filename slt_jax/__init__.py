"""slt-jax: local learning coefficients of neural networks, with error bars."""

from slt_jax.adapters import from_linen, from_nnx, next_token_loss
from slt_jax.batches import hf_dataset, token_file
from slt_jax.estimate import estimate_llc
from slt_jax.posterior import LocalPosterior
from slt_jax.results import LLCResult, load_result
from slt_jax.samplers import Sampler, sgld

__version__ = "0.1.0"
__all__ = [
    "LLCResult",
    "LocalPosterior",
    "Sampler",
    "estimate_llc",
    "from_linen",
    "from_nnx",
    "hf_dataset",
    "load_result",
    "next_token_loss",
    "sgld",
    "token_file",
]
