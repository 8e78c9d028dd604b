"""The quadratic posterior at a teacher, exactly: eigenvalues h_i of the Hessian of the divergence at w*, in float64.

    H = mean over inputs and tokens of J' (diag(p) - p p') J,    p the teacher's predictions, J = d logits / d w

The posterior with the loss w -> (w - w*)' H (w - w*) / 2 has, with x_i = nbeta h_i,

    nbeta E[loss] = sum_i x_i / (x_i + localization) / 2,

which depends on the ratio of nbeta to the localization alone, and rises to (rank of H) / 2, the learning coefficient.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.interpolate import CubicSpline

from scaling.transformers import carried
from scaling.transformers.gauge import Config

RATIOS = tuple(10 ** (k / 4) for k in range(-12, 81))  # nbeta / localization, 1e-3 to 1e20
QR_WEIGHTS = 3000  # beyond, the eigenvalues are those of the Gram matrix
_AT_ONCE = 64  # columns of it
_ROWS = 4096  # of the root of H that are in memory together, about


def root_rows(config: Config, teacher: Any, inputs: np.ndarray) -> Iterator[np.ndarray]:
    """Yields blocks of rows of a matrix R, float64 ``(rows, d)``, with R' R = H.

    diag(p) - p p' = C' C with C = diag(p^(1/2)) (I - 1 p'): the rows are C J, a block of inputs at a time.
    """
    wide = inputs.astype(np.float64) if np.issubdtype(inputs.dtype, np.floating) else inputs
    flat, unravel = ravel_pytree(jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), teacher))
    zero = jax.tree.map(jnp.zeros_like, unravel(flat))

    def rows(w: jax.Array, x: jax.Array) -> jax.Array:
        logits = carried.logits(config, unravel(w), zero, x).base
        p = jax.lax.stop_gradient(jax.nn.softmax(logits, axis=-1))
        centered = logits - jnp.sum(p * logits, axis=-1, keepdims=True)
        return (jnp.sqrt(p) * centered).reshape(-1)

    def block(x: jax.Array) -> jax.Array:
        column = lambda direction: jax.jvp(lambda w: rows(w, x), (flat,), (direction,))[1]  # noqa: E731
        directions = jnp.eye(-(-flat.size // _AT_ONCE) * _AT_ONCE, flat.size).reshape(-1, _AT_ONCE, flat.size)
        return jax.lax.map(jax.vmap(column), directions).reshape(directions.shape[0] * _AT_ONCE, -1)[: flat.size].T

    compiled = jax.jit(block)
    outputs = jax.eval_shape(lambda x: rows(flat, x), wide[:1]).shape[0]
    tokens = wide.shape[1] if wide.dtype == np.int32 else 1
    at_once = max(1, _ROWS // outputs)
    for start in range(0, len(wide), at_once):
        yield np.asarray(compiled(wide[start : start + at_once])) / np.sqrt(len(wide) * tokens)


def curvatures(config: Config, teacher: Any, inputs: np.ndarray) -> np.ndarray:
    """The eigenvalues of H, largest first, float64 ``(d,)``.

    Up to ``QR_WEIGHTS`` weights they are squares of singular values of R, which are good to 1e-16 of the largest one;
    beyond, eigenvalues of R' R, which are good to 1e-16 of the largest eigenvalue.
    """
    with jax.enable_x64(True):
        blocks = root_rows(config, teacher, inputs)
        first = next(blocks)
        if first.shape[1] > QR_WEIGHTS:
            gram = first.T @ first
            for block in blocks:
                gram += block.T @ block
            return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)
        triangle = np.linalg.qr(first, mode="r")
        for block in blocks:
            triangle = np.linalg.qr(np.concatenate([triangle, block]), mode="r")
        return np.linalg.svd(triangle, compute_uv=False) ** 2


def quadratic_values(h: np.ndarray, ratios: tuple[float, ...] = RATIOS) -> np.ndarray:
    """sum_i x_i / (x_i + 1) / 2 with x = ratio h, for each ratio of nbeta to the localization."""
    x = np.asarray(ratios)[:, None] * h
    return np.sum(x / (x + 1), axis=1) / 2


def value_at(values: np.ndarray, ratio: float) -> float:
    """Between the ``RATIOS``, by a cubic spline in log ratio: to about 1e-4 of the value."""
    if not RATIOS[0] <= ratio <= RATIOS[-1]:
        raise ValueError(
            f"the ratio of nbeta to localization must be from {RATIOS[0]:g} to {RATIOS[-1]:g}, got {ratio}."
        )
    return float(CubicSpline(np.log(RATIOS), values)(np.log(ratio)))
