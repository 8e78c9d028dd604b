"""The control of a sweep: nbeta = 0, where the posterior is a Gaussian that can be drawn exactly."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.engine import Engine
from slt_jax.posterior import LossProgram
from slt_jax.samplers.base import gaussian

_DRAWS = 32


@functools.partial(jax.jit, static_argnums=0)
def _rise(program: LossProgram, center, frozen, batch, localization, key):
    """L_m(w) - L_m(w*) at one draw w of the localizing Gaussian alone."""
    away = gaussian(key, center)
    moved = tuple(c + x / jnp.sqrt(localization) for c, x in zip(center, away, strict=True))
    return program.mean_loss(moved, frozen, batch) - program.mean_loss(center, frozen, batch)


def control_of(engine: Engine, localizations: np.ndarray, key: jax.Array) -> np.ndarray:
    """Mean of L(w) - L(w*) at nbeta = 0 and its standard error, nats, for each localization: ``(len, 2)``."""
    program, size = engine.posterior.program, engine.plan.batch_size
    center, frozen = engine.alone(engine.center), engine.alone(engine.frozen)
    random = np.random.default_rng(np.asarray(jax.random.key_data(engine.key)))
    found = []
    for g, localization in enumerate(localizations):
        rises = []
        for draw in range(_DRAWS):
            batch = engine.fetch(random.integers(0, engine.source.num_data, size))
            noise = engine.alone(engine.put(jax.random.fold_in(jax.random.fold_in(key, g), draw)))
            rises.append(float(_rise(program, center, frozen, batch, jnp.float32(localization), noise)))
        found.append((np.mean(rises), np.std(rises, ddof=1) / math.sqrt(len(rises))))
    return np.array(found)
