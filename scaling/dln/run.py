"""Learning coefficients of deep linear teachers, one JSON line for each.

    python -m scaling.dln.run --class 1K --type A B C --count 30 --out ours.jsonl
    python -m scaling.dln.run --class 1K --type A B C --count 30 --out published.jsonl --protocol published
    python -m scaling.dln.run --class 100K --type C --count 10 --out ours.jsonl --sampler default --data drawn

What is not given is slt-jax's own default. For types B and C from 100K on it is the Kronecker metric at a large nbeta,
over the law of the inputs (``methods.LARGE``), unless --sampler, --data or --label-noise is given.

A row that is there is not run again: the same command goes on where a killed one stopped. Rows are told apart by class,
type, seed and everything under ``request``; not by devices, on which no number depends beyond the order of sums.

Several processes: the same command in each, under ``srun``, or with --coordinator, --num-processes and --process-id
(``launch/``). The chains are shared out; only the first process reads and writes the file.

Exit codes: 0 done; 2 arguments that cannot be used, or a teacher that does not fit into memory.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax

from scaling.dln import devices
from scaling.dln.memory import check
from scaling.dln.methods import DATA, PUBLISHED_BATCH, SAMPLERS, Method, estimate, filled, ours, published
from scaling.dln.records import Store
from scaling.dln.rows import KEY, identity, row_of
from scaling.dln.teachers import KINDS, SIZES, Teacher, make_teacher


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scaling.dln.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--class", dest="sizes", nargs="+", choices=list(SIZES), required=True, help="classes of teachers")
    add("--type", dest="kinds", nargs="+", choices=KINDS, required=True, help="types of teachers")
    add("--count", type=int, default=30, help="teachers of each class and type")
    add("--seed-start", type=int, default=0, help="number of the first teacher")
    add("--out", type=Path, required=True, help="result file; rows are added to those that are there")
    add("--protocol", choices=("ours", "published"), default="ours", help="published: SGLD as Lau et al. ran it")
    add("--sampler", choices=SAMPLERS, help="default is underdamped Langevin, calibrated")
    add("--step-size", type=float, help="default: calibrated")
    add("--friction", type=float, help="default: calibrated")
    add("--nbeta", type=float, help="default: n / log n")
    add("--localization", type=float, help="default: calibrated")
    add("--budget", type=int, help="minibatch gradients, all counted; default: the class's published number of steps")
    add("--warmup", type=int, help="steps of a chain before the first draw")
    add("--draws", type=int, help="draws of a chain, in place of a budget")
    add("--chains", type=int, help="default: 4, or 2")
    add("--batch-size", type=int, help=f"default: {PUBLISHED_BATCH}")
    add("--label-noise", type=float, help="standard deviation; the teacher stays the minimum; default: 0")
    add("--num-data", type=int, help="examples; default: the class's published number")
    add("--data", choices=DATA, help="stored; drawn: in every step; displaced: drawn, from w*; population: no batches")
    add("--devices", type=int, help="devices of a process; on a CPU virtual ones, default one a core")
    add("--coordinator", help="HOST:PORT of the first of several processes")
    add("--num-processes", type=int)
    add("--process-id", type=int)
    return parser.parse_args(argv)


def method_of(args: argparse.Namespace, size: str, kind: str) -> Method:
    """Raises ValueError for arguments that do not go together."""
    asked = {
        "sampler": args.sampler, "step_size": args.step_size, "friction": args.friction, "nbeta": args.nbeta,
        "localization": args.localization, "num_chains": args.chains, "budget": args.budget, "num_warmup": args.warmup,
        "num_draws": args.draws, "batch_size": args.batch_size, "label_noise": args.label_noise,
        "num_data": args.num_data, "data": args.data,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if value is not None}
    if args.protocol == "ours":
        return ours(size, kind, given)
    if changed := [name for name in given if name not in ("num_data", "data", "label_noise")]:
        raise ValueError(
            f"the published protocol sets {', '.join(changed)} itself. Leave them out, or take --protocol ours."
        )
    return filled(published(size, **given), size)


def run_one(teacher: Teacher, method: Method, most_devices: int | None) -> dict[str, Any]:
    began = time.monotonic()
    try:
        result = estimate(teacher, method, devices.mesh_for(method.num_chains, most_devices))
    except FloatingPointError as error:
        result = str(error)
    return row_of(teacher, method, result, time.monotonic() - began)


def pending(args: argparse.Namespace, store: Store | None) -> list[tuple[str, str, int, Method]]:
    """The teachers that have no row yet; the first process, which has the store, decides for all."""
    methods = {(size, kind): method_of(args, size, kind) for size in args.sizes for kind in args.kinds}
    seeds = range(args.seed_start, args.seed_start + args.count)
    wanted = [(size, kind, seed, methods[size, kind]) for seed in seeds for size in args.sizes for kind in args.kinds]
    return [w for w in wanted if devices.first_says(store is not None and identity(*w) not in store)]


def sweep(args: argparse.Namespace) -> None:
    """Run what is missing. Raises ValueError, MemoryError."""
    first = jax.process_index() == 0
    store = Store(args.out, KEY) if first else None
    todo = pending(args, store)
    for wanted in todo:
        check(*wanted, args.devices)
    for size, kind, seed, method in todo:
        forget_peak()
        row = run_one(make_teacher(kind, size, seed), method, args.devices)
        if store is not None:
            store.add(row)
            ratio = "no estimate" if row["llc"] is None else f"{row['llc'] / row['truth']:.4f} of the truth"
            print(f"{size} {kind} {seed}: {ratio}, {row['verdict']}, {row['seconds']:.1f} s", flush=True)
        jax.clear_caches()  # every teacher has programs of its own


def forget_peak() -> None:
    """Let the next row's peak memory be its own (Linux; elsewhere it is the process's so far)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        processes = devices.cluster(args.coordinator, args.num_processes, args.process_id, os.environ)
        for size, kind in itertools.product(args.sizes, args.kinds):
            method_of(args, size, kind)
        devices.start(processes, args.devices)
        jax.config.update("jax_enable_x64", args.sampler == "gibbs")
        sweep(args)
    except (ValueError, TypeError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
