"""Memory that ``slt-jax llc`` tells before a run against what its process takes: models of four sizes, random weights.

    python -m scaling.throughput.memory --out scaling/throughput/results/memory.json

Each a calibrated run of a few draws in a process of its own, 2 x 64 tokens a step. Predicted: the plan's line. Taken:
the most resident memory of the process from its start to its end, by the system.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from scaling.throughput.compare import machine
from scaling.throughput.work import GPT2_SMALL
from slt_jax.models import Decoder, DecoderConfig
from slt_jax.models.hub import save_decoder


def pythia(width: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        50304, 2048, width, layers, heads, positions="rotary", rotary_width=width // heads // 4, activation="gelu",
        parallel_residual=True, tied_head=False,
    )  # fmt: skip


MODELS = {
    "Pythia-14M": pythia(128, 6, 4), "Pythia-70M": pythia(512, 6, 8), "GPT-2 small": GPT2_SMALL,
    "Pythia-160M": pythia(768, 12, 12),
}  # fmt: skip
RUN = """
import json, os, resource, sys
os.sched_setaffinity(0, json.loads(sys.argv[2]))
from slt_jax.cli.commands import main
code = main(json.loads(sys.argv[1]))
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def measure(folder: Path, config: DecoderConfig, extra: list[str], cores: list[int]) -> dict[str, Any]:
    """One run: MiB told and taken, and seconds. On one core, for one device."""
    tokens = folder / "tokens.npy"
    if not (folder / "model").exists():
        save_decoder(folder / "model", Decoder(config, rngs=nnx.Rngs(0)))
        np.save(tokens, np.random.default_rng(0).integers(0, config.vocab_size, 100_000).astype(np.uint16))
    words = ["llc", str(folder / "model"), "--tokens", str(tokens), "--seq-len", "64", "--batch-size", "2", *extra]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(words), json.dumps(cores)], capture_output=True, text=True
    )
    code, peak = map(int, done.stderr.splitlines()[-1].split())
    if code:
        raise RuntimeError(done.stderr[-2000:])
    told = re.search(r"memory: (.*) a chain.* at most ([\d,.]+) (MiB|GiB) of this process", done.stderr)
    weights = re.search(r"model: ([\d,]+) weights", done.stderr)
    if told is None or weights is None:
        raise RuntimeError(f"no plan in {done.stderr[-2000:]}")
    predicted = float(told[2].replace(",", "")) * (1024 if told[3] == "GiB" else 1)
    return {
        "weights": int(weights[1].replace(",", "")), "options": extra, "devices": len(cores), "a_chain": told[1],
        "predicted_mib": predicted, "taken_mib": peak // 1024, "ratio": predicted * 1024 / peak,
        "seconds": time.monotonic() - begin,
    }  # fmt: skip


def table(record: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| model | weights | chains, devices | a chain | predicted | taken | predicted / taken |"
    yield "|---|---|---|---|---|---|---|"
    for name, run in record["runs"].items():
        chains = run["options"][run["options"].index("--chains") + 1]
        yield (
            f"| {name} | {run['weights']:,} | {chains} on {run['devices']} | {run['a_chain']} | "
            f"{run['predicted_mib']:,.0f} MiB | {run['taken_mib']:,} MiB | {run['ratio']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="these runs again, by their names; the others in the file are kept")
    args = parser.parse_args()
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.only else {"runs": {}}
    every = sorted(os.sched_getaffinity(0))
    cases = [(name, ["--chains", "2", "--draws", "4"], every[:1]) for name in MODELS]
    cases += [("Pythia-70M", ["--chains", "4", "--draws", "4"], every)]
    cases += [("Pythia-14M", ["--chains", "4", "--draws", "60", "--sampler", "underdamped"], every)]
    with tempfile.TemporaryDirectory() as scratch:
        for name, extra, cores in cases:
            folder = Path(scratch) / name
            folder.mkdir(exist_ok=True)
            label = name if cores != every else f"{name}, {'underdamped' if 'underdamped' in extra else 'SGLD'}"
            if args.only is not None and label not in args.only:
                continue
            record["runs"][label] = {**measure(folder, MODELS[name], extra, cores), **machine()}
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(*table(record), sep="\n")


if __name__ == "__main__":
    main()
