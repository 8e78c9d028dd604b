"""The Langevin update with the written-out generator and with ``jax.random.normal``, in one sitting.

    python -m slt_jax.kernels.langevin.bench [--out FILE.json]

Roofline: four float32 numbers a weight go through memory (weight, gradient and center in, weight out), and 20 rounds of
threefry are about 100 integer operations. The copy of a weight in bfloat16, timed beside, adds two bytes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from slt_jax.checkpoint import versions
from slt_jax.kernels.langevin import normal, reference
from slt_jax.kernels.langevin.shapes import TIMED

NBETA, LOCALIZATION, STEP_SIZE = 30.0, 300.0, 1e-4


def update(draw, key, w, grad, center):
    """SGLD's step of one leaf, its noise from ``draw(key, shape, dtype)``."""
    drift = NBETA * grad + LOCALIZATION * (w - center)
    return w - 0.5 * STEP_SIZE * drift + STEP_SIZE**0.5 * draw(key, w.shape, w.dtype)


def program(draw, copy: bool = False):
    """The update of donated weights; with ``copy`` also a bfloat16 copy of the new ones."""

    def run(key, w, grad, center):
        moved = update(draw, key, w, grad, center)
        return (moved, moved.astype(jnp.bfloat16)) if copy else moved

    return jax.jit(run, donate_argnums=1)


def measure(shape: tuple[int, ...], rounds: int) -> dict:
    key, grad, center = jax.random.key(0), jnp.ones(shape), jnp.zeros(shape)
    programs = {"fused": program(normal), "plain": program(reference.normal), "fused, with copy": program(normal, True)}
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = {name: f.lower(key, like, like, like).compile() for name, f in programs.items()}
    found = {name: {"seconds": [], "cpu_seconds": []} for name in compiled}
    for turn in range(rounds + 1):
        for name, run in compiled.items():
            w = jax.block_until_ready(jnp.zeros(shape))
            wall, cpu = time.monotonic(), time.process_time()
            jax.block_until_ready(run(key, w, grad, center))
            if turn:  # the first one warms the caches
                found[name]["seconds"].append(round(time.monotonic() - wall, 5))
                found[name]["cpu_seconds"].append(round(time.process_time() - cpu, 5))
    for name, run in compiled.items():
        memory = run.memory_analysis()
        found[name]["temporary_bytes"] = None if memory is None else memory.temp_size_in_bytes
    middle = {name: statistics.median(f["cpu_seconds"]) for name, f in found.items()}
    return {**found, "cpu_time_plain_over_fused": round(middle["plain"] / middle["fused"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    record = {"device": jax.devices()[0].device_kind, "versions": versions()}
    for name, shape in TIMED.items():
        record[name] = measure(shape, args.rounds)
    text = json.dumps(record, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
