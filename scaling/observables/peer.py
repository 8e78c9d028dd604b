"""Susceptibilities of a transformer's parts: the time of slt-jax beside that of devinterp 2.0.1, on the same work.

A GPT-2 with random weights in Hugging Face's format, which both read. Same components, chains, burn-in, draws, batch,
step size, localization, nbeta and probe; the time is that of the whole call, compilation included. slt-jax also
measures standard errors, reliabilities and the curvature at w* in that time.

    python scaling/observables/peer.py make FOLDER --size demo          # needs transformers and torch
    python scaling/observables/peer.py devinterp FOLDER --out A.json    # needs devinterp 2.0.1 and transformers
    python -m scaling.observables.peer ours FOLDER --out B.json
    python -m scaling.observables.peer table A.json B.json --out scaling/observables/results/peer-demo.json

Run both sides in one sitting on an idle machine.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {
    "demo": {"vocab_size": 256, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4},
    "2.8M": {"vocab_size": 5000, "n_positions": 128, "n_embd": 192, "n_layer": 4, "n_head": 4},
}
PARTS = {"demo": {"layers": 2, "heads": 4}, "2.8M": {"layers": 1, "heads": 4}}
LR, NBETA, LOCALIZATION, BATCH, CHAINS = 1e-4, 30.0, 300.0, 16, 4
DRAWS = {"demo": 25, "2.8M": 10}
BURNIN = {"demo": 25, "2.8M": 10}
PROBE_BATCHES = 4


def make(folder: Path, size: str) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**SIZES[size], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    rows = np.random.default_rng(0).integers(0, SIZES[size]["vocab_size"], (2048, SIZES[size]["n_positions"]))
    np.save(folder / "tokens.npy", rows.astype(np.uint16))
    (folder / "size.json").write_text(json.dumps(size))


def parts_of(size: str) -> list[tuple[int, int | None]]:
    """(layer, head), or (layer, None) for the MLP of a layer."""
    layers, heads = PARTS[size]["layers"], PARTS[size]["heads"]
    return [(k, head) for k in range(layers) for head in (*range(heads), None)]


def devinterp(folder: Path, size: str) -> dict[str, Any]:
    import importlib.metadata

    import torch
    from datasets import Dataset
    from devinterp.slt.susceptibilities import susceptibilities
    from devinterp.slt.weight_restrictions import create_param_masks
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = GPT2LMHeadModel.from_pretrained(folder)
    rows = np.load(folder / "tokens.npy").astype(np.int64)
    data = Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch")
    probe = Dataset.from_dict({"input_ids": rows[: BATCH * PROBE_BATCHES].tolist()}).with_format("torch")
    restrictions = {"full": None} | {
        f"l{k} mlp" if h is None else f"l{k}h{h}": create_param_masks(model, f"l{k} mlp" if h is None else f"l{k}h{h}")
        for k, h in parts_of(size)
    }
    start = time.perf_counter()
    susceptibilities(
        model, data, {"data": (data, 1), "probe": (probe, PROBE_BATCHES)}, restrictions, sampling_task="data", lr=LR,
        n_beta=NBETA, localization=LOCALIZATION, num_chains=CHAINS, num_draws=DRAWS[size],
        num_burnin_steps=BURNIN[size], batch_size=BATCH, num_init_loss_batches=1,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    versions = {name: importlib.metadata.version(name) for name in ("devinterp", "torch", "transformers")}
    return {"side": "devinterp", "size": size, "seconds": seconds, "versions": versions}


def ours(folder: Path, size: str) -> dict[str, Any]:
    import jax

    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    import slt_jax as slt
    from slt_jax.cli.language import open_case
    from slt_jax.machine import versions

    case = open_case(str(folder), tokens=folder / "tokens.npy")
    probe = np.load(folder / "tokens.npy")[: BATCH * PROBE_BATCHES].astype(np.int32)
    names = [f"layer {k} mlp" if h is None else f"layer {k} head {h}" for k, h in parts_of(size)]
    start = time.perf_counter()
    found = slt.susceptibilities(
        case.posterior, case.data, names, slt.Observable(probe, level="token"), sampler=slt.sgld(LR), num_chains=CHAINS,
        num_draws=DRAWS[size], num_warmup=BURNIN[size], thinning=1, batch_size=BATCH, progress=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert found.chi.shape == (len(names), len(probe), probe.shape[1] - 1)
    sampling = sum(r.settings.cost["parts"].get("sampling", 0.0) for r in (found.full, *found.results.values()) if r)
    return {"side": "ours", "size": size, "seconds": seconds, "sampling_seconds": sampling, "versions": versions()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "devinterp", "ours", "table"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--size", choices=sorted(SIZES), default="demo")
    parser.add_argument("--draws", type=int, help="of each chain, in place of the size's own")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.draws is not None:
        DRAWS.update(dict.fromkeys(DRAWS, args.draws))
    if args.what == "make":
        make(args.paths[0], args.size)
        return
    if args.what == "table":
        sides = {row["side"]: row for row in (json.loads(path.read_text()) for path in args.paths)}
        found = {"ratio": sides["devinterp"]["seconds"] / sides["ours"]["seconds"], **sides}
    else:
        folder = args.paths[0]
        size = json.loads((folder / "size.json").read_text())
        found = {"devinterp": devinterp, "ours": ours}[args.what](folder, size)
        work = {"components": 1 + len(parts_of(size)), "chains": CHAINS, "burnin": BURNIN[size], "draws": DRAWS[size],
                "batch": BATCH, "probe": BATCH * PROBE_BATCHES}  # fmt: skip
        found |= {"work": work, "cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
