"""Timing of kernels, shared by their benchmarks: the programs run in alternation, and every measured time is kept."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from slt_jax.machine import versions


def measure(compiled: Mapping[str, Any], arguments: Callable[[], tuple], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds, CPU seconds and temporary bytes of each program. A first round warms the caches and is not recorded.

    Args:
        compiled: the programs by name, compiled ahead of time.
        arguments: returns fresh arguments for each call, since a program may consume (donate) them.
        rounds: how often each program is timed.
    """
    times: dict[str, dict[str, Any]] = {name: {"seconds": [], "cpu_seconds": []} for name in compiled}
    for measured_round in range(rounds + 1):
        for name, run in compiled.items():
            inputs = jax.block_until_ready(arguments())
            wall, cpu = time.monotonic(), time.process_time()
            jax.block_until_ready(run(*inputs))
            if measured_round:
                times[name]["seconds"].append(round(time.monotonic() - wall, 5))
                times[name]["cpu_seconds"].append(round(time.process_time() - cpu, 5))
    for name, run in compiled.items():
        memory = run.memory_analysis()
        times[name]["temporary_bytes"] = None if memory is None else memory.temp_size_in_bytes
    return times


def cpu_ratio(times: Mapping[str, dict[str, Any]], name: str, other: str) -> float:
    """Median CPU time of ``name`` over that of ``other``."""
    median, other_median = (statistics.median(times[program]["cpu_seconds"]) for program in (name, other))
    return round(median / other_median, 3)


def table(record: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown: medians, and each program's CPU time over that of the program called ``plain``."""
    yield "| shape | program | CPU ms | temporary memory | CPU time over plain |"
    yield "|---|---|---|---|---|"
    for shape, times in record.items():
        if shape in ("device", "versions"):
            continue
        for program, measured in times.items():
            if not isinstance(measured, dict):
                continue
            milliseconds, size = 1e3 * statistics.median(measured["cpu_seconds"]), measured["temporary_bytes"]
            memory = "unknown" if size is None else f"{size / 2**20:,.0f} MiB"
            ratio = cpu_ratio(times, program, "plain")
            yield f"| {shape} | {program} | {milliseconds:,.1f} | {memory} | {ratio:.2f} |"


def main(
    doc: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    measure_shape: Callable[[Any, int], dict[str, Any]],
    rounds: int,
) -> None:
    """The command line of a benchmark: ``measure_shape(shape, rounds)`` for each of ``shapes``, written as JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=rounds)
    args = parser.parse_args()
    record: dict[str, Any] = {"device": jax.devices()[0].device_kind, "versions": versions()}
    for name, shape in shapes.items():
        record[name] = {"shape": shape, **measure_shape(shape, args.rounds)}
    print(*table(record), sep="\n")
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
