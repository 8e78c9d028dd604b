"""Deep linear teachers: the theorem against counts that do not use it, local numbers against enumerations."""

import functools
import itertools
import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest

from scaling.dln import truth

# (widths, rank, learning coefficient, multiplicity); with tied widths the theorem's inequalities are easily misread
VECTORS = [
    ((3, 4), 2, Fraction(6), 1),
    ((1, 1), 0, Fraction(1, 2), 1),
    ((1, 1, 1), 0, Fraction(1, 2), 2),
    ((2, 2, 2), 0, Fraction(3, 2), 1),
    ((2, 2, 2), 1, Fraction(2), 2),
    ((1, 2, 2), 0, Fraction(1), 2),
    ((2, 3, 3), 0, Fraction(5, 2), 1),
    ((5, 3, 5), 0, Fraction(13, 2), 2),
    ((5, 4, 5), 2, Fraction(21, 2), 1),
    ((10, 3, 10), 3, Fraction(51, 2), 1),
    ((2, 2, 2, 2), 0, Fraction(3, 2), 3),
    ((2, 2, 2, 2, 2), 0, Fraction(3, 2), 5),
    ((4, 7, 5, 6, 3), 2, Fraction(6), 1),
    ((10, 20, 20, 10), 5, Fraction(50), 1),
    ((50, 100, 80, 60), 20, Fraction(2975, 2), 1),
    ((1000, 1000, 1000, 1000, 1000, 1000), 300, Fraction(402000), 1),
]
SMALL_NETS = [
    (widths, rank)
    for layers in range(1, 5)
    for widths in itertools.product(range(1, 6), repeat=layers + 1)
    for rank in range(min(widths) + 1)
]


# --- the theorem


@pytest.mark.quick
@pytest.mark.parametrize(("widths", "rank", "value", "multiplicity"), VECTORS)
def test_known_values(widths, rank, value, multiplicity):
    assert truth.learning_coefficient(widths, rank) == (value, multiplicity)
    narrow = np.array(widths, dtype=np.int16)  # S^2 does not fit
    assert truth.learning_coefficient(narrow, np.int16(rank)) == (value, multiplicity)


def test_value_is_half_the_smallest_codimension_of_the_zero_set():
    """Every sequence of ranks of W_1 ... W_k is tried, no optimality condition used. Value only, all 9584 nets.

    That half the codimension is the learning coefficient is taken from the literature, not checked here.
    """

    def codimension(widths, rank):
        @functools.cache
        def rest(k, alive):
            if k == len(widths):
                return 0 if alive == rank else math.inf
            choices = range(rank, min(alive, widths[k]) + 1)
            return min(((alive - c) * (widths[k] - c) + rest(k + 1, c) for c in choices), default=math.inf)

        return rest(1, widths[0]) + rank * (widths[0] + widths[-1] - rank)

    for widths, rank in SMALL_NETS:
        assert truth.learning_coefficient(widths, rank)[0] == Fraction(codimension(widths, rank), 2)


