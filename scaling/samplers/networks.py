"""Small networks with label noise at their minimum: the estimate against long runs over the whole data set.

    python -m scaling.samplers.networks           # about fifty minutes on two cores
    python -m scaling.samplers.networks --table   # the tables, from what is there

Minibatch noise does not vanish at w*, the curvatures of one network span five decades without a gap, and no theorem
gives the answer: here chains are slow, and an estimate that stopped half-way looks as still as one that is done.
Everything is by default but the budget. The reference samples the same posterior, nbeta and localization, by
underdamped Langevin over all examples at once: no minibatch noise, so that a friction of 0.01 will do, which mixes
fast, and a bias of second order in the step. Beside it, the value that the Hessian at w* gives: sum of
x / (x + localization) / 2 over its eigenvalues x, times nbeta. Of linear regressions that is exact.

One JSON line for a network and a run; a row that is there is not run again.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import slt_jax as slt
from scaling.dln.records import Store

NUM_DATA = 4000
KINDS = {
    "linear": ((60, 1), None),
    "softmax": ((10, 4), None),
    "tanh": ((5, 8, 3), jnp.tanh),
    "relu": ((5, 8, 3), jax.nn.relu),
    "classifier": ((5, 8, 4), jnp.tanh),
    "deep": ((5, 10, 10, 3), jnp.tanh),
}
BUDGETS = (10_000, 40_000, None)
FIRST_SEED = 10  # the limits of the verdict were set on networks before
FIT_STEPS = 1000
INPUTS = 10**-2.5  # the smallest of a linear regression's, whose curvatures then span five decades
KNOWN_RHAT = 1.1  # of a reference that is one


def apply(kind: str, params: Any, x: jax.Array) -> jax.Array:
    activation = KINDS[kind][1]
    *hidden, last = params
    for layer in hidden:
        x = activation(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def loss_of(kind: str) -> Callable:
    """Negative log likelihood of each example, in nats: of a class, or of a normal variable of variance 1."""
    if kind in ("softmax", "classifier"):
        return lambda params, batch: optax.softmax_cross_entropy_with_integer_labels(
            apply(kind, params, batch[0]), batch[1]
        )
    return lambda params, batch: 0.5 * jnp.sum((apply(kind, params, batch[0]) - batch[1]) ** 2, -1)


def make_network(kind: str, seed: int) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """(w*, data): a random teacher with label noise, and the minimum of the loss of its data that lies nearest."""
    widths = KINDS[kind][0]
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(widths) + 2))
    params = [
        {
            "kernel": 1.4 / np.sqrt(a) * jax.random.normal(next(keys), (a, b)),
            "bias": 0.3 * jax.random.normal(next(keys), (b,)),
        }
        for a, b in pairwise(widths)
    ]
    x = jax.random.normal(next(keys), (NUM_DATA, widths[0]))
    if kind == "linear":
        x *= jnp.geomspace(1, INPUTS, widths[0])
    clean = apply(kind, params, x)
    if kind in ("softmax", "classifier"):
        data = x, jax.random.categorical(next(keys), 1.5 * clean)
    else:
        data = x, clean + jax.random.normal(next(keys), clean.shape)
    return minimum(lambda p: jnp.mean(loss_of(kind)(p, data)), params), data


def minimum(mean_loss: Callable, params: Any) -> Any:
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(mean_loss)

    def step(carry, _):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        update, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=mean_loss)
        return (optax.apply_updates(params, update), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, solver.init(p)), None, FIT_STEPS)[0][0])(params)


def eigenvalues(kind: str, params: Any, data: tuple[jax.Array, jax.Array]) -> np.ndarray:
    """Of the Hessian of L_n at w*, ascending."""
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda w: jnp.asarray(np.asarray(w, np.float64)), params))
        wide = tuple(jnp.asarray(np.asarray(a, np.float64 if a.dtype == jnp.float32 else a.dtype)) for a in data)
        hessian = jax.hessian(lambda v: jnp.mean(loss_of(kind)(unravel(v), wide)))(flat)
    return np.linalg.eigvalsh(np.asarray(hessian))


def row_of(asked: dict, result: slt.LLCResult, seconds: float, **more: float) -> dict:
    summary = result.to_dict()
    settings = summary["settings"]
    keep = ("llc", "llc_stderr", "llc_raw", "verdict", "flags", "rhat", "ess", "virial", "from_center", "from_hot",
            "owed", "extrapolated")  # fmt: skip
    return {
        **asked, **{name: summary[name] for name in keep}, "nbeta_slope": summary["nbeta_slope"],
        "nbeta_slope_stderr": summary["nbeta_slope_stderr"], "num_free": settings["num_free"],
        "nbeta": settings["nbeta"], "localization": settings["localization"], "step_size": settings["step_size"],
        "friction": settings["friction"], "control_variate": settings["control_variate"],
        "gradients": sum(settings["gradients"].values()), **more, "seconds": round(seconds, 2),
        "device": settings["devices"], "versions": settings["versions"],
    }  # fmt: skip


def measure(store: Store, kind: str, seed: int) -> None:
    names = [*(f"budget {budget}" if budget else "default" for budget in BUDGETS), "reference"]
    if all({"kind": kind, "seed": seed, "run": name} in store for name in names):
        return
    params, data = make_network(kind, seed)
    spectrum = eigenvalues(kind, params, data)
    localization = None
    for name, budget in zip(names, BUDGETS, strict=False):
        asked = {"kind": kind, "seed": seed, "run": name}
        if asked not in store:
            began = time.monotonic()
            posterior = slt.LocalPosterior(loss_of(kind), params, NUM_DATA, localization=localization)
            result = slt.estimate_llc(posterior, data, budget=budget, key=seed)
            store.add(row_of(asked, result, time.monotonic() - began))
            print(asked, f"{result.llc:.4g} +/- {result.llc_stderr:.2g}", result.verdict, flush=True)
        # the first run's, so that all are of one posterior
        localization = localization or store.rows[store.key(asked)]["localization"]
        nbeta = store.rows[store.key(asked)]["nbeta"]
    asked = {"kind": kind, "seed": seed, "run": "reference"}
    if asked not in store:
        began = time.monotonic()
        posterior = slt.LocalPosterior(loss_of(kind), params, NUM_DATA, localization=localization)
        curvatures = nbeta * spectrum.clip(0)
        result = slt.estimate_llc(
            posterior, data, sampler=slt.underdamped(0.4 / (curvatures[-1] + localization), 0.01),
            batch_size=NUM_DATA, num_chains=4, num_warmup=20_000, num_draws=10_000, thinning=4, key=1000 + seed,
        )  # fmt: skip
        at_center = float((curvatures / (curvatures + localization)).sum() / 2)
        store.add(row_of(asked, result, time.monotonic() - began, hessian=at_center))
        print(asked, f"{result.llc:.4g} +/- {result.llc_stderr:.2g}", result.verdict, f"{at_center:.4g}", flush=True)
    jax.clear_caches()


def tables(store: Store) -> None:
    rows = store.rows.values()
    runs = [r for r in rows if r["run"] == "reference"]
    references = {(r["kind"], r["seed"]): r for r in runs if r["rhat"] < KNOWN_RHAT}
    print("| network | weights | budget | networks | from the reference, median | largest | converged |")
    print("|---|---|---|---|---|---|---|")
    judged = []
    for kind in KINDS:
        for budget in BUDGETS:
            name = f"budget {budget}" if budget else "default"
            mine = [r for r in rows if (r["kind"], r["run"]) == (kind, name) and (kind, r["seed"]) in references]
            if not mine:
                continue
            errors = [abs(r["llc"] / references[kind, r["seed"]]["llc"] - 1) for r in mine]
            judged += [(error, r["verdict"]) for error, r in zip(errors, mine, strict=True)]
            said = sum(r["verdict"] == "converged" for r in mine)
            spent = f"{budget:,}" if budget else f"default, {round(mine[0]['gradients'], -4):,.0f}"
            line = (kind, mine[0]["num_free"], spent, len(mine), f"{np.median(errors):.1%}", f"{max(errors):.1%}", said)
            print(f"| {' | '.join(map(str, line))} |")
    off = [verdict for error, verdict in judged if error > 0.1]
    right = [verdict for error, verdict in judged if error <= 0.03]
    print(f"\noff by more than 10 %: {len(off)}, not called converged: {sum(v != 'converged' for v in off)}")
    print(f"within 3 %: {len(right)}, called converged: {sum(v == 'converged' for v in right)}")
    apart = [(r["llc"] / r["hessian"] - 1, kind) for (kind, _), r in references.items()]
    print("reference over the Hessian's value - 1: " + ", ".join(f"{kind} {error:+.0%}" for error, kind in apart))
    unknown = [f"{r['kind']} {r['seed']} (R-hat {r['rhat']:.2f})" for r in runs if r["rhat"] >= KNOWN_RHAT]
    print("left out, since the reference did not settle either: " + (", ".join(unknown) or "none"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "networks.jsonl")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    store = Store(args.out, ("kind", "seed", "run"))
    if not args.table:
        for seed in range(FIRST_SEED, FIRST_SEED + args.count):
            for kind in args.kinds:
                measure(store, kind, seed)
    tables(store)


if __name__ == "__main__":
    main()
