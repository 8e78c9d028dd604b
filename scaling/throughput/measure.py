"""One measurement in one fresh process: ``python -m scaling.throughput.measure CASE``; prints ``RESULT {json}``.

deep_linear, gpt    a warm call of estimate_llc, with everything it does but compiling (as peers are timed)
overhead            on the GPT work, steps of each sampler against a bare jitted value_and_grad loop, turn by turn
gpt2_small          124M weights: 2 chains x 3 draws, with the compilation
floor               float32 matrix products and memory copies per second on this machine
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling.throughput.compare import machine


def peak_mb() -> int:
    """Most resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def whole_call(case: str, folder: Path, baseline: str) -> dict[str, Any]:
    """steps/s of a whole ``estimate_llc`` call, compiled before by a call of the same shape."""
    from scaling.throughput import work as bench

    work = bench.deep_linear() if case == "deep_linear" else bench.gpt(folder)
    begin = time.perf_counter()
    bench.run(work, baseline=baseline, key=0)
    first = time.perf_counter() - begin
    begin, cpu = time.perf_counter(), time.process_time()
    result = bench.run(work, baseline=baseline, key=1)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    peak = peak_mb()  # before the diagnostics, which load BlackJAX
    steps, sampling = work.num_chains * (work.num_warmup + work.num_draws), result.settings.cost["parts"]["sampling"]
    return {
        "steps": steps, "wall_s": wall, "cpu_s": cpu, "first_call_s": first, "sampling_s": sampling,
        "steps_per_s_call": steps / wall, "steps_per_s": steps / sampling, "baseline": baseline,
        "peak_rss_mb": peak, "gflop_per_step": work.flops / 1e9,
        "llc": result.llc, "llc_stderr": result.llc_stderr,
    }  # fmt: skip


def overhead(folder: Path, rounds: int = 7, steps: int = 10) -> dict[str, Any]:
    """Seconds a step of the engine, for each sampler, over those of the bare loop, turn by turn.

    One device, one chain, no baseline in the step. Medians over the rounds of each round's ratio. ``overhead`` is that
    of SGLD, ``overheads`` has them all.
    """
    import slt_jax as slt
    from scaling.throughput import work as bench

    work = bench.gpt(folder)
    size = work.step_size
    samplers = {
        "sgld": slt.sgld(size), "leimkuhler-matthews": slt.sgld(size, noise="leimkuhler-matthews"),
        "preconditioned, rmsprop": slt.preconditioned_sgld(size),
        "preconditioned, adam": slt.preconditioned_sgld(size, moments="adam"),
        "underdamped": slt.underdamped(size, 0.1), "sghmc": slt.sghmc(size, 0.1), "sgnht": slt.sgnht(size, 0.1),
    }  # fmt: skip
    batches = [jnp.asarray(work.data[i : i + work.batch_size]) for i in range(0, 80, work.batch_size)]
    bare = jax.jit(jax.value_and_grad(lambda p, batch: work.posterior.loss_fn(p, batch).mean()))

    def plain(count: int) -> None:
        for i in range(count):
            out = bare(work.posterior.center, batches[i % len(batches)])
        jax.block_until_ready(out)

    loops = {"bare": plain, **{name: _stepper(work, s, rounds * steps + 1) for name, s in samplers.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(1)  # compiles
    for _ in range(rounds):
        for name, loop in loops.items():
            begin = time.perf_counter()
            loop(steps)
            seconds[name].append((time.perf_counter() - begin) / steps)

    def ratio(name: str) -> float:
        return statistics.median(own / bare for own, bare in zip(seconds[name], seconds["bare"], strict=True))

    overheads = {name: ratio(name) - 1 for name in samplers}
    return {"seconds": seconds, "overheads": overheads, "overhead": overheads["sgld"], "peak_rss_mb": peak_mb()}


def _stepper(work: Any, sampler: Any, total: int) -> Callable[[int], None]:
    """A function that moves one chain by so many steps, ``total`` in all."""
    from slt_jax.engine.loop import Engine
    from slt_jax.engine.mesh import chain_mesh
    from slt_jax.engine.plan import Numbers, Schedule
    from slt_jax.engine.problem import Problem
    from slt_jax.posterior.data import as_source

    plan = Schedule(1, total, 0, 1, work.batch_size, 1, "full", 1, 512)
    mesh = chain_mesh(1, jax.devices()[:1])
    posterior = work.posterior
    problem = Problem(posterior, as_source(work.data), mesh, work.batch_size)
    engine = Engine(problem, sampler, plan, jax.random.key(0))
    numbers = Numbers(posterior.nbeta, posterior.localization or 1.0, sampler.step_size or 1.0, sampler.friction)
    inputs = engine.inputs(numbers)
    run = engine.start(inputs)
    return lambda count: engine.advance(run, inputs, count)


def gpt2_small() -> dict[str, Any]:
    """Seconds and peak memory of a whole first call."""
    from scaling.throughput import work as bench

    work = bench.gpt2_small()
    begin = time.perf_counter()
    result = bench.run(work, key=0, progress=True)
    wall = time.perf_counter() - begin
    print(result)
    steps = work.num_chains * work.num_draws
    return {"weights": work.posterior.num_free, "steps": steps, "first_call_s": wall, "peak_rss_mb": peak_mb()}


def floor(size: int = 1024, repeats: int = 10) -> dict[str, Any]:
    """GFLOP/s of float32 matrix products and GB/s of copies, on one JAX device with all cores."""
    a = jnp.ones((size, size)) / size
    product = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, y: y @ x, x))
    big = jnp.ones(2**26)
    copy = jax.jit(lambda x: x + 1)
    best = {}
    for name, call, argument in (("product", product, a), ("copy", copy, big)):
        jax.block_until_ready(call(argument))
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(call(argument))
            times.append(time.perf_counter() - begin)
        best[name] = min(times)
    gflops = 2 * size**3 * repeats / best["product"] / 1e9
    return {"sgemm_gflop_per_s": gflops, "copy_gb_per_s": 2 * 4 * big.size / best["copy"] / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["deep_linear", "gpt", "overhead", "gpt2_small", "floor", "train"])
    parser.add_argument("--folder", type=Path, default=Path("gpt"), help="the GPT's checkpoint, written by train")
    parser.add_argument("--baseline", choices=["full", "paired"], default="full")
    parser.add_argument("--devices", type=int, default=None, help="JAX devices on a CPU; default one per core")
    parser.add_argument("--out", type=Path, help="also write the result to this JSON file, with machine and versions")
    args = parser.parse_args()
    one = args.case in ("overhead", "floor", "gpt2_small", "train")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", args.devices or (1 if one else cores))
    if args.case == "train":
        from scaling.throughput.work import train_gpt

        train_gpt(args.folder)
        return
    if args.case in ("deep_linear", "gpt"):
        found = whole_call(args.case, args.folder, args.baseline)
    else:
        found = {"overhead": lambda: overhead(args.folder), "gpt2_small": gpt2_small, "floor": floor}[args.case]()
    record = {"case": args.case, "devices": jax.device_count(), "cores": cores, **found}
    record = {k: float(v) if isinstance(v, np.floating) else v for k, v in record.items()}
    print("RESULT", json.dumps(record))
    if args.out:
        args.out.write_text(json.dumps({**machine(), **record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
