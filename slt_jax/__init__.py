"""slt-jax: local learning coefficients of neural networks, with error bars."""

from slt_jax.estimators.crosschecks import CrossCheck, two_temperature_estimator, variance_estimator
from slt_jax.estimators.llc import estimate_llc
from slt_jax.estimators.planning import plan
from slt_jax.estimators.spectral import effective_dimension
from slt_jax.estimators.susceptibilities import susceptibilities
from slt_jax.estimators.sweep import sweep
from slt_jax.estimators.trajectory import trajectory
from slt_jax.fleet.run import Fleet, run_fleet
from slt_jax.posterior.control import gaussian_control
from slt_jax.posterior.files import hf_dataset, token_file
from slt_jax.posterior.flax import from_linen, from_nnx, next_token_loss
from slt_jax.posterior.local import LocalPosterior
from slt_jax.posterior.observable import Observable
from slt_jax.posterior.outputs import loss_of_outputs
from slt_jax.posterior.pytorch import from_torch
from slt_jax.report.tokens import token_page
from slt_jax.results.comparison import Comparison, compare
from slt_jax.results.equations_of_state import Generalization, generalization
from slt_jax.results.influences import influence
from slt_jax.results.llc import LLCResult, load_result
from slt_jax.results.loss_covariance import Influence
from slt_jax.results.observed import Observed, from_devinterp
from slt_jax.results.planned import Plan
from slt_jax.results.ranking import Ranking
from slt_jax.results.spectral import EffectiveDimension
from slt_jax.results.stages import Stages, find_stages
from slt_jax.results.susceptibilities import Pattern, Susceptibilities, load_susceptibilities
from slt_jax.results.sweep import Sweep, load_sweep
from slt_jax.results.trajectory import Trajectory, load_trajectory
from slt_jax.samplers.base import Sampler
from slt_jax.samplers.exact import hmc, mala, mclmc, nuts
from slt_jax.samplers.preconditioned import preconditioned_sgld
from slt_jax.samplers.sghmc import sghmc
from slt_jax.samplers.sgld import sgld
from slt_jax.samplers.sgnht import sgnht
from slt_jax.samplers.underdamped import underdamped

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "CrossCheck",
    "EffectiveDimension",
    "Fleet",
    "Generalization",
    "Influence",
    "LLCResult",
    "LocalPosterior",
    "Observable",
    "Observed",
    "Pattern",
    "Plan",
    "Ranking",
    "Sampler",
    "Stages",
    "Susceptibilities",
    "Sweep",
    "Trajectory",
    "compare",
    "effective_dimension",
    "estimate_llc",
    "find_stages",
    "from_devinterp",
    "from_linen",
    "from_nnx",
    "from_torch",
    "gaussian_control",
    "generalization",
    "hf_dataset",
    "hmc",
    "influence",
    "load_result",
    "load_susceptibilities",
    "load_sweep",
    "load_trajectory",
    "loss_of_outputs",
    "mala",
    "mclmc",
    "next_token_loss",
    "nuts",
    "plan",
    "preconditioned_sgld",
    "run_fleet",
    "sghmc",
    "sgld",
    "sgnht",
    "susceptibilities",
    "sweep",
    "token_file",
    "token_page",
    "trajectory",
    "two_temperature_estimator",
    "underdamped",
    "variance_estimator",
]
