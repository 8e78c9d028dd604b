"""Are the error bars right? Default estimates of networks for many keys, in standard errors from a reference.

    python -m scaling.checkpoints.zscores                              # two keys of each problem: some minutes
    python -m scaling.checkpoints.zscores --keys 100 120 --only MLP    # more of them
    python -m scaling.checkpoints.zscores --methods "batch 256"        # minibatches, whose heat is subtracted
    python -m scaling.checkpoints.zscores --kinds --keys 100 120   # 23 small models of other kinds: hours
    python -m scaling.checkpoints.zscores --table

All runs of a problem sample one posterior, whose localization is that of a calibration with key 0. Its reference is
Hamiltonian Monte Carlo over all examples, with 40 steps for each draw, and four times as many draws if its chains
have nearly met; what it did not settle is in no average.

z = (LLC - reference) / (both standard errors, added in squares). Where the error bars are right its standard deviation
over problems and keys is 1. One JSON line for each problem, method and key; a row that is there is not run again.
"""

import argparse
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import slt_jax as slt
from scaling.checkpoints import problems
from scaling.checkpoints.networks import NETWORKS
from scaling.dln.records import Store
from slt_jax.machine import versions

RESULTS = Path(__file__).parent / "results" / "zscores.jsonl"
FIELDS = ("problem", "method", "key")
PROBLEMS: dict[str, Callable[[], problems.Problem]] = {
    "MLP": lambda: problems.digits(problems.MLP),
    "CNN": lambda: problems.digits(problems.CNN),
    **NETWORKS,
}
METHODS: dict[str, dict[str, Any]] = {"default": {}, "batch 256": {"batch_size": 256}}
REFERENCE = {"num_chains": 4, "num_draws": 500, "num_warmup": 150}
LONGER = {"num_chains": 4, "num_draws": 2000, "num_warmup": 600}
KNOWN_RHAT, HOPELESS_RHAT = 1.05, 1.3  # of a reference that is one; from where on more draws are not tried
ALL, ALL_CONVERGED = "all with a settled reference", "of them converged"
WRONG, ERRORS = 0.05, 3.0  # a converged estimate is wrong if it is off by more than both: a share, standard errors


def reference(problem: problems.Problem) -> tuple[slt.LocalPosterior, slt.LLCResult]:
    """(the posterior with its localization, Hamiltonian Monte Carlo over all examples)."""
    first = slt.estimate_llc(problem.posterior, problem.data, budget=4000, batch_size=problem.batch_size, key=0)
    posterior = dataclasses.replace(problem.posterior, localization=first.settings.localization)
    sample = functools.partial(slt.estimate_llc, posterior, problem.data, sampler=slt.hmc(num_steps=40), key=1)
    short = sample(**REFERENCE)
    found = short.to_dict()
    near = found["rhat"] is not None and found["rhat"] <= HOPELESS_RHAT
    return posterior, sample(**LONGER) if near and not settled(found) else short


def settled(row: dict[str, Any]) -> bool:
    return row["llc"] is not None and row["rhat"] is not None and row["rhat"] <= KNOWN_RHAT


def row_of(problem: str, method: str, key: int, result: slt.LLCResult, seconds: float) -> dict[str, Any]:
    found, s = result.to_dict(), result.settings
    names = ("llc", "llc_stderr", "llc_raw", "bias_noise", "rhat", "ess")
    return {
        "problem": problem, "method": method, "key": key, **{name: found[name] for name in names},
        "verdict": result.verdict, "localization": s.localization, "friction": s.friction, "batch_size": s.batch_size,
        "num_free": s.num_free, "gradients": sum(s.spent.values()), "seconds": seconds, "device": s.devices,
        "versions": versions(),
    }  # fmt: skip


