"""The loss over the law of the inputs itself: gradients without minibatch noise, at the cost of a small minibatch.

Inputs are uniform on [-10, 10] and independent, so that the mean loss is, exactly,

    L(w) = (100 / 3) |W_1 ... W_L - W*|^2 / H_L.

What is left of the difficulty is the posterior's: depth, curvatures that span decades, degeneracy. What is missing is
the noise of minibatches, which ``--data stored`` and ``--data drawn`` have.

The difference of the two products is never formed by subtracting them, which in float32 leaves nothing of it at a large
nbeta. It is carried along, A B - A* B* = A (B - B*) + (A - A*) B*, from the layers' own differences, which are exact.
And it is carried from the narrowest width m outwards: m / H_0 of the cost of H_0 inputs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import slt_jax as slt
from scaling.dln.teachers import INPUT_VARIANCE, Teacher

Pair = tuple[jax.Array, jax.Array]  # (a product of the teacher's layers, what the network's differs from it)


def _joined(left: Pair, right: Pair) -> Pair:
    """The product of two. ``(a, b)`` times ``(b, c)``."""
    (p, dp), (q, dq) = left, right
    return p @ q, (p + dp) @ dq + dp @ q


def difference(weights: Sequence[jax.Array], layers: Sequence[jax.Array]) -> jax.Array:
    """W_1 ... W_L - W*_1 ... W*_L, ``(H_0, H_L)``, to the relative precision of the type."""
    pairs = [(star, w - star) for w, star in zip(weights, layers, strict=True)]
    widths = [layers[0].shape[0], *(w.shape[1] for w in layers)]
    narrowest = int(np.argmin(widths))
    before, after = pairs[:narrowest], pairs[narrowest:]
    whole = []
    if before:
        left = before[-1]
        for pair in reversed(before[:-1]):
            left = _joined(pair, left)
        whole.append(left)
    if after:
        right = after[0]
        for pair in after[1:]:
            right = _joined(right, pair)
        whole.append(right)
    if len(whole) == 1:
        return whole[0][1]
    (p, dp), (q, dq) = whole
    return (p + dp) @ dq + dp @ q


def loss_fn(weights: Sequence[jax.Array], teachers: Sequence[jax.Array]) -> jax.Array:
    """L(w), ``(m,)``, for each of m teachers: L arrays ``(m, H_{k-1}, H_k)``."""

    def one(layers: Sequence[jax.Array]) -> jax.Array:
        return INPUT_VARIANCE / layers[-1].shape[1] * jnp.sum(difference(weights, layers) ** 2)

    return jax.vmap(one)(teachers)


def posterior_and_data(
    teacher: Teacher, num_data: int, nbeta: float | None, localization: float | None
) -> tuple[slt.LocalPosterior, list[np.ndarray]]:
    """The local posterior at the teacher, and a data set of one example, of which the loss is all of L.

    ``num_data`` sets nbeta where that is not given, and nothing else.
    """
    posterior = slt.LocalPosterior(loss_fn, list(teacher.weights), num_data, nbeta=nbeta, localization=localization)
    return posterior, [w[None] for w in teacher.weights]
