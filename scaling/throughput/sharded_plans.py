"""Plans of models whose weights are split over several devices (the mesh's axis ``model``), as JSON and as a table.

    python -m scaling.throughput.sharded_plans --out scaling/throughput/results/sharded_plans.json
    python -m scaling.throughput.sharded_plans --table scaling/throughput/results/sharded_plans.json

4 chains; a minibatch of 16 (in one case 32) x 1024 tokens; float32 chains, bfloat16 forward pass. Each plan is compiled
for TPUs that are not there, in a process of its own, and written as it ends; those in the file are kept. It needs the
compiler for TPUs (the extra ``tpu-compiler``). No weights are made or read.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

import slt_jax as slt
from scaling.throughput.compare import machine
from scaling.throughput.plans import PYTHIA_1B4
from slt_jax.models import Decoder, sequence_loss
from slt_jax.models.layouts import read_config

LLAMA_1B = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "hidden_size": 2048,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "intermediate_size": 8192, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
PYTHIA_6B9 = {
    **PYTHIA_1B4, "vocab_size": 50432, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 16384,
}  # fmt: skip
MODELS = {"Pythia-1.4B": PYTHIA_1B4, "Llama-3.2-1B": LLAMA_1B, "Pythia-6.9B": PYTHIA_6B9}
SAMPLERS = {"sgld": slt.sgld(1e-6), "underdamped": slt.underdamped(1e-6, friction=0.1)}
LENGTH, CHAINS = 1024, 4


class Case(NamedTuple):
    """``model``: devices that share the weights of a chain, and a minibatch too if it is a multiple of their number.
    ``micro_batches``: parts of a minibatch.
    """

    name: str
    device: str
    model: int
    sampler: str
    micro_batches: int = 1
    batch_size: int = 16

    def __str__(self) -> str:
        return "|".join(map(str, self))


CASES = [
    Case("Pythia-1.4B", "v5e:2x4", 8, "sgld"), Case("Llama-3.2-1B", "v5e:2x4", 8, "sgld"),
    Case("Pythia-6.9B", "v5e:4x8", 8, "sgld"), Case("Pythia-1.4B", "v5e:2x4", 2, "sgld", 2),
    Case("Pythia-6.9B", "v5e:4x8", 32, "sgld", 1, 32), Case("Pythia-1.4B", "v5e:2x4", 8, "underdamped"),
]  # fmt: skip


def planned(case: Case) -> dict[str, Any]:
    """The plan in numbers."""
    _, config = read_config(MODELS[case.name], case.name)
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    params, loss_fn = slt.from_nnx(decoder, sequence_loss)
    tokens = np.zeros((256, LENGTH), np.int32)
    posterior = slt.LocalPosterior(loss_fn, params, len(tokens), 30.0, 300.0, forward_dtype=jnp.bfloat16)
    found = slt.plan(
        posterior, tokens, device=case.device, model=case.model, sampler=SAMPLERS[case.sampler], num_chains=CHAINS,
        num_draws=400, num_warmup=200, batch_size=case.batch_size, micro_batches=case.micro_batches, chain_batch=1,
    )  # fmt: skip
    return {**case._asdict(), **found.to_dict()}


def apart(case: Case) -> dict[str, Any]:
    """``planned`` in a process of its own, or why there is no plan."""
    call = [sys.executable, "-m", "scaling.throughput.sharded_plans", "--case", str(case)]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {**case._asdict(), "refused": done.stderr.strip().splitlines()[-1][:1000]}


def table(record: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    names = ("model", "sampler", "devices", "chain x model", "batch", "a device", "of it a chain")
    yield f"| {' | '.join(names)} | collectives on the model axis |"
    yield "|---" * (len(names) + 1) + "|"
    for found in record["plans"]:
        what = f"| {found['name']} | {found['sampler']} | {found['device']} |"
        if "refused" in found:
            yield f"{what} model {found['model']} | {found['batch_size']} | does not fit | | |"
            continue
        shape = f"{found['devices'] // found['model']} x {found['model']}"
        size, each = found["device_bytes"]["total"] / 2**30, found["bytes_per_chain"] / 2**30
        fits = "" if found["fits"] else f", of {found['usable_bytes'] / 2**30:.2f}: does not fit"
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(found["collectives"].get("model", {}).items()))
        yield f"{what} {shape} | {found['batch_size']} | {size:.2f} GiB{fits} | {each:.2f} GiB | {kinds} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--out", type=Path, help="the JSON file; plans that it has are kept")
    which.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file")
    which.add_argument("--case", choices=list(map(str, CASES)), help="one plan, printed as JSON")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(planned(next(case for case in CASES if str(case) == args.case))))
        return
    if args.table is not None:
        print(*table(json.loads(args.table.read_text())), sep="\n")
        return
    plans = json.loads(args.out.read_text())["plans"] if args.out.exists() else []
    done = {tuple(plan[field] for field in Case._fields) for plan in plans}
    for case in CASES:
        if tuple(case) not in done:
            plans.append(apart(case))
            args.out.write_text(json.dumps({**machine(), "plans": plans}, indent=1) + "\n")
    print(*table({"plans": plans}), sep="\n")


if __name__ == "__main__":
    main()
