"""One accelerator's speed and memory on GPT-2 small's shape, in under nine minutes; writes JSON, prints a table.

    python -m scaling.throughput.accelerator --out scaling/throughput/results/accelerator.json
    python -m scaling.throughput.accelerator --table scaling/throughput/results/accelerator.json

124M random weights, batch 16 x 1024 tokens, SGLD, float32 chains with a bfloat16 forward pass, one device:

peer      a bare torch loop of the same shape in a process of its own (``accelerator_torch``), ended before JAX starts
memory    the device's peak, the compiler's own account of the chunk program, and the chains that fit by it
step      a step of the engine and a bare jitted value_and_grad of the same loss (float32 weights, cast to bfloat16 in
          each call), turn by turn
estimate  8 chains x 200 draws by ``estimate_llc``; fewer where they would take too long, and then a projection

The file is written anew as each part ends. A part that fails is recorded, the others go on, and the exit code is 1. Our
baseline is L_n(w*) over the whole data set, computed once: a step is one gradient, without a second forward pass.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import slt_jax as slt
from scaling.throughput.accelerator_torch import BATCHES, LOCALIZATION, NBETA, STEP_SIZE, add_sizes, run_apart
from scaling.throughput.compare import machine
from slt_jax.engine.loop import Engine, Inputs, Run
from slt_jax.engine.mesh import chain_mesh
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.engine.problem import Problem
from slt_jax.engine.progress import peak_memory
from slt_jax.machine import versions
from slt_jax.models import Decoder, DecoderConfig
from slt_jax.posterior.data import as_source

# Dense bfloat16 TFLOP/s of one device, by the makers' data sheets; the first name found in JAX's device_kind counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.5, "H100 NVL": 835.5, "H200 NVL": 835.5, "H100": 989.4, "H200": 989.4, "A100": 312.0,
    "TPU v4": 275.0, "TPU v5 lite": 197.0, "TPU v5": 459.0, "TPU v6 lite": 918.0,
}  # fmt: skip


class Job:
    """The work: the posterior around random weights, its data, one device (not touched before it is needed)."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.data = np.random.default_rng(0).integers(0, args.vocab, (BATCHES * args.batch, args.length), np.int32)

    @cached_property
    def mesh(self) -> Any:
        return chain_mesh(self.args.chains, jax.devices()[:1])

    @cached_property
    def posterior(self) -> slt.LocalPosterior:
        a = self.args
        config = DecoderConfig(a.vocab, a.length, a.width, a.layers, a.heads, keep=a.keep)
        params, loss_fn = slt.from_nnx(Decoder(config, rngs=nnx.Rngs(0)), lambda m, tokens: m.losses(tokens))
        return slt.LocalPosterior(loss_fn, params, len(self.data), NBETA, LOCALIZATION, forward_dtype=jnp.bfloat16)

    def engine(self, chains: int) -> tuple[Engine, Inputs, Run]:
        """Chunks of ``--steps`` steps, one chain at a time: the program that ``estimate`` uses as well."""
        a, sampler = self.args, slt.sgld(STEP_SIZE)
        plan = Schedule(chains, (a.rounds + 2) * a.steps, 0, 1, a.batch, 1, "full", 1, a.steps)
        problem = Problem(self.posterior, as_source(self.data), self.mesh, a.batch)
        engine = Engine(problem, sampler, plan, jax.random.key(0))
        inputs = engine.inputs(Numbers(NBETA, LOCALIZATION, STEP_SIZE))
        return engine, inputs, engine.start(inputs)


