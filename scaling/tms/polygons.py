"""The critical points, k-gons, and which of them some weights are nearest to.

A k-gon has k columns of W of one length at angles 2 pi / k and one common bias; its other columns are 0. The bias of
such a unit is free where it is negative, because the unit is then never open ("dead", written -): the loss is constant
in its bias and in its column, as long as it stays shut and its column opens no other unit. Where it is positive
("open", +), the output is the constant b on all inputs, best at b = 1/12. So ``5-`` and ``5+`` are two 5-gons, and
``4+-`` is a 4-gon with one unit of each kind. Lengths and biases: 1 and 0 up to k = 4, where no column is in the way of
another; 1.1705 and -0.2823 at k = 5; 1.3205 and -0.6181 at k = 6, by minimizing the expected loss.

Learning coefficients. Where the minima near a point form a smooth surface, across which all curvatures are positive,
the loss is a sum of squares in suitable coordinates, one for each direction across, and the coefficient is half their
number. Rotations of W leave W'W alone, hence one flat direction for any data. A dead unit adds its column and its bias,
three more. No other curvature is 0 (``hessian_rank``), so

    5-: (18 - 1 - 3) / 2 = 7.0,   5+: (18 - 1) / 2 = 8.5,   6: (18 - 1) / 2 = 8.5.

``0++++++``, ``4++`` and ``5 doubled``, a 5-gon with two columns at one vertex, are saddles and have none.

The function's own coefficient, that of |f - f*|^2 with f* the function at the point itself, exists everywhere.

- At 5-, 5+ and 6 it is the same number, because f changes to first order in the same directions (``function_rank``).
  At 5 doubled these are 17: 8.5.
- At ``0++++++``, f is b_j + s (W'W)_ji nearby, and the loss of the order of |b - b*|^2 + |W'W|^2: six squares, and a
  form of degree 4 in the twelve entries of W, which is 0 only at W = 0. So 6 / 2 + 12 / 4 = 6.
- At a 4-gon the corners' biases stand on the kink of a ReLU. The loss is no sum of squares, but still, to leading
  order, a form of degree 2 that is 0 only along the flat directions: the angles between neighbours cannot all grow,
  and a dead unit's column, wherever it points, comes within 45 degrees of a corner. Any such form in d directions
  gives d / 2. The flat ones are the rotation and a dead unit's bias: 4++ 8.5, 4+- 8, 4-- 7.5.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from scaling.tms.model import HIDDEN, INPUTS, outputs, population_hessian, population_loss

OPEN = 1 / 12  # minimizes (5/6) b^2 + (1/6)(1/3 - b + b^2)
DEAD = -1.0  # any negative number
DOUBLED = "5 doubled"
OF_LOSS = {"5-": 7.0, "5+": 8.5, "6": 8.5}
OF_FUNCTION = {"0++++++": 6.0, "4++": 8.5, "4+-": 8.0, "4--": 7.5, DOUBLED: 8.5, **OF_LOSS}
_PERMUTATIONS = np.array(list(itertools.permutations(range(INPUTS))))


class Polygon(NamedTuple):
    """Weights ``w`` (2, 6) and ``b`` (6,), and which units count, ``(6,)``: all but the dead ones."""

    label: str
    w: np.ndarray
    b: np.ndarray
    counts: np.ndarray


class Nearest(NamedTuple):
    """The k-gon that is nearest to some weights; distance in units of a weight, see ``distance``."""

    label: str
    distance: float


@functools.cache
def size(corners: int) -> tuple[float, float]:
    """(length, bias) of a regular k-gon's columns: the minimum of the expected loss over such k-gons."""
    if corners < 5:
        return 1.0, 0.0
    shape = lambda v: population_loss(*_ring(corners, v[0], v[1], corners - INPUTS))  # noqa: E731
    found = minimize(shape, (1.2, -0.4), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-15})
    return float(found.x[0]), float(found.x[1])


def _ring(corners: int, length: float, bias: float, num_open: int) -> tuple[np.ndarray, np.ndarray]:
    """W and b; of the units without a corner the first ``num_open`` are open."""
    w, b = np.zeros((HIDDEN, INPUTS)), np.full(INPUTS, DEAD)
    angles = 2 * np.pi * np.arange(corners) / max(corners, 1)
    w[:, :corners] = length * np.stack([np.cos(angles), np.sin(angles)])
    b[:corners] = bias
    b[corners : corners + max(num_open, 0)] = OPEN
    return w, b


def polygon(corners: int, num_open: int = 0) -> Polygon:
    """The regular k-gon with ``num_open`` open units; the others without a corner are dead.

    Raises:
        ValueError: more corners and open units than there are.
    """
    if corners < 0 or num_open < 0 or corners + num_open > INPUTS:
        raise ValueError(f"{corners} corners and {num_open} open units do not fit {INPUTS} units. Give fewer.")
    dead = INPUTS - corners - num_open
    label = f"{corners}{'+' * num_open}{'-' * dead}"
    return Polygon(label, *_ring(corners, *size(corners), num_open), np.arange(INPUTS) < corners + num_open)


