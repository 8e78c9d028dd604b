"""Transition rules, one a file, on the contract in ``base``."""

from slt_jax.samplers.base import Hyper, Info, Sampler
from slt_jax.samplers.exact import hmc, mala, mclmc, nuts
from slt_jax.samplers.preconditioned import preconditioned_sgld
from slt_jax.samplers.sghmc import sghmc
from slt_jax.samplers.sgld import sgld
from slt_jax.samplers.sgnht import sgnht
from slt_jax.samplers.underdamped import underdamped

__all__ = [
    "Hyper",
    "Info",
    "Sampler",
    "hmc",
    "mala",
    "mclmc",
    "nuts",
    "preconditioned_sgld",
    "sghmc",
    "sgld",
    "sgnht",
    "underdamped",
]
