"""The contract of a sampler: how one step moves one chain.

A sampler is a pair of pure functions and the numbers they take. It knows no data and no device: the engine hands it a
function of the position that gives the minibatch loss and its gradient. What changes the program is bound when the
sampler is built; what changes only numbers travels in ``hyper`` and is traced, so that a sweep compiles once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Position = tuple[jax.Array, ...]
LossAndGrad = Callable[[Position], tuple[jax.Array, Position]]


class Hyper(NamedTuple):
    """Scalars of the target and of the step; all may be traced."""

    nbeta: jax.Array | float
    localization: jax.Array | float
    step_size: jax.Array | float


class Info(NamedTuple):
    """What a person needs of one step, taken at the position before the move. All scalars, float32.

    ``loss``: L_m(w). ``drift_sq``: |G|^2 with G the gradient of the negative log density. ``virial``: <w - w*, G>.
    """

    loss: jax.Array
    drift_sq: jax.Array
    virial: jax.Array


class Sampler(NamedTuple):
    """``init(position) -> State`` and ``step(key, state, loss_and_grad, center, hyper) -> (State, Info)``.

    ``State`` is a NamedTuple whose first field is ``position``; it holds what the next step needs and nothing else.
    ``name`` and ``step_size`` go into the record of a run.
    """

    name: str
    step_size: float
    init: Callable[[Position], Any]
    step: Callable[[jax.Array, Any, LossAndGrad, Position, Hyper], tuple[Any, Info]]


def drift(grad: Position, position: Position, center: Position, hyper: Hyper) -> Position:
    """G = nbeta grad L_m(w) + localization (w - w*), leaf by leaf."""
    return tuple(hyper.nbeta * g + hyper.localization * (w - c) for g, w, c in zip(grad, position, center, strict=True))


def inner(a: Position, b: Position) -> jax.Array:
    """Sum over all leaves of the products of their entries, in float32 at least."""
    return sum((jnp.sum(x * y) for x, y in zip(a, b, strict=True)), start=jnp.float32(0))


def leaf_keys(key: jax.Array, position: Position) -> list[jax.Array]:
    """One independent key for each leaf."""
    return [jax.random.fold_in(key, i) for i in range(len(position))]
