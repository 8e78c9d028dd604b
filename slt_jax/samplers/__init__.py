"""Transition rules, one a file, on the contract in ``base``."""

from slt_jax.samplers.base import Hyper, Info, Sampler
from slt_jax.samplers.sgld import sgld

__all__ = ["Hyper", "Info", "Sampler", "sgld"]
