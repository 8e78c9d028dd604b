"""Measurements at single positions: curvature, gradient noise, acceptance. They cost a few gradients, and move none."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from slt_jax.engine.problem import Problem, added, batch_grad
from slt_jax.kernels.langevin import fold_in_on_host
from slt_jax.posterior.program import LossProgram, can_be_lowered
from slt_jax.samplers.base import Metric, Position, displacement, inner, noise_like, pull_back, root

_ROWS = 16  # of a Hessian, side by side where the model is small
_FEW = 10_000  # weights of such a model
MOST_ROUNDING = 3e-6  # of the largest eigenvalue of a Hessian
BOTH_SIDES = 1.5  # the largest rounded eigenvalue over the most negative one, at most
_SHRINKS = 0.9  # how far the secant's length is off, over what it was a round ago, at most, while it settles
_STEEPEST = 10.0  # half of the degree of a loss, at most
_LENGTHENED = 100.0  # times as long a secant in one round, at most
_TANGENTS = 2.2  # times what a gradient takes, for its derivative along a direction


class Noise(NamedTuple):
    """Trace of the covariance of nbeta grad L_m(w): of the plain gradient, and with control variates at w*.

    In the coordinates of the metric, if there is one.
    """

    plain: float
    controlled: float


def _scalar_type(position: Position) -> Any:
    """Of sums over the weights and of losses: float32, and float64 only where weights are."""
    return jnp.result_type(jnp.float32, *position)


def _grad_over(program: LossProgram, frozen: Any, blocks: Any, position: Position) -> tuple[jax.Array, Position]:
    """Mean loss and its gradient over all blocks, one block at a time."""

    def add(total, block):
        loss_and_grad = jax.value_and_grad(program.mean_loss)(position, frozen, block)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, loss_and_grad), None

    zero = (jnp.zeros((), _scalar_type(position)), jax.tree.map(jnp.zeros_like, position))
    total, _ = jax.lax.scan(add, zero, blocks)
    count = jax.tree.leaves(blocks)[0].shape[0]
    return jax.tree.map(lambda x: x / count, total)


_square = jax.jit(lambda tree: inner(tree, tree))


def _norm(tree: Position) -> jax.Array:
    """Of entries whose squares float32 does not hold, too."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in tree]))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    within = optax.tree.scale(1 / unit, tree)
    return unit * jnp.sqrt(inner(within, within))


def _grad_change(program: LossProgram, frozen: Any, blocks: Any, position: Position, v: Position, reach) -> Position:
    """Mean of grad L(w + reach v) - grad L(w - reach v) over all blocks; one moved position and one sum at a time."""

    def side(total, sign):
        moved = optax.tree.add(position, optax.tree.scale(sign * reach, v))

        def add(total, block):
            grad = jax.grad(program.mean_loss)(moved, frozen, block)
            return tuple(t + (sign * g).astype(t.dtype) for t, g in zip(total, grad, strict=True)), None

        return jax.lax.scan(add, total, blocks)[0], None

    total, _ = jax.lax.scan(side, jax.tree.map(jnp.zeros_like, position), jnp.array([1.0, -1.0], jnp.float32))
    count = jax.tree.leaves(blocks)[0].shape[0]
    return jax.tree.map(lambda x: x / count, total)


@functools.partial(jax.jit, static_argnums=0)
def _sharpness(program: LossProgram, position, frozen, blocks, nbeta, floor, reach, start, iterations):
    """Power iteration on secants of the gradient, as long as one standard deviation of the posterior they find.

    The product with the Hessian is (grad L(w + s v) - grad L(w - s v)) / (2 s): two gradients, no second derivative of
    the model. s settles at 1 / sqrt(curvature), so that where the Hessian vanishes (a quartic) this is the curvature
    that a chain meets. For a loss of degree k, g = log s + log(curvature) / 2 has the slope k / 2 in log s: a Newton
    step by a slope of 2 settles for degrees below 8. Where g changes its sign and hardly shrinks, the slope is that of
    the last two lengths. On ground that is flat in float32 the length grows, up to 1 + |w|.
    """

    def body(_, carry):
        v, s, _, slope, (last_s, last_g) = carry
        unit = s / _norm(v)
        product = optax.tree.scale(nbeta / (2 * s), _grad_change(program, frozen, blocks, position, v, unit))
        curvature = _norm(product)
        good = jnp.isfinite(curvature) & (curvature > 0)
        product = tuple(jnp.where(good, p, x).astype(x.dtype) for p, x in zip(product, v, strict=True))
        g = jnp.log(s) + 0.5 * jnp.log(curvature + floor)
        swings = good & (g * last_g < 0) & (jnp.abs(g) > _SHRINKS * jnp.abs(last_g))
        slope = jnp.where(swings, jnp.clip((g - last_g) / jnp.log(s / last_s), 2.0, _STEEPEST), slope)
        moved = jnp.where(slope > 2, s * jnp.exp(-g / slope), jnp.sqrt(s / jnp.sqrt(curvature + floor)))
        lost = jnp.where(curvature == 0, jnp.minimum(10 * s, jnp.maximum(s, 1e3 * reach)), s / 10)
        new = jnp.where(good, jnp.minimum(moved, _LENGTHENED * s), lost).astype(scalar)
        last = jnp.where(good, s, last_s), jnp.where(good, g, last_g)
        return product, new, jnp.where(good, curvature, 0.0).astype(scalar), slope.astype(scalar), last

    scalar = _scalar_type(position)
    zero, begun = jnp.zeros((), scalar), reach.astype(scalar)
    carry = (start, begun, zero, jnp.full((), 2.0, scalar), (begun, zero))
    return jax.lax.fori_loop(0, iterations, body, carry)[2]


