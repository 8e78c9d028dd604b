"""The stochastic-gradient Nose-Hoover thermostat."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from slt_jax._checks import check_positive
from slt_jax.diagnostics.bias import underdamped_heating
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
    part_of_kicked,
)

SGNHT = Theory(
    "sgnht", heating=underdamped_heating
)  # most of which the thermostat absorbs: there is no theory of the rest


class SGNHTState(NamedTuple):
    position: Position
    momentum: Position
    excess: jax.Array


def init(position: Position) -> SGNHTState:
    return SGNHTState(position, tuple(jnp.zeros_like(w) for w in position), jnp.float32(0))


def step(
    key: Key[Array, ""], state: SGNHTState, loss_and_grad: LossAndGrad, center: Position, hyper: Hyper
) -> tuple[SGNHTState, Info]:
    """One step of the Nose-Hoover thermostat: a friction that grows while the momentum is too hot.

    Update, with h = sqrt(step_size), friction A, z = A + excess, T(p) = |p|^2 / d, and, of the z that the step begins
    with, c = e^-z and m = (1 + 3 c) / (4 (1 + c)), as in ``part_of_kicked``::

        G      = nbeta grad L_m(w) + localization (w - w*)
        q      = p - h G
        excess = excess + (A^2 / 2) m (T(q) - 1)
        p'     = e^-z q + sqrt(A (1 - e^(-2 z)) / z) xi,      xi ~ N(0, 1)
        excess = excess + (A^2 / 2) (1 - m) (T(p') - 1)
        w'     = w + (h / 2) (q + p')

    So weighted, the heat of q and p' is that of the positions, which is held at 1. With one half in place of m the
    positions of noisy chains end too cold, by 8 % where z is 0.8.

    Target density: exp(-nbeta L_n(w) - (localization/2)|w - w*|^2 - |p|^2 / 2 - d excess^2 / A^2): the thermostat's
    rate A^2 / 2 a step damps its own swings critically. Gradient noise that is the same in all directions and at all
    positions is absorbed into ``excess``.

    Args:
        key: a ``jax.random.key`` used only for this step's noise.
        state: position, momentum, and the friction beyond ``hyper.friction``, a scalar.
        loss_and_grad: position -> (L_m(w), grad L_m(w)) on this step's batch.
        center: w*, shaped like the position.
        hyper: nbeta, localization, step_size and friction, scalars.

    Returns:
        The moved state, and Info with ``kinetic`` = m T(q) + (1 - m) T(p), which the thermostat holds at 1 unless the
        noise by itself heats more.

    Error: second order in h. Noise whose covariance differs between directions, as a network's does, is right only on
    average: noisy directions stay hot and the quiet ones turn cold, while the thermometer reads 1.

    Source: Ding et al. (NeurIPS 2014), integrated by the splitting of Leimkuhler and Shang, arXiv:1505.06889.
    """
    loss, grad = loss_and_grad(state.position)
    force = drift(grad, state.position, center, hyper)
    time, size, rate = jnp.sqrt(hyper.step_size), dimension(state.position), hyper.friction**2 / 2
    kicked = tuple((p - time * f).astype(p.dtype) for p, f in zip(state.momentum, force, strict=True))
    part = part_of_kicked(jnp.exp(-(hyper.friction + state.excess)))
    hot = inner(kicked, kicked) / size
    excess = state.excess + rate * part * (hot - 1)
    friction = hyper.friction + excess
    safe = jnp.where(jnp.abs(friction) < 1e-4, 1e-4, friction)
    spread = jnp.sqrt(hyper.friction * -jnp.expm1(-2 * safe) / safe)
    noise = gaussian(key, state.position, hyper.blocks)
    momentum = tuple((jnp.exp(-friction) * q + spread * x).astype(q.dtype) for q, x in zip(kicked, noise, strict=True))
    excess = (excess + rate * (1 - part) * (inner(momentum, momentum) / size - 1)).astype(state.excess.dtype)
    moved = tuple(
        (w + 0.5 * time * (q + p)).astype(w.dtype) for w, q, p in zip(state.position, kicked, momentum, strict=True)
    )
    away = displacement(state.position, center)
    kinetic = (1 - part) * inner(state.momentum, state.momentum) / size + part * hot
    info = Info(loss, inner(force, force), inner(away, force), inner(away, away), kinetic)
    return SGNHTState(moved, momentum, excess), info


def sgnht(step_size: float | None = None, friction: float | None = None) -> Sampler:
    """The Nose-Hoover thermostat; ``friction`` is the least friction, to which the thermostat adds.

    What is left out is chosen by the calibration.
    """
    for name, value in {"step_size": step_size, "friction": friction}.items():
        if value is not None:
            check_positive(name, value, "Leave it out to have it chosen.")
    step_size = None if step_size is None else float(step_size)
    return Sampler("sgnht", step_size, init, step, None if friction is None else float(friction), SGNHT, entrywise=True)
