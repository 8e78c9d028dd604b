"""Plans of language models for accelerators that are not at hand: ``slt-jax plan`` for each of them, as JSON and text.

    python -m scaling.throughput.plans --out scaling/throughput/results/plans.json
    python -m scaling.throughput.plans --table scaling/throughput/results/plans.json

Each plan is a process of its own, and is written as it ends; those in the file are kept, and only the others are made.
A plan takes the memory of its compiler (1 to 3 GiB) and about a minute of one core on an idle machine. Of a model only
its config.json is needed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.throughput.compare import machine

GPT2_SMALL = {
    "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
PYTHIA_1B4 = {
    "model_type": "gpt_neox", "vocab_size": 50304, "max_position_embeddings": 2048, "hidden_size": 2048,
    "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8192, "hidden_act": "gelu",
    "rotary_pct": 0.25, "rotary_emb_base": 10000, "layer_norm_eps": 1e-5, "use_parallel_residual": True,
    "tie_word_embeddings": False,
}  # fmt: skip
PYTHIA_70M = {
    **PYTHIA_1B4, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048,
}  # fmt: skip
MODELS = {"Pythia-70M": PYTHIA_70M, "GPT-2 small": GPT2_SMALL, "Pythia-1.4B": PYTHIA_1B4}
DEVICES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "h100")
OPTIONS = ("--sampler", "sgld", "--precision", "0.03", "--bfloat16", "--batch-size", "16", "--seq-len", "1024")


def made(folder: Path, config: dict[str, Any], device: str, options: tuple[str, ...] = OPTIONS) -> dict[str, Any]:
    """The plan in numbers, or why there is none."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    call = [sys.executable, "-m", "slt_jax.cli", "plan", str(folder), "--device", device, *options, "--json", "--quiet"]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if not errors:
        raise RuntimeError(done.stderr[-2000:])
    return {"refused": errors[-1].removeprefix("error: ")}


def table(record: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| model | device | chains that fit | a device | a chain | collectives | a step of a chain | compiled in |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, plans in record["plans"].items():
        for device, found in plans.items():
            if "refused" in found:
                yield f"| {name} | {device} | 0 (its compiler refuses it) | | | | | |"
                continue
            size, each = found["device_bytes"]["total"] / 2**30, found["bytes_per_chain"] / 2**30
            operations = sum(found["step_products"].values()) / 1e12
            kinds = sum(sum(kinds.values()) for kinds in found["collectives"].values())
            yield (
                f"| {name} | {device} | {found['chains_that_fit']} | {size:.2f} GiB | {each:.2f} GiB | "
                f"{kinds or 'none'} | {operations:.1f} TFLOP, {1e3 * found['step_seconds']:.0f} ms | "
                f"{found['compile_seconds']:.0f} s |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--out", type=Path, help="the JSON file; plans that it has are kept")
    which.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--devices", nargs="+", default=list(DEVICES))
    args = parser.parse_args()
    if args.table is not None:
        print(*table(json.loads(args.table.read_text())), sep="\n")
        return
    record: dict[str, Any] = {"plans": {}, **machine(), "options": list(OPTIONS)}
    if args.out.exists():
        record["plans"] = json.loads(args.out.read_text())["plans"]
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            for device in args.devices:
                plans = record["plans"].setdefault(name, {})
                if device not in plans:
                    plans[device] = made(Path(scratch) / name, MODELS[name], device)
                    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(*table(record), sep="\n")


if __name__ == "__main__":
    main()
