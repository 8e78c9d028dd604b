"""A 6 x 6 x 3 grid on the demo's transformer: one sweep against 108 separate calls of ``estimate_llc``.

    python -m scaling.throughput.sweep --out scaling/throughput/results/sweep.json
    XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" python -m scaling.throughput.sweep \
        --out scaling/throughput/results/sweep-accelerator.json --warmup 1000 --draws 2000 --memory-gib 8 --calls 5 \
        --processes 0

In turn, in one sitting, on an accelerator or on as many devices as there are cores: the sweep, with its compilation and
within a memory budget, in a process of its own; 108 calls one after another in one process, which compile once; and
calls in processes of their own, as a shell script makes them. Where only some are run, spread over the grid, their mean
stands for the others: all are the same program. The first call of a process, which compiles, is not in the mean.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import slt_jax as slt
from scaling.throughput.compare import machine
from slt_jax.cli.demo import FULL, source_bytes, train
from slt_jax.engine.progress import peak_memory
from slt_jax.models.hub import load_decoder

GRID = {
    "nbeta": [10.0, 30.0, 100.0],
    "localization": np.geomspace(30, 3000, 6).tolist(),
    "step_size": np.geomspace(1e-5, 1e-3, 6).tolist(),
}
CHAINS = 2
ALIKE = {True: 1e-3, False: 1e-2}  # relative, on a CPU and off it, where matrices are multiplied in TF32
KEY = 0


def compiling() -> list[float]:
    """Seconds of every compilation of this process from now on."""
    found: list[float] = []

    def noted(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(noted)
    return found


def loss_of_model(model: Any, batch: jax.Array) -> jax.Array:
    return model.losses(batch)


def posterior_of(folder: Path, **numbers: float) -> tuple[slt.LocalPosterior, np.ndarray]:
    data = source_bytes(FULL.num_files, FULL.config.context_length)
    params, loss_fn = slt.from_nnx(load_decoder(folder)[0], loss_of_model)
    traces: list[int] = []

    def counted(p, batch):
        traces.append(1)
        return loss_fn(p, batch)

    posterior = slt.LocalPosterior(counted, params, len(data), **numbers)
    counted.__dict__["traces"] = traces
    return posterior, data


def the_model(args: argparse.Namespace) -> dict[str, Any]:
    data = source_bytes(FULL.num_files, FULL.config.context_length)
    return {"folder": str(train(FULL, data, args.folder, show=False)[-1])}


def the_sweep(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the sweep and of compiling, times its loss was traced, and peak memory in MiB (process or device)."""
    posterior, data = posterior_of(args.folder)
    began, compiled = time.monotonic(), compiling()
    found = slt.sweep(posterior, data, **GRID, sampler=slt.sgld(), **plan_of(args), key=KEY, memory_gib=args.memory_gib)
    seconds = time.monotonic() - began
    str(found)
    traces, cost = len(posterior.loss_fn.traces), found.results[0].settings.cost
    return {
        "seconds": seconds, "compiling": sum(compiled), "traces": traces, "peak_mib": peak_memory()[0], "steps": cost,
        "devices": found.results[0].settings.devices, "llc": found.dataset.llc.values.tolist(),
    }  # fmt: skip


def plan_of(args: argparse.Namespace) -> dict[str, int]:
    lengths = {"num_draws": args.draws, "num_warmup": args.warmup}
    return {"num_chains": CHAINS, **lengths, "batch_size": FULL.sample_batch}


def cells() -> list[dict[str, float]]:
    rows = np.array(np.meshgrid(*GRID.values(), indexing="ij")).reshape(3, -1).T
    return [dict(zip(GRID, row.tolist(), strict=True)) for row in rows]


def one_call(posterior: slt.LocalPosterior, data: Any, number: int, args: argparse.Namespace) -> float:
    cell = cells()[number]
    around = slt.LocalPosterior(
        posterior.loss_fn, posterior.center, posterior.num_data, cell["nbeta"], cell["localization"]
    )
    key = jax.random.fold_in(jax.random.key(KEY), number)
    return slt.estimate_llc(around, data, sampler=slt.sgld(cell["step_size"]), **plan_of(args), key=key).llc


def spread(count: int) -> list[int]:
    """So many numbers of cells, spread over the grid."""
    return np.linspace(0, len(cells()) - 1, count).astype(int).tolist()


def the_calls(args: argparse.Namespace) -> dict[str, Any]:
    """Calls in one process: each one's seconds, those of compiling, and traces of the loss."""
    posterior, data = posterior_of(args.folder)
    data, llc, each, compiled = jnp.asarray(data), [], [], compiling()
    for number in spread(args.calls):
        began = time.monotonic()
        llc.append(one_call(posterior, data, number, args))
        each.append(time.monotonic() - began)
    counts = {"traces": len(posterior.loss_fn.traces), "compiling": sum(compiled)}
    return {"cells": spread(args.calls), "each": each, **counts, "llc": llc}


