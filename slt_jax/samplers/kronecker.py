"""A Kronecker-factored preconditioner: what turns a posterior whose curvatures span decades into a round one.

The gradient of a weight matrix is a sum over examples of outer products, so that a layer's Hessian is close to a
Kronecker product A (x) B of a matrix for each side (exactly, for one layer of a deep linear network). In the eigenbases
U of A and V of B it is close to diagonal, and with t_ij the curvature of nbeta L + (localization / 2)|w - w*|^2 there,

    R X = U (X / sqrt(t)) V',      P = R R'

makes R' H R close to the identity within each layer. What is left comes from the layers' couplings, a factor
of the order of the depth, whatever the condition number was.

Measured only from Hessian-vector products, by secants of the gradient: no access to activations, any loss. With R so
far (at first 1) and probes z ~ N(0, 1), y = R' H R z are products in its own coordinates. If H there is A (x) B for a
layer, y y' has the mean A^2 tr B^2, and so A is read off, U diag(a) U' becomes (U sqrt a) A (U sqrt a)', and likewise
on the other side. One round does not do: in the weights' own coordinates all layers push along the few stiffest
directions, and what is a millionth of them is lost among the products, of few probes and in float32. Each round
resolves more decades below; with the first round only, chains of deep networks hardly move.
Between rounds any root of A^-1 will do for (U / sqrt a), without eigenvectors, which are most of the work: until some
a_i b_j is below the localization, which is a curvature of every direction.

Last, t_ij is multiplied by the root mean square of y_ij over further probes. The two sets must differ: a direction that
the first happened to miss has no part in *its* products, by construction of U and V, and would be taken for flat.

Sources: Martens and Grosse, arXiv:1503.05671 (Kronecker factors); George et al., arXiv:1806.03884 (diagonal in their
eigenbasis).
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slt_jax.samplers.base import HIGHEST, Factor, Metric, Position, inner, noise_like, pull_back, root

LARGEST_SIDE = 3072  # a longer side keeps its own basis: eigenvectors cost its cube, and its square in memory
ROUNDS = 4  # from the weights' own coordinates
PROBES = 4  # of a round, at each position
WHITE_REACH = 0.3  # standard deviations: length of a secant in the metric's coordinates
LARGE_SIDE = 1024  # from which on a GPU finds eigenvectors, rather than its host
CLEAR = 10.0  # times the least curvature, from which on no direction of a leaf is taken to be below it
POWERS = 20  # of the inverse, to its largest eigenvalue
ROOT_ERROR, MOST_ROUNDS = 1e-9, 80  # of a matrix root
LEAST_ALONG = 0.5  # cosine of a product and its vector, below which it is rounding
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


def blank_factor(leaf: Any) -> Factor:
    """Shapes and types of a leaf's metric before it is measured."""
    shape = matrix_shape(leaf.shape)
    sides = [(n, n) if gets_basis(n, shape) else None for n in shape]

    def blank() -> Factor:
        left, right = (None if side is None else jnp.zeros(side, jnp.float32) for side in sides)
        return Factor(left, right, jnp.zeros(shape, jnp.float32))

    return jax.eval_shape(blank)


def gets_basis(side: int, shape: tuple[int, ...]) -> bool:
    """Whether a side gets a basis: neither that of a vector nor a very long one."""
    return min(shape) > 1 and side <= LARGEST_SIDE


