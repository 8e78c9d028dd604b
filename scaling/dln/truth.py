"""Exactly known numbers of deep linear networks, in rational arithmetic.

Layer k of L maps width H_{k-1} to H_k, output = x W_1 W_2 ... W_L, and the loss is a positive definite quadratic form
of W_1 ... W_L - W*, rank W* = r. Three numbers must be kept apart:

- the theorem's learning coefficient, a property of (H, r): the minimum of the local one over the whole zero set;
- the local learning coefficient at one teacher (W_1, ..., W_L), which depends on the ranks of its partial products, and
  is what a sampler started there estimates;
- bounds on the latter, which meet for many teachers and then are its value.

Sources: Aoyagi, Neural Networks 172 (2024) 106132 (the theorem); Pepin Lehalleur and Rimanyi, arXiv:2411.19920 (its
value is half the codimension of the zero set).
"""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def _check_widths(widths: Sequence[int]) -> None:
    if len(widths) < 2:
        raise ValueError(f"widths must name the input and every layer's output, so at least 2, got {list(widths)}.")
    if min(widths) < 1:
        raise ValueError(f"every width must be >= 1, got {list(widths)}.")


def learning_coefficient(widths: Sequence[int], rank: int) -> tuple[Fraction, int]:
    """Aoyagi's theorem: the learning coefficient of a deep linear network and its multiplicity.

    With M_0 <= M_1 <= ... the numbers H_k - r sorted, take the two smallest, ell = 1, S their sum; while one remains
    and S >= ell M_next, take it too. With a = S - (ceil(S / ell) - 1) ell and sums over the M taken,

        value = [r (H_0 + H_L) - r^2] / 2 + a (ell - a) / (4 ell) - (ell - 1) S^2 / (4 ell) + (sum_{i<j} M_i M_j) / 2
        multiplicity = a (ell - a) + 1

    Where the value comes from. Sort the zero set by the ranks rho_k of W_1 ... W_k, rho_0 = H_0, rho_L = r. Given the
    first k - 1 layers, rank rho_k asks for (rho_{k-1} - rho_k)(H_k - rho_k) equations, and W* within the matrices of
    rank r for r (H_0 + H_L - r) more. With a_k = rho_{k-1} - rho_k >= 0, whose sum is M_0 = H_0 - r, and M_k = H_k - r,

        codimension = r (H_0 + H_L - r) + sum_k a_k (M_k + a_k / 2) - M_0^2 / 2.

    The smallest has all M_k + a_k equal to t = S / ell where a_k > 0, hence S^2 / (2 ell) - (sum M_i^2) / 2, plus
    a (ell - a) / (2 ell) because the a_k are integers, a of them rounded up. Half of it is the value. That no
    singularity of the zero set brings the learning coefficient below half the codimension is the theorem. The reduced
    part depends on the set of widths, not on their order.

    Args:
      widths: H_0, ..., H_L, input first, each >= 1.
      rank: r, the rank of W*, from 0 to min(widths).

    Returns:
      (value, multiplicity).

    Raises:
      ValueError: fewer than 2 widths, a width below 1, a rank outside 0 ... min(widths).
    """
    _check_widths(widths)
    if not 0 <= rank <= min(widths):
        raise ValueError(f"rank must be from 0 to the smallest width, {min(widths)}, got {rank}.")
    # Python integers: S^2 passes 2^31, and a numpy width would bring its own overflow
    reduced = sorted(int(width) - int(rank) for width in widths)
    ell, total = 1, reduced[0] + reduced[1]
    while ell + 1 < len(reduced) and total >= ell * reduced[ell + 1]:
        ell += 1
        total += reduced[ell]
    a = total + ell - ell * -(-total // ell)
    pairs = sum(x * y for x, y in itertools.combinations(reduced[: ell + 1], 2))
    regular = int(rank) * (int(widths[0]) + int(widths[-1]) - int(rank))
    value = Fraction(regular + pairs, 2) + Fraction(a * (ell - a) - (ell - 1) * total**2, 4 * ell)
    return value, a * (ell - a) + 1


def resolved_coefficient(widths: Sequence[int], costs: Sequence[float], nbeta: float) -> tuple[int, float]:
    """What nbeta resolves of a teacher of type A: (rank, value).

    A singular value s_i of W* too small to matter at this nbeta might as well not be there. Leaving out all but the
    first k costs the loss c = sum_{i>k} s_i^2 (in units of the loss), and the network is then one of rank k:

        value = min_k [learning_coefficient(widths, k) + nbeta sum_{i>k} costs_i]

    A heuristic, not a theorem: the smallest mean loss that any of these ranks offers, without entropies and without
    the (m - 1) / log(nbeta) of a multiplicity. It has nothing to fit. As nbeta grows it ends at the theorem's value.

    Args:
      costs: squared singular values of the output, in units of the loss, largest first; as many as the rank.
    """
    left = np.concatenate([np.cumsum(np.asarray(costs, float)[::-1])[::-1], [0.0]])
    values = [float(learning_coefficient(widths, k)[0]) + nbeta * left[k] for k in range(len(left))]
    best = int(np.argmin(values))
    return best, float(values[best])


def generic_rank_table(widths: Sequence[int], layer_ranks: Sequence[int]) -> np.ndarray:
    """``rank_table`` of layers drawn independently in general position: the smallest rank among those multiplied.

    Almost surely right, because a random row space of dimension a meets a random null space of codimension b in
    max(0, a - b) dimensions. Costs nothing, whatever the widths.

    Args:
      widths: H_0, ..., H_L.
      layer_ranks: the L ranks of the layers.

    Returns:
      int ``(L + 1, L + 1)``, see ``rank_table``.
    """
    _check_widths(widths)
    if len(layer_ranks) != len(widths) - 1:
        raise ValueError(f"{len(widths)} widths need {len(widths) - 1} layer ranks, got {len(layer_ranks)}.")
    table = np.diag(np.asarray(widths, dtype=np.int64))
    for i, j in itertools.combinations(range(len(widths)), 2):
        table[i, j] = min(layer_ranks[i:j])
    return table


def rank_table(weights: Sequence[np.ndarray]) -> np.ndarray:
    """Ranks of all partial products, numerically: entry (i, j) is the rank of W_{i+1} ... W_j, and (i, i) is H_i.

    Products are never formed: an orthonormal basis of the rows is carried from layer to layer, so that only one layer's
    conditioning enters at a time. A singular value counts when it exceeds 8 eps sqrt(max shape) times the layer's
    largest, eps of the weights' dtype. L^2 / 2 decompositions: for nets of the 1K and 10K classes; beyond, use
    ``generic_rank_table``.

    Args:
      weights: L matrices, ``weights[k]`` of shape (H_k, H_{k+1}).

    Returns:
      int ``(L + 1, L + 1)``; zero below the diagonal.

    Raises:
      ValueError: no layers, or shapes that do not chain.
    """
    shapes = [np.shape(w) for w in weights]
    if not shapes or any(a[1] != b[0] for a, b in itertools.pairwise(shapes)):
        raise ValueError(f"weights must be matrices whose shapes chain, got {shapes}.")
    table = np.diag([shapes[0][0], *(s[1] for s in shapes)]).astype(np.int64)
    norms = [np.linalg.norm(w, 2) for w in weights]
    for i in range(len(weights)):
        basis = np.eye(shapes[i][0])
        for j in range(i, len(weights)):
            _, values, rows = np.linalg.svd(basis @ weights[j].astype(np.float64), full_matrices=False)
            cutoff = 8 * np.finfo(weights[j].dtype).eps * np.sqrt(max(shapes[j])) * norms[j]
            basis = rows[values > cutoff]
            table[i, j + 1] = len(basis)
            if not len(basis):
                break
    return table


def table_jacobian_rank(table: np.ndarray) -> int:
    """``jacobian_rank`` from the ranks of the partial products."""
    depth = len(table) - 1
    suffix = [0, *(int(table[k, depth]) for k in range(1, depth + 1))]
    return sum((suffix[k] - suffix[k - 1]) * int(table[0, k - 1]) for k in range(1, depth + 1))


def jacobian_rank(weights: Sequence[np.ndarray]) -> int:
    """Rank of the Jacobian of (W_1, ..., W_L) -> W_1 ... W_L, from ranks of partial products.

        sum_k (u_k - u_{k-1}) v_k,   u_k = rank W_{k+1} ... W_L,   v_k = rank W_1 ... W_{k-1},

    with u_0 = 0, u_L = H_L, v_1 = H_0. The image of the Jacobian is the sum over k of C_k (x) R_k, with C_k the column
    space of W_1 ... W_{k-1} and R_k the row space of W_{k+1} ... W_L. The C_k shrink and the R_k grow with k, so that
    step k adds C_k (x) (R_k / R_{k-1}).

    Args:
      weights: L matrices, ``weights[k]`` of shape (H_k, H_{k+1}).
    """
    return table_jacobian_rank(rank_table(weights))


def _contract(table: np.ndarray) -> tuple[np.ndarray, Fraction]:
    """Removes layers of full rank, exactly (``local_bounds``): the table of what is left, the coefficient split off."""
    kept, split = list(range(len(table))), 0
    k = 1
    while k < len(kept) and len(kept) > 2:
        before, after = kept[k - 1], kept[k]
        last, first = k == len(kept) - 1, k == 1
        change = int(table[after, after] - table[before, before])
        if table[before, after] == table[before, before]:
            split += change if last else 0
            kept.pop(k)
            k = 1
        elif table[before, after] == table[after, after]:
            split -= change if first else 0
            kept.pop(k - 1)
            k = 1
        else:
            k += 1
    return table[np.ix_(kept, kept)], Fraction(split * int(table[0, -1]), 2)


def local_codimension(table: np.ndarray) -> int:
    """Smallest codimension among the pieces of the zero set {W_1 ... W_L = W*} that reach the teacher.

    Pieces and codimensions are those of ``learning_coefficient``: with a_k >= 0 of sum H_0 - r,

        r (H_0 + H_L - r) + sum_k a_k (M_k + a_k / 2) - M_0^2 / 2,   M_k = H_k - r.

    On piece (a_k) the product of layers k+1 ... j has generically rank min over k <= i <= j of
    H_i - (a_{i+1} + ... + a_j). A piece reaches the teacher if and only if no partial product has a larger rank at the
    teacher (closures of orbits of type A quivers: Abeasis and Del Fra 1985), that is, if and only if

        a_{k+1} + ... + a_j <= H_k - rank(W_{k+1} ... W_j)   for all k < j.

    The right side is submodular on overlapping intervals (Frobenius' rank inequality), so the a_k range over the base
    of a polymatroid, where a separable convex function is minimised by adding one unit at a time where it costs least.
    With all ranks equal to r the constraints are idle and the result is twice the theorem's value.

    Args:
      table: of ``rank_table``.
    """
    widths, rank = table.diagonal().tolist(), int(table[0, -1])
    reduced = [width - rank for width in widths]
    slack = np.triu(table.diagonal()[:, None] - table, 1)
    drops = [0] * len(widths)
    free = list(range(1, len(widths)))
    for _ in range(reduced[0]):
        while True:
            k = min(free, key=lambda layer: reduced[layer] + drops[layer])
            if slack[:k, k:].min() > 0:
                break
            free.remove(k)
        drops[k] += 1
        slack[:k, k:] -= 1
    twice = sum(a * (2 * m + a) for a, m in zip(drops, reduced, strict=True)) - reduced[0] ** 2
    return rank * (widths[0] + widths[-1] - rank) + twice // 2


def table_bounds(table: np.ndarray) -> tuple[Fraction, Fraction]:
    """``local_bounds`` from the ranks of the partial products."""
    core, split = _contract(table)
    theorem, _ = learning_coefficient(core.diagonal().tolist(), int(core[0, -1]))
    return max(Fraction(table_jacobian_rank(table), 2), split + theorem), Fraction(local_codimension(table), 2)


def local_bounds(weights: Sequence[np.ndarray]) -> tuple[Fraction, Fraction]:
    """Rigorous bounds on the local learning coefficient at these weights; where they meet, they are its value.

    Lower, the larger of two:

    - (Jacobian rank) / 2. As many of the equations W_1 ... W_L = W* as that rank have independent gradients and serve
      as coordinates; the loss is at least a constant times the sum of their squares, which has coefficient rank / 2.
    - The theorem, after removing what is exactly removable. The theorem's value is the minimum over the zero set, hence
      at most the local one, of this network and of any network with the same local coefficient. A layer of full row
      rank before another one: (W_k, W_{k+1}) -> (W_k, W_k W_{k+1}) is a submersion, and the loss depends on the product
      alone, so the two layers count as one, whose width H_k is gone; likewise full column rank after another layer. At
      the ends: W_1 of full column rank is (I; B) T with T invertible; absorb T in W_2, and with P = W_2 ... W_L the
      equations are P = P* and (B - B*) P* = 0. The second splits off (H_0 - H_1) r / 2, the first is the network
      without its first layer. W_L of full row rank: the transpose. Repeat with the products as layers until none has
      full rank.

    Upper: half the codimension c of the zero set at the teacher, ``local_codimension``. Near a smooth point of a piece
    of codimension c the loss is at most a constant times the squared distance to that piece, so the coefficient is at
    most c / 2 there; such points lie in every neighbourhood of the teacher, whose coefficient is at most theirs. It
    never exceeds (number of weights) / 2. For two layers it is attained (eliminate the blocks that are invertible; the
    theorem holds for the rest); for more it is proven only where it meets the lower bound.

    Args:
      weights: L matrices, ``weights[k]`` of shape (H_k, H_{k+1}); their ranks are taken numerically, see
        ``rank_table``.

    Returns:
      (lower, upper).
    """
    return table_bounds(rank_table(weights))
