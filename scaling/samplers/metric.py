"""The Kronecker metric on deep linear teachers of the 1K class, at a tenth to all of the published budget.

    python -m scaling.samplers.metric            # about fifteen minutes on two cores
    python -m scaling.samplers.metric --table    # the table, from what is there

Without label noise nbeta is free, and what keeps it small is the range of curvatures that a chain can bridge. In the
metric's coordinates there is hardly any: teachers of each kind at nbeta 1e8 beside the default nbeta, n / log n = 8686,
budgets of 1,000, 3,000 and 10,000 minibatch gradients, calibration and all chains counted; everything else is left to
the calibration. One JSON line an estimate.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import slt_jax as slt
from scaling.dln.records import Store, errors_of
from scaling.dln.teachers import SIZES, Teacher, loss_fn, make_data, make_teacher
from scaling.samplers.teachers import BATCH

NBETAS = (None, 1e8)
BUDGETS = (1000, 3000, 10_000)
FIELDS = ("kind", "seed", "asked nbeta", "budget")


def estimate(teacher: Teacher, data: tuple, nbeta: float | None, budget: int) -> slt.LLCResult:
    center = [jnp.asarray(w) for w in teacher.weights]
    posterior = slt.LocalPosterior(loss_fn, center, SIZES[teacher.size].num_data, nbeta=nbeta)
    sampler = slt.underdamped(metric="kronecker")
    return slt.estimate_llc(posterior, data, sampler=sampler, budget=budget, batch_size=BATCH, key=teacher.seed)


def row_of(teacher: Teacher, asked: dict, result: slt.LLCResult, seconds: float) -> dict:
    found = result.to_dict()
    settings = found["settings"]
    return {
        **asked, "widths": teacher.widths, "rank": teacher.rank, "truth": float(teacher.truth),
        **{k: found[k] for k in ("llc", "llc_stderr", "llc_raw", "verdict", "flags", "virial", "kinetic")},
        "nbeta": settings["nbeta"], "localization": settings["localization"],
        "chosen": settings["calibration"]["lines"], "gradients": sum(settings["gradients"].values()),
        "seconds": round(seconds, 1), "device": settings["devices"], "versions": settings["versions"],
    }  # fmt: skip


def table(store: Store) -> None:
    print("| type | nbeta | gradients | teachers | median error | 90th | non-finite | pairs right | converged |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in "ABC":
        for nbeta in NBETAS:
            for budget in BUDGETS:
                asked = {"kind": kind, "asked nbeta": nbeta, "budget": budget}
                rows = [r for r in store.rows.values() if asked.items() <= r.items()]
                if rows:
                    found = errors_of([(r["truth"], r["llc"]) for r in rows])
                    said = sum(r["verdict"] == "converged" for r in rows)
                    shares = f"{found.median:.1%} | {found.ninetieth:.1%} | {found.non_finite} | {found.ranked:.1%}"
                    print(f"| {kind} | {rows[0]['nbeta']:.3g} | {budget:,} | {found.count} | {shares} | {said} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "metric-1k.jsonl")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    store = Store(args.out, FIELDS)
    for kind, seed in [] if args.table else [(k, s) for s in range(args.count) for k in "ABC"]:
        teacher = make_teacher(kind, "1K", seed)
        data = make_data(teacher, seed=seed)
        for nbeta in NBETAS:
            for budget in BUDGETS:
                asked = {"kind": kind, "seed": seed, "asked nbeta": nbeta, "budget": budget}
                if asked in store:
                    continue
                began = time.monotonic()
                result = estimate(teacher, data, nbeta, budget)
                store.add(row_of(teacher, asked, result, time.monotonic() - began))
                ratio = result.llc / float(teacher.truth)
                print(kind, seed, f"{result.settings.nbeta:.3g} {budget} {ratio:.4f} {result.verdict}", flush=True)
        jax.clear_caches()
    table(store)


if __name__ == "__main__":
    main()