def the_process(args: argparse.Namespace) -> dict[str, Any]:
    posterior, data = posterior_of(args.folder)
    return {"llc": one_call(posterior, data, args.number, args)}


def in_a_process(child: str, args: argparse.Namespace, number: int = 0) -> dict[str, Any]:
    """What a process of its own printed, and its ``wall`` seconds."""
    names = ("folder", "draws", "warmup", "calls", "memory_gib")
    options = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    command = [sys.executable, "-m", "scaling.throughput.sweep", "--child", child, "--number", str(number), *options]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.monotonic() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    print(f"{child}: {wall:.1f} s", file=sys.stderr, flush=True)
    return {"wall": wall, **json.loads(done.stdout.splitlines()[-1])}


def difference(together: Any, numbers: list[int], alone: list[float]) -> float:
    """The largest relative difference of a cell of the sweep from a call of its own; infinite where one is NaN."""
    pairs = np.stack([np.ravel(together)[numbers], alone])
    pairs = pairs[:, ~np.isnan(pairs).all(0)]
    gaps = np.abs(pairs[0] - pairs[1]) / np.maximum(np.abs(pairs).max(0), np.finfo(float).tiny)
    return float(np.nan_to_num(gaps, nan=np.inf).max(initial=0.0))


def estimated(calls: dict[str, Any]) -> float:
    """Wall seconds of all calls in one process: those that were run, and their mean for the others."""
    others = len(cells()) - len(calls["each"])
    return calls["wall"] + (others * statistics.mean(calls["each"][1:]) if others else 0.0)


def table(record: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    sweep, calls, processes = (record[name] for name in ("sweep", "calls", "processes"))
    yield "| 108 cells | seconds | against the sweep |"
    yield "|---|---|---|"
    memory = f"peak memory {sweep['peak_mib']:,} MiB of {1024 * record['budget_gib']:,.0f}"
    yield f"| one sweep, {memory} | {sweep['wall']:.0f} | |"
    whole, some = estimated(calls), len(calls["each"]) < len(cells())
    told = "108 calls in one process" + (f" ({len(calls['each'])} of them run)" if some else "")
    yield f"| {told} | {whole:.0f} | {whole / sweep['wall']:.2f}x |"
    if processes["walls"]:
        whole = statistics.mean(processes["walls"]) * len(cells())
        told = f"108 processes (mean of {len(processes['walls'])})"
        yield f"| {told} | {whole:.0f} | {whole / sweep['wall']:.2f}x |"


def keep(record: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(record, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--warmup", type=int, default=2, help="steps of a chain before its first draw")
    parser.add_argument("--draws", type=int, default=4, help="of a chain")
    parser.add_argument("--memory-gib", type=float, default=2.0, help="that the sweep may take")
    parser.add_argument("--calls", type=int, default=len(cells()), help="to run in one process")
    parser.add_argument("--processes", type=int, default=4, help="to run of a call each")
    parser.add_argument("--folder", type=Path, help="the demo's model, if it is trained already")
    parser.add_argument("--child", choices=("train", "sweep", "calls", "process"))
    parser.add_argument("--number", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.child:
        jax.config.update("jax_num_cpu_devices", machine()["cores"])
        jobs = {"train": the_model, "sweep": the_sweep, "calls": the_calls, "process": the_process}
        print(json.dumps(jobs[args.child](args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.folder is None:  # not here: this process takes no accelerator, of which the others need the memory
            args.folder = Path(scratch)
            args.folder = Path(in_a_process("train", args)["folder"])
        record: dict[str, Any] = {"machine": machine(), "grid": GRID, "plan": plan_of(args)}
        record |= {"budget_gib": args.memory_gib, "xla_flags": os.environ.get("XLA_FLAGS", "")}
        for child in ("sweep", "calls"):
            record[child] = in_a_process(child, args)
            keep(record, args.out)
        alone = [in_a_process("process", args, number) for number in spread(args.processes)]
    sweep, calls, cells_alone = record["sweep"], record["calls"], spread(args.processes)
    record["processes"] = {"cells": cells_alone, "walls": [found["wall"] for found in alone]}
    numbers, llc = calls["cells"] + cells_alone, calls["llc"] + [found["llc"] for found in alone]
    record["difference"] = difference(sweep["llc"], numbers, llc)
    keep(record, args.out)
    print(*table(record), sep="\n")
    if record["difference"] > ALIKE["cpu" in sweep["devices"]]:
        sys.exit(f"a cell of the sweep differs from a call of its own by {record['difference']:.2g} of it")


if __name__ == "__main__":
    main()
