"""How many of the published benchmark's quoted truths cannot be true. About two minutes on one core.

    python -m scaling.dln.published_truths --out scaling/dln/results/published-truths.json

The benchmark quotes the theorem's value for every net of its recipe. Only shapes and ranks are drawn: a net's bounds
depend on nothing else (``truth``).
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling.dln.teachers import SIZES, draw_shape
from scaling.dln.truth import generic_rank_table, learning_coefficient, table_bounds, table_jacobian_rank

MARGIN = 1.01  # more than 1 % above the quoted truth


class Known(NamedTuple):
    """One net: the quoted truth, and what is rigorously known of the local learning coefficient at its weights."""

    quoted: float
    half_jacobian_rank: float
    lower: float
    upper: float


def known(size: str, seed: int) -> Known:
    shape = draw_shape("published", size, seed)
    table = generic_rank_table(*shape)
    quoted, _ = learning_coefficient(shape.widths, min(shape.layer_ranks))
    lower, upper = table_bounds(table)
    return Known(float(quoted), table_jacobian_rank(table) / 2, float(lower), float(upper))


def share(hits: np.ndarray) -> dict[str, float]:
    """A share of the nets and its binomial standard error."""
    mean = float(hits.mean())
    return {"share": round(mean, 5), "stderr": round(math.sqrt(mean * (1 - mean) / len(hits)), 5)}


def count(size: str, nets: int) -> dict[str, Any]:
    """Shares over ``nets`` nets of a class; ``local_known`` counts those whose bounds meet."""
    quoted, jacobian, lower, upper = np.array([known(size, seed) for seed in range(nets)]).T
    return {
        "nets": nets,
        "impossible": share(lower > MARGIN * quoted),
        "impossible_by_jacobian_rank": share(jacobian > MARGIN * quoted),
        "not_the_local_value": share(lower > quoted),
        "local_known": share(lower == upper),
        "largest_lower_over_quoted": round(float((lower / quoted).max()), 4),
        "median_lower_over_quoted_of_impossible": _median(lower / quoted),
    }


def _median(ratios: np.ndarray) -> float | None:
    wrong = ratios[ratios > MARGIN]
    return round(float(np.median(wrong)), 4) if wrong.size else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "published-truths.json")
    parser.add_argument("--nets", type=int, default=2000, help="nets of each class")
    parser.add_argument("--class", dest="sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    args = parser.parse_args()
    record = {"margin": MARGIN, "classes": {}}
    for size in args.sizes:
        found = record["classes"][size] = count(size, args.nets)
        print(f"{size}: impossible {found['impossible']['share']:.1%}, by Jacobian rank alone "
              f"{found['impossible_by_jacobian_rank']['share']:.1%}", flush=True)  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
