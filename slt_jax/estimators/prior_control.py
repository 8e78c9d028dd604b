"""The control of a sweep: the loss at nbeta = 0, where the posterior is a Gaussian that can be drawn exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.engine.problem import Problem
from slt_jax.samplers.base import noise_like

_DRAWS = 32


@jax.jit
def _drawn(center, unit, localization):
    """A draw of the localizing Gaussian."""
    return tuple(c + x / jnp.sqrt(localization) for c, x in zip(center, unit, strict=True))


def prior_control(problem: Problem, localizations: np.ndarray, key: jax.Array, batch_key: jax.Array) -> np.ndarray:
    """Mean of L(w) - L(w*) at nbeta = 0 and its standard error, nats, for each localization: ``(len, 2)``.

    A draw takes one direction and one minibatch to all localizations: L_m(w*) is taken once, and the curve is smooth.

    Args:
        key: of the directions. batch_key: seeds the minibatches.
    """
    center = problem.on_first_device(problem.center)
    random = np.random.default_rng(np.asarray(jax.random.key_data(batch_key)))
    rises = np.empty((_DRAWS, len(localizations)))
    for draw in range(_DRAWS):
        batch = problem.fetch(random.integers(0, problem.source.num_data, problem.batch_size))
        own = problem.on_first_device(problem.put(jax.random.fold_in(key, draw)))
        unit = noise_like(own, center, problem.program.blocks)
        places = (_drawn(center, unit, jnp.float32(localization)) for localization in localizations)
        rises[draw] = np.array([problem.loss_at(away, batch) for away in places]) - problem.loss_at(center, batch)
    return np.stack([rises.mean(0), rises.std(0, ddof=1) / math.sqrt(_DRAWS)], axis=-1)
