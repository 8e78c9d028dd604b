"""The trace of f(H), f(h) = x / (x + localization) with x = nbeta h, from eigenvalues or from Lanczos coefficients.

The derivatives of f alternate in sign, f' > 0 > f''. For a spectrum >= 0 the Gauss quadrature of any order is therefore
an upper bound of v'f(H)v, and Gauss-Radau with a node at 0 a lower one. Negative eigenvalues count 0: f has a pole at
x = -localization, and in such a direction there is no Gaussian posterior.

Source: Golub and Meurant, Matrices, Moments and Quadrature (2010), sections 6 and 7; for the trace, Ubaru, Chen and
Saad, SIAM J. Matrix Anal. Appl. 38 (2017) 1075.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

Vector = Float64[np.ndarray, "_"]
_FEW_NODES = 8
_EXHAUSTED = 100.0  # roundings of the largest coefficient: an off-diagonal one below that ends the Krylov space


class Trace(NamedTuple):
    """Half the trace of f(H), its errors, and the negative part of the spectrum.

    ``probes``: standard error by the random vectors. ``truncation``: by the finite order, half of the distance between
    two bounds if there are such. ``rounding``: by eigenvalues near 0 that rounding has moved, at most.
    ``negative``: how many eigenvalues are negative, beyond rounding (of Lanczos coefficients, how many at least), and
    ``negative_share`` their share of the sum of all absolute values.
    """

    value: float
    probes: float
    truncation: float
    rounding: float
    negative: float
    negative_share: float


class Coefficients(NamedTuple):
    """Of Lanczos' iteration for H from each probe. ``diagonal``: (probe, order). ``beside``: (probe, order), of which
    the last one is the norm of what is left over after the last step. ``dimension``: of H.
    """

    diagonal: Float64[np.ndarray, "probe order"]
    beside: Float64[np.ndarray, "probe order"]
    dimension: int
    epsilon: float


def share_held(x: np.ndarray, localization: float) -> np.ndarray:
    """x / (x + localization), and 0 for a negative x."""
    positive = np.maximum(x, 0.0)
    return positive / (positive + localization)


def from_eigenvalues(eigenvalues: Vector, rounding: float, nbeta: float, localization: float) -> Trace:
    """Of all eigenvalues of H, which rounding may have moved by ``rounding``."""
    moved = (
        share_held(nbeta * (eigenvalues + side * rounding), localization).sum() / 2 for side in (1, -1)
    )  # fmt: skip
    above, below = moved
    negative = eigenvalues < -rounding
    size = np.abs(eigenvalues).sum()
    return Trace(
        value=float(share_held(nbeta * eigenvalues, localization).sum() / 2),
        probes=0.0,
        truncation=0.0,
        rounding=float(above - below) / 2,
        negative=float(negative.sum()),
        negative_share=float(-eigenvalues[negative].sum() / size) if size else 0.0,
    )


def from_lanczos(
    coefficients: Coefficients, rounding: float, nbeta: float, localization: float, *, semidefinite: bool
) -> Trace:
    """Of Lanczos coefficients from probes that are uniform on the sphere.

    The variance of a probe is then that of the spectrum alone: with u uniform on the sphere of radius sqrt(d),
    Var(u'Au) = 2 d / (d + 2) (|A|^2 - tr(A)^2 / d), so that even the error of a single probe is known.

    Args:
        rounding: of eigenvalues near 0.
        semidefinite: whether H has no negative eigenvalues by construction. Otherwise, and where there are some all the
            same, there are no such bounds: the truncation is how much the value changed over the second half of the
            orders. Below order 8, where that says nothing, it is by the bounds of Markov and Stieltjes for an
            increasing function, which are wide.
    """
    d, found = coefficients.dimension, []
    for diagonal, beside in zip(coefficients.diagonal, coefficients.beside, strict=True):
        used = _until_exhausted(diagonal, beside, coefficients.epsilon)
        found.append(_of_probe(*used, rounding, nbeta, localization, semidefinite))
    middle, half, square, negative, below, size = d * np.mean(found, axis=0)
    variance = 2 * d / (d + 2) * max(0.0, square / d - (middle / d) ** 2)
    return Trace(
        value=float(middle / 2),
        probes=float(math.sqrt(variance * d / len(found)) / 2) if d > 1 else 0.0,
        truncation=float(half / 2),
        rounding=0.0,
        negative=float(negative),
        negative_share=float(below / size) if size else 0.0,
    )


def _of_probe(
    diagonal: Vector, beside: Vector, rounding: float, nbeta: float, localization: float, semidefinite: bool
) -> tuple[float, ...]:
    """Of v'f(H)v, |v| = 1: (middle, half width, square of f; count, size of negative eigenvalues, size of all)."""
    nodes, weights = nodes_of(diagonal, beside[:-1])
    held = share_held(nbeta * nodes, localization)
    upper, square = weights @ held, weights @ held**2
    if semidefinite and nodes[0] >= -rounding:
        lower_nodes, lower_weights = nodes_of(*with_node(diagonal, beside, min(0.0, 2 * nodes[0])))
        lower = min(upper, lower_weights @ share_held(nbeta * lower_nodes, localization))
    elif beside[-1] == 0:
        lower = upper
    elif len(nodes) < _FEW_NODES:  # f increases, and below a node lie at least the weights below it
        lower, upper = weights[1:] @ held[:-1], weights @ np.append(held[1:], 1.0)
    else:
        change = max(abs(upper - value) for value in _at_shorter(diagonal, beside, nbeta, localization))
        lower, upper = upper - change, upper + change
    negative = nodes < -rounding
    at_least = weights[negative][:-1].sum()
    sizes = weights * nodes
    middle, half = (upper + lower) / 2, (upper - lower) / 2
    found = middle, half, square, at_least, -sizes[negative].sum(), np.abs(sizes).sum()
    return tuple(float(x) for x in found)


def _at_shorter(diagonal: Vector, beside: Vector, nbeta: float, localization: float) -> Iterator[float]:
    """The Gauss quadratures of the orders from half of the last one on."""
    for order in range(len(diagonal) // 2, len(diagonal)):
        nodes, weights = nodes_of(diagonal[:order], beside[: order - 1])
        yield float(weights @ share_held(nbeta * nodes, localization))


def nodes_of(diagonal: Vector, beside: Vector) -> tuple[Vector, Vector]:
    """(nodes, weights) of the Gauss quadrature of a symmetric tridiagonal matrix, in ascending order."""
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2


def with_node(diagonal: Vector, beside: Vector, at: float) -> tuple[Vector, Vector]:
    """The tridiagonal matrix with one more row that has an eigenvalue at ``at``: Gauss-Radau.

    ``at`` is not above the spectrum of the matrix as it is; where it is in it, that matrix. ``beside`` is as long as
    ``diagonal``.
    """
    last = diagonal[0] - at  # pivots of the factorization of the matrix less ``at``
    for a, b in zip(diagonal[1:], beside[:-1], strict=True):
        last = a - at - b**2 / last
    if last <= 0 or beside[-1] == 0:
        return diagonal, beside[:-1]
    return np.append(diagonal, at + beside[-1] ** 2 / last), beside


def _until_exhausted(diagonal: Vector, beside: Vector, epsilon: float) -> tuple[Vector, Vector]:
    """The coefficients up to the step that ended the Krylov space, where rounding alone is left over."""
    size = np.abs(diagonal[0]) + beside[0]
    for k, value in enumerate(beside):
        size = max(size, np.nan_to_num(np.abs(diagonal[k])))
        if not value > _EXHAUSTED * epsilon * size:
            return diagonal[: k + 1], np.append(beside[:k], 0.0)
    return diagonal, beside
