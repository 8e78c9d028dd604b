"""Underdamped Langevin dynamics (BAOAB), one gradient a step."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from slt_jax._checks import check_positive, shown
from slt_jax.diagnostics.bias import no_step_bias, underdamped_heating
from slt_jax.diagnostics.relaxation import underdamped_relaxation
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
    pull_back,
    root,
)

MEMORY = 0.01  # a step's part in the mean squared force: a hundred steps, some oscillations of the stiffest direction
BAOAB = Theory(
    "baoab", heating=underdamped_heating, step_bias=no_step_bias, second_order=True, relaxation=underdamped_relaxation,
    can_shorten_steps=True,
)  # fmt: skip


class UnderdampedState(NamedTuple):
    """``force_sq``: running mean of G'PG over the last 1 / MEMORY steps."""

    position: Position
    momentum: Position
    force_sq: jax.Array


def init(position: Position) -> UnderdampedState:
    return UnderdampedState(position, tuple(jnp.zeros_like(w) for w in position), jnp.float32(0))


def step(
    key: Key[Array, ""], state: UnderdampedState, loss_and_grad: LossAndGrad, center: Position, hyper: Hyper
) -> tuple[UnderdampedState, Info]:
    """One BAOAB step of underdamped Langevin dynamics; the two half kicks between drifts are one.

    Update, with R a root of the metric, R R' = P, 1 without one::

        G  = nbeta grad L_m(w) + localization (w - w*)
        t  = min(1, sqrt(limit / s)),      h = t sqrt(step_size),      f = t friction
        s' = s + MEMORY (G'PG - s)
        q  = p - h R' G
        p' = e^-f q + sqrt(1 - e^(-2 f)) xi,      xi ~ N(0, 1)
        w' = w + (h / 2) R (q + p')

    In equilibrium the mean of G'PG is the trace of the curvature, so that steps shorten where the curvature exceeds the
    limit. The dynamics in time is untouched: a mean over it weights each position by t, ``Info.time``. Without a
    limit t is 1.

    Target density: exp(-nbeta L_n(w) - (localization/2)|w - w*|^2 - |p|^2 / 2), as step_size goes to 0: p is the
    momentum in the coordinates R^-1 w, in which the mass is 1. R is constant, so it changes no stationary law.

    Args:
        key: a ``jax.random.key`` used only for this step's noise.
        state: position and momentum, tuples of arrays. The momentum is BAOAB's in the middle of its drift.
        loss_and_grad: position -> (L_m(w), grad L_m(w)) on this step's batch.
        center: w*, shaped like the position.
        hyper: nbeta, localization, step_size and friction, scalars, and the metric.

    Returns:
        The moved state, and Info with G'PG and the thermometer: ``kinetic`` = (m |q|^2 + (1 - m) |p|^2) / d, where
        m = (1 + 3 c) / (4 (1 + c)) and c = e^-f, as in ``part_of_kicked``.

    Error: no bias on a quadratic; second order in h elsewhere. Gradient noise of covariance S = nbeta^2 C / B heats
    a mode of curvature a by (step_size S / 4) coth(friction / 2) / (1 - step_size a / 4), and ``kinetic`` - 1 is just
    that; with a metric, a and S are those of its coordinates. Shortened steps are heated t times less. Stable for
    step_size a < 4.

    Source: Leimkuhler and Matthews, J. Chem. Phys. 138 (2013) 174102. Steps whose length follows the force, with
    averages weighted by time: Leimkuhler, Lohmann and Whalley, arXiv:2504.18911.
    """
    loss, grad = loss_and_grad(state.position)
    force = drift(grad, state.position, center, hyper)
    turned = pull_back(hyper.metric, force)
    share = jnp.sqrt(jnp.minimum(1.0, hyper.limit / state.force_sq))  # of steps past: the kick need not wait for a sum
    time, friction = share * jnp.sqrt(hyper.step_size), share * hyper.friction
    keep = jnp.exp(-friction)
    spread = jnp.sqrt(-jnp.expm1(-2 * friction))
    kicked = tuple((p - time * f).astype(p.dtype) for p, f in zip(state.momentum, turned, strict=True))
    noise = gaussian(key, state.position, hyper.blocks)
    momentum = tuple((keep * q + spread * x).astype(q.dtype) for q, x in zip(kicked, noise, strict=True))
    drifted = root(hyper.metric, tuple(q + p for q, p in zip(kicked, momentum, strict=True)))
    moved = tuple((w + 0.5 * time * x).astype(w.dtype) for w, x in zip(state.position, drifted, strict=True))
    away = displacement(state.position, center)
    part = part_of_kicked(keep)
    hot = part * inner(kicked, kicked) + (1 - part) * inner(state.momentum, state.momentum)
    drift_sq = inner(turned, turned)
    force_sq = (state.force_sq + MEMORY * (drift_sq - state.force_sq)).astype(jnp.float32)
    info = Info(loss, drift_sq, inner(away, force), inner(away, away), hot / dimension(kicked), time=share)
    return UnderdampedState(moved, momentum, force_sq), info


def underdamped(step_size: float | None = None, friction: float | None = None, *, metric: str | None = None) -> Sampler:
    """Underdamped Langevin dynamics by the BAOAB splitting.

    Args:
        step_size: the square of the time step, in squared units of weight: a tenth of 1 / (largest curvature) is safe.
        friction: share of the momentum lost in one step; 0.1 mixes fast, 1 is close to SGLD. Low friction with noisy
            gradients heats the chain.
        metric: ``"kronecker"`` moves in coordinates in which the posterior is nearly round, see
            ``slt_jax.samplers.kronecker``; the calibration measures them, and ``step_size`` is then in their
            units. None: the weights' own coordinates.

    What is left out is chosen by the calibration.
    """
    if metric is not None and (not isinstance(metric, str) or metric != "kronecker"):
        raise ValueError(f"metric must be 'kronecker' or None, got {shown(metric)}. None moves every weight alike.")
    if metric and step_size is not None:
        raise ValueError(
            f"a metric is measured together with its step size, got step_size = {step_size}. Leave step_size out."
        )
    for name, value in {"step_size": step_size, "friction": friction}.items():
        if value is not None:
            check_positive(name, value, "Leave it out to have it chosen.")
    step_size = None if step_size is None else float(step_size)
    friction = None if friction is None else float(friction)
    name = f"underdamped-{metric}" if metric else "underdamped"
    theory = replace(BAOAB, relaxation=None, can_shorten_steps=False) if metric else BAOAB
    return Sampler(name, step_size, init, step, friction, theory, metric=metric is not None, entrywise=metric is None)
