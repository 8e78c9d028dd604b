"""What a first estimate costs beside its sampling: models of many small arrays, the README's example, GPT-2's program.

    python -m scaling.throughput.compile_time --out scaling/throughput/results/compile.json --tree before=../before

Each case is a process of its own without a cache of compiled programs, and the trees (checkouts of this repository;
this one is ``after``) take turns. Of all repeats the smallest is reported, since other work of the machine only adds;
``cpu_s`` is the time of all cores. On two cores: eight minutes a repeat for two trees.

N scalars           default estimate of a regression with N weights, each an array of its own
N biases            the same where the arrays have one to eight entries
readme              the README's example
gpt2_small          the steps of one chain of GPT-2 small, 16 x 1024 tokens, lowered for this machine; not run
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_DATA = 5000
EVENTS = {
    "jaxpr_trace_duration": "tracing_s", "jaxpr_to_mlir_module_duration": "lowering_s",
    "backend_compile_duration": "compiling_s",
}  # fmt: skip


def counted() -> dict[str, float]:
    """Programs compiled from now on, and the seconds that JAX reports for each stage; nested traces count twice."""
    import jax

    found: dict[str, float] = {"programs": 0, **dict.fromkeys(EVENTS.values(), 0.0)}

    def add(event: str, duration_secs: float, **_: Any) -> None:
        name = EVENTS.get(event.rsplit("/", 1)[-1])
        if name is not None:
            found[name] += duration_secs
            found["programs"] += name == "compiling_s"

    jax.monitoring.register_event_duration_secs_listener(add)
    return found


def arrays(sizes: list[int]) -> tuple[Any, dict[str, Any], Any]:
    """(loss, weights, data) of a noisy linear regression whose weights are in arrays of these sizes."""
    import jax.numpy as jnp
    import numpy as np

    rng, count = np.random.default_rng(0), sum(sizes)
    x = rng.normal(size=(NUM_DATA, count)).astype(np.float32)
    y = (x.sum(1) + rng.normal(size=NUM_DATA)).astype(np.float32)
    best, ends = np.linalg.lstsq(x, y, rcond=None)[0], np.cumsum(sizes)
    parts = np.split(best, ends[:-1])
    center = {f"w{i:03d}": jnp.asarray(w if len(w) > 1 else w[0]) for i, w in enumerate(parts)}

    def loss_fn(params, batch):
        weights = jnp.concatenate([jnp.atleast_1d(w) for w in params.values()])
        return 0.5 * (batch[0] @ weights - batch[1]) ** 2

    return loss_fn, center, (x, y)


def readme() -> tuple[Any, Any, Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import slt_jax as slt

    model = nnx.Linear(10, 1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (NUM_DATA, 10))
    y = model(x)
    params, loss_fn = slt.from_nnx(model, lambda m, batch: 0.5 * jnp.sum((m(batch[0]) - batch[1]) ** 2, axis=-1))
    return loss_fn, params, (x, y)


def estimated(loss_fn: Any, center: Any, data: Any) -> dict[str, Any]:
    """A default estimate: seconds of the call and of its parts, by the wall and of all cores."""
    import slt_jax as slt

    found = counted()
    began, cpu = time.perf_counter(), time.process_time()
    posterior = slt.LocalPosterior(loss_fn, center, num_data=NUM_DATA)
    result = slt.estimate_llc(posterior, data)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    parts = dict(result.settings.cost.get("parts", {}))
    return {
        "wall_s": wall, "cpu_s": cpu, "beside_sampling_s": wall - parts["sampling"], **found, "parts": parts,
        "llc": result.llc, "llc_stderr": result.llc_stderr,
    }  # fmt: skip


def gpt2_small() -> dict[str, Any]:
    """Characters of the lowered steps' text, and seconds to trace, lower and compile them; weights of zero, no step."""
    import jax
    import numpy as np
    from flax import nnx

    import slt_jax as slt
    from scaling.throughput.work import GPT2_SMALL
    from slt_jax.engine.loop import Engine
    from slt_jax.engine.mesh import chain_mesh
    from slt_jax.engine.plan import Schedule
    from slt_jax.engine.problem import Problem
    from slt_jax.models import Decoder
    from slt_jax.posterior.data import as_source

    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(GPT2_SMALL, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    posterior = slt.LocalPosterior(lambda p, t: nnx.merge(graph, p).losses(t), params, 64, 30.0, 300.0)
    packs: Any = {"packs": True} if "packs" in inspect.signature(Problem).parameters else {}
    tokens, mesh = as_source(np.zeros((64, 1024), np.int32)), chain_mesh(1, jax.devices()[:1])
    problem = Problem(posterior, tokens, mesh, 16, **packs)
    engine = Engine(problem, slt.sgld(1e-7), Schedule(1, 100, 100, 1, 16, 1, "paired", 1, 512), jax.random.key(0))
    found = counted()
    began, cpu = time.perf_counter(), time.process_time()
    lowered = engine.lower()
    lowered_s, text = time.perf_counter() - began, lowered.as_text()
    compiled = lowered.compile()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "wall_s": wall, "cpu_s": cpu, "until_lowered_s": lowered_s, **found, "text_characters": len(text),
        "compiled_characters": len(compiled.as_text() or ""),
    }  # fmt: skip


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"{n} scalars": lambda n=n: estimated(*arrays([1] * n)) for n in (5, 50, 100, 600)},
    "100 biases": lambda: estimated(*arrays([1 + i % 8 for i in range(100)])),
    "readme": lambda: estimated(*readme()),
    "gpt2_small": gpt2_small,
}


def measured(case: str, tree: Path) -> dict[str, Any]:
    """One case in a process of its own, with the library of ``tree``."""
    settings = {"PYTHONPATH": str(tree), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, str(Path(__file__).resolve()), "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    if done.returncode:
        raise RuntimeError(f"{case} in {tree} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=FOLDER", help="another checkout")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--case", choices=list(CASES), help="measure one here, and print JSON")
    args = parser.parse_args()
    if args.case is not None:
        import jax

        jax.config.update("jax_num_cpu_devices", 2)
        print(json.dumps(CASES[args.case]()))
        return
    trees = {name: Path(folder) for name, folder in (t.split("=", 1) for t in args.tree)}
    trees["after"] = Path(__file__).resolve().parents[2]
    runs: dict[str, dict[str, list]] = {case: {name: [] for name in trees} for case in args.cases}
    for _ in range(args.repeats):
        for case, by_tree in runs.items():
            for name, tree in trees.items():
                by_tree[name].append(measured(case, tree))
                print(case, name, {k: round(by_tree[name][-1][k], 2) for k in ("wall_s", "cpu_s")}, flush=True)
                write(args.out, record_of(runs))


def record_of(runs: dict[str, dict[str, list]]) -> dict[str, Any]:
    """What is known so far."""
    from scaling.throughput.compare import machine

    done = {case: {name: found for name, found in by_tree.items() if found} for case, by_tree in runs.items()}
    summary = {case: {name: least(found) for name, found in by_tree.items()} for case, by_tree in done.items()}
    return {**machine(), "least of the repeats": summary, "runs": done}


def write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def least(found: list[dict[str, Any]]) -> dict[str, float]:
    """Of each number, the smallest; but an estimate's own numbers as they are."""
    names = [name for name, value in found[0].items() if isinstance(value, int | float)]
    return {name: min(run[name] for run in found) for name in names}


if __name__ == "__main__":
    main()