def test_value_and_multiplicity_from_counting_lattices():
    """A second derivation, of both numbers; all 9584 nets.

    Rank 0, n the smallest width, the others q_1 ... q_L. Over the p-adic integers layer k is a random sublattice of the
    one before, type mu_k with weight p^(-q_k |mu_k|). Hall's algebra counts the chains of given types whose end has
    type lambda: p^((n-1)|lambda| - n(lambda) - sum n(mu_k)) where the Littlewood-Richardson condition holds, with
    n(mu) = sum (i-1) mu_i. The product vanishes mod p^N when all lambda_i >= N. Hence twice the value is the minimum of
    |lambda| + n(lambda) + sum_ki (q_k - n + i - 1) mu_ki at lambda = (1, ..., 1), 0 <= mu_ki <= 1, sum mu_ki = n: the n
    cheapest of the levels q_k - n + i - 1. The order of the pole is 1 + the dimension of the minimising face: f of t
    levels tie for the last places, and tight frames of t vectors in f dimensions have f (t - f) of it.
    """
    for widths, rank in SMALL_NETS:
        n, *others = sorted(width - rank for width in widths)
        levels = sorted(q - n + i for q in others for i in range(n))
        regular = rank * (widths[0] + widths[-1] - rank)
        value = Fraction(regular + n * (n + 1) // 2 + sum(levels[:n]), 2)
        filled, tied = (levels[:n].count(levels[n - 1]), levels.count(levels[n - 1])) if n else (0, 0)
        assert truth.learning_coefficient(widths, rank) == (value, 1 + filled * (tied - filled))


def vanishing_volume(others, depth, p=101.0):
    """Volume, up to a constant, of the p-adic nets of widths (2, *others) whose product vanishes mod p^depth.

    Lattices up to scale are the vertices of a tree: a layer multiplies by p^nu and walks e edges in a random direction,
    ``back`` of them towards the root. State: (smaller exponent, capped at depth; distance from the root).
    """
    states = {(0, 0): 1.0}
    for q in others:
        following = defaultdict(float)
        for (low, distance), weight in states.items():
            for nu, e in itertools.product(range(depth + 1), repeat=2):
                sublattices = p ** (e - 1) * (p + 1) if e else 1.0
                turn = min(distance, e)
                for back in range(turn + 1):
                    share = 1.0 if back == 0 else 1 / ((p + 1) * p ** (back - 1))
                    if turn:
                        share *= p / (p + 1) if back == 0 else (p - 1) / p if back < turn else 1.0
                    end = min(low + nu + back, depth), distance + e - 2 * back
                    following[end] += weight * sublattices * share * p ** (-q * (2 * nu + e))
        states = following
    return sum(weight for (low, _), weight in states.items() if low == depth)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_value_and_multiplicity_from_volumes(layers):
    """The volume is p^(-2 value N) times a polynomial in N of degree multiplicity - 1: summed over chains, not derived.

    Widths (2, 2 or 3, ...), rank 0. It says nothing about fields other than the p-adic; there value and multiplicity
    come from the same valuations.
    """
    for others in itertools.combinations_with_replacement((2, 3), layers):
        value, multiplicity = truth.learning_coefficient((2, *others), 0)
        depths = range(2, multiplicity + 4)
        scaled = np.array([vanishing_volume(others, n) * 101.0 ** (2 * value * n) for n in depths])
        assert abs(np.diff(scaled, n=multiplicity)).max() < 1e-4
        assert np.diff(scaled, n=multiplicity - 1).min() > 1


def test_value_and_multiplicity_of_two_layers_from_singular_values():
    """Over the reals: one Laplace integral over the exponents s_i of the first layer's singular values e^s_i.

    Rank 0, widths (a, b, c), p = min(a, b): their density gives s_i the cost |a - b| + 1 + 2 (p - i), the second layer
    costs c (1 - s_i) each.
    """
    for a, b, c in itertools.product(range(1, 9), repeat=3):
        p = min(a, b)
        slopes = [abs(a - b) + 1 + 2 * (p - i) - c for i in range(1, p + 1)]
        value = Fraction(p * c + sum(min(slope, 0) for slope in slopes), 2)
        assert truth.learning_coefficient((a, b, c), 0) == (value, 1 + slopes.count(0))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("widths", "rank", "message"),
    [((3,), 1, "at least 2"), ((3, 0, 2), 0, ">= 1"), ((3, 2), 3, "smallest width, 2, got 3"), ((3, 2), -1, "got -1")],
)
def test_impossible_networks_are_refused(widths, rank, message):
    with pytest.raises(ValueError, match=message):
        truth.learning_coefficient(widths, rank)


# --- local numbers


def strand_nets(widths):
    """Every way to compose a net of strands, basis vectors that live from layer i to layer j: {(i, j): how many}.

    Up to a change of basis in every layer these are all nets (type A quivers).
    """
    intervals = list(itertools.combinations_with_replacement(range(len(widths)), 2))

    def extend(position, left, chosen):
        if position == len(intervals):
            yield dict(chosen)
            return
        i, j = intervals[position]
        last_with_start = j == len(widths) - 1
        for many in range(min(left[i : j + 1]) + 1):
            if not last_with_start or left[i] == many:
                rest = [h - many if i <= k <= j else h for k, h in enumerate(left)]
                yield from extend(position + 1, rest, [*chosen, ((i, j), many)])

    yield from extend(0, list(widths), [])


def strand_table(net, depth):
    table = np.zeros((depth + 1, depth + 1), dtype=np.int64)
    for (i, j), many in net.items():
        for a, b in itertools.combinations_with_replacement(range(i, j + 1), 2):
            table[a, b] += many
    return table


def strand_weights(net, widths, rng):
    """float64 weights of such a net in random bases."""
    weights = [np.zeros(shape) for shape in itertools.pairwise(widths)]
    used = [0] * len(widths)
    for (i, j), many in net.items():
        for _ in range(many):
            for k in range(i, j):
                weights[k][used[k], used[k + 1]] = 1.0
            for k in range(i, j + 1):
                used[k] += 1
    bases = [np.eye(h) + 0.3 * rng.standard_normal((h, h)) for h in widths]
    return [np.linalg.solve(bases[k], w @ bases[k + 1]) for k, w in enumerate(weights)]


