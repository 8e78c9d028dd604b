"""Loss and gradient of the head, chunked and plain, in one sitting: time, CPU time, temporary memory.

    python -m slt_jax.kernels.cross_entropy.bench [--out FILE.json]

The roofline is three matrix products of 2 x rows x width x vocabulary floating-point operations, timed beside.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax

from slt_jax.checkpoint import versions
from slt_jax.kernels.cross_entropy import cross_entropy, reference
from slt_jax.kernels.cross_entropy.shapes import TIMED


def inputs(rows: int, width: int, vocabulary: int):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (rows, width)), jax.random.normal(keys[1], (vocabulary, width)) / 20
    return hidden, table, jax.random.randint(keys[2], (rows,), 0, vocabulary)


def products(hidden: jax.Array, table: jax.Array, targets: jax.Array):
    """The three matrix products and nothing else."""
    logits = hidden @ table.T
    return logits @ table, logits.T @ hidden


def measure(shape: tuple[int, int, int], rounds: int) -> dict:
    given = inputs(*shape)
    mean = lambda f: jax.jit(jax.value_and_grad(lambda *a: f(*a).mean(), argnums=(0, 1)))  # noqa: E731
    programs = {"chunked": mean(cross_entropy), "plain": mean(reference.cross_entropy), "products": jax.jit(products)}
    compiled = {name: f.lower(*given).compile() for name, f in programs.items()}
    times = {name: {"seconds": [], "cpu_seconds": []} for name in compiled}
    for _ in range(rounds + 1):
        for name, run in compiled.items():
            wall, cpu = time.monotonic(), time.process_time()
            jax.block_until_ready(run(*given))
            times[name]["seconds"].append(time.monotonic() - wall)
            times[name]["cpu_seconds"].append(time.process_time() - cpu)
    found = {}
    for name, run in compiled.items():
        kept = {what: [round(t, 4) for t in values[1:]] for what, values in times[name].items()}
        memory = run.memory_analysis()
        found[name] = {**kept, "temporary_mib": None if memory is None else round(memory.temp_size_in_bytes / 2**20, 1)}
    middle = {name: statistics.median(f["cpu_seconds"]) for name, f in found.items()}
    found["cpu_time_over_plain"] = round(middle["chunked"] / middle["plain"], 3)
    found["cpu_time_over_products"] = round(middle["chunked"] / middle["products"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    record = {"device": jax.devices()[0].device_kind, "versions": versions()}
    for name, shape in TIMED.items():
        record[name] = {"rows, width, vocabulary": shape, **measure(shape, args.rounds)}
    text = json.dumps(record, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
