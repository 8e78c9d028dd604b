"""Stochastic-gradient Langevin dynamics, with Euler-Maruyama or Leimkuhler-Matthews noise."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Key

from slt_jax._checks import check_positive, shown
from slt_jax.diagnostics.bias import euler_step_bias, no_step_bias
from slt_jax.diagnostics.relaxation import overdamped_relaxation
from slt_jax.samplers.base import (
    Hyper,
    Info,
    LossAndGrad,
    Position,
    Sampler,
    Theory,
    displacement,
    drift,
    gaussian,
    inner,
)

EULER = Theory(
    "euler", has_momentum=False, step_share=0.1, step_bias=euler_step_bias, covariance_corrects=True,
    virial_excess=lambda step_size, drift_sq: step_size / 4 * drift_sq, relaxation=overdamped_relaxation,
)  # fmt: skip
MATTHEWS = Theory(
    "matthews", has_momentum=False, step_share=0.5, step_bias=no_step_bias, second_order=True,
    relaxation=overdamped_relaxation,
)  # fmt: skip


class SGLDState(NamedTuple):
    position: Position


class MatthewsState(NamedTuple):
    position: Position
    noise: Position


def init(position: Position) -> SGLDState:
    return SGLDState(position)


def init_matthews(position: Position) -> MatthewsState:
    return MatthewsState(position, tuple(jnp.zeros_like(w) for w in position))


def step(
    key: Key[Array, ""], state: SGLDState, loss_and_grad: LossAndGrad, center: Position, hyper: Hyper
) -> tuple[SGLDState, Info]:
    """One Euler-Maruyama step.

    Update::

        G  = nbeta grad L_m(w) + localization (w - w*)
        w' = w - (step_size / 2) G + sqrt(step_size) xi,      xi ~ N(0, 1)

    Target density: exp(-nbeta L_n(w) - (localization/2)|w - w*|^2), as step_size goes to 0.

    Args:
        key: a ``jax.random.key`` used only for this step's noise.
        state: the chain's position, a tuple of arrays.
        loss_and_grad: position -> (L_m(w), grad L_m(w)) on this step's batch.
        center: w*, shaped like the position.
        hyper: nbeta, localization and step_size (in squared units of weight), scalars.

    Returns:
        The moved state, and the loss, |G|^2 and <w - w*, G> at the position before the move.

    Error: the stationary variance on a quadratic of curvature a = nbeta h + localization is
    [1 + step_size nbeta^2 C / (4 B)] / [a (1 - step_size a / 4)]: first order in step_size and in the gradient noise
    C / B. Stable for step_size a < 4.

    Source: Welling and Teh (ICML 2011); Lau et al., arXiv:2308.12108, section 4.
    """
    noise = gaussian(key, state.position, hyper.blocks)
    moved, info = _move(state.position, noise, loss_and_grad, center, hyper)
    return SGLDState(moved), info


def step_matthews(
    key: Key[Array, ""], state: MatthewsState, loss_and_grad: LossAndGrad, center: Position, hyper: Hyper
) -> tuple[MatthewsState, Info]:
    """One Leimkuhler-Matthews step: SGLD whose noise is the mean of this step's and the next one's.

    Update::

        G  = nbeta grad L_m(w) + localization (w - w*)
        w' = w - (step_size / 2) G + sqrt(step_size) (xi_t + xi_{t+1}) / 2

    Target density: as for ``step``. Args and returns likewise; the state holds xi_t as well.

    Error: none on a quadratic without minibatch noise; second order in step_size elsewhere. Minibatch noise heats it
    as it heats SGLD. Stable for step_size a < 4. Source: Leimkuhler and Matthews, AMRX 2013, 34-56.
    """
    fresh = gaussian(key, state.position, hyper.blocks)
    noise = tuple(0.5 * (old + new) for old, new in zip(state.noise, fresh, strict=True))
    moved, info = _move(state.position, noise, loss_and_grad, center, hyper)
    return MatthewsState(moved, fresh), info


def _move(position, noise, loss_and_grad, center, hyper) -> tuple[Position, Info]:
    loss, grad = loss_and_grad(position)
    force = drift(grad, position, center, hyper)
    scale = jnp.sqrt(hyper.step_size)
    moved = tuple(
        (w - 0.5 * hyper.step_size * f + scale * x).astype(w.dtype)
        for w, f, x in zip(position, force, noise, strict=True)
    )
    away = displacement(position, center)
    return moved, Info(loss, inner(force, force), inner(away, force), inner(away, away))


def sgld(step_size: float | None = None, *, noise: str = "euler-maruyama") -> Sampler:
    """SGLD with a constant ``step_size`` (epsilon of Lau et al.; twice BlackJAX's; devinterp's ``lr``).

    Without a ``step_size`` the calibration chooses one. ``noise="leimkuhler-matthews"`` removes the bias of the step
    size on quadratics at no further gradient, for one more copy of the weights a chain.
    """
    if step_size is not None:
        check_positive("step_size", step_size, "Leave it out to have it chosen, or try 1e-4.")
        step_size = float(step_size)
    if noise == "euler-maruyama":
        return Sampler("sgld", step_size, init, step, theory=EULER, entrywise=True)
    if noise == "leimkuhler-matthews":
        return Sampler("sgld-matthews", step_size, init_matthews, step_matthews, theory=MATTHEWS, entrywise=True)
    raise ValueError(f"noise must be 'euler-maruyama' or 'leimkuhler-matthews', got {shown(noise)}.")
