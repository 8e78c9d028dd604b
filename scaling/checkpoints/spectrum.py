"""The effective dimension of language models: minutes and memory.

    python -m scaling.checkpoints.spectrum demo FOLDER TOKENS.npy       # a checkpoint that ``slt-jax`` reads
    python -m scaling.checkpoints.spectrum gpt2 --order 8 --probes 2    # GPT-2 small's shape, random weights and tokens

Each run writes ``results/spectrum/NAME.json``, with device and versions. nbeta 30 and localization 300, the published
values. The Lanczos coefficients are in the file, from which the value at any other nbeta and localization follows.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import slt_jax as slt
from scaling.throughput.compare import machine
from scaling.throughput.work import GPT2_SMALL
from slt_jax.cli.language import LOCALIZATION, NBETA, open_case
from slt_jax.machine import peak_of_process
from slt_jax.models import Decoder, sequence_loss

RESULTS = Path(__file__).parent / "results" / "spectrum"
SETTINGS = [(30.0, 300.0), (30.0, 1.0), (1e4, 1.0), (1e6, 1.0)]  # nbeta, localization


def demo(folder: str, tokens: str, seq_len: int) -> tuple[slt.LocalPosterior, Any]:
    case = open_case(folder, tokens=Path(tokens), seq_len=seq_len)
    return case.posterior, case.data


def gpt2(seq_len: int) -> tuple[slt.LocalPosterior, Any]:
    """124M weights of the initialization, and random tokens: what a product costs does not depend on them."""
    params, loss_fn = slt.from_nnx(Decoder(GPT2_SMALL, rngs=nnx.Rngs(0)), sequence_loss)
    tokens = np.random.default_rng(0).integers(0, GPT2_SMALL.vocab_size, (64, seq_len)).astype(np.int32)
    return slt.LocalPosterior(loss_fn, params, len(tokens), NBETA, LOCALIZATION), tokens


def run(name: str, posterior: slt.LocalPosterior, data: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """One row: the value, its errors, and what they cost."""
    before, began = peak_of_process(), time.perf_counter()
    found = slt.effective_dimension(posterior, data, progress=True, **arguments)
    print(found, flush=True)
    weights = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(posterior.center))
    return {
        "name": name, "arguments": arguments, "seconds": time.perf_counter() - began,
        "peak_mib": peak_of_process() / 2**20, "peak_before_mib": before / 2**20, "weights_mib": weights / 2**20,
        "at": [{"nbeta": n, "localization": g, "value": at.value, "stderr": at.stderr}
               for n, g in SETTINGS for at in [found.at(nbeta=n, localization=g)]],
        "found": found.to_dict(), "machine": machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("demo", "gpt2"))
    parser.add_argument("paths", nargs="*", help="of the checkpoint and of its tokens")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--curvature", default="gauss-newton")
    for option in ("examples", "batch-size", "order", "probes"):
        parser.add_argument(f"--{option}", type=int)
    given = parser.parse_args()
    names = ("curvature", "examples", "batch_size", "order", "probes")
    arguments = {name: value for name in names if (value := getattr(given, name)) is not None}
    posterior, data = demo(*given.paths, given.seq_len) if given.name == "demo" else gpt2(given.seq_len)
    row = run(given.name, posterior, data, arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = f"{given.name}-{given.curvature}"
    (RESULTS / f"{stem}.json").write_text(json.dumps(row, indent=1) + "\n")
    print(f"{row['seconds']:.0f} s, {row['peak_mib']:,.0f} MiB at most")


if __name__ == "__main__":
    main()
