"""Do the same keys still give the same numbers? Fixed estimates, written as digests and exact floats, and compared.

    python -m scaling.golden --out before.json                      # four minutes on two cores
    python -m scaling.golden --out after.json --against before.json

For a change that is meant to change no number: run it before and after, on one machine with one version of jax (another
processor rounds differently). Every sampler, calibrated and not; masks, control variates, micro-batches, further data
sets, host data, bfloat16; a sweep, a trajectory with parts, a run that is interrupted and resumed, the demo.

``draws`` (digests of the traces), ``estimate`` and ``settings`` must be equal; ``convergence`` (R-hat, effective sample
size, and what follows from them) is listed apart.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import slt_jax as slt
from slt_jax.models import Decoder, DecoderConfig
from slt_jax.posterior.data import HostData

ESTIMATE = (
    "llc", "llc_raw", "init_loss", "wbic", "trend", "virial", "kinetic", "acceptance", "bias_step_size", "bias_noise",
    "from_center", "from_hot", "nbeta_slope", "localization_slope", "degree", "held", "tilt", "owed",
)  # fmt: skip
CONVERGENCE = ("llc_stderr", "rhat", "ess", "verdict", "flags", "nbeta_slope_stderr")
PASSING = ("cost", "memory")  # of the settings: differ from run to run
EXACT = ("mala", "hmc", "nuts", "mclmc")


def digest(array: Any) -> str:
    value = np.ascontiguousarray(array)
    return hashlib.sha256(f"{value.dtype} {value.shape}".encode() + value.tobytes()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """Exact: a float as hexadecimal."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def record_of(result: slt.LLCResult) -> dict[str, Any]:
    tree, found = result.to_xarray(), result.to_dict()
    draws = {
        f"{group}/{name}": digest(tree[group][name].values) for group in tree.children for name in tree[group].data_vars
    }
    settings = {k: v for k, v in found["settings"].items() if k not in PASSING}
    return {
        "draws": draws, "estimate": plain({name: found[name] for name in ESTIMATE}), "settings": plain(settings),
        "also": plain({name: one["llc"] for name, one in found["also"].items()}),
        "convergence": plain({name: found[name] for name in CONVERGENCE}),
    }  # fmt: skip


def regression(num_data: int = 600, noise: float = 1.0) -> tuple[slt.LocalPosterior, tuple]:
    keys = jax.random.split(jax.random.key(5), 3)
    x = jax.random.normal(keys[0], (num_data, 6)) * jnp.array([1.0, 0.1, 1.0, 3.0, 1.0, 0.03])
    y = x @ jnp.arange(6.0) + noise * jax.random.normal(keys[1], (num_data,))
    w = jnp.linalg.lstsq(x, y)[0]

    def loss_fn(p, batch):
        return 0.5 * (batch[0] @ p["w"] + p["b"] - batch[1]) ** 2

    return slt.LocalPosterior(loss_fn, {"w": w, "b": jnp.zeros(())}, num_data=num_data), (x, y)


def valley() -> tuple[slt.LocalPosterior, tuple]:
    """x^2 y^4 with noisy minibatches: the curvature varies, so that steps have a limit."""
    factors = np.tile(np.array([0.5, 1.0, 1.5, 1.0], np.float32), 500)

    def loss_fn(p, batch):
        return batch * (p["x"] - 1.0) ** 2 * (p["y"] + 0.5) ** 4

    center = {"x": jnp.ones(()), "y": jnp.full((), -0.5)}
    return slt.LocalPosterior(loss_fn, center, num_data=len(factors), nbeta=2e4, localization=1.0), factors


