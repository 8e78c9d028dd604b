"""A Kronecker-factored preconditioner: what turns a posterior whose curvatures span decades into a round one.

The gradient of a weight matrix is a sum over examples of outer products, so that a layer's Hessian is close to a
Kronecker product A (x) B of a matrix for each side (exactly, for one layer of a deep linear network). In the eigenbases
U of A and V of B it is close to diagonal, and with t_ij the curvature of nbeta L + (localization / 2)|w - w*|^2 there,

    R X = U (X / sqrt(t)) V',      P = R R'

makes R' H R close to the identity within each layer. What is left comes from the layers' couplings, a factor
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

from slt_jax.samplers.base import Factor, Metric, Position, gaussian, inner, pull_back, root

LARGEST_SIDE = 2048  # a longer side keeps its own basis: eigenvectors cost its cube, and its square in memory
_PRIOR = 2.0  # probes' worth of the product form, against the noise of few probes
Curvature = Callable[[Position, Position, float], Position]  # (at, direction, length of the secant) -> H direction


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A leaf as a matrix: all axes but the last one together, and the last. A vector is one column."""
    if len(shape) < 2:
        return int(np.prod(shape, dtype=int)), 1
    return int(np.prod(shape[:-1])), shape[-1]


def measure(
    curvature: Curvature, positions: list[Position], count: int, reach: float, least: float, key: jax.Array
) -> Metric | None:
    """The Metric at these positions; None when a product is not finite.

    Bases from ``count`` probes at each position, scales from as many others. The mean squares are drawn towards their
    own product form (row sums times column sums), which is what few probes can tell. Holds one product at a time.

    Args:
        reach: length of the secant for a unit of the probe. least: no curvature is taken to be below it.
    """
    shapes = [matrix_shape(w.shape) for w in positions[0]]
    grams = [[0.0, 0.0] for _ in shapes]
    for product in _products(curvature, positions, count, reach, jax.random.fold_in(key, 0)):
        for gram, x in zip(grams, product, strict=True):
            gram[0] = gram[0] + x @ x.T if _turns(x.shape, 0) else 0.0
            gram[1] = gram[1] + x.T @ x if _turns(x.shape, 1) else 0.0
        if not all(np.isfinite(x).all() for x in product):
            return None
    bases = [[np.linalg.eigh(g)[1] if np.ndim(g) else None for g in gram] for gram in grams]
    squares = [np.zeros(shape) for shape in shapes]
    for product in _products(curvature, positions, count, reach, jax.random.fold_in(key, 1)):
        for square, (left, right), x in zip(squares, bases, product, strict=True):
            x = x if left is None else left.T @ x
            square += (x if right is None else x @ right) ** 2
    if not all(np.isfinite(square).all() for square in squares):
        return None
    probes = count * len(positions)
    return tuple(_factor(*basis, square / probes, probes, least) for basis, square in zip(bases, squares, strict=True))


def _turns(shape: tuple[int, int], side: int) -> bool:
    """Whether this side of a matrix gets a basis: not that of a vector, nor a very long one."""
    return min(shape) > 1 and shape[side] <= LARGEST_SIDE


def _products(curvature: Curvature, positions: list[Position], count: int, reach: float, key: jax.Array):
    """H u for ``count`` probes u ~ N(0, 1) at each position: a float64 matrix for each leaf."""
    for i, position in enumerate(positions):
        for k in range(count):
            found = curvature(position, gaussian(jax.random.fold_in(key, i * count + k), position), reach)
            yield [np.asarray(x, np.float64).reshape(matrix_shape(x.shape)) for x in found]


def _factor(left, right, square: np.ndarray, probes: int, least: float) -> Factor:
    total = square.sum()
    product = np.outer(square.sum(1), square.sum(0)) / total if total > 0 else square
    square = (probes * square + _PRIOR * product) / (probes + _PRIOR)
    put = lambda x: None if x is None else jnp.asarray(x, jnp.float32)  # noqa: E731
    return Factor(put(left), put(right), put(1 / np.sqrt(np.maximum(np.sqrt(square), least))))


def largest(curvature: Curvature, metric: Metric, position: Position, iterations: int, key: jax.Array) -> float:
    """The largest curvature in the metric's coordinates, by power iteration on secants one standard deviation long."""
    vector, found = gaussian(key, position), 1.0
    for _ in range(iterations):
        size = jnp.sqrt(inner(vector, vector))
        unit = root(metric, tuple(x / size for x in vector))
        vector = pull_back(metric, curvature(position, unit, 1 / np.sqrt(max(found, 1.0))))
        found = float(jnp.sqrt(inner(vector, vector)))
        if not np.isfinite(found):
            return found
    return found
