"""slt-jax: local learning coefficients of neural networks, with error bars."""

from slt_jax.adapters import from_linen, from_nnx, next_token_loss
from slt_jax.batches import hf_dataset, token_file
from slt_jax.compare import Comparison, compare
from slt_jax.crosschecks import CrossCheck, two_temperature_estimator, variance_estimator
from slt_jax.estimate import estimate_llc
from slt_jax.fleet import Fleet, run_fleet
from slt_jax.grid import Sweep, load_sweep
from slt_jax.posterior import LocalPosterior
from slt_jax.results import LLCResult, load_result
from slt_jax.samplers import Sampler, hmc, mala, mclmc, nuts, preconditioned_sgld, sghmc, sgld, sgnht, underdamped
from slt_jax.stages import Stages, find_stages
from slt_jax.sweep import sweep
from slt_jax.training import Trajectory, load_trajectory
from slt_jax.trajectory import trajectory

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "CrossCheck",
    "Fleet",
    "LLCResult",
    "LocalPosterior",
    "Sampler",
    "Stages",
    "Sweep",
    "Trajectory",
    "compare",
    "estimate_llc",
    "find_stages",
    "from_linen",
    "from_nnx",
    "hf_dataset",
    "hmc",
    "load_result",
    "load_sweep",
    "load_trajectory",
    "mala",
    "mclmc",
    "next_token_loss",
    "nuts",
    "preconditioned_sgld",
    "run_fleet",
    "sghmc",
    "sgld",
    "sgnht",
    "sweep",
    "token_file",
    "trajectory",
    "two_temperature_estimator",
    "underdamped",
    "variance_estimator",
]