@functools.cache
def doubled() -> Polygon:
    """The 5-gon with two equal columns at one vertex: the minimum among weights with that mirror symmetry."""

    def place(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths, biases = v[[0, 0, 1, 1, 2, 2]], v[[3, 3, 4, 4, 5, 5]]
        angles = np.array([0, 0, v[6], -v[6], v[7], -v[7]])
        return lengths * np.stack([np.cos(angles), np.sin(angles)]), biases

    start = np.array([0.9, 1.15, 1.15, -0.2, -0.25, -0.25, 0.4 * np.pi, 0.8 * np.pi])
    found = minimize(lambda v: population_loss(*place(v)), start, method="BFGS", options={"gtol": 1e-7})
    return Polygon(DOUBLED, *place(found.x), np.ones(INPUTS, bool))


def life(w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far each unit is from dead, ``(6,)``: its largest output, and the most that its input adds to another's.

    The root of the sum of their squares; 0 on the whole flat piece, whatever column and bias are there.
    """
    after = np.maximum(w.T @ w + b[:, None], 0)  # outputs (unit, input) at s = 1; at s = 0 they are ReLU(b)
    added = np.maximum(after - np.maximum(b, 0)[:, None], 0)
    np.fill_diagonal(added, 0)
    return np.hypot(np.maximum(after.max(1), np.maximum(b, 0)), added.max(0))


def distance(w: np.ndarray, b: np.ndarray, to: Polygon) -> float:
    """From weights to the critical set of ``to``: the root of the sum of squares over the units that count, and of the
    dead ones' ``life``; the smallest over rotations, reflections and all ways to name the units.

    The best rotation or reflection leaves |A|^2 + |B|^2 - 2 (sum of the singular values of A B'), and for M of size
    2 x 2 that sum is the root of |M|^2 + 2 |det M|.
    """
    theirs, bias, counts = to.w[:, _PERMUTATIONS], to.b[_PERMUTATIONS], to.counts[_PERMUTATIONS]
    product = np.einsum("hi,kpi->phk", w, np.where(counts, theirs, 0))
    aligned = np.sqrt(np.sum(product**2, (1, 2)) + 2 * np.abs(np.linalg.det(product)))
    columns = np.sum(counts * np.sum(w**2, 0), 1) + np.sum(to.w[:, to.counts] ** 2) - 2 * aligned
    biases = np.sum(np.where(counts, b - bias, life(w, b)) ** 2, 1)
    return float(np.sqrt(np.maximum(columns + biases, 0).min()))


def nearest(w: np.ndarray, b: np.ndarray) -> Nearest:
    """The nearest k-gon of those whose units without a corner, the shorter columns, have the signs of ``b``."""
    w, b = np.asarray(w, np.float64), np.asarray(b, np.float64)
    signs = b[np.argsort(-np.sum(w**2, 0))] > 0
    candidates = [polygon(k, int(signs[k:].sum())) for k in range(INPUTS + 1)]
    found = [Nearest(p.label, distance(w, b, p)) for p in (*candidates, doubled())]
    return min(found, key=lambda one: one.distance)


def curvatures(at: Polygon) -> np.ndarray:
    """Eigenvalues of the Hessian of the expected loss, ``(18,)``, increasing."""
    return np.linalg.eigvalsh(population_hessian(at.w, at.b))


def hessian_rank(at: Polygon, least: float = 1e-3) -> int:
    """Number of curvatures above ``least`` (the smallest that count here is 0.02, and differences err by 1e-6)."""
    return int(np.sum(curvatures(at) > least))


def function_rank(at: Polygon, least: float = 1e-3) -> int:
    """Number of directions in which f changes to first order: eigenvalues above ``least`` of the mean of J'J."""
    heights = (np.arange(100) + 0.5) / 100
    inputs = np.concatenate([height * np.eye(INPUTS) for height in heights]).astype(np.float32)
    params = {"W": jnp.asarray(at.w, jnp.float32), "b": jnp.asarray(at.b, jnp.float32)}
    slopes = jax.tree.leaves(jax.jacobian(outputs)(params, inputs))
    rows = np.concatenate([np.asarray(s, np.float64).reshape(inputs.size, -1) for s in slopes], 1)
    return int(np.sum(np.linalg.eigvalsh(rows.T @ rows / len(inputs)) > least))


def flat_directions(at: Polygon) -> int:
    """One for the rotations, three for each dead unit: 18 less this is ``hessian_rank`` at 5-, 5+ and 6."""
    return 1 + 3 * int(np.sum(~at.counts))


def gaussian(at: Polygon, nbeta: float, localization: float) -> float:
    """What a Gaussian posterior of the curvatures h of ``at`` reads: half the sum of nbeta h / (nbeta h + gamma).

    What it lacks of the coefficient is the pull of the localization; no sampler errs yet.
    """
    curved = curvatures(at)[-hessian_rank(at) :]
    return float(0.5 * np.sum(nbeta * curved / (nbeta * curved + localization)))
