"""How often a run measures the slope at w*: <grad L_m(w*), w - w*>, which says whether w* is a minimum."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from slt_jax.engine.plan import Schedule
from slt_jax.engine.problem import Problem
from slt_jax.posterior.program import LossProgram, can_be_lowered

_LEAST_DRAWS = {"gradient": 16, "forward": 100}
_MOST_MEASUREMENTS = 256  # of a chain
_STEPS_APART = 64  # a forward derivative costs about a gradient
_PASS_SHARE = 0.02  # of one chain's steps, that a pass over the data may cost: no matter how many chains there are


class SlopeSchedule(NamedTuple):
    """``method``: "gradient", by that over all data; "forward", along w - w*, on the step's batch; "" for never.

    ``every``: draws from one measurement to the next.
    """

    method: str
    every: int = 1


def slope_schedule(plan: Schedule, problem: Problem) -> SlopeSchedule:
    """By the gradient at w* over all data where it is there, for control variates, or costs little; else forward.

    Never where the draws are few, or the loss can be differentiated only backward.
    """
    cheap = problem.passes <= _PASS_SHARE * plan.total_steps
    method = "gradient" if plan.control_variate or cheap else "forward"
    if plan.num_draws < _LEAST_DRAWS[method]:
        return SlopeSchedule("")
    if method == "forward":
        row = problem.source.fetch(np.zeros(1, np.int64))
        size = plan.batch_size // plan.micro_batches
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), row)
        leaves, treedef = jax.tree.flatten((problem.center, problem.frozen, batch))
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
        if not _has_forward_derivative(problem.program, treedef, shapes):
            return SlopeSchedule("")
    apart = -(-_STEPS_APART // plan.thinning) if method == "forward" else 1
    return SlopeSchedule(method, min(max(apart, -(-plan.num_draws // _MOST_MEASUREMENTS)), plan.num_draws // 4))


@functools.lru_cache(maxsize=16)
def _has_forward_derivative(program: LossProgram, treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> bool:
    """Whether the loss has one: a custom derivative may support only backward differentiation."""

    def slope(center, frozen, batch):
        return jax.jvp(lambda w: program.mean_loss(w, frozen, batch), (center,), (center,))

    return can_be_lowered(jax.jit(slope), *jax.tree.unflatten(treedef, leaves))