def largest_side(leaves: Iterable[Any]) -> int:
    """The longest side that gets a basis, 0 where none does."""
    shapes = [matrix_shape(x.shape) for x in leaves]
    return max((side for shape in shapes for side in shape if gets_basis(side, shape)), default=0)


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
    which is what few probes can determine. Keeps one product and its squares in memory at a time.

    Args:
        reach: length of the secant for a unit of the probe in the weights' own coordinates. least: no curvature is
            taken to be below it.
    """
    metric, rounds = begun, 1 if begun else ROUNDS
    for number in range(rounds):
        products = _Products(curvature, metric, positions, reach, jax.random.fold_in(key, number))
        turned = functools.partial(
            turned_factor, probes=PROBES * len(positions), least=least, last=number == rounds - 1
        )
        metric = _beside(products.leaf_by_leaf(PROBES, grams, turned), positions)
        if metric is None:
            return None
    products = _Products(curvature, metric, positions, reach, jax.random.fold_in(key, ROUNDS))
    return products.leaf_by_leaf(
        count, _squares, functools.partial(rescaled, probes=count * len(positions), least=least)
    )


class _Products(NamedTuple):
    """Products R' H R z at some positions."""

    curvature: Curvature
    metric: Metric
    positions: list[Position]
    reach: float
    key: jax.Array

    def leaf_by_leaf(self, count: int, squares: Callable, change: Callable) -> Metric | None:
        """The metric after ``change(factor, means)`` of each leaf: of ``squares`` over ``count`` probes z ~ N(0, 1) at
        each position, float64; () for a factor where there is none yet. None when a mean is not finite.
        """
        reach, unit = (WHITE_REACH, 1.0) if self.metric else (self.reach, self.reach**-2)  # unit: their squares' root
        shapes = jax.eval_shape(squares, self.metric, self.positions[0], unit)
        total = _beside(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), self.positions)
        for i, position in enumerate(self.positions):
            for k in range(count):
                probe = metric_root(self.metric, noise_like(jax.random.fold_in(self.key, i * count + k), position))
                total = _added(squares, total, self.metric, self.curvature(position, probe, reach), unit)
        scale = unit**2 / (count * len(self.positions))
        factors = []
        for factor, arrays in zip(self.metric or [()] * len(total), total, strict=True):
            means = [np.asarray(x, np.float64) * scale for x in arrays]
            if not all(np.isfinite(x).all() for x in means):
                return None
            factors.append(change(factor, means))
        return tuple(factors)


def _beside(tree: Any, positions: list[Position]) -> Any:
    """On the device of the positions, if they are on one: where a program's arguments are decides what is compiled."""
    devices = positions[0][0].devices()
    return jax.device_put(tree, *devices) if len(devices) == 1 else tree


metric_root = jax.jit(root)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _added(squares: Callable, total: list, metric: Metric, product: Position, unit: jax.Array | float) -> list:
    return jax.tree.map(jnp.add, total, squares(metric, product, unit))


def _matrices(metric: Metric, product: Position, unit: jax.Array | float) -> Position:
    return tuple(x.reshape(matrix_shape(x.shape)) / unit for x in pull_back(metric, product))


def grams(metric: Metric, product: Position, unit: jax.Array | float) -> list[list[jax.Array]]:
    """For each leaf Y: the means over columns of Y Y' and over rows of Y' Y; of a side without a basis the diagonal."""
    return [[_gram(y), _gram(y.T)] for y in _matrices(metric, product, unit)]


def _gram(y: jax.Array) -> jax.Array:
    whole = gets_basis(len(y), y.shape)
    return (jnp.matmul(y, y.T, precision=HIGHEST) if whole else (y * y).sum(1)) / y.shape[1]


def _squares(metric: Metric, product: Position, unit: jax.Array | float) -> list[list[jax.Array]]:
    return [[y * y] for y in _matrices(metric, product, unit)]


def turned_factor(factor: Factor | tuple[()], grams: list[np.ndarray], probes: int, least: float, last: bool) -> Factor:
    """A leaf's factor after one round.

    In its bases after the last one, or where some t_ij is below ``least``, which only a basis can mend; else in roots
    that are as good and need no eigenvectors.
    """
    left, right = grams
    mean = left.mean() if left.ndim == 1 else np.trace(left) / len(left)
    if not mean:  # the loss does not depend on it
        bases = [None if gram.ndim == 1 else np.eye(len(gram)) for gram in grams]
        return _factor(_Sides(bases[0], bases[1], np.zeros([*map(len, grams)])), least)
    old = _sides(factor) if factor else _Sides(None, None, np.ones([*map(len, grams)]))
    t = old.curvature
    rows = Side(old.left, t.sum(1)).into(left, probes * t.shape[1])
    columns = Side(old.right, t.sum(0) / t.sum()).into(right, probes * t.shape[0])
    whole = last or rows.softest() * columns.softest() < CLEAR * least * np.sqrt(mean)
    if whole:
        rows, columns = rows.turned(), columns.turned()
    t = np.outer(rows.values, columns.values) / np.sqrt(mean)
    return _factor(_Sides(rows.root, columns.root, t), least if whole else 0.0)


