"""How the benchmarks of the kernels measure and write: all programs in turn, every time kept."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from slt_jax.engine.checkpoint import versions


def measure(compiled: Mapping[str, Any], arguments: Callable[[], tuple], rounds: int) -> dict[str, dict]:
    """By program: seconds, CPU seconds and temporary bytes. The first turn warms the caches and is not kept.

    Args:
        compiled: programs, compiled ahead of time. arguments: makes them, for each call anew, as it may consume them.
    """
    found: dict[str, dict] = {name: {"seconds": [], "cpu_seconds": []} for name in compiled}
    for turn in range(rounds + 1):
        for name, run in compiled.items():
            given = jax.block_until_ready(arguments())
            wall, cpu = time.monotonic(), time.process_time()
            jax.block_until_ready(run(*given))
            if turn:
                found[name]["seconds"].append(round(time.monotonic() - wall, 5))
                found[name]["cpu_seconds"].append(round(time.process_time() - cpu, 5))
    for name, run in compiled.items():
        memory = run.memory_analysis()
        found[name]["temporary_bytes"] = None if memory is None else memory.temp_size_in_bytes
    return found


def cpu_ratio(found: Mapping[str, dict], name: str, other: str) -> float:
    """Median CPU time of ``name`` over that of ``other``."""
    middle = [statistics.median(found[which]["cpu_seconds"]) for which in (name, other)]
    return round(middle[0] / middle[1], 3)


def table(record: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown: medians, and each program's CPU time over that of the one called plain."""
    yield "| shape | program | CPU ms | temporary memory | CPU time over plain |"
    yield "|---|---|---|---|---|"
    for name, found in record.items():
        if name in ("device", "versions"):
            continue
        for program, one in found.items():
            if not isinstance(one, dict):
                continue
            milliseconds = 1e3 * statistics.median(one["cpu_seconds"])
            memory = "unknown" if one["temporary_bytes"] is None else f"{one['temporary_bytes'] / 2**20:,.0f} MiB"
            yield f"| {name} | {program} | {milliseconds:,.1f} | {memory} | {cpu_ratio(found, program, 'plain'):.2f} |"


def main(doc: str | None, timed: Mapping[str, tuple], measured: Callable[[tuple, int], dict], rounds: int) -> None:
    """The command line of a benchmark: each shape of ``timed`` through ``measured(shape, rounds)``, as JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=rounds)
    args = parser.parse_args()
    record = {"device": jax.devices()[0].device_kind, "versions": versions()}
    for name, shape in timed.items():
        record[name] = {"shape": shape, **measured(shape, args.rounds)}
    print(*table(record), sep="\n")
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
