"""Learning coefficients of transformers that are known exactly: one JSON line for each teacher and method.

    python -m scaling.transformers.run --size 1K --method spectrum --count 5
    python -m scaling.transformers.run --size 1K --method default published --count 5 --layout layernorm "rms rotary"
    python -m scaling.transformers.run --size 1K --method kronecker --nbeta 1e6 --localization 1 --budget 20000
    python -m scaling.transformers.run --size 1K --method hmc --posterior-of default   # nbeta, localization of its rows
    python -m scaling.transformers.run --table

A row that is there is not run again: the same command goes on where a killed one stopped. What is not given is
slt-jax's own default. Exit codes: 0 done; 2 arguments that cannot be used.
"""

import argparse
import dataclasses
import functools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import slt_jax as slt
from scaling.dln.records import Store
from scaling.transformers import spectrum
from scaling.transformers.methods import SAMPLERS, Method, estimate, filled
from scaling.transformers.rank import rank_of
from scaling.transformers.tables import table
from scaling.transformers.teachers import KINDS, TARGETS, Teacher, make_inputs, make_teacher
from slt_jax.machine import versions

RESULTS = Path(__file__).parent / "results" / "rows.jsonl"
KEY = ("size", "layout", "seed", "request")  # two rows that agree in these are the same run
FOUND = ("llc", "llc_stderr", "llc_raw", "rhat", "ess", "verdict", "flags", "reason", "nbeta_slope", "degree")
CHOSEN = (
    "nbeta", "localization", "step_size", "friction", "control_variate", "num_chains", "num_warmup", "num_draws",
    "thinning", "hot", "batch_size",
)  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scaling.transformers.run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--size", nargs="+", choices=list(TARGETS), default=["1K"])
    add("--layout", nargs="+", choices=KINDS, default=list(KINDS))
    add("--method", nargs="+", choices=SAMPLERS, default=["spectrum"])
    add("--count", type=int, default=5, help="teachers of each layout and size")
    add("--seed-start", type=int, default=0, help="number of the first teacher")
    add("--posterior-of", choices=SAMPLERS, help="take nbeta and localization from this method's row of the teacher")
    add("--nbeta", type=float, help="default: n / log n")
    add("--localization", type=float, help="default: calibrated")
    add("--step-size", type=float, help="default: calibrated")
    add("--friction", type=float, help="default: calibrated")
    add("--budget", type=int, help="gradients, all counted; default: slt-jax's own")
    add("--warmup", type=int, dest="num_warmup", help="steps of a chain before the first draw")
    add("--draws", type=int, dest="num_draws", help="draws of a chain, in place of a budget")
    add("--chains", type=int, dest="num_chains")
    add("--batch-size", type=int)
    add("--num-data", type=int, help="sequences; default: the size's")
    add("--data", choices=("stored", "drawn"), default="stored")
    add("--labels", choices=("teacher", "sampled"), default="teacher")
    add("--devices", type=int, help="virtual devices of a CPU, default one a core")
    add("--out", type=Path, default=RESULTS)
    add("--table", action="store_true", help="print the tables of the rows that are there, and run nothing")
    return parser.parse_args(argv)


def method_of(args: argparse.Namespace, sampler: str, layout: str, size: str) -> Method:
    names = [field.name for field in dataclasses.fields(Method) if field.name != "sampler"]
    if sampler == "spectrum":
        names = ["num_data"]
    return filled(Method(sampler, **{name: getattr(args, name) for name in names}), layout, size)


def of_row(method: Method, known: dict[str, Any]) -> Method:
    """With the nbeta and the localization of a row."""
    return dataclasses.replace(method, nbeta=known["nbeta"], localization=known["localization"])


def identity(size: str, layout: str, seed: int, method: Method) -> dict[str, Any]:
    return {"size": size, "layout": layout, "seed": seed, "request": dataclasses.asdict(method)}


def row_of(teacher: Teacher, method: Method) -> dict[str, Any]:
    began = time.monotonic()
    found = _spectrum(teacher, method) if method.sampler == "spectrum" else _sampled(teacher, method)
    return {
        **identity(teacher.size, teacher.layout, teacher.seed, method), "truth": float(teacher.truth),
        "weights": teacher.num_weights, "config": _shape(teacher), **found,
        "seconds": round(time.monotonic() - began, 2), "versions": versions(),
    }  # fmt: skip


