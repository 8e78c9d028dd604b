"""devinterp 2.0.1's LLC of a language model's checkpoint: a row beside those of ``settle``.

Its defaults (4 chains, 200 draws, no burn-in, batch 32), with nbeta 30, localization 300 and the step size of published
work, which it has no defaults for. Needs devinterp 2.0.1, torch and transformers.

    python scaling/checkpoints/devinterp_llc.py FOLDER --rows scaling/checkpoints/results/settle/IgLM-S.jsonl
"""

import argparse
import importlib.metadata
import json
import os
import time
from pathlib import Path

import numpy as np

NBETA, LOCALIZATION, LR = 30.0, 300.0, 1e-3
CHAINS, DRAWS = 4, 200


def main() -> None:
    import torch
    from datasets import Dataset
    from devinterp.slt.llc import llc
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint in Hugging Face's format, with tokens.npy")
    parser.add_argument("--rows", type=Path, required=True, help="the file that the row is added to")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    model = AutoModelForCausalLM.from_pretrained(args.folder)
    tokens = np.load(args.folder / "tokens.npy").astype(np.int64)
    data = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    begun = time.perf_counter()
    found = llc(model, data, lr=LR, n_beta=NBETA, localization=LOCALIZATION, observables={})
    seconds = time.perf_counter() - begun
    each = np.asarray(found["llc_per_chain"].values if "llc_per_chain" in found else found["llc"].values, float)
    row = {
        "problem": args.folder.name, "method": "devinterp 2.0.1", "seed": 0, "llc": float(each.mean()),
        "llc_stderr": float(each.std(ddof=1) / np.sqrt(each.size)) if each.size > 1 else float("nan"), "rhat": None,
        "ess": None, "verdict": "none given", "reason": "standard deviation over chains / sqrt(chains)", "notes": [],
        "extrapolated": None, "localization": LOCALIZATION, "nbeta": NBETA, "step_size": LR,
        "num_free": sum(p.numel() for p in model.parameters()), "gradients": float(CHAINS * DRAWS), "budget": None,
        "seconds": seconds, "device": f"{cores} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("devinterp", "torch", "transformers")},
    }  # fmt: skip
    print(found)
    print(json.dumps(row))
    with args.rows.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
