"""Inputs that are drawn inside the compiled program: a data set of any size that takes no memory.

Row i of the inputs is a pure function of i. The data set is the list of row numbers, a batch is some of them; inputs
and noiseless outputs appear on the device, in every step anew. The teacher's end-to-end matrix is a frozen parameter.

It has the law of ``teachers.make_data``, not its bits, and no label noise: noise that keeps the teacher the exact
minimum is projected, and needs all inputs at once.

Displaced, what is sampled are the displacements from w*, as in ``population``: x times the difference of the two
products, which is carried along. So nbeta has no limit but that of the exponents here either, and a minibatch costs
little more than the law of the inputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import slt_jax as slt
from scaling.dln.population import difference
from scaling.dln.teachers import Teacher, end_to_end, output


def inputs(seed: int, rows: jax.Array, width: int) -> jax.Array:
    """Rows ``rows`` of the data set, float32 ``(m, width)``, uniform on [-10, 10]."""
    key = jax.random.key(seed, impl="threefry2x32")
    one = lambda row: jax.random.uniform(jax.random.fold_in(key, row), (width,), minval=-10, maxval=10)  # noqa: E731
    return jax.vmap(one)(rows)


def loss_fn(seed: int, params: dict, rows: jax.Array) -> jax.Array:
    """``teachers.loss_fn`` on those rows: mean over the outputs of (x W_1 ... W_L - x W*)^2, ``(m,)``."""
    x = inputs(seed, rows, params["target"].shape[0])
    return jnp.mean((output(params["weights"], x) - x @ params["target"]) ** 2, axis=-1)


def posterior(teacher: Teacher, num_data: int, nbeta: float | None, localization: float | None) -> slt.LocalPosterior:
    """The local posterior at the teacher over ``num_data`` rows; its data are ``numpy.arange(num_data)``."""
    center = {"weights": list(teacher.weights), "target": end_to_end(teacher.weights).astype(np.float32)}
    return slt.LocalPosterior(
        functools.partial(loss_fn, teacher.seed), center, num_data, nbeta=nbeta, localization=localization,
        mask=lambda path: path[0] == "weights",
    )  # fmt: skip


def displaced_loss_fn(seed: int, params: dict, rows: jax.Array) -> jax.Array:
    """``loss_fn`` at teacher + displacements, ``(m,)``."""
    x = inputs(seed, rows, params["teacher"][0].shape[0])
    return jnp.mean((x @ difference(params["displacements"], params["teacher"])) ** 2, axis=-1)


def displaced_posterior(
    teacher: Teacher, num_data: int, nbeta: float | None, localization: float
) -> slt.LocalPosterior:
    """``posterior`` in displacements from the teacher, which have no typical weight to take a localization from."""
    center = {"displacements": [np.zeros_like(w) for w in teacher.weights], "teacher": list(teacher.weights)}
    return slt.LocalPosterior(
        functools.partial(displaced_loss_fn, teacher.seed), center, num_data, nbeta=nbeta, localization=localization,
        mask=lambda path: path[0] == "displacements",
    )  # fmt: skip
