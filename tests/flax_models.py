"""Flax models that tests of several packages use."""

import jax.numpy as jnp
from flax import nnx


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def through(model, batch):
    return jnp.mean(model(batch) ** 2, axis=-1)