class Side(NamedTuple):
    """A side of a leaf's curvature, A, as a root of its inverse: (Q / sqrt(v)) (Q / sqrt(v))' = A^-1. Q None: 1."""

    root: np.ndarray | None
    values: np.ndarray

    def into(self, gram: np.ndarray, seen: int) -> "Side":
        """That of A once the mean square of its products in this root's coordinates is known to be ``gram``: with
        S S' = sqrt(gram), A is (Q / sqrt(v))'^-1 S S' (Q / sqrt(v))^-1, of which (Q / sqrt(v)) S'^-1 is such a root.

        ``seen``: vectors of which ``gram`` is the mean.
        """
        if gram.ndim == 1:
            return Side(None, self.values * np.sqrt(gram))
        floor = _FLOOR * max(1.0, len(gram) / seen) * np.trace(gram) / len(gram)
        size = np.exp(np.log(self.values).mean())
        root = (np.eye(len(gram)) if self.root is None else self.root) / np.sqrt(self.values / size)
        return Side(_into(root, gram, floor), np.full(len(gram), size))

    def softest(self) -> float:
        """The smallest eigenvalue of A, or a little more, by power iteration on A^-1."""
        if self.root is None:
            return self.values.min()
        vector, size = np.random.default_rng(0).normal(size=len(self.root)), 1.0
        for _ in range(POWERS):
            vector = self.root @ (self.root.T @ (vector / size))
            size = np.linalg.norm(vector)
        return self.values[0] / size

    def turned(self) -> "Side":
        """The same in the eigenbasis of A."""
        if self.root is None:
            return self
        vectors, squares = _eigen(self.root)
        return Side(vectors, self.values / np.maximum(squares, np.finfo(float).eps * squares.max()))


def _on_accelerator(size: int) -> bool:
    """A GPU has eigenvectors of a large matrix some ten times as soon as one core of its host, after compiling."""
    return jax.default_backend() == "gpu" and size >= LARGE_SIDE


def _there_or_here(there: Callable, here: Callable, *given: Any) -> Any:
    if not _on_accelerator(len(given[0])):
        return here(*given)
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, there(*given))


def _into(root: np.ndarray, gram: np.ndarray, floor: float) -> np.ndarray:
    """root S'^-1, where S S' = sqrt(gram + floor); float64."""
    return _there_or_here(into_by_products, _into_by_vectors, root, gram, floor)


