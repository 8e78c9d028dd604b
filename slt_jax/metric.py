"""A Kronecker-factored preconditioner: what turns a posterior whose curvatures span decades into a round one.

The gradient of a weight matrix is a sum over examples of outer products, so that a layer's Hessian is close to a
Kronecker product A (x) B of a matrix for each side (exactly, for one layer of a deep linear network). In the eigenbases
U of A and V of B it is close to diagonal, and with t_ij the curvature of nbeta L + (localization / 2)|w - w*|^2 there,

    R X = U (X / sqrt(t)) V',      P = R R'

makes R' H R close to the identity within each layer. What is left comes from the layers' couplings, a factor
of the order of the depth, whatever the condition number was.

Measured from Hessian-vector products alone, by secants of the gradient: no access to activations, any loss. With R so
far (at first 1) and probes z ~ N(0, 1), y = R' H R z are products in its own coordinates. If H there is A (x) B for a
layer, y y' has the mean A^2 tr B^2, and so A is read off, U diag(a) U' becomes (U sqrt a) A (U sqrt a)', and likewise
on the other side. One round does not do: in the weights' own coordinates all layers push along the few stiffest
directions, and what is a millionth of them is lost among the products, of few probes and in float32. Each round
resolves more decades below; that of the weights' own coordinates alone is what made chains of deep networks crawl.

Last, t_ij is multiplied by the root mean square of y_ij over further probes. The two sets must differ: a direction that
the first happened to miss has no part in *its* products, by construction of U and V, and would be taken for flat.

Sources: Martens and Grosse, arXiv:1503.05671 (Kronecker factors); George et al., arXiv:1806.03884 (diagonal in their
eigenbasis).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.samplers.base import Factor, Metric, Position, gaussian, inner, pull_back, root

LARGEST_SIDE = 2048  # a longer side keeps its own basis: eigenvectors cost its cube, and its square in memory
ROUNDS = 3  # from the weights' own coordinates
PROBES = 4  # of a round, at each position
WHITE_REACH = 0.3  # standard deviations: length of a secant in the metric's coordinates
_PRIOR = 2.0  # probes' worth of the product form, against the noise of few probes
_FLOOR = 1e-4  # of the mean square in a round, for directions that its few probes miss
Curvature = Callable[[Position, Position, float], Position]  # (at, direction, length of the secant) -> H direction


class _Sides(NamedTuple):
    """A leaf in the making, in float64: bases (None: the leaf's own) and the curvature t in them."""

    left: np.ndarray | None
    right: np.ndarray | None
    curvature: np.ndarray


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A leaf as a matrix: all axes but the last one together, and the last. A vector is one column."""
    if len(shape) < 2:
        return int(np.prod(shape, dtype=int)), 1
    return int(np.prod(shape[:-1])), shape[-1]


def measure(
    curvature: Curvature,
    positions: list[Position],
    count: int,
    reach: float,
    least: float,
    key: jax.Array,
    begun: Metric = (),
) -> Metric | None:
    """The Metric at these positions; None when a product is not finite.

    Bases in rounds of ``PROBES`` probes at each position, one from the metric ``begun``, ``ROUNDS`` without one; scales
    from ``count`` others. Their mean squares are drawn towards their own product form (row sums times column sums),
    which is what few probes can tell. Holds one product at a time.

    Args:
        reach: length of the secant for a unit of the probe in the weights' own coordinates. least: no curvature is
            taken to be below it.
    """
    metric = begun
    for number in range(1 if begun else ROUNDS):
        products = _products(curvature, metric, positions, PROBES, reach, jax.random.fold_in(key, number))
        metric = _turned(metric, products, PROBES * len(positions), least)
        if metric is None:
            return None
    products = _products(curvature, metric, positions, count, reach, jax.random.fold_in(key, ROUNDS))
    return _scaled(metric, products, count * len(positions), least)


def _products(
    curvature: Curvature, metric: Metric, positions: list[Position], count: int, reach: float, key: jax.Array
) -> Iterator[list[np.ndarray]]:
    """R' H R z for ``count`` probes z ~ N(0, 1) at each position: a float64 matrix for each leaf."""
    for i, position in enumerate(positions):
        for k in range(count):
            probe = root(metric, gaussian(jax.random.fold_in(key, i * count + k), position))
            found = pull_back(metric, curvature(position, probe, WHITE_REACH if metric else reach))
            yield [np.asarray(x, np.float64).reshape(matrix_shape(x.shape)) for x in found]


def _turned(metric: Metric, products: Iterable[list[np.ndarray]], probes: int, least: float) -> Metric | None:
    """The metric after one round; None when a product is not finite."""
    grams: list[list] = []
    for product in products:
        if not all(np.isfinite(x).all() for x in product):
            return None
        grams = grams or [[0.0, 0.0] for _ in product]
        for gram, x in zip(grams, product, strict=True):
            for side, y in enumerate((x, x.T)):
                whole = _turns(x.shape, side)
                gram[side] = gram[side] + (y @ y.T if whole else (y * y).sum(1)) / (probes * y.shape[1])
    shapes = [x.shape for x in product]
    old = [_sides(f) for f in metric] if metric else [_Sides(None, None, np.ones(shape)) for shape in shapes]
    return tuple(_factor(_turn(*pair, probes), least) for pair in zip(old, grams, strict=True))


def _turns(shape: tuple[int, int], side: int) -> bool:
    """Whether this side of a matrix gets a basis: not that of a vector, nor a very long one."""
    return min(shape) > 1 and shape[side] <= LARGEST_SIDE


def _turn(old: _Sides, grams: list[np.ndarray], probes: int) -> _Sides:
    t = old.curvature
    left, a = _side(old.left, t.sum(1), grams[0], probes * t.shape[1])
    right, b = _side(old.right, t.sum(0) / t.sum(), grams[1], probes * t.shape[0])
    mean = grams[0].mean() if grams[0].ndim == 1 else np.trace(grams[0]) / len(t)
    return _Sides(left, right, np.outer(a, b) / np.sqrt(max(mean, np.finfo(float).tiny)))


def _side(
    basis: np.ndarray | None, values: np.ndarray, gram: np.ndarray, seen: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """(basis, values) of Q sqrt(v) sqrt(gram) sqrt(v) Q'. ``seen``: vectors of which ``gram`` is the mean square."""
    if gram.ndim == 1:
        return None, values * np.sqrt(gram)
    floor = _FLOOR * max(1.0, len(gram) / seen) * np.trace(gram) / len(gram)
    squares, own = np.linalg.eigh(gram)
    half = (np.eye(len(gram)) if basis is None else basis) * np.sqrt(values)
    grown = half @ ((own * np.sqrt(np.maximum(squares, 0) + floor)) @ own.T) @ half.T
    values, vectors = np.linalg.eigh(grown)
    return vectors, np.maximum(values, 0)


def _scaled(metric: Metric, products: Iterable[list[np.ndarray]], probes: int, least: float) -> Metric | None:
    """The metric with t_ij times the root mean square of its products; None when one is not finite."""
    squares = [np.zeros(f.scale.shape) for f in metric]
    for product in products:
        squares = [square + x**2 for square, x in zip(squares, product, strict=True)]
    if not all(np.isfinite(square).all() for square in squares):
        return None
    return tuple(_rescaled(f, square / probes, probes, least) for f, square in zip(metric, squares, strict=True))


def _rescaled(factor: Factor, square: np.ndarray, probes: int, least: float) -> Factor:
    total = square.sum()
    product = np.outer(square.sum(1), square.sum(0)) / total if total > 0 else square
    square = (probes * square + _PRIOR * product) / (probes + _PRIOR)
    sides = _sides(factor)
    return _factor(sides._replace(curvature=sides.curvature * np.sqrt(square)), least)


def _sides(factor: Factor) -> _Sides:
    left, right = (None if x is None else np.asarray(x, np.float64) for x in (factor.left, factor.right))
    return _Sides(left, right, np.asarray(factor.scale, np.float64) ** -2)


def _factor(sides: _Sides, least: float) -> Factor:
    put = lambda x: None if x is None else jnp.asarray(x, jnp.float32)  # noqa: E731
    return Factor(put(sides.left), put(sides.right), put(1 / np.sqrt(np.maximum(sides.curvature, least))))


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
