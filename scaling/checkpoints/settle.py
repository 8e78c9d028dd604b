"""Does the default settle on trained models? It against long runs of another sampler, and SGLD at published settings.

    python -m scaling.checkpoints.settle                       # the networks on digits
    python -m scaling.checkpoints.settle --language FOLDER     # a checkpoint with tokens.npy in its folder
    python -m scaling.checkpoints.settle --table

All runs of one problem sample the same posterior: its localization is that of the first run's calibration, unless it
was published. The reference of the digits is Hamiltonian Monte Carlo over all examples, which has no bias of a step
size or of minibatches; that of a language model is SGLD with a step of 1e-4, with which the localization alone settles
within 70 steps, for 600 steps.

One JSON line for a method and a seed, in a file for each problem; a row that is there is not run again.
"""

import argparse
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import slt_jax as slt
from scaling.checkpoints import problems
from scaling.dln.records import Store
from slt_jax.machine import versions

RESULTS = Path(__file__).parent / "results" / "settle"
FIELDS = ("problem", "method", "seed")
METHODS = ("default", "SGLD, published", "reference")
TARGET = 0.03
PUBLISHED = {"num_chains": 4, "num_draws": 200, "num_warmup": 200}
DIGITS: dict[str, Callable[[], problems.Problem]] = {
    "digits MLP": lambda: problems.digits(problems.MLP), "digits CNN": lambda: problems.digits(problems.CNN),
}  # fmt: skip


def methods(name: str, batch_size: int) -> dict[str, dict[str, Any]]:
    """Arguments of ``estimate_llc`` for each method."""
    found: dict[str, dict[str, Any]] = {
        "default": {"target_error": TARGET, "batch_size": None if name in DIGITS else batch_size},
        "SGLD, published": {"sampler": slt.sgld(1e-3 if name not in DIGITS else 1e-4), "batch_size": batch_size,
                            **PUBLISHED},
    }  # fmt: skip
    if name in DIGITS:
        reference = {"sampler": slt.hmc(), "num_chains": 4, "num_draws": 600, "num_warmup": 200}
    else:
        reference = {"sampler": slt.sgld(1e-4), "num_chains": 4, "num_draws": 200, "num_warmup": 200, "thinning": 2,
                     "batch_size": batch_size}  # fmt: skip
    return {"reference": reference, **found}


def run(
    name: str, problem: problems.Problem, method: str, seed: int, localization: float | None, budget: int | None
) -> dict[str, Any]:
    """One row."""
    posterior = problem.posterior
    if localization is not None:
        posterior = dataclasses.replace(posterior, localization=localization)
    arguments, began = methods(name, problem.batch_size)[method], time.perf_counter()
    if method == "default" and budget is not None:
        arguments["budget"] = budget
    result = slt.estimate_llc(posterior, problem.data, key=seed, progress=True, **arguments)
    found, s = result.to_dict(), result.settings
    return {
        "problem": name, "method": method, "seed": seed, **{k: found[k] for k in ("llc", "llc_stderr", "rhat", "ess")},
        "verdict": result.verdict, "reason": result.health.reason, "notes": list(result.notes),
        "extrapolated": found["extrapolated"], "localization": s.localization, "nbeta": s.nbeta,
        "step_size": s.step_size, "num_free": s.num_free, "gradients": sum(s.spent.values()),
        "budget": budget, "seconds": time.perf_counter() - began, "device": s.devices, "versions": versions(),
    }  # fmt: skip


def run_all(
    name: str, make: Callable[[], problems.Problem], seeds: int, only: Sequence[str], budget: int | None
) -> None:
    problem, localization = None, None
    store = Store(RESULTS / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl", FIELDS)
    for seed in range(seeds):
        for method in only:
            key = {"problem": name, "method": method, "seed": seed}
            if method == "reference" and seed:
                continue
            if (row := store.rows.get(store.key(key))) is None:
                problem = problem or make()
                row = run(name, problem, method, seed, localization, budget)
                store.add(row)
                print(f"{name}, {method}, seed {seed}: {row['llc']:.4g} +/- {row['llc_stderr']:.2g}, {row['verdict']}, "
                      f"{row['seconds']:.0f} s", flush=True)  # fmt: skip
            localization = row["localization"]


def all_rows() -> list[dict[str, Any]]:
    return [row for file in sorted(RESULTS.glob("*.jsonl")) for row in Store(file, FIELDS).rows.values()]


def table(rows: list[dict[str, Any]]) -> str:
    """Each method's estimates beside the reference, for each problem."""
    lines = [
        "| problem | method | estimate | off | in errors | verdict | gradients | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    references = {row["problem"]: row for row in rows if row["method"] == "reference"}
    for row in sorted(rows, key=lambda row: (row["problem"], row["method"], row["seed"])):
        best = references.get(row["problem"])
        off = z = ""
        if best is not None and best is not row and row["llc"] is not None:
            off = f"{row['llc'] / best['llc'] - 1:+.1%}"
            z = f"{(row['llc'] - best['llc']) / np.hypot(row['llc_stderr'], best['llc_stderr']):+.1f}"
        lines.append(
            f"| {row['problem']} | {row['method']} | {row['llc']:.4g} ± {row['llc_stderr']:.2g} | {off} | {z} | "
            f"{row['verdict']} | {row['gradients']:,.0f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", type=Path, help="folder of a checkpoint, with tokens.npy")
    parser.add_argument("--name", help="of that checkpoint, in the table")
    parser.add_argument("--seq-len", type=int, default=112)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", help="of the digits' networks, this one")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--budget", type=int, help="of the default, minibatch gradients at most")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(all_rows()))
        return
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    if given.language is not None:
        name = given.name or given.language.name
        make = functools.partial(problems.language, given.language, given.seq_len)
        run_all(name, make, given.seeds, given.methods, given.budget)
    else:
        for name, make in DIGITS.items():
            if given.only in (None, name):
                run_all(name, make, given.seeds, given.methods, given.budget)


if __name__ == "__main__":
    main()