def samplers() -> dict[str, Callable[[], dict]]:
    posterior, data = regression()
    near = slt.LocalPosterior(posterior.loss_fn, posterior.center, 600, localization=2.0)
    one = {"num_chains": 4, "num_draws": 120, "num_warmup": 60, "batch_size": 50, "key": 3}
    given = {
        "sgld": slt.sgld(1e-4), "matthews": slt.sgld(1e-4, noise="leimkuhler-matthews"),
        "rmsprop": slt.preconditioned_sgld(1e-4), "adam": slt.preconditioned_sgld(1e-4, moments="adam"),
        "sghmc": slt.sghmc(1e-4, 0.1), "sgnht": slt.sgnht(1e-4, 0.1), "underdamped": slt.underdamped(1e-4, 0.2),
    }  # fmt: skip
    open_ = {
        "sgld": slt.sgld(), "matthews": slt.sgld(noise="leimkuhler-matthews"), "rmsprop": slt.preconditioned_sgld(),
        "sghmc": slt.sghmc(), "sgnht": slt.sgnht(), "underdamped": slt.underdamped(),
        "kronecker": slt.underdamped(metric="kronecker"), "half open": slt.underdamped(1e-4),
    }  # fmt: skip
    cases = {f"{name}, given": lambda s=s: slt.estimate_llc(near, data, sampler=s, **one) for name, s in given.items()}
    few = {"budget": 6000, "batch_size": 50, "key": 4}
    cases |= {
        f"{name}, open": lambda s=s: slt.estimate_llc(posterior, data, sampler=s, **few) for name, s in open_.items()
    }
    for name in EXACT:
        s = getattr(slt, name)(1e-3)
        cases[f"{name}, given"] = lambda s=s: slt.estimate_llc(near, data, sampler=s, num_draws=60, num_chains=2, key=5)
    cases["hmc, open"] = lambda: slt.estimate_llc(posterior, data, sampler=slt.hmc(num_steps=4), budget=3000, key=6)

    def by_blackjax():
        import blackjax

        algorithm = blackjax.mala(near.log_density(data), 1e-4)
        return slt.estimate_llc(near, data, sampler=algorithm, num_draws=50, num_chains=2, key=7)

    return {**cases, "blackjax": by_blackjax}


def options() -> dict[str, Callable[[], dict]]:
    posterior, data = regression()
    near = slt.LocalPosterior(posterior.loss_fn, posterior.center, 600, localization=2.0)
    one = {"sampler": slt.sgld(1e-4), "num_chains": 4, "num_draws": 120, "num_warmup": 60, "batch_size": 50, "key": 3}
    cut = {"w": np.arange(6) % 2 == 0, "b": False}
    low, (lx, ly) = regression(300, 0.3)
    return {
        "defaults": lambda: slt.estimate_llc(low, (lx, ly), key=1),
        "one chain": lambda: slt.estimate_llc(posterior, data, budget=400, batch_size=50, key=1),
        "full baseline": lambda: slt.estimate_llc(near, data, baseline="full", **one),
        "micro-batches": lambda: slt.estimate_llc(near, data, micro_batches=5, **one),
        "control variates": lambda: slt.estimate_llc(near, data, control_variate=True, **one),
        "control, open": lambda: slt.estimate_llc(posterior, data, control_variate=True, budget=6000, batch_size=50),
        "hot": lambda: slt.estimate_llc(near, data, hot=5.0, **one),
        "also": lambda: slt.estimate_llc(near, data, also={"half": (data[0][:300], data[1][:300])}, **one),
        "whole batch": lambda: slt.estimate_llc(near, data, **{**one, "batch_size": 600}),
        "chain batch": lambda: slt.estimate_llc(near, data, chain_batch=2, chunk_size=50, **one),
        "mask": lambda: slt.estimate_llc(
            replace(near, mask=cut), data, **one),
        "bfloat16": lambda: slt.estimate_llc(
            replace(near, forward_dtype=jnp.bfloat16), data, **one),
        "valley": lambda: slt.estimate_llc(*valley(), budget=20_000, batch_size=40, key=2),
        "divergent": lambda: slt.estimate_llc(near, data, **{**one, "sampler": slt.sgld(1.0)}),
    }  # fmt: skip


def language_model() -> tuple[slt.LocalPosterior, np.ndarray, dict[int, Any]]:
    tokens = np.random.default_rng(3).integers(0, 32, (64, 16)).astype(np.int32)
    models = {step: Decoder(DecoderConfig(32, 16, 16, 2, 2), rngs=nnx.Rngs(step)) for step in (1, 2, 5, 9)}
    pairs = {step: slt.from_nnx(model, lambda m, b: m.losses(b)) for step, model in models.items()}
    params, loss_fn = pairs[9]
    posterior = slt.LocalPosterior(loss_fn, params, num_data=64, nbeta=30.0, localization=300.0)
    return posterior, tokens, {step: pair[0] for step, pair in pairs.items()}


