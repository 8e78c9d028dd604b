"""The loss over the law of the inputs itself: gradients without minibatch noise, at the cost of a small minibatch.

Inputs are uniform on [-10, 10] and independent, so that the mean loss is, exactly,

    L(w) = (100 / 3) |W_1 ... W_L - W*|^2 / H_L.

What is left of the difficulty is the posterior's: depth, curvatures that span decades, degeneracy. What is missing is
the noise of minibatches, which ``--data stored`` and ``--data drawn`` have.

What is sampled are the displacements V_k = W_k - W_k* themselves, whose posterior is that of the weights: float32 holds
them to seven digits however small they are, where w* + V would round away all that is below 1e-7 of w*. And the
difference of the two products is never formed by subtracting them. It is carried along,
(A* + U)(B* + V) - A* B* = (A* + U) V + U B*, from the narrowest width m outwards: m / H_0 of the cost of H_0 inputs.
So nbeta has no limit but that of the exponents, and a deep network needs a large one: where layers are nearly singular,
a direction counts only if nbeta times its curvature is well above the localization.
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


def difference(displacements: Sequence[jax.Array], layers: Sequence[jax.Array]) -> jax.Array:
    """W_1 ... W_L - W*_1 ... W*_L, ``(H_0, H_L)``, to the relative precision of the type."""
    pairs = list(zip(layers, displacements, strict=True))
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


def loss_fn(displacements: Sequence[jax.Array], teachers: Sequence[jax.Array]) -> jax.Array:
    """L(w* + v), ``(m,)``, for each of m teachers w*: L arrays ``(m, H_{k-1}, H_k)``."""

    def one(layers: Sequence[jax.Array]) -> jax.Array:
        return INPUT_VARIANCE / layers[-1].shape[1] * jnp.sum(difference(displacements, layers) ** 2)

    return jax.vmap(one)(teachers)


def posterior_and_data(
    teacher: Teacher, num_data: int, nbeta: float | None, localization: float | None
) -> tuple[slt.LocalPosterior, list[np.ndarray]]:
    """The local posterior of displacements from the teacher; a data set of one example, of which the loss is all of L.

    ``num_data`` sets nbeta where that is not given, and nothing else.
    """
    center = [np.zeros_like(w) for w in teacher.weights]
    posterior = slt.LocalPosterior(loss_fn, center, num_data, nbeta=nbeta, localization=localization)
    return posterior, [w[None] for w in teacher.weights]
