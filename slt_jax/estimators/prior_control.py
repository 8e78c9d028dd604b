"""The control of a sweep: nbeta = 0, where the posterior is a Gaussian that can be drawn exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.engine.loop import Engine
from slt_jax.samplers.base import noise_like

_DRAWS = 32


@jax.jit
def _drawn(center, unit, localization):
    """A draw of the localizing Gaussian alone."""
    return tuple(c + x / jnp.sqrt(localization) for c, x in zip(center, unit, strict=True))


def control_of(engine: Engine, localizations: np.ndarray, key: jax.Array) -> np.ndarray:
    """Mean of L(w) - L(w*) at nbeta = 0 and its standard error, nats, for each localization: ``(len, 2)``.

    A draw takes one direction and one minibatch to all localizations: L_m(w*) is taken once, and the curve is smooth.
    """
    size, center = engine.plan.batch_size, engine.alone(engine.center)
    random = np.random.default_rng(np.asarray(jax.random.key_data(engine.key)))
    rises = np.empty((_DRAWS, len(localizations)))
    for draw in range(_DRAWS):
        batch = engine.fetch(random.integers(0, engine.source.num_data, size))
        unit = noise_like(engine.alone(engine.put(jax.random.fold_in(key, draw))), center)
        places = (_drawn(center, unit, jnp.float32(localization)) for localization in localizations)
        rises[draw] = np.array([engine.loss_at(away, batch) for away in places]) - engine.loss_at(center, batch)
    return np.stack([rises.mean(0), rises.std(0, ddof=1) / math.sqrt(_DRAWS)], axis=-1)