def run(store: Store, name: str, methods: Iterable[str], keys: Iterable[int]) -> None:
    """Every row of this problem that is not in the store yet."""

    def add(method: str, key: int, estimate: Callable[[], slt.LLCResult]) -> None:
        began = time.perf_counter()
        row = row_of(name, method, key, estimate(), time.perf_counter() - began)
        store.add(row)
        print(f"{name}, {method}, key {key}: {row['llc']:.4g} +/- {row['llc_stderr']:.2g}, {row['verdict']}, "
              f"{row['seconds']:.0f} s", flush=True)  # fmt: skip

    wanted = [(method, key) for key in keys for method in methods]
    missing = [pair for pair in wanted if store.key(dict(zip(FIELDS, (name, *pair), strict=True))) not in store.rows]
    if not missing:
        return
    problem = PROBLEMS[name]()
    known = store.rows.get(store.key({"problem": name, "method": "reference", "key": 1}))
    if known is None:
        began = time.perf_counter()
        posterior, result = reference(problem)
        store.add(row_of(name, "reference", 1, result, time.perf_counter() - began))
    else:
        posterior = dataclasses.replace(problem.posterior, localization=known["localization"])
    for method, key in missing:
        given = {**METHODS[method], "key": key}
        add(method, key, functools.partial(slt.estimate_llc, posterior, problem.data, **given))


def zscore(row: dict[str, Any], reference: dict[str, Any]) -> float:
    return (row["llc"] - reference["llc"]) / math.hypot(row["llc_stderr"], reference["llc_stderr"])


def is_wrong(row: dict[str, Any], reference: dict[str, Any]) -> bool:
    """Whether it is called converged, and off."""
    off = abs(row["llc"] / reference["llc"] - 1) > WRONG and abs(zscore(row, reference)) > ERRORS
    return row["verdict"] == "converged" and off


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Mean and standard deviation of z for each problem and method, and for each method over all problems.

    A problem whose reference has not settled is in no average, and none of its estimates is called wrong.
    """
    rows = list(rows)
    references = {row["problem"]: row for row in rows if row["method"] == "reference"}
    scores: dict[tuple[str, str], list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        if row["method"] == "reference" or row["problem"] not in references or row["llc"] is None:
            continue
        reference = references[row["problem"]]
        scored = zscore(row, reference), row
        scores.setdefault((row["method"], row["problem"]), []).append(scored)
        if settled(reference):
            scores.setdefault((row["method"], ALL), []).append(scored)
            if row["verdict"] == "converged":
                scores.setdefault((row["method"], ALL_CONVERGED), []).append(scored)
    lines = [
        "| method | problem | weights | reference | its R-hat | keys | mean estimate | mean error | mean z | "
        "standard deviation of z | converged | converged and wrong |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (method, problem), found in sorted(
        scores.items(), key=lambda item: (item[0][0], item[0][1] in (ALL, ALL_CONVERGED), item[0][1])
    ):
        z = np.array([score for score, _ in found])
        cells = ["", "", "", "", ""]
        if problem not in (ALL, ALL_CONVERGED):
            reference = references[problem]
            mean, error = (f"{np.mean([row[k] for _, row in found]):.4g}" for k in ("llc", "llc_stderr"))
            known = f"{reference['llc']:.4g} ± {reference['llc_stderr']:.2g}"
            cells = [str(reference["num_free"]), known, f"{reference['rhat']:.3f}", mean, error]
        spread = f"{z.std(ddof=1):.2f}" if len(z) > 1 else ""
        converged = sum(row["verdict"] == "converged" for _, row in found)
        known = [row for _, row in found if settled(references[row["problem"]])]
        wrong = sum(is_wrong(row, references[row["problem"]]) for row in known)
        lines.append(f"| {method} | {problem} | {' | '.join(cells[:3])} | {len(z)} | {' | '.join(cells[3:])} | "
                     f"{z.mean():+.2f} | {spread} | {converged} | {wrong} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs=2, default=(100, 102), metavar=("FROM", "TO"), help="TO is left out")
    parser.add_argument("--only", nargs="+", default=["MLP", "CNN"], choices=list(PROBLEMS))
    parser.add_argument("--kinds", action="store_true", help="the small models of other kinds, in place of --only")
    parser.add_argument("--methods", nargs="+", default=["default"], choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    store = Store(given.out, FIELDS)
    if not given.table:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
        for name in NETWORKS if given.kinds else given.only:
            run(store, name, given.methods, range(*given.keys))
    print(table(store.rows.values()))


if __name__ == "__main__":
    main()
