"""Stochastic-gradient Langevin dynamics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slt_jax.kernels.langevin import normal
from slt_jax.posterior import check_positive
from slt_jax.samplers.base import Hyper, Info, LossAndGrad, Position, Sampler, drift, inner, leaf_keys


class SGLDState(NamedTuple):
    position: Position


def init(position: Position) -> SGLDState:
    return SGLDState(position)


def step(
    key: jax.Array, state: SGLDState, loss_and_grad: LossAndGrad, center: Position, hyper: Hyper
) -> tuple[SGLDState, Info]:
    """One Euler-Maruyama step.

    Update::

        G  = nbeta grad L_m(w) + localization (w - w*)
        w' = w - (step_size / 2) G + sqrt(step_size) xi,      xi ~ N(0, 1)

    Target density: exp(-nbeta L_n(w) - (localization/2)|w - w*|^2), as step_size goes to 0.

    Args:
        key: a ``jax.random.key`` used for this step's noise alone.
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
    position = state.position
    loss, grad = loss_and_grad(position)
    force = drift(grad, position, center, hyper)
    noise_scale = jnp.sqrt(hyper.step_size)
    moved = tuple(
        (w - 0.5 * hyper.step_size * f + noise_scale * normal(k, w.shape, w.dtype)).astype(w.dtype)
        for w, f, k in zip(position, force, leaf_keys(key, position), strict=True)
    )
    displacement = tuple(w - c for w, c in zip(position, center, strict=True))
    return SGLDState(moved), Info(loss, inner(force, force), inner(displacement, force))


def sgld(step_size: Any = 1e-4) -> Sampler:
    """SGLD with a constant ``step_size`` (epsilon of Lau et al.; twice BlackJAX's; devinterp's ``lr``)."""
    check_positive("step_size", step_size, "Try 1e-4, and halve it until the estimate stands still.")
    return Sampler("sgld", float(step_size), init, step)