def _shape(teacher: Teacher) -> dict[str, Any]:
    """The sizes of the network; all else is that of its layout."""
    names = ("vocab_size", "context_length", "width", "num_layers", "num_heads", "num_kv_heads", "head_width",
             "mlp_width", "widths")  # fmt: skip
    return {name: getattr(teacher.config, name) for name in names if hasattr(teacher.config, name)}


def _spectrum(teacher: Teacher, method: Method) -> dict[str, Any]:
    inputs = make_inputs(teacher.config, method.num_data or 0, teacher.seed)
    h = spectrum.curvatures(teacher.config, teacher.weights, inputs)
    return {
        "values": [round(v, 4) for v in spectrum.quadratic_values(h).tolist()],
        "largest": float(h[0]), "quantiles": [float(x) for x in np.quantile(h, np.linspace(0, 1, 21))],
        "rank": rank_of(np.sqrt(h)).rank,
        "counted": float(np.sqrt(h[int(2 * teacher.truth) - 1] / h[0])),
        "next": float(np.sqrt(h[int(2 * teacher.truth)] / h[0])) if 2 * teacher.truth < len(h) else None,
        "device": f"{jax.device_count()} {jax.devices()[0].platform}",
    }  # fmt: skip


def _sampled(teacher: Teacher, method: Method) -> dict[str, Any]:
    try:
        result = estimate(teacher, method)
    except FloatingPointError as error:
        return {"llc": None, "verdict": "not finite at w*", "flags": [], "reason": str(error)}
    return {**_numbers(result), "device": result.to_dict()["settings"]["devices"]}


def _numbers(result: slt.LLCResult) -> dict[str, Any]:
    found = result.to_dict()
    settings = found["settings"]
    chosen = {name: settings[name] for name in CHOSEN}
    finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731
    spent = sum(settings["gradients"].values())
    return {name: finite(v) for name, v in {**{n: found[n] for n in FOUND}, **chosen, "gradients": spent}.items()}


def posterior_row(store: Store, wanted: dict[str, Any], sampler: str) -> dict[str, Any] | None:
    """The first row of that sampler with a finite estimate, of the same teacher over the same data and labels."""

    def posterior(row: dict[str, Any]) -> list[Any]:
        return [row[n] for n in ("size", "layout", "seed")] + [
            row["request"][n] for n in ("num_data", "data", "labels")
        ]

    same = [row for row in store.rows.values() if row["request"]["sampler"] == sampler and row.get("llc") is not None]
    return next((row for row in same if posterior(row) == posterior(wanted)), None)


def sweep(args: argparse.Namespace) -> None:
    """Run what is missing: all layouts of a teacher's number before the next number."""
    store, make = Store(args.out, KEY), functools.lru_cache(maxsize=None)(make_teacher)
    seeds = range(args.seed_start, args.seed_start + args.count)
    for sampler in args.method:
        for seed, size, layout in ((s, z, k) for s in seeds for z in args.size for k in args.layout):
            method = method_of(args, sampler, layout, size)
            if args.posterior_of is not None and sampler != "spectrum":
                known = posterior_row(store, identity(size, layout, seed, method), args.posterior_of)
                if known is None:
                    print(f"{size} {layout} {seed}: no row of {args.posterior_of} yet, skipped", flush=True)
                    continue
                method = of_row(method, known)
            if identity(size, layout, seed, method) in store:
                continue
            row = row_of(make(layout, size, seed), method)
            store.add(row)
            print(f"{size} {layout} {seed} {sampler}: {told(row)}, {row['seconds']:.1f} s", flush=True)
            jax.clear_caches()


def told(row: dict[str, Any]) -> str:
    if "values" in row:
        return (
            f"truth {row['truth']:g}, half the rank {row['rank'] / 2:g}, {row['counted']:.1e}, {row['next'] or 0:.1e}"
        )
    if row["llc"] is None:
        return row["reason"]
    return f"{row['llc']:.4g} +/- {row['llc_stderr'] or math.nan:.2g} of {row['truth']:g}, {row['verdict']}"


def start(devices: int | None) -> None:
    """Before the first use of JAX: the virtual devices of a CPU, and full precision in products on an accelerator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", devices or cores)
    jax.config.update("jax_default_matmul_precision", "highest")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.table:
            print(table(list(Store(args.out, KEY).rows.values())))
            return 0
        for sampler in args.method:
            method_of(args, sampler, args.layout[0], args.size[0])
        sweep(args)
    except (ValueError, TypeError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    start(parse(None).devices)
    sys.exit(main())
