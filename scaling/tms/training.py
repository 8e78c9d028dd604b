"""Training of many small networks at once by plain SGD, and the way down to the minimum from where it ended."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling.tms.model import HIDDEN, INPUTS, loss_fn
from scaling.tms.polygons import polygon

LEARNING_RATE = 0.1
BATCH_SIZE = 250  # drawn with replacement
DESCENT = 1500  # steps of full gradient descent; the softest curvature, 0.02, is left with exp(-15) of its part
DESCENT_RATE = 0.5  # the largest curvature is 2

Params = dict[str, np.ndarray]


class Start(NamedTuple):
    """Weights before training: the regular k-gon of ``corners`` plus normal noise of these standard deviations."""

    corners: int
    column_noise: float
    bias_noise: float


def make_start(start: Start, key: jax.Array) -> dict[str, jax.Array]:
    """W and b; a k-gon's own biases are 0 here."""
    of_columns, of_biases = jax.random.split(key)
    w = jnp.asarray(polygon(start.corners).w, jnp.float32)
    w = w + start.column_noise * jax.random.normal(of_columns, (HIDDEN, INPUTS), jnp.float32)
    return {"W": w, "b": start.bias_noise * jax.random.normal(of_biases, (INPUTS,), jnp.float32)}


def train(start: Start, seeds: Sequence[int], steps: Sequence[int], data: np.ndarray) -> dict[int, list[Params]]:
    """SGD from one start for each seed; training step -> the networks after it, in the order of ``seeds``.

    A seed's path does not depend on the others, nor on which steps are kept.
    """
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    params, at, found = jax.vmap(functools.partial(make_start, start))(keys), 0, {}
    for step in sorted(steps):
        params, at = _advance(params, keys, at, step, jnp.asarray(data)), step
        found[step] = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), params) for k in range(len(seeds))]
    return found


@jax.jit
def _advance(params: dict, keys: jax.Array, first: int, last: int, data: jax.Array) -> dict:
    """Steps ``first`` + 1 to ``last``."""

    def move(step: jax.Array, params: dict, key: jax.Array) -> dict:
        rows = jax.random.randint(jax.random.fold_in(key, step + 1), (BATCH_SIZE,), 0, len(data))
        slope = jax.grad(_mean_loss)(params, data[rows])
        return jax.tree.map(lambda w, g: w - LEARNING_RATE * g, params, slope)

    together = jax.vmap(move, in_axes=(None, 0, 0))
    return jax.lax.fori_loop(first, last, lambda step, now: together(step, now, keys), params)


def _mean_loss(params: dict, data: jax.Array) -> jax.Array:
    return jnp.mean(loss_fn(params, data))


@jax.jit
def _descend(params: dict, data: jax.Array) -> dict:
    slope = jax.grad(_mean_loss)
    move = lambda _, now: jax.tree.map(lambda w, g: w - DESCENT_RATE * g, now, slope(now, data))  # noqa: E731
    return jax.lax.fori_loop(0, DESCENT, move, params)


def to_minimum(params: Params, data: np.ndarray) -> Params:
    """The minimum of the loss over the whole data set that gradient descent from ``params`` leads to."""
    return jax.tree.map(np.asarray, _descend(jax.tree.map(jnp.asarray, params), jnp.asarray(data)))


def checkpoints(first: int, last: int, count: int) -> list[int]:
    """``count`` steps, about equally spaced in their logarithm."""
    return sorted({round(step) for step in np.geomspace(first, last, count)})
