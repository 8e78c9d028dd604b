"""SGLD with a diagonal preconditioner from optax's running second moments."""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from slt_jax._checks import check_positive, shown
from slt_jax.samplers.base import (
    Hyper,
    Info,
    LossAndGrad,
    Position,
    Sampler,
    dimension,
    displacement,
    drift,
    gaussian,
    inner,
)
from slt_jax.samplers.sgld import EULER

_THEORY = replace(EULER, relaxation=None)  # at a rate P times the curvature, which is not known


class PreconditionedState(NamedTuple):
    position: Position
    moments: optax.OptState


def _step(
    transform: optax.GradientTransformation,
    floor: float,
    key: Key[Array, ""],
    state: PreconditionedState,
    loss_and_grad: LossAndGrad,
    center: Position,
    hyper: Hyper,
) -> tuple[PreconditionedState, Info]:
    """One Euler-Maruyama step with a diagonal preconditioner P, the same in drift and noise.

    Update::

        g  = grad L_m(w),      v = the running mean of g^2, while hyper.adapt; then frozen
        P  = r / (sqrt(v) + floor r),      r = the root of the mean of v over all weights
        G  = nbeta g + localization (w - w*)
        w' = w - (step_size / 2) P G + sqrt(step_size P) xi,      xi ~ N(0, 1)

    Target density: exp(-nbeta L_n(w) - (localization/2)|w - w*|^2), as step_size goes to 0, once P is frozen: a P that
    goes on adapting has another stationary law. P has no unit and is about 1 for a typical weight, so that step_size
    keeps its meaning. The statistics are those of the loss, without the localization.

    Args:
        transform: ``optax.scale_by_rms``, whose running mean of g^2 is read.
        floor: P is at most 1 / floor.
        key, state, loss_and_grad, center, hyper: as for ``sgld``; ``hyper.adapt`` says whether v may change.

    Returns:
        The moved state, and the loss, G'PG, <w - w*, G> and <w - w*, PG> at the position before the move.

    Error: that of SGLD with curvature P a in place of a. Source: Li, Chen, Carlson, Carin, arXiv:1512.07666, without
    the term in the derivative of P, which a frozen P does not have.
    """
    loss, grad = loss_and_grad(state.position)
    _, fresh = transform.update(grad, state.moments)
    moments = jax.tree.map(lambda new, old: jnp.where(hyper.adapt, new, old).astype(old.dtype), fresh, state.moments)
    scale = _preconditioner(moments, floor)
    force = drift(grad, state.position, center, hyper)
    size = hyper.step_size
    moved = tuple(
        (w - 0.5 * size * p * f + jnp.sqrt(size * p) * x).astype(w.dtype)
        for w, p, f, x in zip(state.position, scale, force, gaussian(key, state.position, hyper.blocks), strict=True)
    )
    away = displacement(state.position, center)
    scaled = tuple(p * f for p, f in zip(scale, force, strict=True))
    info = Info(loss, inner(force, scaled), inner(away, force), inner(away, away), pull=inner(away, scaled))
    return PreconditionedState(moved, moments), info


def _preconditioner(moments: optax.OptState, floor: float) -> Position:
    """P for each weight; 1 before anything was gathered. A correction for the mean's start cancels in the ratio."""
    assert isinstance(moments, optax.ScaleByRmsState)
    second = tuple(jax.tree.leaves(moments.nu))
    mean = sum(jnp.sum(v) for v in second) / dimension(second)
    typical = jnp.sqrt(mean)
    none = mean == 0
    return tuple(jnp.where(none, 1.0, typical / jnp.where(none, 1.0, jnp.sqrt(v) + floor * typical)) for v in second)


@functools.cache
def _build(decay: float, floor: float):
    # One function for one setting: the engine compiles anew for a new one.
    transform = optax.scale_by_rms(decay)

    def init(position: Position) -> PreconditionedState:
        return PreconditionedState(position, transform.init(position))

    return init, functools.partial(_step, transform, floor)


def preconditioned_sgld(
    step_size: float | None = None, *, moments: str = "rmsprop", decay: float | None = None, floor: float = 0.1
) -> Sampler:
    """SGLD preconditioned by the gradient's running second moments, frozen halfway through the warm-up.

    Args:
        step_size: epsilon for a weight of typical gradient; without one the calibration chooses.
        moments: ``"rmsprop"`` (decay 0.99) or ``"adam"`` (decay 0.999). Adam's correction for its start cancels in P,
            and its first moment is not used: momentum in the drift without noise of its own has another stationary law.
        decay: of the running mean of squared gradients, below 1.
        floor: least denominator as a share of the typical one; no weight moves 1 / floor times faster than typical.
    """
    if step_size is not None:
        check_positive("step_size", step_size, "Leave it out to have it chosen.")
        step_size = float(step_size)
    if not isinstance(moments, str) or moments not in ("rmsprop", "adam"):
        raise ValueError(f"moments must be 'rmsprop' or 'adam', got {shown(moments)}.")
    decay = {"rmsprop": 0.99, "adam": 0.999}[moments] if decay is None else decay
    check_positive("decay", decay, "It is below 1, e.g. 0.99.")
    if decay >= 1:
        raise ValueError(f"decay must be below 1, got {decay}. 0.99 averages over about 100 steps.")
    check_positive("floor", floor, "It is a share of the typical gradient, e.g. 0.1.")
    init, step = _build(float(decay), float(floor))
    return Sampler(f"preconditioned-sgld-{moments}", step_size, init, step, theory=_THEORY, entrywise=True)
