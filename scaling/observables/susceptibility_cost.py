"""Minutes and peak memory of the susceptibilities of all parts of the demo's transformer, by one command.

The last checkpoint of ``slt-jax demo`` (2 layers of 4 heads, 437,760 weights) is sampled with Python's own source. The
components are the embedding, each head, each MLP and each layer: 13. The probe has 160 examples each of that source
and of Python's help texts, with 63 predicted bytes each: 20,160 tokens. The command is run in a process of its own,
whose time, start and compilation included, and largest resident memory are recorded. Sums over draws are kept, so that
the memory does not depend on the number of draws.

    python -m scaling.observables.susceptibility_cost --demo demo-run --out susceptibility_cost.json
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from slt_jax.machine import versions
from slt_jax.results.susceptibilities import load_susceptibilities

EXAMPLES, CHAINS = 160, 4
CHECKPOINT = "checkpoints/step-00980"


def write_tokens(folder: Path) -> dict[str, Path]:
    """Bytes of Python's source and of its help texts, as token files."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = {
        "python": b"".join(file.read_bytes() for file in sorted(library.glob("*.py"))[:120]),
        "prose": (library / "pydoc_data/topics.py").read_bytes(),
    }
    files = {name: folder / f"{name}.npy" for name in texts}
    for name, text in texts.items():
        np.save(files[name], np.frombuffer(text, np.uint8).astype(np.uint16))
    return files


def command_of(demo: Path, files: dict[str, Path], out: Path, draws: int) -> list[str]:
    probes = [f"{name}={file}" for name, file in files.items()]
    options = {"--examples": EXAMPLES, "--chains": CHAINS, "--draws": draws, "--warmup": draws, "--thinning": 1,
               "--sampler": "sgld", "--step-size": 1e-3, "--out": out}  # fmt: skip
    flat = [str(x) for pair in options.items() for x in pair]
    return [sys.executable, "-m", "slt_jax.cli", "susceptibilities", str(demo / CHECKPOINT), "--tokens",
            str(files["python"]), "--probe", *probes, "--components", "all", "layers", *flat, "--quiet"]  # fmt: skip


def measured(demo: Path, draws: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "susceptibilities.zarr"
        command = command_of(demo, write_tokens(folder), out, draws)
        begun, load = time.perf_counter(), os.getloadavg()[0]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        found = load_susceptibilities(out)
        return {
            "components": len(found.components), "tokens": int(np.isfinite(found.chi.values[0]).sum()),
            "chains": CHAINS, "draws": draws, "warmup": draws, "thinning": 1, "sampler": "sgld", "step_size": 1e-3,
            "estimator": found.dataset.attrs["estimator"], "seconds": round(seconds, 1), "peak_gib": round(peak, 3),
            "load_before": load, "load_after": os.getloadavg()[0], "cores": os.cpu_count(),
            "reliability": {k: round(v, 3) for k, v in found.reliability.items()},
            "verdicts": {k: result.verdict for k, result in found.results.items()},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="the folder that slt-jax demo wrote")
    parser.add_argument("--draws", type=int, nargs="+", default=[200], help="of each chain; a run for each number")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {"runs": [], "versions": versions()}
    for draws in args.draws:
        found["runs"].append(measured(args.demo, draws))
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
