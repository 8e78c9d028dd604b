"""Underdamped Langevin dynamics (BAOAB), one gradient a step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slt_jax.posterior import check_positive
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


class UnderdampedState(NamedTuple):
    position: Position
    momentum: Position


def init(position: Position) -> UnderdampedState:
    return UnderdampedState(position, tuple(jnp.zeros_like(w) for w in position))


def step(
    key: jax.Array, state: UnderdampedState, loss_and_grad: LossAndGrad, center: Position, hyper: Hyper
) -> tuple[UnderdampedState, Info]:
    """One BAOAB step of underdamped Langevin dynamics; the two half kicks between drifts are one.

    Update, with time step h = sqrt(step_size) and unit mass::

        G  = nbeta grad L_m(w) + localization (w - w*)
        q  = p - h G
        p' = e^-friction q + sqrt(1 - e^(-2 friction)) xi,      xi ~ N(0, 1)
        w' = w + (h / 2) (q + p')

    Target density: exp(-nbeta L_n(w) - (localization/2)|w - w*|^2 - |p|^2 / 2), as step_size goes to 0.

    Args:
        key: a ``jax.random.key`` used for this step's noise alone.
        state: position and momentum, tuples of arrays. The momentum is BAOAB's in the middle of its drift.
        loss_and_grad: position -> (L_m(w), grad L_m(w)) on this step's batch.
        center: w*, shaped like the position.
        hyper: nbeta, localization, step_size and friction, scalars.

    Returns:
        The moved state, and Info with the thermometer: ``kinetic`` = (|p|^2 + |q|^2) / (2 d).

    Error: no bias on a quadratic; second order in h elsewhere. Gradient noise of covariance S = nbeta^2 C / B heats
    a mode of curvature a by (step_size S / 4) coth(friction / 2) / (1 - step_size a / 4), which ``kinetic`` - 1 reads
    to first order. Stable for step_size a < 4.

    Source: Leimkuhler and Matthews, J. Chem. Phys. 138 (2013) 174102.
    """
    loss, grad = loss_and_grad(state.position)
    force = drift(grad, state.position, center, hyper)
    time = jnp.sqrt(hyper.step_size)
    keep = jnp.exp(-hyper.friction)
    spread = jnp.sqrt(-jnp.expm1(-2 * hyper.friction))
    kicked = tuple((p - time * f).astype(p.dtype) for p, f in zip(state.momentum, force, strict=True))
    noise = gaussian(key, state.position)
    momentum = tuple((keep * q + spread * x).astype(q.dtype) for q, x in zip(kicked, noise, strict=True))
    moved = tuple(
        (w + 0.5 * time * (q + p)).astype(w.dtype) for w, q, p in zip(state.position, kicked, momentum, strict=True)
    )
    away = displacement(state.position, center)
    kinetic = (inner(state.momentum, state.momentum) + inner(kicked, kicked)) / (2 * dimension(kicked))
    info = Info(loss, inner(force, force), inner(away, force), inner(away, away), kinetic)
    return UnderdampedState(moved, momentum), info


def underdamped(step_size: float | None = None, friction: float | None = None) -> Sampler:
    """Underdamped Langevin dynamics by the BAOAB splitting, unit mass.

    Args:
        step_size: the square of the time step, in squared units of weight: a tenth of 1 / (largest curvature) is safe.
        friction: share of the momentum lost in one step; 0.1 mixes fast, 1 is close to SGLD. Low friction with noisy
            gradients heats the chain.

    What is left out is chosen by the calibration.
    """
    for name, value in {"step_size": step_size, "friction": friction}.items():
        if value is not None:
            check_positive(name, value, "Leave it out to have it chosen.")
    step_size = None if step_size is None else float(step_size)
    return Sampler("underdamped", step_size, init, step, None if friction is None else float(friction), "baoab")
