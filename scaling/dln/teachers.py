"""Deep linear teachers with a known learning coefficient, and data on which the teacher is the exact minimum.

Kinds of teacher, of widths H_0 ... H_L and end-to-end rank r:

- ``A``: every layer of rank r < min(widths), the deepest point of the zero set. The local learning coefficient is the
  theorem's, with its multiplicity. The hard kind: curvatures span decades, and some directions have none.
- ``B``: every layer of full rank. r = min(widths), coefficient r (H_0 + H_L - r) / 2, multiplicity 1. The easy kind.
- ``C``: one layer of rank r between widths h and h', all others of full rank; h and h' are the two smallest widths and
  any other is at least h + h' - r. Coefficient [r (H_0 + H_L - r) + (h - r)(h' - r)] / 2, multiplicity 1.
- ``published``: the recipe of Lau et al., arXiv:2308.12108: each layer is cut with probability 1/2, to a rank uniform
  from 1 to full. The theorem's value, which the paper takes for the truth, is certainly not the local one
  (``doubtful``) at 36 % of these teachers in class 1K, 40 % in 10K, 60 % in 100M; ``bounds`` holds what is known.

In A, B and C the two bounds of ``truth.local_bounds`` meet at the theorem's value.
"""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling.dln import truth

KINDS = ("A", "B", "C", "published")
INPUT_VARIANCE = 100 / 3  # of a uniform number on [-10, 10]


class Size(NamedTuple):
    """A class of the published protocol: inclusive ranges, and the settings it was run at (batch 500, gamma 1)."""

    layers: tuple[int, int]
    widths: tuple[int, int]
    num_data: int
    step_size: float
    steps: int


SIZES = {
    "1K": Size((2, 5), (5, 50), 100_000, 5e-7, 10_000),
    "10K": Size((2, 10), (5, 100), 100_000, 5e-7, 10_000),
    "100K": Size((2, 10), (50, 500), 1_000_000, 1e-7, 50_000),
    "1M": Size((5, 20), (100, 1000), 1_000_000, 5e-8, 50_000),
    "10M": Size((2, 20), (500, 2000), 1_000_000, 2e-8, 50_000),
    "100M": Size((2, 40), (500, 3000), 1_000_000, 2e-8, 50_000),
}


class Shape(NamedTuple):
    """A teacher without its weights; enough for everything that is known exactly."""

    widths: tuple[int, ...]
    layer_ranks: tuple[int, ...]


class Teacher(NamedTuple):
    """The true parameter of one network, output = x @ weights[0] @ weights[1] @ ...

    ``truth`` and ``multiplicity`` are the theorem's. ``bounds`` encloses the local learning coefficient at ``weights``
    and is its value where both ends agree; ``doubtful`` says that its lower end is above ``truth``.
    """

    kind: str
    size: str
    seed: int
    widths: tuple[int, ...]
    rank: int
    weights: tuple[np.ndarray, ...]
    truth: Fraction
    multiplicity: int
    doubtful: bool
    layer_ranks: tuple[int, ...]
    bounds: tuple[Fraction, Fraction]


