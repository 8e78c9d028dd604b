"""A toy model of superposition is trained; its LLC at the 5-gon and the 6-gon, and along training, is measured.

    python -m scaling.tms.run --out scaling/tms/results          # seven minutes of two cores
    python -m scaling.tms.run --out scaling/tms/results --plot   # picture and tables of what is there

Writes ``tms.json`` and ``tms.png``, and prints the tables of README.md.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling.throughput.compare import machine
from scaling.tms import curves, kgons
from scaling.tms.model import make_data
from scaling.tms.picture import draw
from scaling.tms.tables import tables
from scaling.tms.training import BATCH_SIZE, LEARNING_RATE


def measure(family: curves.Family, runs: list[curves.Run], data: np.ndarray, seeds: int, draws: int) -> dict[str, Any]:
    """The runs of one kind."""
    found = []
    for run in curves.choose(runs, family.path, seeds):
        found.append(curves.record(run, data, draws))
        print(f"{family.name}, seed {run.seed}: {found[-1]['matches']}", flush=True)
    return {**family._asdict(), "start": family.start._asdict(), "runs": found}


def study(seeds: int, draws: int, budget: int) -> dict[str, Any]:
    """Everything that is measured."""
    began, data = time.perf_counter(), make_data(curves.NUM_DATA)
    found = kgons.study(data, seeds + 1, budget)
    by_start = {start: curves.candidates(start, data) for start in {f.start for f in curves.FAMILIES}}
    families = [measure(family, by_start[family.start], data, seeds, draws) for family in curves.FAMILIES]
    return {
        "machine": machine(),
        "device": jax.devices()[0].device_kind,
        "settings": {
            "num_data": len(data), "learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE, "draws": draws,
            "budget": budget, "localization": curves.LOCALIZATION, "start_of_kgons": kgons.START._asdict(),
        },
        "seconds": time.perf_counter() - began,
        "kgons": found,
        "families": families,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", action="store_true", help="only the picture and the tables of what is there")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind; of the k-gons one more")
    parser.add_argument("--draws", type=int, default=600, help="of a chain at each checkpoint")
    parser.add_argument("--budget", type=int, default=40_000, help="gradients for one estimate at a k-gon")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    path = args.out / "tms.json"
    if not args.plot:
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(study(args.seeds, args.draws, args.budget), indent=1) + "\n")
    record = json.loads(path.read_text())
    print(tables(record))
    draw(record, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
