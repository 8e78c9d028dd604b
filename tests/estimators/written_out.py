"""Eleven models with their Gauss-Newton matrices and Hessians written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree

import slt_jax as slt
from slt_jax.models import Decoder, DecoderConfig, sequence_loss
from slt_jax.posterior.outputs import parts_of

ROWS, NBETA, GAMMA = 24, 200.0, 0.5


INPUTS = np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32)


LABELS = np.random.default_rng(1).integers(0, 3, ROWS)


TOKENS = np.random.default_rng(2).integers(0, 7, (ROWS, 5))


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.gelu(nn.Dense(7)(x)))


def cross_entropy(forward, batch):
    return optax.softmax_cross_entropy_with_integer_labels(forward(batch[0]), batch[1])


def half_square(z, batch):
    return 0.5 * jnp.sum((z - batch[0][:, : z.shape[1]]) ** 2, axis=-1)


def normal(*shape, seed=3):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) / np.sqrt(shape[0])


def of_outputs(outputs, loss, weights, data=(INPUTS, LABELS)):
    return weights, slt.loss_of_outputs(outputs, loss), data


def decoder(**more):
    config = DecoderConfig(7, 5, 4, 1, 2, mlp_width=6, tied_head=False, **more)
    model = Decoder(config, rngs=nnx.Rngs(0))
    params, loss_fn = slt.from_nnx(model, sequence_loss)
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [x + 0.5 * normal(*x.shape) for x in leaves]), loss_fn, TOKENS


def recurrent(w, batch):
    def step(state, x):
        return jnp.tanh(state @ w["state"] + x[:, None] * w["input"]), None

    state, _ = jax.lax.scan(step, jnp.zeros((len(batch[0]), 5), w["input"].dtype), batch[0].T)
    return state @ w["out"]


def two_heads(w, batch):
    hidden = jnp.tanh(batch[0] @ w["hidden"])
    return {"mean": hidden @ w["mean"], "log_precision": hidden @ w["precision"]}


def gaussian(z, batch):
    """Of a normal distribution, which is not convex in mean and log precision together."""
    off = batch[0][:, 0] - z["mean"]
    return 0.5 * (jnp.exp(z["log_precision"]) * off**2 - z["log_precision"])


def linear_layers(w, batch):
    return functools.reduce(jnp.matmul, w, batch[0])


def poisson(z, batch):
    return jnp.exp(z[:, 0]) - batch[1] * z[:, 0]


def linen():
    module = Dense()
    variables = module.init(jax.random.key(0), INPUTS)
    return *slt.from_linen(module, variables, cross_entropy), (INPUTS, LABELS)


MODELS = {
    "least squares": lambda: of_outputs(lambda w, b: (b[0] * np.logspace(0, -2, 6)) @ w, half_square, normal(6, 2)),
    "softmax regression": lambda: of_outputs(
        lambda w, b: b[0] @ w, lambda z, b: cross_entropy(lambda _: z, b), normal(6, 3)
    ),
    "Poisson regression": lambda: of_outputs(lambda w, b: b[0] @ w, poisson, normal(6, 1)),
    "MLP": lambda: (*slt.from_nnx(MLP(nnx.Rngs(0)), cross_entropy), (INPUTS, LABELS)),
    "MLP of Linen": linen,
    "autoencoder": lambda: of_outputs(
        lambda w, b: jnp.tanh(b[0] @ w["in"]) @ w["out"], half_square, {"in": normal(6, 4), "out": normal(4, 6)}
    ),
    "deep linear": lambda: of_outputs(linear_layers, half_square, [normal(6, 5), normal(5, 4), normal(4, 6)]),
    "recurrent": lambda: of_outputs(
        recurrent, half_square, {"state": normal(5, 5), "input": normal(5), "out": normal(5, 3)}
    ),
    "two-headed": lambda: of_outputs(
        two_heads, gaussian, {"hidden": normal(6, 8), "mean": normal(8), "precision": normal(8)}
    ),
    "decoder": decoder,
    "decoder, rotary": lambda: decoder(
        positions="rotary", norm="rms", gated_mlp=True, activation="silu", qkv_bias=False, out_bias=False,
        mlp_bias=False,
    ),
}  # fmt: skip


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64 if np.asarray(x).dtype.kind == "f" else None), tree)


@functools.cache
def case(name):
    """(posterior, data, the Gauss-Newton matrix by its definition, in float64)."""
    weights, loss_fn, data = MODELS[name]()
    posterior = slt.LocalPosterior(loss_fn, weights, ROWS, nbeta=NBETA, localization=GAMMA)
    parts = parts_of(loss_fn)
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(wide(weights))
        rows = wide(data)
        _, of_flat = ravel_pytree(parts.outputs(unravel(flat), rows))

        @jax.jit
        def gauss_newton(w):
            outputs = lambda w: ravel_pytree(parts.outputs(unravel(w), rows))[0]  # noqa: E731
            jacobian, z = jax.jacfwd(outputs)(w), outputs(w)
            return jacobian.T @ jax.hessian(lambda z: jnp.mean(parts.loss(of_flat(z), rows)))(z) @ jacobian

        return posterior, data, np.asarray(gauss_newton(flat))


@functools.cache
def hessian_of(name):
    posterior, data, _ = case(name)
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(wide(posterior.center))
        rows = wide(data)
        return np.asarray(jax.jit(jax.hessian(lambda w: jnp.mean(posterior.loss_fn(unravel(w), rows))))(flat))


def exact(matrix, nbeta=NBETA, localization=GAMMA):
    h = np.linalg.eigvalsh(matrix)
    x = nbeta * h[h > 1e-12 * h.max()]
    return (x / (x + localization)).sum() / 2