@functools.partial(jax.jit, static_argnums=0)
def _curvature(program: LossProgram, position, direction, frozen, blocks, nbeta, localization, reach):
    """(nbeta Hessian of L + localization) times ``direction``, by a central secant ``reach`` times as long as it."""
    change = _grad_change(program, frozen, blocks, position, direction, reach)
    bent = optax.tree.scale(nbeta / (2 * reach), change)
    return optax.tree.add(bent, optax.tree.scale(localization, direction))


@functools.partial(jax.jit, static_argnums=0)
def hessian_product(program: LossProgram, position, direction, frozen, blocks, nbeta, localization):
    """The same by the derivative of the gradient along ``direction``."""

    def add(total, block):
        _, bent = jax.jvp(lambda w: jax.grad(program.mean_loss)(w, frozen, block), (position,), (direction,))
        return tuple(t + x.astype(t.dtype) for t, x in zip(total, bent, strict=True)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, position), blocks)
    return optax.tree.add(
        optax.tree.scale(nbeta / jax.tree.leaves(blocks)[0].shape[0], total), optax.tree.scale(localization, direction)
    )


@functools.partial(jax.jit, static_argnums=0)
def _dense_hessian(program: LossProgram, position, frozen, blocks, nbeta):
    """The whole Hessian of nbeta L, a row for each entry of the position."""
    flat, unravel = ravel_pytree(position)
    weights = sum(w.size for w in (*position, *frozen))

    def row(unit):
        return ravel_pytree(hessian_product(program, position, unravel(unit), frozen, blocks, nbeta, 0.0))[0]

    return jax.lax.map(row, jnp.eye(flat.size, dtype=flat.dtype), batch_size=_ROWS if weights < _FEW else 1)


def rounding_of(hessian: np.ndarray, eigenvalues: np.ndarray) -> float:
    """How far rounding in float32 may have moved the eigenvalues near 0 of a Hessian that was computed row by row.

    By the norm of the antisymmetric part, which is rounding alone, and the most negative eigenvalue: flat directions
    are rounded to both sides. ``MOST_ROUNDING`` of the largest where that is more, since w* may be a saddle.
    """
    antisymmetric = float(np.linalg.norm((hessian - hessian.T) / 2, 2))
    largest = float(np.abs(eigenvalues).max(initial=0.0))
    negative = -float(eigenvalues.min(initial=0.0))
    return min(MOST_ROUNDING * largest, max(BOTH_SIDES * negative, antisymmetric))


@functools.partial(jax.jit, static_argnums=0)
def noise_squares(program: LossProgram, position, center, frozen, halves, metric, nbeta):
    """Squared norms of g(w) and of g(w) - g(w*), with g the gradient of nbeta L over the first half less that over the
    second. Scaled before it is squared: float32 ends at 1e-38.
    """

    def add(carry, i):
        total, plain = carry
        half = jax.tree.map(lambda x: x[i % 2], halves)
        at = tuple(jnp.where(i < 2, w, c) for w, c in zip(position, center, strict=True))
        sign = jnp.array([1.0, -1.0, -1.0, 1.0], jnp.float32)[i]
        grad = jax.grad(program.mean_loss)(at, frozen, half)
        total = tuple(t + (sign * nbeta * g).astype(t.dtype) for t, g in zip(total, grad, strict=True))
        return (total, jnp.where(i == 1, square(total), plain)), None

    def square(tree):
        turned = pull_back(metric, tree)
        return inner(turned, turned)

    zero = (jax.tree.map(jnp.zeros_like, position), jnp.zeros((), _scalar_type(position)))
    (rest, plain), _ = jax.lax.scan(add, zero, jnp.arange(4))
    return plain, square(rest)


