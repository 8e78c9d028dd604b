"""A 6 x 6 x 3 grid on the demo's transformer: one sweep against 108 separate calls of ``estimate_llc``.

    python -m scaling.throughput.sweep --out scaling/throughput/results/sweep.json

In turn, in one sitting, on as many devices as there are cores: the sweep, with its compilation and within a memory
budget, in a process of its own; 108 calls one after another in one process, which compile once; and calls in processes
of their own, as a shell script makes them, of which some are run and their mean stands for all.
"""

import argparse
import json
import resource
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
from slt_jax.demo import FULL, source_bytes, train
from slt_jax.models.hub import load_decoder

GRID = {
    "nbeta": [10.0, 30.0, 100.0],
    "localization": np.geomspace(30, 3000, 6).tolist(),
    "step_size": np.geomspace(1e-5, 1e-3, 6).tolist(),
}
PLAN = {"num_chains": 2, "num_draws": 4, "num_warmup": 2, "batch_size": FULL.sample_batch}
BUDGET = 2.0  # GiB
KEY = 0


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


def the_sweep(folder: Path) -> dict[str, Any]:
    """Seconds of the sweep, times its loss was traced, and the peak memory of the process in MiB."""
    posterior, data = posterior_of(folder)
    began = time.monotonic()
    found = slt.sweep(posterior, data, **GRID, sampler=slt.sgld(), **PLAN, key=KEY, memory_gib=BUDGET)
    seconds = time.monotonic() - began
    str(found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    traces = len(posterior.loss_fn.traces)
    return {"seconds": seconds, "traces": traces, "peak_mib": peak, "llc": found.dataset.llc.values.tolist()}


def cells() -> list[dict[str, float]]:
    rows = np.array(np.meshgrid(*GRID.values(), indexing="ij")).reshape(3, -1).T
    return [dict(zip(GRID, row.tolist(), strict=True)) for row in rows]


def one_call(posterior: slt.LocalPosterior, data: np.ndarray, number: int, cell: dict[str, float]) -> float:
    around = slt.LocalPosterior(
        posterior.loss_fn, posterior.center, posterior.num_data, cell["nbeta"], cell["localization"]
    )
    key = jax.random.fold_in(jax.random.key(KEY), number)
    return slt.estimate_llc(around, data, sampler=slt.sgld(cell["step_size"]), **PLAN, key=key).llc


def the_calls(folder: Path) -> dict[str, Any]:
    """108 calls in one process: seconds, and traces of the loss."""
    posterior, data = posterior_of(folder)
    data = jnp.asarray(data)
    began = time.monotonic()
    llc = [one_call(posterior, data, number, cell) for number, cell in enumerate(cells())]
    return {"seconds": time.monotonic() - began, "traces": len(posterior.loss_fn.traces), "llc": llc}


def the_process(folder: Path, number: int) -> dict[str, Any]:
    posterior, data = posterior_of(folder)
    return {"llc": one_call(posterior, data, number, cells()[number])}


def in_a_process(*words: str) -> tuple[float, dict[str, Any]]:
    """(wall seconds of the whole process, what it printed)."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "scaling.throughput.sweep", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.monotonic() - began, json.loads(done.stdout.splitlines()[-1])


def table(record: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    sweep, calls, processes = (record[name] for name in ("sweep", "calls", "processes"))
    yield "| 108 cells | seconds | against the sweep |"
    yield "|---|---|---|"
    memory = f"peak memory {sweep['peak_mib']:,} MiB of {1024 * record['budget_gib']:,.0f}"
    yield f"| one sweep, {memory} | {sweep['wall']:.0f} | |"
    yield f"| 108 calls in one process | {calls['wall']:.0f} | {calls['wall'] / sweep['wall']:.2f}x |"
    whole = processes["estimated_wall"]
    told = f"108 processes (mean of {len(processes['walls'])})"
    yield f"| {told} | {whole:.0f} | {whole / sweep['wall']:.2f}x |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--child", choices=("sweep", "calls", "process"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--number", type=int, default=0)
    args = parser.parse_args()
    if args.child:
        jax.config.update("jax_num_cpu_devices", machine()["cores"])
        jobs = {"sweep": the_sweep, "calls": the_calls, "process": lambda f: the_process(f, args.number)}
        print(json.dumps(jobs[args.child](args.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = source_bytes(FULL.num_files, FULL.config.context_length)
        folder = train(FULL, data, Path(scratch), show=False)[-1]
        found = {}
        for name in ("sweep", "calls"):
            wall, printed = in_a_process("--child", name, "--folder", str(folder))
            found[name] = {"wall": wall, **printed}
            print(f"{name}: {wall:.1f} s", file=sys.stderr, flush=True)
        chosen = np.linspace(0, len(cells()) - 1, args.processes).astype(int).tolist()
        walls = []
        for number in chosen:
            wall, printed = in_a_process("--child", "process", "--folder", str(folder), "--number", str(number))
            walls.append(wall)
            together = np.ravel(found["sweep"]["llc"])[number]
            if not np.isclose(together, printed["llc"], rtol=1e-3, equal_nan=True):
                raise RuntimeError(f"cell {number} reads {together} in the sweep and {printed['llc']} alone")
        each = statistics.mean(walls)
        found["processes"] = {"cells": chosen, "walls": walls, "estimated_wall": each * len(cells())}
    record = {"machine": machine(), "grid": GRID, "plan": PLAN, "budget_gib": BUDGET, **found}
    args.out.write_text(json.dumps(record, indent=1))
    print(*table(record), sep="\n")


if __name__ == "__main__":
    main()
