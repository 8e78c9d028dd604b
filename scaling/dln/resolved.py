"""What share of a regular teacher's coefficient its posterior holds, at any nbeta.

    python -m scaling.dln.resolved --class 1M --type B --seed 6 --narrower 14

To second order in the displacements V_k the loss sees them only through D = sum_k A_k V_k B_k, with A_k and B_k the
products of the teacher's layers on either side. With e_i the eigenvalues of M = sum_k (A_k A_k') (x) (B_k' B_k), and
c = 2 nbeta (100 / 3) / H_L,

    nbeta E[L] = (1/2) sum_i c e_i / (c e_i + localization):

of each direction of W* that counts a half, as far as its curvature outweighs the localization. In a deep network with
nearly singular layers the e_i span so many decades that no usual nbeta holds them all.

M has (H_0 H_L)^2 entries: a large teacher is stood for by one of the same shape, so many times narrower.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from scaling.dln import truth
from scaling.dln.methods import FLAT
from scaling.dln.teachers import INPUT_VARIANCE, SIZES, Shape, draw_layer, draw_shape


def eigenvalues(weights: Sequence[np.ndarray]) -> np.ndarray:
    """The e_i, decreasing, of all H_0 H_L directions; 0 for those that are not above rounding."""
    count = len(weights)
    before, after = [np.eye(weights[0].shape[0])], [np.eye(weights[-1].shape[1])]
    for k in range(count - 1):
        before.append(before[-1] @ weights[k])
        after.append(weights[count - 1 - k] @ after[-1])
    pairs = zip(before, reversed(after), strict=True)
    found = np.linalg.eigvalsh(sum(np.kron(a @ a.T, b.T @ b) for a, b in pairs))[::-1]
    return np.where(found > len(found) * np.finfo(float).eps * found[0], found, 0.0)


def held(found: np.ndarray, outputs: int, nbeta: float, localization: float) -> float:
    """nbeta E[L], to second order, for these e_i and so many outputs."""
    curvature = 2 * nbeta * INPUT_VARIANCE / outputs * found
    return 0.5 * float(np.sum(curvature / (curvature + localization)))


def narrowed(shape: Shape, times: float) -> Shape:
    """All widths, and the ranks that are not full, so many times smaller; widths of 4 at least."""
    widths = tuple(max(4, round(width / times)) for width in shape.widths)
    ranks = []
    for rank, old, new in zip(shape.layer_ranks, pairwise(shape.widths), pairwise(widths), strict=True):
        ranks.append(max(1, round(rank / times)) if rank < min(old) else min(new))
    return Shape(widths, tuple(ranks))


def shares(shape: Shape, outputs: int, nbeta: Sequence[float], seed: int) -> list[float]:
    """``held`` over the coefficient of a teacher of this shape, at each nbeta and a localization beside it."""
    rng = np.random.default_rng(seed)
    layers = zip(pairwise(shape.widths), shape.layer_ranks, strict=True)
    found = eigenvalues([draw_layer(rng, *pair, rank).astype(float) for pair, rank in layers])
    whole = truth.table_jacobian_rank(truth.generic_rank_table(*shape)) / 2
    return [held(found, outputs, x, np.sqrt(x / FLAT)) / whole for x in nbeta]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class", dest="size", choices=list(SIZES), required=True)
    parser.add_argument("--type", dest="kind", choices=("B", "C"), required=True)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--narrower", type=float, default=14.0, help="times, to stand for a large teacher")
    parser.add_argument("--nbeta", type=float, nargs="+", default=[1e8, 1e12, 1e16, 1e20, 1e24])
    args = parser.parse_args()
    print("| teacher | layers | " + " | ".join(f"{x:.0e}" for x in args.nbeta) + " |")
    print("|---" * (2 + len(args.nbeta)) + "|")
    for seed in args.seed:
        shape = draw_shape(args.kind, args.size, seed)
        small = narrowed(shape, args.narrower)
        told = " | ".join(f"{share:.3f}" for share in shares(small, shape.widths[-1], args.nbeta, seed))
        print(f"| {args.size} {args.kind} {seed} | {len(small.layer_ranks)} | {told} |")


if __name__ == "__main__":
    main()
