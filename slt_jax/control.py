"""The control of a sweep: nbeta = 0, where the posterior is a Gaussian that can be drawn exactly."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.engine import Engine
from slt_jax.samplers.base import gaussian

_DRAWS = 32


@jax.jit
def _drawn(center, localization, key):
    """A draw of the localizing Gaussian alone."""
    return tuple(c + x / jnp.sqrt(localization) for c, x in zip(center, gaussian(key, center), strict=True))


def control_of(engine: Engine, localizations: np.ndarray, key: jax.Array) -> np.ndarray:
    """Mean of L(w) - L(w*) at nbeta = 0 and its standard error, nats, for each localization: ``(len, 2)``."""
    size, center = engine.plan.batch_size, engine.alone(engine.center)
    random = np.random.default_rng(np.asarray(jax.random.key_data(engine.key)))
    found = []
    for g, localization in enumerate(localizations):
        rises = []
        for draw in range(_DRAWS):
            batch = engine.fetch(random.integers(0, engine.source.num_data, size))
            noise = engine.alone(engine.put(jax.random.fold_in(jax.random.fold_in(key, g), draw)))
            away = _drawn(center, jnp.float32(localization), noise)
            rises.append(engine.loss_at(away, batch) - engine.loss_at(center, batch))
        found.append((np.mean(rises), np.std(rises, ddof=1) / math.sqrt(len(rises))))
    return np.array(found)
