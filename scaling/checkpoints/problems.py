"""Trained models and their data: networks on scikit-learn's digits, and checkpoints of language models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import slt_jax as slt

FIT_STEPS, FIT_RATE = 6000, 3e-3


class Problem(NamedTuple):
    """``posterior`` without a localization, unless one was published; ``batch_size``: of a minibatch."""

    posterior: slt.LocalPosterior
    data: Any
    batch_size: int


class MLP(nnx.Module):
    """64-16-10, tanh: 1,210 weights."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(64, 16, rngs=rngs), nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x.reshape(len(x), -1))))


class CNN(nnx.Module):
    """Two convolutions and a dense layer, relu: 1,898 weights."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.dense(x.reshape(len(x), -1))


def loss(model: Callable, batch: Any) -> jax.Array:
    """Cross-entropy of each image, nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1])


def digits(kind: type[nnx.Module], seed: int = 0) -> Problem:
    """A network that Adam, with a falling rate, has trained on all 1,797 digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    data = (jnp.asarray(found.images[..., None] / 16, jnp.float32), jnp.asarray(found.target, jnp.int32))
    params, loss_fn = slt.from_nnx(kind(nnx.Rngs(seed)), loss)
    optimizer = optax.adam(optax.cosine_decay_schedule(FIT_RATE, FIT_STEPS))

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda p: jnp.mean(loss_fn(p, data)))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, FIT_STEPS))((params, optimizer.init(params)))
    n = len(data[1])
    return Problem(slt.LocalPosterior(loss_fn, params, n, chance_loss=float(np.log(10))), data, 256)


def autoencoder(seed: int = 0) -> Problem:
    """Tanh, 16-4-16, on the 16 central pixels of the digits: 148 weights, trained by L-BFGS."""
    from sklearn.datasets import load_digits

    images = load_digits().images[:, 2:6, 2:6].reshape(-1, 16) / 16
    data = jnp.asarray(images, jnp.float32)
    shapes = {"encode": (16, 4), "code": (4,), "decode": (4, 16), "out": (16,)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(seed), 4), strict=True))
    start = {name: jax.random.normal(keys[name], shape) / 4 for name, shape in shapes.items()}

    def loss_fn(w: dict, x: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum((jnp.tanh(x @ w["encode"] + w["code"]) @ w["decode"] + w["out"] - x) ** 2, axis=-1)

    center = minimum(lambda w: jnp.mean(loss_fn(w, data.astype(jnp.asarray(w["out"]).dtype))), start)
    return Problem(slt.LocalPosterior(loss_fn, center, len(data)), data, 256)


def minimum(mean_loss: Callable, start: Any, steps: int = 1000) -> Any:
    """Where L-BFGS, in float64, ends."""
    from jax.flatten_util import ravel_pytree
    from scipy.optimize import minimize

    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda w: np.asarray(w, np.float64), start))
        both = jax.jit(jax.value_and_grad(lambda w: mean_loss(unravel(w))))
        options = {"maxiter": steps, "maxcor": 50, "ftol": 0, "gtol": 1e-9}
        values = lambda w: [np.asarray(x, np.float64) for x in both(w)]  # noqa: E731
        found = minimize(values, np.asarray(flat), jac=True, method="L-BFGS-B", options=options)
        at = unravel(jnp.asarray(found.x))
    return jax.tree.map(lambda w: jnp.asarray(np.asarray(w), jnp.float32), at)


def language(folder: Path, seq_len: int) -> Problem:
    """A checkpoint, and the ids in its folder's ``tokens.npy``; nbeta and localization as published."""
    from slt_jax.cli.language import open_case

    case = open_case(str(folder), tokens=folder / "tokens.npy", seq_len=seq_len)
    return Problem(case.posterior, case.data, 32)