class Failing(HostData):
    """Rows from the host; raises at one of its reads."""

    def __init__(self, arrays: tuple, fail_at: int | None):
        self.rows, self.num_data, self.fail_at, self.reads = arrays, len(arrays[0]), fail_at, 0

    def fetch(self, indices):
        self.reads += np.size(indices) > 1000
        if self.reads == self.fail_at:
            raise KeyboardInterrupt
        return tuple(np.asarray(x)[np.asarray(indices)] for x in self.rows)

    def fingerprint(self):
        return "rows"


def resumed() -> slt.LLCResult:
    posterior, data = regression()
    near = slt.LocalPosterior(posterior.loss_fn, posterior.center, 600, localization=2.0)
    one = {"sampler": slt.underdamped(1e-4, 0.2), "num_chains": 4, "num_draws": 120, "num_warmup": 80, "batch_size": 50,
           "chunk_size": 20, "checkpoint_seconds": 0.0}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        try:
            slt.estimate_llc(near, Failing(data, 5), checkpoint_dir=folder, **one)
            raise AssertionError("the run was not interrupted")
        except KeyboardInterrupt:
            pass
        assert any(Path(folder, "steps").iterdir())
        return slt.estimate_llc(near, Failing(data, None), checkpoint_dir=folder, **one)


def many() -> dict[str, Callable[[], dict[str, slt.LLCResult]]]:
    posterior, data = regression()
    lm, tokens, centers = language_model()
    short = {"num_chains": 2, "num_draws": 40, "batch_size": 8, "key": 2}

    def swept():
        found = slt.sweep(
            posterior,
            data,
            nbeta=[50.0, 90.0],
            step_size=[3e-5, 1e-4],
            num_chains=2,
            num_draws=60,
            batch_size=50,
            key=8,
        )
        return {f"cell {i}": r for i, r in enumerate(found.results)} | {"control": found.control}

    def course(**more):
        found = slt.trajectory(lm, centers, tokens, **short, **more)
        return {
            f"{part} {step}": r for part, row in found.results.items() for step, r in zip(found.steps, row, strict=True)
        }

    return {
        "sweep": swept,
        "trajectory": lambda: course(sampler=slt.sgld(1e-4), parts=["layer 0", "layer 1 head 1"]),
        "cold trajectory": lambda: course(sampler=slt.sgld(1e-4), warm_start=False),
        "calibrated trajectory": lambda: course(),
    }


def demo() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "slt_jax.cli", "demo", "--smoke", "--quiet", "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = slt.load_trajectory(Path(folder, "smoke", "trajectory.zarr"))
        return {str(step): record_of(r) for step, r in zip(found.steps, found.results["all"], strict=True)}


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {}
    cases = {**samplers(), **options(), "resumed": resumed}
    for name, case in cases.items():
        found[name] = record_of(case())
        print(name, found[name]["convergence"]["verdict"], flush=True)
    for name, case in many().items():
        results = case()
        found |= {f"{name}: {key}": record_of(r) if isinstance(r, slt.LLCResult) else {"draws": digest(r)}
                  for key, r in results.items()}  # fmt: skip
        print(name, flush=True)
    found |= {f"demo {step}": record for step, record in demo().items()}
    return found


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = [*before, *(name for name in after if name not in before)]
        return [x for name in names for x in differences(before.get(name), after.get(name), f"{place}/{name}")]
    return [] if before == after else [f"{place}: {before} -> {after}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    found = everything()
    args.out.write_text(json.dumps(found, indent=1))
    if args.against is None:
        return
    changed = differences(json.loads(args.against.read_text()), json.loads(args.out.read_text()))
    allowed = [line for line in changed if "/convergence/" in line.split(": ")[0] or "/convergence/" in line]
    wrong = [line for line in changed if line not in allowed]
    print(*wrong[:60], sep="\n")
    print(f"{len(found)} estimates: {len(wrong)} numbers differ, and {len(allowed)} of convergence.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