class Record:
    """What has been found, on disk after every part."""

    def __init__(self, args: argparse.Namespace):
        self.out, self.began = args.out, time.monotonic()
        self.found: dict[str, Any] = {"options": {**vars(args), "out": str(args.out)}, "parts": {}}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def part(self, name: str, call: Callable[[], dict[str, Any]]) -> None:
        """Keep what ``call`` returns, or why it failed."""
        begin = time.monotonic()
        print(f"{begin - self.began:.0f} s: {name}", file=sys.stderr, flush=True)
        try:
            result = call()
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        self.found["parts"][name] = {**result, "part_s": time.monotonic() - begin}
        self.write()

    def write(self) -> None:
        self.found["summary"] = summary(self.found)
        partial = self.out.with_name(f"{self.out.name}.partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        partial.replace(self.out)


def device(args: argparse.Namespace) -> dict[str, Any]:
    """The device's name, and its peak of dense bfloat16 arithmetic where it is known."""
    first = jax.devices()[0]
    peak, source = args.peak_tflops, "given"
    if peak is None:
        unknown = f"unknown for {first.device_kind!r}: give --peak-tflops"
        name = next((name for name in PEAK_TFLOPS if name in first.device_kind), None)
        peak, source = (None, unknown) if name is None else (PEAK_TFLOPS[name], f"data sheet of {name}")
    found = {"name": first.device_kind, "jax": jax.__version__, "platform": str(first.client.platform_version)}
    return {**found, "bfloat16_peak_tflops": peak, "bfloat16_peak_source": source}


def memory(job: Job) -> dict[str, Any]:
    """Peak after one chunk of all chains, before anything else has run here; the compiler's account at two counts."""
    (engine, inputs, run), begin = job.engine(job.args.chains), time.monotonic()
    sizes, compile_s = {job.args.chains: _program_bytes(engine, run)}, time.monotonic() - begin
    engine.advance(run, inputs, job.args.steps)
    stats = jax.devices()[0].memory_stats() or {}
    peak_mib, where = peak_memory()
    del engine, run
    other = 2 if job.args.chains > 2 else 2 * job.args.chains
    sizes[other] = _program_bytes(job.engine(other)[0], job.engine(other)[2])
    (few, less), (many, more) = sorted((chains, found["total"]) for chains, found in sizes.items())
    per_chain = (more - less) / (many - few)
    fixed, limit = less - few * per_chain, stats.get("bytes_limit")
    return {
        "peak_bytes_in_use": stats.get("peak_bytes_in_use"), where: peak_mib, "bytes_limit": limit,
        "program_bytes": {str(chains): found for chains, found in sizes.items()},
        "bytes_per_chain": per_chain, "fixed_bytes": fixed,
        "chains_that_fit": None if limit is None else int((limit - fixed) // per_chain), "compile_s": compile_s,
    }  # fmt: skip


def _program_bytes(engine: Engine, run: Run) -> dict[str, int]:
    """The compiler's account of the chunk program; donated state counts once in ``total``."""
    found = engine.lower(run).compile().memory_analysis()
    sizes = {kind: getattr(found, f"{kind}_size_in_bytes") for kind in ("argument", "output", "alias", "temp")}
    return {**sizes, "total": sum(sizes.values()) - 2 * sizes["alias"]}


def step(job: Job) -> dict[str, Any]:
    """Seconds of one step of one chain and of one bare gradient, each round's."""
    a = job.args
    engine, inputs, run = job.engine(a.chains)
    batches = [jnp.asarray(job.data[i * a.batch : (i + 1) * a.batch]) for i in range(4)]
    bare = jax.jit(jax.value_and_grad(job.posterior.program.mean_loss))

    def gradients(count: int) -> None:
        for i in range(count):
            out = bare(engine.problem.center, engine.problem.frozen, batches[i % len(batches)])
        jax.block_until_ready(out)

    each = a.steps * a.chains
    loops = {"engine": lambda: engine.advance(run, inputs, a.steps), "bare": lambda: gradients(each)}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()  # compiles
    for _ in range(a.rounds):
        for name, loop in loops.items():
            begin = time.perf_counter()
            loop()
            seconds[name].append((time.perf_counter() - begin) / each)
    overheads = [own / other - 1 for own, other in zip(seconds["engine"], seconds["bare"], strict=True)]
    full, causal = step_flops(a, weights := job.posterior.num_free)
    return {
        "step_s": statistics.median(seconds["engine"]), "bare_s": statistics.median(seconds["bare"]),
        "overhead": statistics.median(overheads), "overheads": overheads, "seconds": seconds,
        "steps_in_a_round": each, "finite": bool(np.isfinite(run.trace.loss[:, : run.step]).all()),
        "weights": weights, "flops_full_attention": full, "flops_causal_attention": causal,
    }  # fmt: skip


def step_flops(args: argparse.Namespace, weights: int) -> tuple[float, float]:
    """Of one loss and gradient, by the field's two conventions: 6 a weight and token, and attention whole or half."""
    tokens = args.batch * args.length
    products = 6 * (weights - args.length * args.width) * tokens  # the table of positions multiplies nothing
    attention = 12 * args.layers * args.width * args.length * tokens
    return products + attention, products + attention / 2


def estimate(job: Job, record: Record) -> dict[str, Any]:
    """Minutes of ``estimate_llc``. No warm-up, every step a draw."""
    versions()  # fails now, and not after the run, where slt-jax is not installed
    a, parts = job.args, record.found["parts"]
    if "step_s" not in parts["step"]:
        raise RuntimeError("its length depends on the time of a step, which was not measured.")
    each = parts["step"]["step_s"] * a.chains
    around = 2 * parts["memory"].get("compile_s", 60.0)  # to compile the loss at w* and the looks at the end
    allowed = min(a.budget_seconds, a.limit_seconds - (time.monotonic() - record.began))
    draws = min(a.draws, max(min(a.steps, a.draws), int((allowed - around) / each)))
    begin = time.monotonic()
    result = slt.estimate_llc(
        job.posterior, job.data, sampler=slt.sgld(STEP_SIZE), num_chains=a.chains, num_draws=draws, num_warmup=0,
        thinning=1, batch_size=a.batch, key=0, mesh=job.mesh, chain_batch=1, chunk_size=a.steps, baseline="full",
    )  # fmt: skip
    call, sampling = time.monotonic() - begin, result.settings.cost["seconds"]
    return {
        "chains": a.chains, "draws": draws, "num_warmup": 0, "thinning": 1, "baseline": "full", "step_size": STEP_SIZE,
        "call_minutes": call / 60, "sampling_minutes": sampling / 60, "draws_asked": a.draws,
        "projected": draws < a.draws, "minutes_for_draws_asked": (call + sampling * (a.draws / draws - 1)) / 60,
        "stopped_chains": len(result.stopped), "llc_raw": result.llc_raw if np.isfinite(result.llc_raw) else None,
        "cost": result.settings.cost, "memory": result.settings.memory,
    }  # fmt: skip


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s, model FLOP utilization, and peers' steps over ours, of the parts that there are."""
    parts, found = record["parts"], {}
    if "step_s" in (own := parts.get("step", {})):
        found["tokens_per_s"] = record["options"]["batch"] * record["options"]["length"] / own["step_s"]
        peak = parts.get("device", {}).get("bfloat16_peak_tflops")
        for kind in ("full", "causal"):
            rate = own[f"flops_{kind}_attention"] / own["step_s"] / 1e12
            found[f"mfu_{kind}_attention"] = None if peak is None else rate / peak
        for name, peer in parts.get("peer", {}).items():
            if isinstance(peer, dict) and "step_s" in peer:
                found[f"torch_{name}_step_over_ours"] = peer["step_s"] / own["step_s"]
    found["failed"] = [name for name, part in parts.items() if _failures(part)]
    return found


def _failures(part: dict[str, Any]) -> list[str]:
    """Reasons, of a part and of what it is made of."""
    return [x["failed"] for x in (part, *part.values()) if isinstance(x, dict) and "failed" in x]


def table(record: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    parts, sums, sizes = record["parts"], record["summary"], record["options"]
    facts, own, held, run = (parts.get(name, {}) for name in ("device", "step", "memory", "estimate"))
    weights = f"{own['weights']:,} weights, " if "weights" in own else ""
    yield f"| {facts.get('name', 'no device')} | {weights}batch {sizes['batch']} x {sizes['length']} tokens |"
    yield "|---|---|"
    if "step_s" in own:
        yield f"| step of one chain | {1e3 * own['step_s']:.2f} ms, {sums['tokens_per_s']:,.0f} tokens/s |"
        full, causal = (sums[f"mfu_{kind}_attention"] for kind in ("full", "causal"))
        shares = facts.get("bfloat16_peak_source") if full is None else f"{full:.1%}, {causal:.1%}"
        yield f"| model FLOP utilization: all of attention, causal half | {shares} |"
        yield f"| bare value_and_grad | {1e3 * own['bare_s']:.2f} ms |"
        yield f"| sampler overhead | {own['overhead']:+.1%} |"
    if "bytes_per_chain" in held:
        where = "device" if "device_peak_mib" in held else "process"
        yield f"| peak memory of the {where}, {sizes['chains']} chains | {held[f'{where}_peak_mib']:,} MiB |"
        each, fixed = (held[kind] / 2**20 for kind in ("bytes_per_chain", "fixed_bytes"))
        fit = "unknown" if held["chains_that_fit"] is None else held["chains_that_fit"]
        yield f"| chains that fit | {fit} ({each:,.1f} MiB each, {fixed:,.1f} MiB besides) |"
    if "call_minutes" in run:
        yield f"| {run['chains']} chains x {run['draws']} draws | {run['call_minutes']:.2f} min, measured |"
    if run.get("projected"):
        minutes = f"{run['minutes_for_draws_asked']:.2f} min, projected"
        yield f"| {run['chains']} chains x {run['draws_asked']} draws | {minutes} |"
    for kind, peer in parts.get("peer", {}).items():
        if isinstance(peer, dict) and "step_s" in peer:
            ratio = sums.get(f"torch_{kind}_step_over_ours", float("nan"))
            yield f"| torch loop, {kind} | {1e3 * peer['step_s']:.2f} ms, {ratio:.2f} times our step |"
    for name in sums["failed"]:
        yield f"| {name} failed | {' '.join(_failures(parts[name])[0].split())[:200].replace('|', '/')} |"


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--out", type=Path, help="the JSON file")
    which.add_argument("--table", type=Path, metavar="FILE", help="print the table of such a file, measure nothing")
    add_sizes(parser)
    parser.add_argument("--draws", type=int, default=200, help="of each chain in the estimate")
    parser.add_argument("--keep", default="products", help="what a block keeps for its gradient, see DecoderConfig")
    parser.add_argument("--peak-tflops", type=float, help="the device's dense bfloat16 TFLOP/s")
    parser.add_argument("--budget-seconds", type=float, default=300.0, help="most for the estimate")
    parser.add_argument("--limit-seconds", type=float, default=500.0, help="for everything: the estimate is fitted in")
    parser.add_argument("--peer-seconds", type=float, default=170.0, help="most for the torch process")
    parser.add_argument("--no-peer", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = options(arguments)
    if args.table is not None:
        print(*table(json.loads(args.table.read_text())), sep="\n")
        return
    record, job = Record(args), Job(args)
    record.part("machine", machine)
    if not args.no_peer:
        record.part("peer", lambda: run_apart(args))
    record.part("device", lambda: device(args))
    record.part("memory", lambda: memory(job))
    record.part("step", lambda: step(job))
    record.part("estimate", lambda: estimate(job, record))
    print(*table(record.found), sep="\n")
    if record.found["summary"]["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
