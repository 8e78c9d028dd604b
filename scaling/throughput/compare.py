"""Ours and the peers', turn by turn in one sitting, with the machine's own floor; writes one JSON file.

    python -m scaling.throughput.compare --out scaling/throughput/results/cpu.json --rounds 3 \
        --peer deep_linear:canonical-interp="PYTHON bench_peers.py ci_dln" \
        --peer gpt:torch-loop="PYTHON bench_peers.py raw_gpt"

A peer's command does the work described in ``work.py`` on as many threads as there are cores, and prints lines
``RESULT {json}`` with ``case`` and ``steps_per_s_call``; the last line counts. Its loss at w* is computed outside the
timed part, so ours is timed without it too (``steps_per_s``; the whole call is beside it). Run nothing else meanwhile.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def result_of(command: list[str], name: str) -> dict[str, Any]:
    """The last ``RESULT`` line of a command. Raises RuntimeError with the end of its output if there is none."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(
            f"{name} gave no RESULT (exit code {done.returncode}): {(done.stdout + done.stderr)[-2000:]}"
        )
    return json.loads(lines[-1].removeprefix("RESULT "))


def ours(*arguments: str) -> dict[str, Any]:
    return result_of([sys.executable, "-m", "scaling.throughput.measure", *arguments], " ".join(arguments))


def machine() -> dict[str, Any]:
    """Device, versions and commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "unknown")
    versions = {name: importlib.metadata.version(name) for name in ("slt-jax", "jax", "jaxlib", "flax", "numpy")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "versions": versions, "commit": commit,
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="WORK:NAME=COMMAND")
    args = parser.parse_args()
    peers = [(*p.split("=", 1)[0].split(":"), shlex.split(p.split("=", 1)[1])) for p in args.peer]
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/gpt"
        subprocess.run(
            [sys.executable, "-m", "scaling.throughput.measure", "train", "--folder", folder],
            check=True, capture_output=True,
        )  # fmt: skip
        record: dict[str, Any] = {**machine(), "rounds": []}
        for _ in range(args.rounds):
            turn = {"floor": ours("floor")}
            for work in ("deep_linear", "gpt"):
                turn[f"{work}:slt-jax"] = ours(work, "--folder", folder)
                for of, name, command in peers:
                    if of == work:
                        turn[f"{work}:{name}"] = result_of(command, name)
            record["rounds"].append(turn)
            print(
                json.dumps({k: round(v.get("steps_per_s", v.get("steps_per_s_call", 0)), 2) for k, v in turn.items()})
            )
        record["overhead"] = ours("overhead", "--folder", folder)
        record["gpt, one chain at a time"] = ours("gpt", "--folder", folder, "--devices", "1", "--baseline", "paired")
        record["gpt2_small"] = ours("gpt2_small")
    record["summary"] = summary(record)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"], indent=1))
    print(*table(record), "", *costs(record), sep="\n")


def table(record: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown: steps/s, the fastest of a row in bold, and how many times a peer's ours is."""
    sums = record["summary"]
    works = {
        "deep_linear": "deep linear, 3 layers of 50 x 50, batch 500", "gpt": "GPT, 2.8M weights, batch 8 x 128 tokens",
    }  # fmt: skip
    peers = list(sums["deep_linear"]["peers_steps_per_s"])
    yield f"| steps/s | slt-jax | {' | '.join(peers)} |"
    yield "|---" * (2 + len(peers)) + "|"
    for work, label in works.items():
        speeds, times = sums[work]["peers_steps_per_s"], sums[work]["times_faster"]
        own = sums[work]["steps_per_s"]
        shown = {speed: f"{speed:,.4g}" for speed in (own, *speeds.values())}
        shown[max(shown)] = f"**{shown[max(shown)]}**"
        cells = (f"{shown[speeds[p]]} (ours is {times[p]:.2f}x)" if p in speeds else "" for p in peers)
        yield f"| {label} | {shown[own]} | {' | '.join(cells)} |"


def costs(record: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown: what a step of each sampler takes over a bare gradient."""
    names = {
        "sgld": "SGLD", "leimkuhler-matthews": "Leimkuhler-Matthews", "preconditioned, rmsprop": "preconditioned",
        "preconditioned, adam": "with Adam's moments", "underdamped": "underdamped", "sghmc": "SGHMC", "sgnht": "SGNHT",
    }  # fmt: skip
    yield f"| | {' | '.join(names.values())} |"
    yield "|---" * (1 + len(names)) + "|"
    cells = (f"{record['overhead']['overheads'][name]:+.1%}".replace("%", " %") for name in names)
    yield f"| {record['cpu'].replace('(R)', '').removesuffix(' Processor')} | {' | '.join(cells)} |"


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, ratios to each peer, and the share of the floor."""
    rounds = record["rounds"]

    def middle(name: str, field: str) -> float:
        return statistics.median(turn[name][field] for turn in rounds)

    flops = middle("floor", "sgemm_gflop_per_s")
    found: dict[str, Any] = {"sgemm_gflop_per_s": flops, "copy_gb_per_s": middle("floor", "copy_gb_per_s")}
    for work in ("deep_linear", "gpt"):
        own = middle(f"{work}:slt-jax", "steps_per_s")
        limit = flops / middle(f"{work}:slt-jax", "gflop_per_step")
        peers = [name for name in rounds[0] if name.startswith(f"{work}:") and not name.endswith(":slt-jax")]
        speeds = {name.split(":")[1]: middle(name, "steps_per_s_call") for name in peers}
        found[work] = {
            "steps_per_s": own, "steps_per_s_whole_call": middle(f"{work}:slt-jax", "steps_per_s_call"),
            "steps_per_s_if_all_sgemm": limit, "share_of_that": own / limit, "peers_steps_per_s": speeds,
            "times_faster": {name: own / speed for name, speed in speeds.items()},
        }  # fmt: skip
    found["overhead_over_value_and_grad"] = record["overhead"]["overhead"]
    found["gpt_peak_rss_mb"] = record["gpt, one chain at a time"]["peak_rss_mb"]
    found["gpt2_small_peak_rss_mb"] = record["gpt2_small"]["peak_rss_mb"]
    return found


if __name__ == "__main__":
    main()
