"""A Kronecker-factored preconditioner: what turns a posterior whose curvatures span decades into a round one.

The gradient of a weight matrix is a sum over examples of outer products, so that a layer's Hessian is close to a
Kronecker product A (x) B of a matrix for each side (exactly, for one layer of a deep linear network). In the eigenbases
U of A and V of B it is close to diagonal, and with t_ij the curvature of nbeta L + (localization / 2)|w - w*|^2 there,

    P^(1/2) X = U ((U' X V) / sqrt(t)) V'

makes P^(1/2) H P^(1/2) close to the identity within each layer. What is left comes from the layers' couplings, a factor
of the order of the depth, whatever the condition number was.

Measured from Hessian-vector products alone, by secants of the gradient: no access to activations, any loss. With probes
u ~ N(0, 1), U and V are the eigenvectors of the sums of (Hu)(Hu)' and (Hu)'(Hu); t_ij is the root mean square of
(U' H u V)_ij over other probes. The two sets must differ: a direction that the first happened to miss has no part in
*its* products, by construction of U and V, and would be taken for flat.

Sources: Martens and Grosse, arXiv:1503.05671 (Kronecker factors); George et al., arXiv:1806.03884 (diagonal in their
eigenbasis).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.samplers.base import Factor, Metric, Position, gaussian, inner, root

LARGEST_SIDE = 2048  # a longer side keeps its own basis: eigenvectors cost its cube, and its square in memory
_PRIOR = 2.0  # probes' worth of the product form, against the noise of few probes
Curvature = Callable[[Position, Position, float], Position]  # (at, direction, length of the secant) -> H direction


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A leaf as a matrix: all axes but the last one together, and the last. A vector is one column."""
    if len(shape) < 2:
        return int(np.prod(shape, dtype=int)), 1
    return int(np.prod(shape[:-1])), shape[-1]


def factor_of(first: np.ndarray, second: np.ndarray, least: float) -> Factor:
    """The Factor of one leaf from products H u, ``(probes, rows, columns)``: bases from one set, scales from the other.

    The mean squares are drawn towards their own product form (row sums times column sums), which is what few probes can
    tell. No curvature is taken to be below ``least``.
    """
    left = _eigenvectors(np.einsum("kij,klj->il", first, first)) if first.shape[2] > 1 else None
    right = _eigenvectors(np.einsum("kij,kil->jl", first, first)) if first.shape[2] > 1 else None
    turned = second if left is None else np.einsum("ai,kaj->kij", left, second)
    turned = turned if right is None else np.einsum("kij,jb->kib", turned, right)
    square = np.mean(turned**2, axis=0)
    total = square.sum()
    product = np.outer(square.sum(1), square.sum(0)) / total if total > 0 else square
    square = (len(second) * square + _PRIOR * product) / (len(second) + _PRIOR)
    scale = 1 / np.sqrt(np.maximum(np.sqrt(square), least))
    put = lambda x: None if x is None else jnp.asarray(x, jnp.float32)  # noqa: E731
    return Factor(put(left), put(right), put(scale))


def _eigenvectors(gram: np.ndarray) -> np.ndarray | None:
    return np.linalg.eigh(gram)[1] if 1 < len(gram) <= LARGEST_SIDE else None


def products(
    curvature: Curvature, positions: list[Position], count: int, reach: float, key: jax.Array
) -> list[np.ndarray]:
    """H u at each position for ``count`` probes u ~ N(0, 1), a leaf at a time: ``(probes, rows, columns)``, float64.

    ``reach``: length of the secant for a unit of u.
    """
    found = []
    for i, position in enumerate(positions):
        for k in range(count):
            probe = gaussian(jax.random.fold_in(key, i * count + k), position)
            found.append(curvature(position, probe, reach))
    leaves = range(len(positions[0]))
    shapes = [matrix_shape(w.shape) for w in positions[0]]
    return [np.stack([np.asarray(p[j], np.float64).reshape(shapes[j]) for p in found]) for j in leaves]


def measure(
    curvature: Curvature, positions: list[Position], count: int, reach: float, least: float, key: jax.Array
) -> Metric | None:
    """The Metric at these positions, from 2 ``count`` probes at each; None when a product is not finite."""
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    first, second = (products(curvature, positions, count, reach, k) for k in keys)
    if not all(np.isfinite(x).all() for x in (*first, *second)):
        return None
    return tuple(factor_of(a, b, least) for a, b in zip(first, second, strict=True))


def largest(curvature: Curvature, metric: Metric, position: Position, iterations: int, key: jax.Array) -> float:
    """The largest curvature in the metric's coordinates, by power iteration on secants one standard deviation long."""
    vector, found = gaussian(key, position), 1.0
    for _ in range(iterations):
        size = jnp.sqrt(inner(vector, vector))
        unit = root(metric, tuple(x / size for x in vector))
        vector = root(metric, curvature(position, unit, 1 / np.sqrt(max(found, 1.0))))
        found = float(jnp.sqrt(inner(vector, vector)))
        if not np.isfinite(found):
            return found
    return found