def numerical_jacobian_rank(weights):
    products = [np.eye(len(weights[0]))]
    for layer in weights:
        products.append(products[-1] @ layer)
    after = np.eye(weights[-1].shape[1])
    blocks = []
    for k in reversed(range(len(weights))):
        blocks.append(np.kron(products[k], after.T))
        after = weights[k] @ after
    return np.linalg.matrix_rank(np.concatenate(blocks, axis=1), tol=1e-8)


@pytest.mark.quick
@pytest.mark.parametrize("widths", [(3, 3), (3, 2, 4), (2, 4, 3, 3), (3, 3, 2, 3), (2, 2, 3, 2, 2)])
def test_jacobian_rank_is_the_numerical_one_at_every_kind_of_point(widths):
    rng = np.random.default_rng(0)
    nets = list(strand_nets(widths))
    for index in rng.permutation(len(nets))[:40]:
        weights = strand_weights(nets[index], widths, rng)
        np.testing.assert_array_equal(truth.rank_table(weights), strand_table(nets[index], len(widths) - 1))
        assert truth.jacobian_rank(weights) == numerical_jacobian_rank(weights)


@pytest.mark.parametrize(
    "widths", [(2, 3), (3, 2, 3), (2, 4, 3), (2, 2, 2, 2), (3, 2, 3, 2), (2, 3, 3, 2), (2, 2, 2, 2, 2)]
)
def test_local_codimension_is_the_smallest_over_all_pieces_that_reach_the_point(widths):
    """At every point there is. Pieces are orbits of strands; codimension = the ways two strands could be re-joined."""
    depth = len(widths) - 1
    tables, codimensions = [], []
    for net in strand_nets(widths):
        pairs = itertools.product(net.items(), repeat=2)
        orbit = sum(m * n for ((a, b), m), ((c, d), n) in pairs if a < c <= b + 1 and b < d)
        table = strand_table(net, depth)
        rank = table[0, -1]
        tables.append(table)
        codimensions.append(orbit + rank * (widths[0] + widths[-1] - rank))
    tables, codimensions = np.array(tables), np.array(codimensions)
    for table in tables:
        reach = (tables >= table).all(axis=(1, 2)) & (tables[:, 0, -1] == table[0, -1])
        assert truth.local_codimension(table) == codimensions[reach].min()
        theorem, _ = truth.learning_coefficient(widths, table[0, -1])
        assert theorem == Fraction(int(codimensions[tables[:, 0, -1] == table[0, -1]].min()), 2)
        lower, upper = truth.table_bounds(table)
        assert Fraction(truth.table_jacobian_rank(table), 2) <= lower <= upper
        assert theorem <= lower


def test_bounds_at_the_deepest_point_are_the_theorem():
    for widths, rank in SMALL_NETS:
        bounds = truth.table_bounds(truth.generic_rank_table(widths, [rank] * (len(widths) - 1)))
        assert bounds == (truth.learning_coefficient(widths, rank)[0],) * 2


def test_the_upper_bound_is_attained_by_two_layers():
    """Without the r common strands, ranks q and s: q c + s a - q s equations are regular, the theorem has the rest.

    The lower bound gets there too where a layer has full rank.
    """
    for widths in itertools.product(range(1, 5), repeat=3):
        for net in strand_nets(widths):
            table = strand_table(net, 2)
            rank = table[0, 2]
            (a, b, c), q, s = table.diagonal() - rank, table[0, 1] - rank, table[1, 2] - rank
            regular = rank * (widths[0] + widths[2] - rank) + q * c + s * a - q * s
            value = Fraction(int(regular), 2)
            if min(a - q, b - q - s, c - s) > 0:
                value += truth.learning_coefficient((a - q, b - q - s, c - s), 0)[0]
            lower, upper = truth.table_bounds(table)
            assert lower <= value == upper
            if q in (a, b) or s in (b, c):
                assert lower == value


@pytest.mark.quick
def test_an_invertible_layer_hides_the_theorem():
    """W_1 invertible, W_2 = 0: n^2 / 2, not the theorem's 3 n^2 / 8."""
    weights = (np.eye(4) + 0.1, np.zeros((4, 4)))
    assert truth.local_bounds(weights) == (Fraction(8), Fraction(8))
    assert truth.learning_coefficient((4, 4, 4), 0) == (Fraction(6), 1)


@pytest.mark.quick
def test_layers_that_do_not_chain_are_refused():
    with pytest.raises(ValueError, match="shapes chain"):
        truth.jacobian_rank([np.zeros((2, 3)), np.zeros((2, 3))])
    with pytest.raises(ValueError, match="3 widths need 2 layer ranks, got 1"):
        truth.generic_rank_table((2, 3, 2), (1,))