def _generators(kind: str, size: str, seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """One stream for the shape and one for the weights, so that a shape can be had alone."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}.")
    seeds = np.random.SeedSequence([KINDS.index(kind), list(SIZES).index(size), seed]).spawn(2)
    return np.random.default_rng(seeds[0]), np.random.default_rng(seeds[1])


def _narrow_layer(widths: Sequence[int]) -> tuple[int, int] | None:
    """For kind C: (layer between the two smallest widths, smallest rank the third allows), None where there is none."""
    order = np.argsort(widths, kind="stable")
    smallest, second, third = (widths[i] for i in order[:3])
    if abs(order[0] - order[1]) != 1 or third <= second:
        return None
    return int(min(order[:2])), max(1, smallest + second - third)


def draw_shape(kind: str, size: str, seed: int) -> Shape:
    """Widths and layer ranks of ``make_teacher(kind, size, seed)``, without drawing the weights.

    The number of layers and each width are uniform in the ranges of ``SIZES``; kind C draws widths again until the two
    smallest are neighbours and the third is larger. The rank is uniform: in A from 1 to min(widths) - 1; in C from the
    smallest that the condition on the other widths allows to min(widths) - 1.

    Raises:
      ValueError: an unknown kind or size.
    """
    rng, _ = _generators(kind, size, seed)
    layers = int(rng.integers(*SIZES[size].layers, endpoint=True))
    while True:
        widths = tuple(rng.integers(*SIZES[size].widths, size=layers + 1, endpoint=True).tolist())
        narrow = _narrow_layer(widths)
        if kind != "C" or (narrow is not None and narrow[1] < min(widths)):
            break
    ranks = [min(pair) for pair in itertools.pairwise(widths)]
    if kind == "A":
        ranks = [int(rng.integers(1, min(widths)))] * layers
    elif kind == "C":
        ranks[narrow[0]] = int(rng.integers(narrow[1], min(widths)))
    elif kind == "published":
        ranks = [int(rng.integers(1, full, endpoint=True)) if rng.random() < 0.5 else full for full in ranks]
    return Shape(widths, tuple(ranks))


def draw_layer(rng: np.random.Generator, fan_in: int, fan_out: int, rank: int) -> np.ndarray:
    """A float32 Gaussian layer of variance 1 / fan_in, cut to ``rank`` by dropping its smallest singular values.

    Those kept stay as they are: the largest is about 1 + sqrt(fan_out / fan_in), the smallest is the larger, the deeper
    the cut. Only a layer of (nearly) full rank and (nearly) equal widths has one near 1 / width. Rounding to float32
    leaves those dropped near 1e-7 of the largest, not at 0.
    """
    layer = rng.standard_normal((fan_in, fan_out), dtype=np.float32)
    layer *= np.float32(fan_in**-0.5)
    if rank < min(fan_in, fan_out):
        left, values, right = np.linalg.svd(layer, full_matrices=False)
        np.matmul(left[:, :rank] * values[:rank], right[:rank], out=layer)
    return layer


def make_teacher(kind: str, size: str, seed: int) -> Teacher:
    """Teacher number ``seed`` of a kind and size; the same arguments give the same bits on one machine.

    Holds the weights once, plus the three factors of one layer while it is cut.

    Args:
      kind: "A", "B", "C" or "published", see the module.
      size: a key of ``SIZES``.
      seed: >= 0.

    Raises:
      ValueError: an unknown kind or size.
    """
    shape = draw_shape(kind, size, seed)
    _, rng = _generators(kind, size, seed)
    pairs = itertools.pairwise(shape.widths)
    weights = tuple(draw_layer(rng, *pair, rank) for pair, rank in zip(pairs, shape.layer_ranks, strict=True))
    rank = min(shape.layer_ranks)
    value, multiplicity = truth.learning_coefficient(shape.widths, rank)
    bounds = truth.table_bounds(truth.generic_rank_table(*shape))
    return Teacher(
        kind, size, seed, shape.widths, rank, weights, value, multiplicity, bounds[0] > value, shape.layer_ranks, bounds
    )


def output(weights: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """x @ weights[0] @ weights[1] @ ..., ``(m, H_0)`` to ``(m, H_L)``."""
    for layer in weights:
        x = x @ layer
    return x


def loss_fn(weights: Sequence[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean over the outputs of the squared error, one number an example: the published loss is its mean.

    It is a negative log likelihood (up to a constant) for label noise of variance H_L / 2.

    Args:
      weights: L matrices.
      batch: (x ``(m, H_0)``, y ``(m, H_L)``).

    Returns:
      ``(m,)``.
    """
    x, y = batch
    return jnp.mean((output(weights, x) - y) ** 2, axis=-1)


def end_to_end(weights: Sequence[np.ndarray]) -> np.ndarray:
    """W* = weights[0] @ weights[1] @ ..., float64 ``(H_0, H_L)``."""
    product = weights[0].astype(np.float64)
    for layer in weights[1:]:
        product = product @ layer.astype(np.float64)
    return product


def _cross(x: np.ndarray, y: np.ndarray, rows: int = 16_384) -> np.ndarray:
    """x' y summed in float64, a few rows at a time."""
    starts = range(0, len(x), rows)
    return sum(x[i : i + rows].astype(np.float64).T @ y[i : i + rows].astype(np.float64) for i in starts)


def make_data(
    teacher: Teacher, num_data: int | None = None, label_noise: float = 0.0, seed: int = 0, project: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs uniform on [-10, 10] and the teacher's outputs, plus label noise that leaves the teacher the minimum.

        y = X W* + E,   E <- E - X (X'X)^-1 X'E

    Why project. The loss sees the weights only through W = W_1 ... W_L. With D = W - W*, for n examples and the mean
    over H_L outputs,

        n H_L L_n(W) = |X D|^2 - 2 <E, X D> + |E|^2.

    Projected, X'E = 0 and the middle term vanishes: the empirical loss is the noiseless one plus a constant, for every
    parameter. The teacher stays an exact global minimum and its learning coefficient is untouched, while a minibatch
    still sees noise. The price: rows of E are no longer exactly independent (H_0 of n degrees of freedom are gone).

    What happens otherwise. Let P project on the columns of X, nbeta be the sampler's, and s the noise's standard
    deviation. Completing the square, L_n(W) - L_n(W*) = (|X D - P E|^2 - |P E|^2) / (n H_L). In d directions in which
    X D moves freely the first term gives d/2 after multiplication by nbeta, the second subtracts
    nbeta d s^2 / (n H_L) on average. At nbeta = n / log n the estimate at the teacher is therefore

        (d / 2) (1 - 2 s^2 / (H_L log n)).

    With the SUM over outputs as loss and s = 1 the same steps give the often seen 1 - 2 / log n (0.83 at n = 1e5), and
    with half the sum, the likelihood itself, 1 - 1 / log n.

    Args:
      teacher: where X goes through.
      num_data: n; the published number of the teacher's size if not given (1M examples of a wide net take gigabytes).
      label_noise: standard deviation of E per output, >= 0.
      seed: of inputs and noise; the inputs do not depend on ``label_noise``.
      project: False for noise as it comes.

    Returns:
      float32 (x ``(n, H_0)``, y ``(n, H_L)``).

    Raises:
      ValueError: negative ``label_noise``, or too few examples to project.
    """
    num_data = SIZES[teacher.size].num_data if num_data is None else num_data
    if label_noise < 0:
        raise ValueError(f"label_noise is a standard deviation, >= 0, got {label_noise}.")
    width_in, width_out = teacher.widths[0], teacher.widths[-1]
    if label_noise > 0 and project and num_data <= width_in:
        raise ValueError(
            f"projected noise needs more examples than inputs ({width_in}), got num_data = {num_data}: "
            f"nothing would be left of it. Give more data or project=False."
        )
    rng_inputs, rng_noise = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    x = rng_inputs.random((num_data, width_in), dtype=np.float32)
    x -= np.float32(0.5)
    x *= np.float32(20)
    y = x @ end_to_end(teacher.weights).astype(np.float32)
    if label_noise > 0:
        noise = rng_noise.standard_normal((num_data, width_out), dtype=np.float32)
        noise *= np.float32(label_noise)
        if project:
            noise -= x @ np.linalg.solve(_cross(x, x), _cross(x, noise)).astype(np.float32)
        y += noise
    return x, y


def sufficient_data(x: np.ndarray, dtype: np.typing.DTypeLike = None) -> np.ndarray:
    """H_0 pseudo-inputs on which every noiseless full-batch loss equals the one on x.

    R'R / H_0 = X'X / n, so that the mean of |R_i D|^2 over the H_0 rows of R is that of |X_i D|^2 over all n, for every
    D = W - W*. With y = R W* the loss, its gradient and its posterior at a given nbeta are those of the whole data set
    (projected label noise adds a constant), at H_0 / n of the cost: exact references need no minibatches.

    Args:
      x: ``(n, H_0)``.

    Returns:
      R ``(H_0, H_0)``, of ``dtype``, else of the dtype of x.
    """
    values, vectors = np.linalg.eigh(_cross(x, x) * (x.shape[1] / len(x)))
    return (np.sqrt(np.maximum(values, 0))[:, None] * vectors.T).astype(x.dtype if dtype is None else dtype)