@functools.partial(jax.jit, static_argnums=0)
def acceptance(program: LossProgram, position, center, frozen, blocks, nbeta, localization, step_size, metric, fresh):
    """Metropolis acceptance of one Euler-Maruyama step, which is one leapfrog step from the ``fresh`` momentum."""
    time = jnp.sqrt(step_size)

    def kick(i, carry):  # half a kick before the move, half a kick after it
        w, momentum, losses, distances, squares = carry
        loss, grad = _grad_over(program, frozen, blocks, w)
        away = displacement(w, center)
        force = pull_back(metric, tuple(nbeta * g + localization * x for g, x in zip(grad, away, strict=True)))
        before = inner(momentum, momentum)
        momentum = tuple(p - 0.5 * time * f for p, f in zip(momentum, force, strict=True))
        losses, distances = losses.at[i].set(loss), distances.at[i].set(inner(away, away))
        squares = squares.at[i].set(jnp.where(i == 0, before, inner(momentum, momentum)))
        return optax.tree.add(w, root(metric, optax.tree.scale(time, momentum))), momentum, losses, distances, squares

    pair = jnp.zeros(2, _scalar_type(position))
    start = (position, fresh, pair, pair, pair)
    *_, losses, distances, squares = jax.lax.fori_loop(0, 2, kick, start)
    change = nbeta * (losses[1] - losses[0]) + 0.5 * localization * (distances[1] - distances[0])
    change += 0.5 * (squares[1] - squares[0])
    return jnp.where(jnp.isfinite(change), jnp.exp(jnp.minimum(0.0, -change)), 0.0)


def _temporaries(program: Any, given: tuple) -> int:
    analysis = program.lower(*given).compile().memory_analysis()
    return 0 if analysis is None else analysis.temp_size_in_bytes + analysis.output_size_in_bytes


