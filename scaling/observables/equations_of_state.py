"""The generalization error that ``slt.generalization`` predicts, against the actual one, over many data sets.

Two models whose posterior can be drawn exactly, so that nothing but the equations of state is tested: a linear model
with 5 weights (regular), and y = w^k x + N(0, 1) with the true w = 0 (singular). Of each data set the excess over the
loss of the truth, times n: predicted from the training data alone, and actual. Of the mean over data sets, their
difference, its standard error, and the laws lambda / beta -+ nu.

400 data sets of 4 models take 15 minutes on one core. Expected: every |z| below 2 to 3, "gibbs" at both temperatures,
and "bayes" at beta = 1.

    python -m scaling.observables.equations_of_state --out scaling/observables/results/equations_of_state.json
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import slt_jax as slt
from slt_jax.machine import versions

CHAINS, DRAWS, FRESH = 4, 150, 4000


class Case(NamedTuple):
    """One data set: losses of the training examples at the draws (draw, example), of fresh ones, and of the truth."""

    losses: np.ndarray
    fresh: np.ndarray
    truth: np.ndarray
    truth_fresh: np.ndarray
    gibbs: float  # the exact excess of the Gibbs loss on new data


def regular(rng: np.random.Generator, n: int, beta: float, dimension: int = 5) -> Case:
    x, fresh = rng.standard_normal((n, dimension)), rng.standard_normal((FRESH, dimension))
    noise, noise_fresh = rng.standard_normal(n), rng.standard_normal(FRESH)
    covariance = np.linalg.inv(beta * x.T @ x)
    mean = beta * covariance @ (x.T @ noise)  # the true weights are 0
    w = mean + rng.standard_normal((CHAINS * DRAWS, dimension)) @ np.linalg.cholesky(covariance).T
    exact = 0.5 * float(mean @ mean + np.trace(covariance))
    return Case(0.5 * (noise - w @ x.T) ** 2, 0.5 * (noise_fresh - w @ fresh.T) ** 2, 0.5 * noise**2,
                0.5 * noise_fresh**2, exact)  # fmt: skip


def singular(rng: np.random.Generator, n: int, beta: float, power: int = 2) -> Case:
    x, fresh = rng.standard_normal(n), rng.standard_normal(FRESH)
    noise, noise_fresh = rng.standard_normal(n), rng.standard_normal(FRESH)
    w = np.sinh(np.linspace(-9, 9, 20_001)) / np.sinh(9)  # a flat prior on (-1, 1)
    t = w**power
    energy = 0.5 * beta * (t**2 * (x @ x) - 2 * t * (x @ noise))
    density = np.exp(-(energy - energy.min())) * np.gradient(w)
    density /= density.sum()
    drawn = np.interp(rng.random(CHAINS * DRAWS), np.cumsum(density) - density / 2, t)[:, None]
    exact = 0.5 * float(density @ t**2)
    return Case(0.5 * (noise - drawn * x) ** 2, 0.5 * (noise_fresh - drawn * fresh) ** 2, 0.5 * noise**2,
                0.5 * noise_fresh**2, exact)  # fmt: skip


def observed(name: str, losses: np.ndarray, truth: np.ndarray, n: int, beta: float) -> slt.Observed:
    values = losses.reshape(CHAINS, DRAWS, -1).astype(np.float32)
    gap = values.mean(-1, dtype=np.float64) - truth.mean()
    return slt.Observed(
        name=name, level="example", values=values, moments=None, center=truth.astype(np.float32), valid=None, gap=gap,
        nbeta=n * beta, num_data=n, localization=0.0,
    )  # fmt: skip


def row_of(case: Case, n: int, beta: float) -> dict[str, float]:
    """n times the excess losses of one data set, and nu."""
    seen = observed("train", case.losses, case.truth, n, beta)
    found = slt.generalization(None, seen, observed("new", case.fresh, case.truth_fresh, n, beta))
    truth, fresh = float(case.truth.mean()), float(case.truth_fresh.mean())
    assert found.bayes_train is not None
    assert found.waic is not None
    assert found.bayes_heldout is not None
    return {
        "nu": found.fluctuation.value,
        "gibbs_train": n * (found.gibbs_train.value - truth),
        "gibbs_predicted": n * (found.gibbs_predicted.value - truth),
        "gibbs_actual": n * case.gibbs,
        "bayes_train": n * (found.bayes_train.value - truth),
        "bayes_predicted": n * (found.waic.value - truth),
        "bayes_actual": n * (found.bayes_heldout.value - fresh),
        "mc_stderr": n * found.gibbs_predicted.stderr,
    }


def summary(rows: list[dict[str, float]], llc: float, beta: float) -> dict[str, Any]:
    """Means over data sets with their standard errors, and z of predicted less actual."""
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    found: dict[str, Any] = {name: [float(x.mean()), _error(x)] for name, x in table.items()}
    for kind in ("gibbs", "bayes"):
        away = table[f"{kind}_predicted"] - table[f"{kind}_actual"]
        found[f"{kind}_z"] = float(away.mean() / _error(away))
    nu = found["nu"][0]
    found["laws"] = {"gibbs_train": llc / beta - nu, "gibbs_actual": llc / beta + nu,
                     "bayes_train": (llc - nu) / beta - nu, "bayes_actual": (llc - nu) / beta + nu}  # fmt: skip
    return found


def _error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / math.sqrt(len(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data-sets", type=int, default=400)
    parser.add_argument("--n", type=int, default=1000)
    args = parser.parse_args()
    record: dict[str, Any] = {"data_sets": args.data_sets, "n": args.n, "draws": CHAINS * DRAWS, "versions": versions()}
    for name, make, llc in (("regular", regular, 2.5), ("singular", singular, 0.25)):
        for beta in (1.0, 1 / math.log(args.n)):
            start, rng = time.perf_counter(), np.random.default_rng([len(name), round(1000 * beta)])
            rows = [row_of(make(rng, args.n, beta), args.n, beta) for _ in range(args.data_sets)]
            found = summary(rows, llc, beta)
            record[f"{name}, beta {beta:.3g}"] = found | {"llc": llc, "seconds": time.perf_counter() - start}
            args.out.write_text(json.dumps(record, indent=1) + "\n")
            print(name, beta, {k: v for k, v in found.items() if k.endswith("_z") or k == "nu"}, flush=True)


if __name__ == "__main__":
    main()
