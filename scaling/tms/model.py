"""The toy model of superposition, two hidden units and six inputs: its data, its losses, its exact expected loss.

f(x) = ReLU(W'W x + b) with W of shape (2, 6) and b of shape (6,), the loss of an example |x - f(x)|^2. An input has one
coordinate that is not zero: x = s e_i, with i uniform over the six and s uniform on [0, 1]. So output j on input i is
ReLU(a s + b_j) with a = <W_j, W_i>, and the expected loss is a sum of 36 integrals over s:

    L(W, b) = (1/6) sum_i [ C(|W_i|^2, b_i) - 2 S(|W_i|^2, b_i) + 1/3 + sum_{j != i} C(<W_j, W_i>, b_j) ],
    C(a, b) = integral of ReLU(a s + b)^2 ds,    S(a, b) = integral of s ReLU(a s + b) ds,    over [0, 1].

Source: Chen, Lau, Mendel, Wei and Murfet, arXiv:2310.06301, after Elhage et al., arXiv:2209.10652. The coefficients do
not depend on the factor in front of the loss.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HIDDEN, INPUTS = 2, 6
WEIGHTS = HIDDEN * INPUTS + INPUTS


def make_data(count: int, seed: int = 0) -> np.ndarray:
    """``(count, 6)`` inputs, float32."""
    rng = np.random.default_rng(seed)
    data = np.zeros((count, INPUTS), np.float32)
    data[np.arange(count), rng.integers(INPUTS, size=count)] = rng.random(count)
    return data


def outputs(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """f(x) for inputs ``(m, 6)``."""
    return jax.nn.relu((x @ params["W"].T) @ params["W"] + params["b"])


def loss_fn(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """|x - f(x)|^2 of each example, ``(m,)``."""
    return jnp.sum((outputs(params, x) - x) ** 2, axis=-1)


def mean_loss(params: Mapping[str, Any], data: np.ndarray) -> float:
    """L_n, summed in float64."""
    return float(np.mean(np.asarray(loss_fn(params, data), np.float64)))


def own_loss_fn(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """|f(x) - f*(x)|^2, f* the function of ``params["teacher"]``, which must not move; f that of ``params["own"]``.

    Where both are one, the loss is 0: any weights at all are a minimum of it, also those that training will leave.
    """
    return jnp.sum((outputs(params["own"], x) - outputs(params["teacher"], x)) ** 2, axis=-1)


def square_integral(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C(a, b) = (p^3 - q^3) / 3a with p = ReLU(a + b), q = ReLU(b); float64.

    Where both are positive, a = p - q and the quotient is (p^2 + pq + q^2) / 3, which holds at a = 0 too.
    """
    p, q = np.maximum(a + b, 0), np.maximum(b, 0)
    kinked = (p**3 - q**3) / np.where(a == 0, 1, 3 * a)
    return np.where((p > 0) & (q > 0), (p * p + p * q + q * q) / 3, np.where(a == 0, q * q, kinked))


def mean_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """S(a, b) for a >= 0: a (1 - t^3) / 3 + b (1 - t^2) / 2, where the unit opens at s = t; float64."""
    opens = np.clip(-b / np.where(a == 0, 1, a), 0, 1)
    t = np.where(a + b <= 0, 1, np.where(b >= 0, 0, opens))
    return a * (1 - t**3) / 3 + b * (1 - t**2) / 2


def population_loss(w: np.ndarray, b: np.ndarray) -> float:
    """L(W, b), exact."""
    w, b = np.asarray(w, np.float64), np.asarray(b, np.float64)
    gram = w.T @ w
    norms = np.diagonal(gram)
    total = square_integral(gram, np.broadcast_to(b[:, None], gram.shape)).sum()
    return float((total + np.sum(1 / 3 - 2 * mean_product(norms, b))) / INPUTS)


def population_hessian(w: np.ndarray, b: np.ndarray, width: float = 1e-4) -> np.ndarray:
    """Second derivatives of L, ``(18, 18)``, W row by row and then b, by central differences (error about width^2)."""
    at = np.concatenate([np.ravel(w), b]).astype(np.float64)
    value = lambda v: population_loss(v[: HIDDEN * INPUTS].reshape(HIDDEN, INPUTS), v[HIDDEN * INPUTS :])  # noqa: E731
    moves = width * np.eye(WEIGHTS)
    found = np.empty((WEIGHTS, WEIGHTS))
    centre, ahead, behind = value(at), [value(at + m) for m in moves], [value(at - m) for m in moves]
    for i in range(WEIGHTS):
        for j in range(i + 1):
            both = value(at + moves[i] + moves[j]) + value(at - moves[i] - moves[j])
            apart = ahead[i] + behind[i] + ahead[j] + behind[j]
            found[i, j] = found[j, i] = (both - apart + 2 * centre) / (2 * width**2)
    return found
