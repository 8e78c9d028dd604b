"""Exact full-batch references through BlackJAX: MALA, HMC, NUTS, MCLMC, or any of its algorithms.

Every gradient is one over the whole data set, so there is no minibatch noise; a Metropolis test (all but MCLMC) removes
the bias of the step size too. They say what a posterior's value is, at a price.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from slt_jax._checks import check_count, check_positive
from slt_jax.samplers.base import Hyper, Info, LossAndGrad, Position, Sampler, Theory, displacement, drift, inner

FULL_BATCH = Theory("exact", full_batch=True, has_momentum=False, heating=lambda step_size, friction: 0.0)


class ExactState(NamedTuple):
    position: Position
    inner: Any


def log_density(loss_and_grad: LossAndGrad, center: Position, hyper: Hyper) -> Callable[[Position], jax.Array]:
    """-nbeta L_n(w) - (localization / 2) |w - w*|^2, up to a constant: 0 at w* when the loss there is 0.

    The loss sees weights of the types of ``center``.
    """

    def at(position: Position) -> jax.Array:
        away = displacement(position, center)
        loss = jnp.mean(loss_and_grad(_typed_like(center, position))[0])
        return -hyper.nbeta * loss - 0.5 * hyper.localization * inner(away, away)

    return at


Build = Callable[[Callable, Hyper, Position], Any]


def _typed_like(other: Position, position: Position) -> Position:
    return tuple(w.astype(c.dtype) for w, c in zip(position, other, strict=True))


def _widest(position: Position) -> Position:
    """In JAX's default type, float64 where x64 is on: BlackJAX's own numbers have it, and it mixes none."""
    return tuple(w.astype(jnp.promote_types(w.dtype, jnp.result_type(float))) for w in position)


def _init(build: Build, position: Position, loss_and_grad: LossAndGrad, hyper: Hyper) -> ExactState:
    algorithm = build(log_density(loss_and_grad, position, hyper), hyper, position)
    return ExactState(position, algorithm.init(_widest(position), jax.random.key(0)))


def _step(
    build: Build, key: Key[Array, ""], state: ExactState, loss_and_grad: LossAndGrad, center: Position, hyper: Hyper
) -> tuple[ExactState, Info]:
    """One transition of a BlackJAX algorithm on exp(-nbeta L_n(w) - (localization/2)|w - w*|^2).

    Args:
        build: (log density, hyper, position) -> ``blackjax.SamplingAlgorithm``.
        key, state, loss_and_grad, center, hyper: as for ``sgld``, the loss being that of the whole data set.

    Returns:
        The moved state, and Info at the position before the move with the acceptance of the move.
    """
    losses, grad = loss_and_grad(state.position)
    force = drift(grad, state.position, center, hyper)
    moved, transition = build(log_density(loss_and_grad, center, hyper), hyper, center).step(key, state.inner)
    away = displacement(state.position, center)
    accepted = getattr(transition, "acceptance_rate", jnp.float32(jnp.nan))
    info = Info(losses, inner(force, force), inner(away, force), inner(away, away), jnp.float32(jnp.nan), accepted)
    return ExactState(_typed_like(state.position, moved.position), moved), info


@functools.cache
def _functions(build: Build):
    return functools.partial(_init, build), functools.partial(_step, build)


def _sampler(name: str, step_size: float | None, build: Build) -> Sampler:
    if step_size is not None:
        check_positive("step_size", step_size, "Leave it out to have it chosen.")
        step_size = float(step_size)
    return Sampler(name, step_size, *_functions(build), theory=FULL_BATCH)


@functools.cache
def _mala_build() -> Build:
    import blackjax

    return lambda density, hyper, _: blackjax.mala(density, 0.5 * hyper.step_size)


def mala(step_size: float | None = None) -> Sampler:
    """The Metropolis-adjusted Langevin algorithm: SGLD's step of this ``step_size``, full batch, then a test."""
    return _sampler("mala", step_size, _mala_build())


@functools.cache
def _hmc_build(num_steps: int) -> Build:
    import blackjax

    def build(density, hyper, position):
        ones = jnp.ones(sum(w.size for w in position))
        return blackjax.hmc(density, jnp.sqrt(hyper.step_size), ones, num_steps)

    return build


def hmc(step_size: float | None = None, num_steps: int = 32) -> Sampler:
    """Hamiltonian Monte Carlo; the leapfrog's time step is the root of ``step_size``, ``num_steps`` of them a move."""
    check_count("num_steps", num_steps, 1)
    return _sampler("hmc", step_size, _hmc_build(int(num_steps)))


@functools.cache
def _nuts_build(max_doublings: int) -> Build:
    import blackjax

    def build(density, hyper, position):
        ones = jnp.ones(sum(w.size for w in position))
        return blackjax.nuts(density, jnp.sqrt(hyper.step_size), ones, max_num_doublings=max_doublings)

    return build


def nuts(step_size: float | None = None, max_doublings: int = 8) -> Sampler:
    """The no-U-turn sampler; the leapfrog's time step is the root of ``step_size``."""
    check_count("max_doublings", max_doublings, 1)
    return _sampler("nuts", step_size, _nuts_build(int(max_doublings)))


@functools.cache
def _mclmc_build(decoherence: float) -> Build:
    import blackjax

    def build(density, hyper, position):
        # A direction of unit length: one coordinate moves by about (step / root of d).
        size = math.sqrt(sum(w.size for w in position))
        length = jnp.sqrt(hyper.step_size) * size
        return blackjax.mclmc(density, L=decoherence * length, step_size=length)

    return build


def mclmc(step_size: float | None = None, decoherence: float = 20.0) -> Sampler:
    """Microcanonical Langevin Monte Carlo; no Metropolis test, so a bias of second order in its step stays.

    ``step_size``: the square of what one coordinate moves in a step. ``decoherence``: steps until the direction is
    forgotten.
    """
    check_positive("decoherence", decoherence, "It is a number of steps, e.g. 20.")
    return _sampler("mclmc", step_size, _mclmc_build(float(decoherence)))


def from_blackjax(algorithm: Any) -> Sampler:
    """A Sampler around a ``blackjax.SamplingAlgorithm`` that was built on this posterior's own log density.

    Its positions are tuples of the free weights (``posterior.program.split``); ``posterior.log_density(data)`` gives
    the density. nbeta and localization are inside it, and must be those of the posterior.
    """
    return Sampler("blackjax", math.nan, *_functions(_Fixed(algorithm)), theory=FULL_BATCH)


class _Fixed:
    """A build that gives one finished algorithm, whatever the density."""

    def __init__(self, algorithm: Any):
        self.algorithm = algorithm

    def __call__(self, density, hyper, position):
        return self.algorithm
