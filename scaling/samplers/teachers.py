"""Default settings on deep linear teachers of the 1K class, at the published budget of 10,000 minibatch gradients.

    python -m scaling.samplers.teachers --out results.jsonl            # about 30 minutes on two cores
    python -m scaling.samplers.teachers --out results.jsonl --peer PY  # devinterp 1.3.2, by an interpreter that has it
    python -m scaling.samplers.teachers --out results.jsonl --table    # the table, from what is there

One JSON line for a teacher and a method. Methods: ``default`` (``estimate_llc(posterior, data)`` with the budget and
the batch size alone), ``label noise`` (the same, unit label noise), ``hmc`` (the same posterior sampled exactly),
``published`` (plain SGLD at the published settings: step 5e-7, localization 1, one chain, the first 90 % dropped), and
the peer's ``devinterp sgld`` and ``devinterp rmsprop`` at that budget. A row that is there is not run again.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import slt_jax as slt
from scaling.dln.records import Pair, Store, errors_of
from scaling.dln.teachers import SIZES, Teacher, loss_fn, make_data, make_teacher, output, sufficient_data

BUDGET, BATCH = 10_000, 500
METHODS = ("default", "label noise", "hmc", "published", "devinterp sgld", "devinterp rmsprop")


def posterior_of(teacher: Teacher, localization: float | None = None) -> slt.LocalPosterior:
    center = [jnp.asarray(w) for w in teacher.weights]
    return slt.LocalPosterior(loss_fn, center, SIZES[teacher.size].num_data, localization=localization)


def default(teacher: Teacher, label_noise: float = 0.0) -> slt.LLCResult:
    data = make_data(teacher, label_noise=label_noise, seed=teacher.seed)
    return slt.estimate_llc(posterior_of(teacher), data, budget=BUDGET, batch_size=BATCH, key=teacher.seed)


def published(teacher: Teacher) -> slt.LLCResult:
    size = SIZES[teacher.size]
    data = make_data(teacher, seed=teacher.seed)
    return slt.estimate_llc(
        posterior_of(teacher, 1.0), data, sampler=slt.sgld(size.step_size), num_chains=1,
        num_warmup=9 * size.steps // 10, num_draws=size.steps // 10, batch_size=BATCH, key=teacher.seed,
    )  # fmt: skip


def exact(teacher: Teacher, localization: float, step_size: float, draws: int = 800) -> slt.LLCResult:
    """HMC over sufficient statistics of the whole data set, four chains."""
    rows = sufficient_data(make_data(teacher, seed=teacher.seed)[0])
    data = (rows, np.asarray(output(teacher.weights, rows), np.float32))
    return slt.estimate_llc(
        posterior_of(teacher, localization), data, sampler=slt.hmc(step_size, 64), num_chains=4, num_draws=draws,
        num_warmup=draws // 2, key=7,
    )  # fmt: skip


def row_of(teacher: Teacher, method: str, result: slt.LLCResult, seconds: float) -> dict:
    summary = result.to_dict()
    settings = summary["settings"]
    return {
        "kind": teacher.kind, "seed": teacher.seed, "method": method, "widths": teacher.widths, "rank": teacher.rank,
        "truth": float(teacher.truth), "multiplicity": teacher.multiplicity, "llc": summary["llc"],
        "llc_stderr": summary["llc_stderr"], "llc_raw": summary["llc_raw"], "verdict": summary["verdict"],
        "flags": summary["flags"], "nbeta_slope": summary["nbeta_slope"],
        "nbeta_slope_stderr": summary["nbeta_slope_stderr"], "localization_slope": summary["localization_slope"],
        "localization_slope_stderr": summary["localization_slope_stderr"], "degree": summary["degree"],
        "degree_stderr": summary["degree_stderr"], "held": summary["held"],
        "from_center": summary["from_center"], "from_hot": summary["from_hot"],
        "nbeta": settings["nbeta"], "localization": settings["localization"],
        "step_size": settings["step_size"], "friction": settings["friction"],
        "control_variate": settings["control_variate"], "gradients": sum(settings["gradients"].values()),
        "rhat": summary["rhat"], "ess": summary["ess"], "seconds": round(seconds, 2), "device": settings["devices"],
        "versions": settings["versions"],
    }  # fmt: skip


def need(store: Store, teacher: Teacher, method: str, make: Callable[[], dict]) -> dict:
    """The row of this teacher and method; made and kept if it is not there."""
    asked = {"kind": teacher.kind, "seed": teacher.seed, "method": method}
    if asked not in store:
        row = make()
        store.add(row)
        ratio = (row["llc"] or np.nan) / row["truth"]
        print(f"{teacher.kind}{teacher.seed:<3} {method:18} {ratio:.4f} {row['verdict']}", flush=True)
    return store.rows[store.key(asked)]


def timed(teacher: Teacher, method: str, run: Callable[[], slt.LLCResult]) -> dict:
    began = time.monotonic()
    return row_of(teacher, method, run(), time.monotonic() - began)


def ours(store: Store, teacher: Teacher) -> None:
    row = need(store, teacher, "default", lambda: timed(teacher, "default", lambda: default(teacher)))
    if teacher.kind == "A":
        reference = lambda: exact(teacher, row["localization"], row["step_size"] / 4)  # noqa: E731
        need(store, teacher, "hmc", lambda: timed(teacher, "hmc", reference))
    else:
        need(store, teacher, "label noise", lambda: timed(teacher, "label noise", lambda: default(teacher, 1.0)))
    need(store, teacher, "published", lambda: timed(teacher, "published", lambda: published(teacher)))


def peer(store: Store, teacher: Teacher, python: str) -> None:
    """Both of the peer's samplers, in a process of their own."""
    methods = {"devinterp sgld": "sgld", "devinterp rmsprop": "rmsprop"}
    if all({"kind": teacher.kind, "seed": teacher.seed, "method": m} in store for m in methods):
        return
    size = SIZES[teacher.size]
    with tempfile.TemporaryDirectory() as folder:
        x, y = make_data(teacher, seed=teacher.seed)
        np.savez(f"{folder}/work.npz", x, y, *teacher.weights)
        script = Path(__file__).with_name("peer.py")
        done = subprocess.run(
            [python, str(script), f"{folder}/work.npz", str(size.step_size), str(BUDGET), str(BATCH)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    for method, name in methods.items():
        values = {
            "kind": teacher.kind, "seed": teacher.seed, "method": method, "widths": teacher.widths,
            "rank": teacher.rank, "truth": float(teacher.truth), "multiplicity": teacher.multiplicity, "verdict": "",
            **found[name],
        }  # fmt: skip
        need(store, teacher, method, lambda values=values: values)


def table(store: Store) -> None:
    """Markdown: error of each method, by type."""
    print("| type | method | against | teachers | median error | 90th | non-finite | pairs right | converged |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in "ABC":
        of = {m: [r for r in store.rows.values() if (r["kind"], r["method"]) == (kind, m)] for m in METHODS}
        exact_of = {r["seed"]: r["llc"] for r in of["hmc"]}
        for method, rows in of.items():
            said = f"{sum(r['verdict'] == 'converged' for r in rows)}" if rows and rows[0]["verdict"] else ""
            if rows and exact_of and method == "default":
                _line(kind, method, "the same posterior by HMC", [(exact_of[r["seed"]], r["llc"]) for r in rows], said)
            if rows:
                _line(kind, method, "truth", [(r["truth"], r["llc"]) for r in rows], said)
    off = [r for r in store.rows.values() if (r["kind"], r["method"]) == ("A", "default")]
    off = [r for r in off if abs(r["llc"] / r["truth"] - 1) > 0.1]
    flagged = [r for r in off if "depends on nbeta or localization" in r["flags"]]
    said = [r for r in off if r["verdict"] != "converged"]
    print(f"\nType A off its learning coefficient by more than 10 %: {len(off)}, of which {len(flagged)} are said to")
    print(f"depend on nbeta or localization, and {len(said)} are not called converged.")


def _line(kind: str, method: str, against: str, pairs: list[Pair], converged: str) -> None:
    found = errors_of(pairs)
    shares = (f"{found.median:.1%}", f"{found.ninetieth:.1%}", found.non_finite, f"{found.ranked:.1%}")
    print(f"| {' | '.join(map(str, (kind, method, against, found.count, *shares, converged)))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "teachers-1k.jsonl")
    parser.add_argument("--kinds", default="ABC")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--peer", help="a Python with torch and devinterp 1.3.2; runs the peer alone")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    store = Store(args.out, ("kind", "seed", "method"))
    if not args.table:
        for seed in range(args.count):
            for kind in args.kinds:
                teacher = make_teacher(kind, "1K", seed)
                if args.peer:
                    peer(store, teacher, args.peer)
                else:
                    ours(store, teacher)
                    jax.clear_caches()  # every teacher has programs of its own
    table(store)


if __name__ == "__main__":
    main()
