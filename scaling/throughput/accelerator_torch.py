"""The peer: a bare torch loop of GPT-2's shape, with devinterp 2.0.1's SGLD update written out.

    python -m scaling.throughput.accelerator_torch [--no-compile] [--layers 12 ...]

transformers' GPT2LMHeadModel, random weights, sdpa attention, float32 weights under bfloat16 autocast, one chain of as
many steps a round as ours has of all chains. Prints ``RESULT {json}`` for ``eager`` and for ``compiled`` (torch.compile
of model and update, default mode). Seconds are per step; the host reads nothing from the device within a round.

    w <- w - (step_size / 2) (nbeta grad L_m(w) + localization (w - w*)) + sqrt(step_size) xi
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

NBETA, LOCALIZATION, STEP_SIZE = 30.0, 300.0, 1e-7
SIZES = {
    "layers": 12, "width": 768, "heads": 12, "vocab": 50257, "length": 1024, "batch": 16,
    "chains": 8, "steps": 4, "rounds": 5,
}  # fmt: skip
BATCHES = 32  # the data set holds so many batches of random tokens


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Options of the work's size, the same for both sides; GPT-2 small's by default."""
    told = {"steps": "of each chain in one timed round, and in one chunk of the engine"}
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=told.get(name))
    parser.add_argument("--no-compile", action="store_true", help="leave out the peer with torch.compile")


def run_apart(args: argparse.Namespace) -> dict[str, Any]:
    """What this module found in a process of its own, when that ended or was stopped after ``peer_seconds``."""
    words = [f"--{name}={getattr(args, name)}" for name in SIZES] + ["--no-compile"] * args.no_compile
    command = [sys.executable, "-m", "scaling.throughput.accelerator_torch", *words]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            end = f"exit code {process.wait(args.peer_seconds)}"
        except subprocess.TimeoutExpired:
            end = f"stopped after {args.peer_seconds:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its compiler's workers too
                process.wait()
        output.seek(0)
        text = output.read()
    results = [json.loads(x.removeprefix("RESULT ")) for x in text.splitlines() if x.startswith("RESULT ")]
    found = {result.pop("case"): result for result in results}
    if end != "exit code 0" or not found:
        found["failed"] = f"{end}: {text[-1000:]}"
    return found


def measure(args: argparse.Namespace, compiled: bool) -> dict[str, Any]:
    """Seconds of a step, tokens/s and peak memory of one variant."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=args.vocab, n_positions=args.length, n_embd=args.width, n_layer=args.layers, n_head=args.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    weights = list(model.parameters())
    center = [w.detach().clone() for w in weights]
    tokens = torch.randint(0, args.vocab, (BATCHES * args.batch, args.length), device=device)

    def loss_of(ids: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    @torch.no_grad()
    def update(weights: Any, grads: Any, center: Any) -> None:
        for w, g, c in zip(weights, grads, center, strict=True):
            w.add_(NBETA * g + LOCALIZATION * (w - c), alpha=-STEP_SIZE / 2)
            w.add_(torch.randn_like(w), alpha=STEP_SIZE**0.5)

    if compiled:
        loss_of, update = torch.compile(loss_of), torch.compile(update)

    def run(count: int) -> float:
        for _ in range(count):
            loss = loss_of(tokens[torch.randint(0, len(tokens), (args.batch,), device=device)])
            update(weights, torch.autograd.grad(loss, weights), center)
        return loss.item()  # waits for the device

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    run(3)
    first, seconds, loss = time.perf_counter() - begin, [], float("nan")
    count = args.steps * args.chains
    for _ in range(args.rounds):
        begin = time.perf_counter()
        loss = run(count)
        seconds.append((time.perf_counter() - begin) / count)
    step = statistics.median(seconds)
    return {
        "step_s": step, "tokens_per_s": args.batch * args.length / step, "seconds": seconds, "warm_up_s": first,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None, "loss": loss,
        "weights": sum(w.numel() for w in weights), "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    args = parser.parse_args(arguments)
    for name in ("eager",) if args.no_compile else ("eager", "compiled"):
        try:
            found = measure(args, name == "compiled")
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        print("RESULT", json.dumps({"case": name, **found}), flush=True)
        gc.collect()
        _empty_cache()


def _empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
