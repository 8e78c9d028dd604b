"""How often a run looks at the slope at w*: <grad L_m(w*), w - w*>, which says whether w* is a minimum."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from slt_jax.batches import Source
from slt_jax.posterior import LossProgram
from slt_jax.samplers.base import Position, Sampler

if TYPE_CHECKING:
    from slt_jax.engine import Schedule

_LEAST_DRAWS = 100
_MOST_LOOKS = 256  # of a chain
_STEPS_A_LOOK = 64  # a look costs about a gradient


def tilt_every(
    plan: "Schedule", sampler: Sampler, program: LossProgram, center: Position, frozen: Any, source: Source
) -> int:
    """Draws from one look to the next; 0 for no looks.

    There are none where the draws are few, or the loss was written to be differentiated backward alone. With control
    variates the gradient at w* is there, and nothing is differentiated.
    """
    if plan.num_draws < _LEAST_DRAWS:
        return 0
    if not plan.control_variate:
        size = source.num_data if sampler.family == "exact" else plan.batch_size // plan.micro_batches
        row = source.fetch(np.zeros(1, np.int64))
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), row)
        leaves, treedef = jax.tree.flatten((center, frozen, batch))
        if not _goes_forward(program, treedef, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)):
            return 0
    every = max(-(-_STEPS_A_LOOK // plan.thinning), -(-plan.num_draws // _MOST_LOOKS))
    return min(every, plan.num_draws // 4)


@functools.lru_cache(maxsize=16)
def _goes_forward(program: LossProgram, treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> bool:
    """Whether the loss has a forward derivative: a custom one may be written for backward alone."""

    def slope(center, frozen, batch):
        return jax.jvp(lambda w: program.mean_loss(w, frozen, batch), (center,), (center,))

    try:
        jax.jit(slope).lower(*jax.tree.unflatten(treedef, leaves))  # a custom derivative is refused no sooner
    except Exception:  # JAX raises several; the run itself says what else is wrong with a loss
        return False
    return True
