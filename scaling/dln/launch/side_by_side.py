"""Many teachers on one accelerator, a process for each, several at a time.

    python -m scaling.dln.launch.side_by_side --together 13 --memory-gib 70 --out results/H100.jsonl \
        --class 10M 100M --type B C --count 10

Compiling keeps a core busy for most of a process's time, and the accelerator is idle meanwhile. Takes the arguments of
``scaling.dln.run`` too. Class by class as given, small networks first, so that a run that is stopped has most of them;
those side by side fit into --memory-gib together. Rows go to --out as they are done, and what has one is not run again:
the same command goes on where a stopped one was. A teacher that fails is told, and the others go on.

Exit codes: 0 done; 1 some failed; 2 arguments that cannot be used.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax

from scaling.dln import run
from scaling.dln.memory import need_of
from scaling.dln.methods import Method
from scaling.dln.records import Store, read_rows
from scaling.dln.rows import KEY
from scaling.dln.teachers import draw_shape

CONTEXT = 2**29  # bytes of an accelerator for a process's own program
QUICK = {  # what is found by trying kernels out would cost more than it saves
    "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip


class Job(NamedTuple):
    size: str
    kind: str
    seed: int
    weights: int
    bytes: float  # of the accelerator

    @property
    def name(self) -> str:
        return f"{self.size} {self.kind} {self.seed}"


def job_of(size: str, kind: str, seed: int, method: Method) -> Job:
    shape = draw_shape(kind, size, seed)
    weights = sum(a * b for a, b in pairwise(shape.widths))
    need = need_of(shape, method, method.num_chains, 1, accelerated=True)
    return Job(size, kind, seed, weights, need.accelerator + CONTEXT)


def in_order(todo: list[tuple[str, str, int, Method]], sizes: list[str]) -> list[Job]:
    return sorted((job_of(*one) for one in todo), key=lambda job: (sizes.index(job.size), job.weights))


def next_of(waiting: list[Job], running: list[Job], together: int, memory: float) -> Job | None:
    """The first that fits beside those that run; one that never fits is run alone, and says so itself."""
    if len(running) >= together:
        return None
    free = memory - sum(job.bytes for job in running)
    return next((job for job in waiting if job.bytes <= free or not running), None)


def command(job: Job, out: Path, others: list[str]) -> list[str]:
    which = ["--class", job.size, "--type", job.kind, "--seed-start", str(job.seed), "--count", "1"]
    return [sys.executable, "-m", "scaling.dln.run", *which, "--out", str(out), *others]


class Process:
    """A teacher under way."""

    def __init__(self, job: Job, folder: Path, others: list[str]):
        self.job, self.out = job, folder / f"{job.name.replace(' ', '-')}.jsonl"
        self.said = folder / f"{self.out.stem}.log"
        environment = {**os.environ, **QUICK}
        environment["XLA_FLAGS"] = f"{QUICK['XLA_FLAGS']} {os.environ.get('XLA_FLAGS', '')}"
        with self.said.open("w") as said:
            self.child = subprocess.Popen(
                command(job, self.out, others), env=environment, stdout=said, stderr=subprocess.STDOUT
            )

    def ended(self, store: Store) -> bool | None:
        """None while it runs; else whether it left a row, which the store has then."""
        if self.child.poll() is None:
            return None
        rows, _ = read_rows(self.out)
        for row in rows:
            store.add(row)
        lines = self.said.read_text().splitlines() or [f"ended with {self.child.returncode} and no word"]
        print(lines[-1] if rows else f"{self.job.name} failed: {lines[-1]}", flush=True)
        return bool(rows)


def go(waiting: list[Job], store: Store, together: int, memory: float, others: list[str]) -> list[Job]:
    """Run all; those that failed."""
    running: list[Process] = []
    failed: list[Job] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while job := next_of(waiting, [process.job for process in running], together, memory):
                    waiting.remove(job)
                    running.append(Process(job, Path(folder), others))
                time.sleep(0.2)
                ends = [(process, process.ended(store)) for process in running]
                running = [process for process, left in ends if left is None]
                failed += [process.job for process, left in ends if left is False]
        finally:
            for process in running:
                process.child.kill()
                process.child.wait()
    return failed


def parse(argv: list[str] | None) -> tuple[Any, Any, list[str]]:
    """(own arguments, those of ``scaling.dln.run``, those that every process is given as they are)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--memory-gib", type=float, default=math.inf, help="of the accelerator; default: no limit")
    own, rest = parser.parse_known_args(argv)
    which = argparse.ArgumentParser(add_help=False)
    for name, count in (("--class", "+"), ("--type", "+"), ("--count", None), ("--seed-start", None), ("--out", None)):
        which.add_argument(name, nargs=count)
    if own.together < 1:
        raise ValueError(f"--together must be at least 1, got {own.together}.")
    return own, run.parse(rest), which.parse_known_args(rest)[1]


def main(argv: list[str] | None = None) -> int:
    try:
        own, args, others = parse(argv)
        jax.config.update("jax_platforms", "cpu")  # this process leaves the accelerator to the others
        store = Store(args.out, KEY)
        waiting = in_order(run.pending(args, store), args.sizes)
        failed = go(waiting, store, own.together, own.memory_gib * 2**30, others)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes end with this one
    sys.exit(main())