class Probe:
    """Compiled measurements at positions of one problem; ``gradients`` counts their cost in minibatch gradients.

    On the first device only, where the mesh is one of whole chains of this process. ``center``, ``frozen``: w* there,
    ``blocks``: the fixed set of examples.

    Args:
        problem: whose loss, data and batch size are meant. nbeta: of the posterior.
        blocks: minibatches in the fixed set of examples that curvature and acceptance are taken over.
        key: draws the examples.
    """

    def __init__(self, problem: Problem, nbeta: float, blocks: int, key: jax.Array):
        self.problem, self._nbeta, self._key = problem, nbeta, problem.on_first_device(key)
        self._batch = problem.batch_size
        self._random = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        num = problem.source.num_data
        self.num_blocks = max(1, min(blocks, num // self._batch))
        chosen = self._random.choice(num, self.num_blocks * self._batch, replace=num < self._batch)
        self._chosen = np.sort(chosen).reshape(self.num_blocks, self._batch)
        self.blocks = problem.fetch(self._chosen)
        self.center, self.frozen = problem.on_first_device(problem.center), problem.on_first_device(problem.frozen)
        self.gradients = 0.0

    def _next_key(self) -> jax.Array:
        self._key, out = (fold_in_on_host(self._key, number) for number in (0, 1))  # those of jax.random.split
        return out if self.problem.per_chain.is_fully_addressable else self.problem.put(out)

    def temporaries(self, *, calibrates: bool, metric: bool = False) -> list[int]:
        """Bytes that its measurements take beside their arguments, on one device; compiled here, and not again later.

        Args:
            calibrates: those that a calibration takes; else those at a run's end.
            metric: whether the calibration measures a metric.
        """
        programs = [(noise_squares, self._for_noise(self.center, ()))]
        if calibrates:
            programs.append((_sharpness, self._for_sharpness(self.center, 1, self.center)))
            block = self.problem.fetch(self._chosen[0])
            programs.append((batch_grad, (self.problem.program, self.center, self.frozen, block)))
        else:
            programs.append((acceptance, self._for_acceptance(self.center, 1.0, 1.0, (), self.center)))
        sizes = [_temporaries(program, given) for program, given in programs]
        return [*sizes, int(_TANGENTS * sizes[-1])] if calibrates and metric else sizes

    def sharpness(self, position: Position, iterations: int) -> float:
        """Largest curvature of nbeta L at ``position``, from below, by ``iterations`` rounds; 0 on flat ground."""
        start = noise_like(self._next_key(), position, self.problem.program.blocks)
        largest = _sharpness(*self._for_sharpness(position, iterations, start))
        self.gradients += 2 * iterations * self.num_blocks
        return float(largest)

    def _for_sharpness(self, position: Position, iterations: int, start: Position) -> tuple:
        size = float(np.sqrt(np.asarray(_square(position))))
        numbers = (jnp.float32(x) for x in (self._nbeta, 1e-12, 1e-3 * (1 + size)))
        return self.problem.program, position, self.frozen, self.blocks, *numbers, start, iterations

    def curvature(self, position: Position, direction: Position, reach: float, localization: float) -> Position:
        """(nbeta Hessian + localization) times ``direction``, by a secant ``reach`` times as long; two gradients."""
        self.gradients += 2 * self.num_blocks
        numbers = (jnp.float32(x) for x in (self._nbeta, localization, reach))
        return _curvature(self.problem.program, position, direction, self.frozen, self.blocks, *numbers)

    def hessian(self, position: Position, direction: Position, reach: float, localization: float) -> Position:
        """The same by the second derivative, whose rounding is proportional to the product; by a secant for a loss that
        has none, such as a kernel's with a derivative of its own.
        """
        if not self.has_hessian:
            return self.curvature(position, direction, reach, localization)
        self.gradients += 2 * self.num_blocks
        return hessian_product(*self._for_hessian(position, direction, localization))

    @functools.cached_property
    def has_hessian(self) -> bool:
        """Whether the loss has a second derivative; a kernel's with a derivative of its own may not."""
        return can_be_lowered(hessian_product, *self._for_hessian(self.center, self.center, 0.0))

    def _for_hessian(self, position: Position, direction: Position, localization: float) -> tuple:
        numbers = (jnp.float32(x) for x in (self._nbeta, localization))
        return self.problem.program, position, direction, self.frozen, self.blocks, *numbers

    def curvatures(self, position: Position) -> tuple[np.ndarray, float]:
        """All eigenvalues of the Hessian of nbeta L, ascending, float64, and how far rounding may have moved those near
        0; two gradients for each free weight.

        NaN where the Hessian is not finite.
        """
        hessian = np.asarray(_dense_hessian(*self._for_dense_hessian(position)), np.float64)
        self.gradients += 2 * len(hessian) * self.num_blocks
        if not np.isfinite(hessian).all():
            return np.full(len(hessian), np.nan), math.nan
        eigenvalues = np.linalg.eigvalsh((hessian + hessian.T) / 2)
        return eigenvalues, rounding_of(hessian, eigenvalues)

    def hessian_temporaries(self) -> int:
        """Bytes that ``curvatures`` takes beside its arguments, on one device."""
        return _temporaries(_dense_hessian, self._for_dense_hessian(self.center))

    def _for_dense_hessian(self, position: Position) -> tuple:
        return self.problem.program, position, self.frozen, self.blocks, jnp.float32(self._nbeta)

    def loss_and_grad_norm(self, position: Position) -> tuple[float, float]:
        """Mean loss over the fixed examples, and the norm of its gradient."""
        self.gradients += self.num_blocks
        loss, total = 0.0, None
        for rows in self._chosen:
            batch = self.problem.fetch(rows)
            loss += self.problem.loss_at(position, batch)
            grad = batch_grad(self.problem.program, position, self.frozen, batch)
            total = grad if total is None else added(total, grad)
        return loss / self.num_blocks, math.sqrt(float(_square(total))) / self.num_blocks

    def noise(self, position: Position, repeats: int, metric: Metric = ()) -> tuple[Noise, Noise]:
        """Mean and standard error over ``repeats`` fresh batches, by the difference of a batch's two halves.

        None where a batch is the whole data set.
        """
        if self.problem.takes_all:
            return Noise(0.0, 0.0), Noise(0.0, 0.0)
        half, pairs = max(1, self._batch // 2), []
        for _ in range(repeats):
            pairs.append(noise_squares(*self._for_noise(position, metric)))
            self.gradients += 4 * half / self._batch
        values = half / (2 * self._batch) * np.array([[float(x) for x in pair] for pair in pairs])
        error = values.std(0, ddof=1) / math.sqrt(repeats) if repeats > 1 else np.full(2, np.nan)
        return Noise(*values.mean(0).tolist()), Noise(*error.tolist())

    def _for_noise(self, position: Position, metric: Metric) -> tuple:
        problem, half = self.problem, max(1, self._batch // 2)
        halves = problem.fetch(self._random.integers(0, problem.source.num_data, (2, half)))
        around = (problem.program, position, self.center, self.frozen)
        return *around, halves, problem.on_first_device(metric), jnp.float32(self._nbeta)

    def acceptance(self, position: Position, step_size: float, localization: float, metric: Metric = ()) -> float:
        """Metropolis acceptance of one Euler-Maruyama step of this size from ``position``, on the fixed examples."""
        self.gradients += 2 * self.num_blocks
        momentum = noise_like(self._next_key(), position, self.problem.program.blocks)
        return float(acceptance(*self._for_acceptance(position, step_size, localization, metric, momentum)))

    def _for_acceptance(
        self, position: Position, step_size: float, localization: float, metric: Metric, momentum: Position
    ) -> tuple:
        numbers = (jnp.float32(x) for x in (self._nbeta, localization, step_size))
        around = (self.problem.program, position, self.center, self.frozen, self.blocks)
        return *around, *numbers, self.problem.on_first_device(metric), momentum
