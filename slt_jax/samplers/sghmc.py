"""Stochastic-gradient Hamiltonian Monte Carlo."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Key

from slt_jax._checks import check_positive
from slt_jax.samplers.base import (
    Hyper,
    Info,
    LossAndGrad,
    Position,
    Sampler,
    Theory,
    dimension,
    displacement,
    drift,
    gaussian,
    inner,
)

SGHMC = Theory(
    "sghmc",
    heating=lambda step_size, friction: step_size * (1 / (4 * friction)),
    step_bias=lambda step_size, friction, smooth: step_size * smooth / (8 - 4 * friction),
)


class SGHMCState(NamedTuple):
    position: Position
    momentum: Position


def init(position: Position) -> SGHMCState:
    return SGHMCState(position, tuple(jnp.zeros_like(w) for w in position))


def step(
    key: Key[Array, ""], state: SGHMCState, loss_and_grad: LossAndGrad, center: Position, hyper: Hyper
) -> tuple[SGHMCState, Info]:
    """One SGHMC step: momentum with friction, discretized by Euler.

    Update, with h = sqrt(step_size); h p is the paper's v, step_size its eta, friction its alpha::

        G  = nbeta grad L_m(w) + localization (w - w*)
        p' = (1 - friction) p - h G + sqrt(2 friction) xi,      xi ~ N(0, 1)
        w' = w + h p'

    Target density: exp(-nbeta L_n(w) - (localization/2)|w - w*|^2 - |p|^2 / 2), as friction and step_size go to 0.

    Args:
        key: a ``jax.random.key`` used only for this step's noise.
        state: position and momentum, tuples of arrays.
        loss_and_grad: position -> (L_m(w), grad L_m(w)) on this step's batch.
        center: w*, shaped like the position.
        hyper: nbeta, localization, step_size and friction, scalars; friction below 1.

    Returns:
        The moved state, and Info with ``kinetic`` = (1 - friction / 2) |p|^2 / d, which is 1 as step_size goes to 0.

    Error: on a quadratic of curvature a the position's variance is
    [1 + step_size S / (2 friction)] / [a (1 - step_size a / (4 - 2 friction))], S = nbeta^2 C / B the gradient noise:
    first order in step_size, twice SGLD's as friction goes to 1. BAOAB (``underdamped``) has no such term; this one
    is here because it is the field's reference. Stable for step_size a < 4 - 2 friction.

    Source: Chen, Fox, Guestrin, arXiv:1402.4102, equation 15 with its noise estimate at zero.
    """
    loss, grad = loss_and_grad(state.position)
    force = drift(grad, state.position, center, hyper)
    time, spread = jnp.sqrt(hyper.step_size), jnp.sqrt(2 * hyper.friction)
    momentum = tuple(
        ((1 - hyper.friction) * p - time * f + spread * x).astype(p.dtype)
        for p, f, x in zip(state.momentum, force, gaussian(key, state.position, hyper.blocks), strict=True)
    )
    moved = tuple((w + time * p).astype(w.dtype) for w, p in zip(state.position, momentum, strict=True))
    away = displacement(state.position, center)
    kinetic = (1 - 0.5 * hyper.friction) * inner(state.momentum, state.momentum) / dimension(momentum)
    return SGHMCState(moved, momentum), Info(loss, inner(force, force), inner(away, force), inner(away, away), kinetic)


def sghmc(step_size: float | None = None, friction: float | None = None) -> Sampler:
    """SGHMC; ``step_size`` is the paper's eta (squared units of weight), ``friction`` its alpha, below 1.

    What is left out is chosen by the calibration.
    """
    for name, value in {"step_size": step_size, "friction": friction}.items():
        if value is not None:
            check_positive(name, value, "Leave it out to have it chosen.")
    if friction is not None and friction >= 1:
        raise ValueError(f"friction must be below 1 for SGHMC, got {friction}. 0.01 to 0.1 are common values.")
    step_size = None if step_size is None else float(step_size)
    return Sampler("sghmc", step_size, init, step, None if friction is None else float(friction), SGHMC, entrywise=True)
