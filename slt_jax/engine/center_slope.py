"""How often a run looks at the slope at w*: <grad L_m(w*), w - w*>, which says whether w* is a minimum."""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from slt_jax.posterior.data import Source
from slt_jax.posterior.program import LossProgram, can_be_lowered
from slt_jax.samplers.base import Position, Sampler

if TYPE_CHECKING:
    from slt_jax.engine.plan import Schedule

_LEAST_DRAWS = {"gradient": 16, "forward": 100}
_MOST_LOOKS = 256  # of a chain
_STEPS_A_LOOK = 64  # a look forward costs about a gradient
_PASS_SHARE = 0.02  # of one chain's steps, that a pass over the data may cost: no matter how many chains there are


class Looks(NamedTuple):
    """``way``: "gradient", by that over all data; "forward", along w - w*, on the step's batch; "" for no looks.

    ``every``: draws from one look to the next.
    """

    way: str
    every: int = 1


def looks_of(
    plan: "Schedule", sampler: Sampler, program: LossProgram, center: Position, frozen: Any, source: Source
) -> Looks:
    """The gradient at w* over all data where it is there, for control variates, or costs little; else forward.

    There are none where the draws are few, or the loss was written to be differentiated backward alone.
    """
    passes = -(-source.num_data // plan.batch_size)
    way = "gradient" if plan.control_variate or passes <= _PASS_SHARE * plan.total_steps else "forward"
    if plan.num_draws < _LEAST_DRAWS[way]:
        return Looks("")
    if way == "forward":
        row = source.fetch(np.zeros(1, np.int64))
        size = plan.batch_size // plan.micro_batches
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), row)
        leaves, treedef = jax.tree.flatten((center, frozen, batch))
        if not _goes_forward(program, treedef, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)):
            return Looks("")
    rare = -(-_STEPS_A_LOOK // plan.thinning) if way == "forward" else 1
    return Looks(way, min(max(rare, -(-plan.num_draws // _MOST_LOOKS)), plan.num_draws // 4))


@functools.lru_cache(maxsize=16)
def _goes_forward(program: LossProgram, treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> bool:
    """Whether the loss has a forward derivative: a custom one may be written for backward alone."""

    def slope(center, frozen, batch):
        return jax.jvp(lambda w: program.mean_loss(w, frozen, batch), (center,), (center,))

    return can_be_lowered(jax.jit(slope), *jax.tree.unflatten(treedef, leaves))