def _eigen(root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(vectors, values) of root root', float64."""
    return _there_or_here(_eigen_there, lambda r: np.linalg.eigh(r @ r.T)[::-1], root)


def _into_by_vectors(root: np.ndarray, gram: np.ndarray, floor: float) -> np.ndarray:
    squares, vectors = np.linalg.eigh(gram)
    return root @ (vectors * (np.maximum(squares, 0) + floor) ** -0.25)


@jax.jit
def into_by_products(root: jax.Array, gram: jax.Array, floor: jax.Array) -> jax.Array:
    """These cost a GPU next to nothing beside eigenvectors."""
    lower = jnp.linalg.cholesky(square_root(gram + floor * jnp.eye(len(gram), dtype=gram.dtype)))
    return jax.scipy.linalg.solve_triangular(lower, root.T, lower=True).T


@jax.jit
def _eigen_there(root: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(root @ root.T)
    return vectors, values


def square_root(matrix: jax.Array) -> jax.Array:
    """Of a symmetric positive definite matrix in float64, by the coupled Newton-Schulz iteration.

    With Y at first the matrix over its norm and Z = 1, T = (3 - Z Y) / 2, Y <- Y T, Z <- T Z: each singular value of Y
    goes to 1 times its root, a small one growing by 3/2 each time at first, so that a condition number of 10^10 takes
    some forty rounds. Source: Higham, Functions of Matrices (2008), section 6.
    """
    size, one = jnp.linalg.norm(matrix), jnp.eye(len(matrix), dtype=matrix.dtype)

    def further(state):
        y, z, count, _ = state
        t = 1.5 * one - 0.5 * z @ y
        return y @ t, t @ z, count + 1, jnp.abs(t - one).max()

    begun = matrix / size, one, 0, jnp.asarray(jnp.inf, matrix.dtype)
    y, *_ = jax.lax.while_loop(lambda state: (state[3] > ROOT_ERROR) & (state[2] < MOST_ROUNDS), further, begun)
    return jnp.sqrt(size) * (y + y.T) / 2


def rescaled(factor: Factor, squares: list[np.ndarray], probes: int, least: float) -> Factor:
    """A leaf's factor with t_ij times the root mean square of its products."""
    (square,) = squares
    total = square.sum()
    product = np.outer(square.sum(1), square.sum(0)) / total if total > 0 else square
    square = (probes * square + _PRIOR * product) / (probes + _PRIOR)
    sides = _sides(factor)
    return _factor(sides._replace(curvature=sides.curvature * np.sqrt(square)), least)


def _sides(factor: Factor) -> _Sides:
    left, right = (None if x is None else np.asarray(x, np.float64) for x in (factor.left, factor.right))
    return _Sides(left, right, np.asarray(factor.scale, np.float64) ** -2)


def _factor(sides: _Sides, least: float) -> Factor:
    left, right = (None if x is None else jnp.asarray(x, jnp.float32) for x in (sides.left, sides.right))
    return Factor(left, right, jnp.asarray(1 / np.sqrt(np.maximum(sides.curvature, least)), jnp.float32))


def largest(
    curvature: Curvature, metric: Metric, position: Position, iterations: int, key: jax.Array,
    hessian: Curvature | None = None,
) -> float:  # fmt: skip
    """The largest curvature in the metric's coordinates, by power iteration on secants one standard deviation long.

    Both gradients of a secant are rounded, each by a part of the whole force, and the sum of that over all coordinates
    grows with their number: in a wide network far from w* it can pass for a curvature that no direction has. It shows
    in a product that does not lie along its vector. ``hessian`` then takes the secants' place, whose products' rounding
    is proportional to the products.
    """
    size, along = _power(curvature, metric, position, iterations, key)
    if hessian is not None and along < LEAST_ALONG:
        size, _ = _power(hessian, metric, position, iterations, key)
    return size


def _power(
    curvature: Curvature, metric: Metric, position: Position, iterations: int, key: jax.Array
) -> tuple[float, float]:
    """(length of the last product with a unit vector, cosine of the angle between them)."""
    vector, length, along = noise_like(key, position), 1.0, 1.0
    for _ in range(iterations):
        product = curvature(position, _unit(metric, vector), 1 / np.sqrt(max(length, 1.0)))
        vector, size, cosine = _into_and_norm(metric, product, vector)
        if not np.isfinite(length := float(size)):
            return length, 1.0
        along = float(cosine)
    return length, along


@jax.jit
def _unit(metric: Metric, vector: Position) -> Position:
    size = jnp.sqrt(inner(vector, vector))
    return root(metric, tuple(x / size for x in vector))


@jax.jit
def _into_and_norm(metric: Metric, product: Position, before: Position) -> tuple[Position, jax.Array, jax.Array]:
    """R' times a product, its norm, and the cosine of its angle with ``before``."""
    vector = pull_back(metric, product)
    size = jnp.sqrt(inner(vector, vector))
    return vector, size, inner(vector, before) / (size * jnp.sqrt(inner(before, before)))
