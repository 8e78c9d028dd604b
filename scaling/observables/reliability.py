"""How many draws a susceptibility needs: split-half reliability over draws, of slt-jax and of devinterp 2.0.1.

Published settings on both sides: SGLD of step 1e-3, nbeta 30, localization 300, 4 chains, two-chain estimator. Both
write phi and the losses of the probe's tokens at each draw; one function reads the susceptibilities of the two halves
of the chains from the first T draws of each, and their correlation over tokens by Spearman and Brown's formula. The
number of draws at 0.9 is interpolated in log T; beyond the last T it is that which the formula 1 / (1 + c/T), through
the last T, gives.

    python -m scaling.observables.reliability convert DEMO/checkpoints/step-00980 FOLDER
    python scaling/observables/reliability.py devinterp FOLDER --out A       # needs devinterp 2.0.1
    python -m scaling.observables.reliability ours FOLDER --out B
    python -m scaling.observables.reliability table A B --timing peer-demo-100.json \
        --out scaling/observables/results/reliability-demo.json

``FOLDER`` has a GPT-2 in Hugging Face's format and ``tokens.npy``. Seconds are of a component and of all weights, at
the speed that ``peer`` measured on an idle machine with the same model, batch and probe.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

LR, NBETA, LOCALIZATION, BATCH, CHAINS, BURNIN = 1e-3, 30.0, 300.0, 16, 4, 50
PARTS: tuple[tuple[int, int | None], ...] = ((0, 0), (1, 2), (1, None))  # (layer, head), or None for its MLP
PROBE_BATCHES = 4
LENGTHS = (4, 8, 16, 25, 50, 100, 200, 400, 800)
SEED = 0


def convert(checkpoint: Path, folder: Path) -> None:
    """A checkpoint of ``slt-jax demo`` as a GPT-2 of Hugging Face's format."""
    import jax
    from flax import nnx
    from safetensors.numpy import save_file

    from slt_jax.models.hub import load_decoder
    from slt_jax.models.sources import GPT2

    model = load_decoder(checkpoint)[0]
    arrays = {
        "/".join(str(getattr(key, "key", key)) for key in path if getattr(key, "key", key) != "value"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    }
    tensors: dict[str, np.ndarray] = {}
    for path, source in sorted(GPT2.items(), key=lambda item: item[1].part):
        if path not in arrays:
            continue
        stacked = "{}" in source.name
        for layer in range(arrays[path].shape[0] if stacked else 1):
            value = arrays[path][layer] if stacked else arrays[path]
            rows = source.axes.split(" ", 1)[0] if not source.axes.startswith("(") else ""
            flat = value.reshape(value.shape[0], -1) if rows == "width" and value.ndim > 2 else value
            if path.endswith("attention/o"):
                flat = value.reshape(-1, value.shape[-1])
            elif source.axes.startswith("(3"):
                flat = value.reshape(-1)
            name = source.name.format(layer)
            tensors[name] = np.concatenate((tensors[name], flat), axis=-1) if name in tensors else flat
    decoder = json.loads((checkpoint / "config.json").read_text())["decoder"]
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "vocab_size": decoder["vocab_size"], "n_positions": decoder["context_length"], "n_embd": decoder["width"],
        "n_layer": decoder["num_layers"], "n_head": decoder["num_heads"], "n_inner": decoder["mlp_width"],
        "layer_norm_epsilon": decoder["norm_epsilon"], "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "tie_word_embeddings": decoder["tied_head"], "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip


def named(part: tuple[int, int | None]) -> str:
    layer, head = part
    return f"layer {layer} mlp" if head is None else f"layer {layer} head {head}"


def probe_of(folder: Path) -> np.ndarray:
    rows = np.load(folder / "tokens.npy").astype(np.int64)
    return rows[np.random.default_rng(SEED).choice(len(rows), BATCH * PROBE_BATCHES, replace=False)]


def devinterp(folder: Path, out: Path, draws: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from devinterp.slt.sampling import sample
    from devinterp.slt.weight_restrictions import create_param_masks
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = GPT2LMHeadModel.from_pretrained(folder)
    rows = np.load(folder / "tokens.npy").astype(np.int64)
    data = Dataset.from_dict({"input_ids": rows.tolist()}).with_format("torch")
    probe = Dataset.from_dict({"input_ids": probe_of(folder).tolist()}).with_format("torch")
    masks = {"full": {name: None for name, _ in model.named_parameters()}} | {
        named(part): create_param_masks(model, f"l{part[0]} mlp" if part[1] is None else f"l{part[0]}h{part[1]}")
        for part in PARTS
    }
    for name, mask in masks.items():
        found = sample(
            model=model, dataset=data, observables={"data": (data, 1), "probe": (probe, PROBE_BATCHES)},
            param_masks=mask, lr=LR, n_beta=NBETA, localization=LOCALIZATION, num_chains=CHAINS, num_draws=draws,
            num_burnin_steps=BURNIN, batch_size=BATCH, num_init_loss_batches=8,
        ).dataset  # fmt: skip
        phi = found["loss_data"].values.mean(axis=(-2, -1)) - float(found["init_loss"].values.mean())
        np.savez(out / f"{name}.npz", phi=phi, losses=found["loss_probe"].values.astype(np.float32))
    versions = {name: importlib.metadata.version(name) for name in ("devinterp", "torch", "transformers")}
    return {"side": "devinterp", "versions": versions}


def ours(folder: Path, out: Path, draws: int) -> dict[str, Any]:
    import jax

    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    import slt_jax as slt
    from slt_jax.cli.language import open_case
    from slt_jax.machine import versions
    from slt_jax.models.restrict import restricted

    case = open_case(str(folder), tokens=folder / "tokens.npy", nbeta=NBETA, localization=LOCALIZATION)
    probe = slt.Observable(probe_of(folder).astype(np.int32), level="token")
    posteriors = {"full": case.posterior} | {named(p): restricted(case.posterior, named(p)) for p in PARTS}
    for index, (name, posterior) in enumerate(posteriors.items()):
        found = slt.estimate_llc(
            posterior, case.data, observe={"probe": probe}, sampler=slt.sgld(LR), num_chains=CHAINS, num_draws=draws,
            num_warmup=BURNIN, thinning=1, batch_size=BATCH, key=index, progress=False,
        )  # fmt: skip
        observed = found.observed["probe"]
        np.savez(out / f"{name}.npz", phi=observed.gap, losses=np.asarray(observed.values[...], np.float32))
    return {"side": "ours", "versions": versions()}


def reliability(part: dict[str, np.ndarray], full: dict[str, np.ndarray], draws: int) -> float:
    """Of the two-chain estimate from so many draws of each chain; ``phi`` (chain, draw), ``losses`` with the probe."""
    from slt_jax.results.observed import Observed
    from slt_jax.results.susceptibility_columns import column_of, reference_of

    def first(of: dict[str, np.ndarray]) -> Observed:
        losses, gap = of["losses"][:, :draws], of["phi"][:, :draws]
        unknown = np.full(losses.shape[2:], np.nan, np.float32)
        return Observed("probe", "token", losses, None, unknown, None, gap, NBETA, losses.shape[2], LOCALIZATION)

    return column_of(first(part), "two-chain", reference_of(first(full))).reliability


def draws_at(target: float, curve: dict[int, float]) -> float:
    """The number of draws at which the reliability is ``target``; infinite if it is not positive."""
    lengths, values = list(curve), list(curve.values())
    for (a, low), (b, high) in itertools.pairwise(zip(lengths, values, strict=True)):
        if low < target <= high:
            return float(np.exp(np.interp(target, (low, high), np.log((a, b)))))
    last = values[-1]
    if last >= target:
        return float(lengths[0])
    return lengths[-1] * (1 / last - 1) / (1 / target - 1) if last > 0 else float("inf")


def read(side: Path, timing: dict[str, Any]) -> dict[str, Any]:
    row = json.loads((side / "run.json").read_text())
    arrays = {file.stem: dict(np.load(file)) for file in side.glob("*.npz")}
    full = arrays.pop("full")
    lengths = [t for t in LENGTHS if t <= row["draws"]]
    row["reliability"] = {
        name: {t: round(reliability(part, full, t), 3) for t in lengths} for name, part in arrays.items()
    }
    needed = {name: draws_at(0.9, curve) for name, curve in row["reliability"].items()}
    timed, work = timing[row["side"]]["seconds"], timing[row["side"]]["work"]
    step = timed / (work["components"] * work["chains"] * (work["draws"] + work["burnin"]))
    row["draws_at_0.9"] = {name: round(draws, 1) for name, draws in needed.items() if np.isfinite(draws)}
    row["seconds_at_0.9"] = {
        name: round(2 * CHAINS * (draws + BURNIN) * step, 1) for name, draws in needed.items() if np.isfinite(draws)
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("convert", "devinterp", "ours", "table"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--timing", type=Path, help="what peer wrote")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what == "convert":
        convert(*args.paths)
        return
    if args.what == "table":
        settings = {"step_size": LR, "nbeta": NBETA, "localization": LOCALIZATION, "batch": BATCH, "chains": CHAINS,
                    "burnin": BURNIN, "probe": BATCH * PROBE_BATCHES}  # fmt: skip
        timing = json.loads(args.timing.read_text())
        text = json.dumps({"settings": settings, "sides": [read(side, timing) for side in args.paths]}, indent=1) + "\n"
        print(text)
        args.out.write_text(text)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"devinterp": devinterp, "ours": ours}[args.what](args.paths[0], args.out, args.draws)
    found |= {"draws": args.draws, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}
    (args.out / "run.json").write_text(json.dumps(found))
    print(found)


if __name__ == "__main__":
    main()
