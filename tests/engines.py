"""Engines put together by hand, for the tests of what runs below ``estimate_llc``."""

import math

from slt_jax.engine.loop import Engine
from slt_jax.engine.plan import Numbers
from slt_jax.engine.problem import Problem
from slt_jax.posterior.data import as_source


def engine_of(posterior, data, sampler, plan, key, mesh):
    problem = Problem(posterior, as_source(data), mesh, plan.batch_size, plan.micro_batches)
    return Engine(problem, sampler, plan, key)


def numbers_of(posterior, sampler, limit=math.inf):
    """What an estimate of this posterior by this sampler moves its chains with."""
    return Numbers(posterior.nbeta, posterior.localization, sampler.step_size, sampler.friction, limit)
