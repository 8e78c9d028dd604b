"""Looks at single positions: curvature, gradient noise, acceptance. Each costs a few gradients and moves no chain."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.posterior import LossProgram
from slt_jax.samplers.base import Position, displacement, gaussian, inner, root


class Noise(NamedTuple):
    """Trace of the covariance of nbeta grad L_m(w): of the plain gradient, and with control variates at w*.

    In the coordinates of the engine's metric, if it has one.
    """

    plain: float
    controlled: float


def _grad_over(program: LossProgram, frozen: Any, blocks: Any, position: Position) -> tuple[jax.Array, Position]:
    """Mean loss and its gradient over all blocks, one block at a time."""

    def add(total, block):
        found = jax.value_and_grad(program.mean_loss)(position, frozen, block)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, found), None

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, position))
    total, _ = jax.lax.scan(add, zero, blocks)
    count = jax.tree.leaves(blocks)[0].shape[0]
    return jax.tree.map(lambda x: x / count, total)


def _scaled(factor: jax.Array, tree: Position) -> Position:
    return tuple((factor * x).astype(x.dtype) for x in tree)


def _plus(a: Position, b: Position) -> Position:
    return tuple(x + y for x, y in zip(a, b, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _sharpness(program: LossProgram, position, frozen, blocks, nbeta, floor, reach, key, iterations):
    """Power iteration on secants of the gradient, as long as one standard deviation of the posterior they find.

    The product with the Hessian is (grad L(w + s v) - grad L(w - s v)) / (2 s): two gradients, no second derivative of
    the model. s settles at 1 / sqrt(curvature), so that where the Hessian vanishes (a quartic) this is the curvature
    that a chain meets. The length is averaged with the last one's logarithm: alone, a quartic's would swing for ever.
    """

    def body(_, carry):
        v, s, _ = carry
        v = _scaled(1 / jnp.sqrt(inner(v, v)), v)
        ahead = _grad_over(program, frozen, blocks, _plus(position, _scaled(s, v)))[1]
        behind = _grad_over(program, frozen, blocks, _plus(position, _scaled(-s, v)))[1]
        product = _scaled(nbeta / (2 * s), displacement(ahead, behind))
        found = jnp.sqrt(inner(product, product))
        good = jnp.isfinite(found) & (found > 0)
        product = tuple(jnp.where(good, p, x) for p, x in zip(product, v, strict=True))
        s = jnp.where(good, jnp.sqrt(s / jnp.sqrt(found + floor)), s / 10)
        return product, s, jnp.where(good, found, 0.0)

    start = gaussian(key, position)
    _, _, found = jax.lax.fori_loop(0, iterations, body, (start, reach, jnp.float32(0)))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _grad_blocks(program: LossProgram, position, frozen, blocks):
    return _grad_over(program, frozen, blocks, position)


@functools.partial(jax.jit, static_argnums=0)
def _curvature(program: LossProgram, position, direction, frozen, blocks, nbeta, localization, reach):
    """(nbeta Hessian of L + localization) times ``direction``, by a central secant ``reach`` times as long as it."""
    ahead = _grad_over(program, frozen, blocks, _plus(position, _scaled(reach, direction)))[1]
    behind = _grad_over(program, frozen, blocks, _plus(position, _scaled(-reach, direction)))[1]
    bent = _scaled(nbeta / (2 * reach), displacement(ahead, behind))
    return _plus(bent, _scaled(localization, direction))


@functools.partial(jax.jit, static_argnums=0)
def _noise(program: LossProgram, position, center, frozen, first, second, metric):
    def difference(at):
        grads = [jax.grad(program.mean_loss)(at, frozen, half) for half in (first, second)]
        return root(metric, displacement(*grads))

    here, there = difference(position), difference(center)
    rest = displacement(here, there)
    return inner(here, here), inner(rest, rest)


@functools.partial(jax.jit, static_argnums=0)
def _acceptance(program: LossProgram, position, center, frozen, blocks, nbeta, localization, step_size, metric, key):
    """Metropolis acceptance of one Euler-Maruyama step, which is one leapfrog step from a fresh momentum."""

    def energy(w):
        loss, grad = _grad_over(program, frozen, blocks, w)
        away = displacement(w, center)
        force = root(metric, tuple(nbeta * g + localization * x for g, x in zip(grad, away, strict=True)))
        return loss, inner(away, away), force

    time = jnp.sqrt(step_size)
    momentum = gaussian(key, position)
    loss, distance, force = energy(position)
    half = tuple(p - 0.5 * time * f for p, f in zip(momentum, force, strict=True))
    loss2, distance2, force2 = energy(_plus(position, root(metric, _scaled(time, half))))
    last = tuple(p - 0.5 * time * f for p, f in zip(half, force2, strict=True))
    change = nbeta * (loss2 - loss) + 0.5 * localization * (distance2 - distance)
    change += 0.5 * (inner(last, last) - inner(momentum, momentum))
    return jnp.where(jnp.isfinite(change), jnp.exp(jnp.minimum(0.0, -change)), 0.0)


class Probe:
    """Compiled looks at positions of one engine's posterior; ``gradients`` counts their cost in minibatch gradients.

    Args:
        engine: whose posterior, data and batch size are meant.
        blocks: minibatches in the fixed set of examples that curvature and acceptance are taken over.
        key: draws the examples.
    """

    def __init__(self, engine: Any, blocks: int, key: jax.Array):
        self._engine, self._key = engine, key
        self._batch = engine.plan.batch_size
        self._random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        num = engine.source.num_data
        self.num_blocks = max(1, min(blocks, num // self._batch))
        chosen = self._random.choice(num, self.num_blocks * self._batch, replace=num < self._batch)
        fetched = engine.fetch(np.sort(chosen))
        self._blocks = jax.tree.map(lambda x: x.reshape(self.num_blocks, self._batch, *x.shape[1:]), fetched)
        self.gradients = 0.0

    def _next_key(self) -> jax.Array:
        self._key, out = jax.random.split(self._key)
        return out

    def sharpness(self, position: Position, iterations: int) -> float:
        """Largest curvature of nbeta L at ``position``, from below, by ``iterations`` rounds; 0 on flat ground."""
        engine = self._engine
        nbeta = engine.posterior.nbeta
        size = math.sqrt(sum(float(jnp.sum(w * w)) for w in position))
        found = _sharpness(
            engine.posterior.program, position, engine.frozen, self._blocks, jnp.float32(nbeta), jnp.float32(1e-12),
            jnp.float32(1e-3 * (1 + size)), self._next_key(), iterations,
        )  # fmt: skip
        self.gradients += 2 * iterations * self.num_blocks
        return float(found)

    def curvature(self, position: Position, direction: Position, reach: float) -> Position:
        """(nbeta Hessian + localization) times ``direction``, by a secant ``reach`` times as long; two gradients."""
        engine, posterior = self._engine, self._engine.posterior
        self.gradients += 2 * self.num_blocks
        numbers = (jnp.float32(x) for x in (posterior.nbeta, posterior.localization, reach))
        return _curvature(posterior.program, position, direction, engine.frozen, self._blocks, *numbers)

    def loss_and_grad_norm(self, position: Position) -> tuple[float, float]:
        """Mean loss over the fixed examples, and the norm of its gradient."""
        engine = self._engine
        loss, grad = _grad_blocks(engine.posterior.program, position, engine.frozen, self._blocks)
        self.gradients += self.num_blocks
        return float(loss), float(jnp.sqrt(inner(grad, grad)))

    def noise(self, position: Position, repeats: int) -> tuple[Noise, Noise]:
        """Mean and standard error over ``repeats`` fresh batches, by the difference of a batch's two halves."""
        engine, half = self._engine, max(1, self._batch // 2)
        found = []
        for _ in range(repeats):
            drawn = self._random.integers(0, engine.source.num_data, 2 * half)
            parts = [engine.fetch(part) for part in (drawn[:half], drawn[half:])]
            around = (position, engine.center, engine.frozen)
            found.append(_noise(engine.posterior.program, *around, *parts, engine.metric))
            self.gradients += 4 * half / self._batch
        scale = engine.posterior.nbeta**2 * half / (2 * self._batch)
        values = scale * np.array([[float(x) for x in pair] for pair in found])
        error = values.std(0, ddof=1) / math.sqrt(repeats) if repeats > 1 else np.full(2, np.nan)
        return Noise(*values.mean(0).tolist()), Noise(*error.tolist())

    def acceptance(self, position: Position, step_size: float) -> float:
        """Metropolis acceptance of one Euler-Maruyama step of this size from ``position``, on the fixed examples."""
        engine, posterior = self._engine, self._engine.posterior
        self.gradients += 2 * self.num_blocks
        numbers = (jnp.float32(x) for x in (posterior.nbeta, posterior.localization, step_size))
        return float(
            _acceptance(
                posterior.program, position, engine.center, engine.frozen, self._blocks, *numbers, engine.metric,
                self._next_key(),
            )
        )
