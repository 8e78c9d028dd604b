"""Does influence predict what leaving an example out does? Against a network that was trained again without it.

A network on scikit-learn's digits (64-8-10, tanh, 610 weights, weight decay in the loss), trained on 200 of them with
all rows, until it stands still. It is trained again without each of 50 examples drawn at random, in two ways: from w*
with short steps ("near w*"), and from the first weights ("from scratch"). The actual change is that of the mean
loss of 1,000 other digits. Two predictions of it:

    influence   beta Cov(l_i, mean held-out loss) over the draws of the posterior at nbeta = beta n
    classical   g_i' (n H + localization / beta)^-1 g, with all second derivatives at w*

For each: Spearman's rank correlation with the actual change, its standard error by the jackknife over the examples, and
for the influence the part of the error that is from the draws, by leaving out one chain at a time.

Three networks take 15 minutes on one core.

    python -m scaling.observables.leave_one_out --out scaling/observables/results/leave_one_out.json
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import slt_jax as slt
from slt_jax.machine import versions

TRAIN, HELD_OUT, LEFT_OUT = 200, 1000, 50
DECAY, STEPS, RATE, NEAR_RATE = 5e-3, 6000, 1e-2, 2e-4
SIZES = (64, 8, 10)


class Study(NamedTuple):
    """``change``: of the mean held-out loss without each example of ``left``, nats, by way of training."""

    center: dict[str, jax.Array]
    train: tuple[jax.Array, jax.Array]
    held_out: tuple[jax.Array, jax.Array]
    left: np.ndarray
    change: dict[str, np.ndarray]


def loss(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Cross-entropy of each image and the weight decay, nats."""
    x, y = batch
    logits = jnp.tanh(x @ params["a"] + params["b"]) @ params["c"] + params["d"]
    decay = sum(jnp.sum(w**2) for w in params.values())
    return optax.softmax_cross_entropy_with_integer_labels(logits, y) + 0.5 * DECAY * decay


def first_weights(key: jax.Array) -> dict[str, jax.Array]:
    a, b, c = SIZES
    k1, k2 = jax.random.split(key)
    return {"a": jax.random.normal(k1, (a, b)) / math.sqrt(a), "b": jnp.zeros(b),
            "c": jax.random.normal(k2, (b, c)) / math.sqrt(b), "d": jnp.zeros(c)}  # fmt: skip


def trained(
    start: dict[str, jax.Array], data: tuple[jax.Array, jax.Array], weights: jax.Array, rate: jax.Array
) -> dict[str, jax.Array]:
    """Adam on all rows with a falling rate; the rows count by ``weights``."""
    optimizer = optax.adam(lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * count / STEPS)))

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda p: weights @ loss(p, data) / weights.sum())(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (start, optimizer.init(start)), None, STEPS)[0][0]


def study(seed: int) -> Study:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.target))
    x, y = jnp.asarray(found.data / 16, jnp.float32)[order], jnp.asarray(found.target, jnp.int32)[order]
    train, held_out = (x[:TRAIN], y[:TRAIN]), (x[TRAIN : TRAIN + HELD_OUT], y[TRAIN : TRAIN + HELD_OUT])
    start = first_weights(jax.random.key(seed))
    fit, every = jax.jit(trained), jnp.ones(TRAIN)
    center = fit(fit(start, train, every, RATE), train, every, NEAR_RATE)
    left = np.random.default_rng(seed + 1).choice(TRAIN, LEFT_OUT, replace=False)
    weights = jnp.ones((LEFT_OUT, TRAIN)).at[jnp.arange(LEFT_OUT), left].set(0.0)
    again = jax.jit(jax.vmap(trained, (None, None, 0, None)))
    held = jax.jit(jax.vmap(lambda p: loss(p, held_out).mean()))
    change = {}
    for way, begin, rate in (("near w*", center, NEAR_RATE), ("from scratch", start, RATE)):
        models, same = again(begin, train, weights, rate), fit(begin, train, every, rate)
        change[way] = np.asarray(held(models), np.float64) - float(loss(same, held_out).mean())
    return Study(center, train, held_out, left, change)


def classical(found: Study, beta: float, localization: float) -> np.ndarray:
    """The first-order change of the mean held-out loss without each example."""
    flat, build = ravel_pytree(found.center)

    def rows(w: jax.Array, batch: Any) -> jax.Array:
        return loss(build(w), batch)

    left = jax.tree.map(lambda x: x[found.left], found.train)
    hessian = np.asarray(jax.hessian(lambda w: rows(w, found.train).mean())(flat), np.float64)
    own = np.asarray(jax.jacrev(lambda w: rows(w, left))(flat), np.float64)
    mean = np.asarray(jax.grad(lambda w: rows(w, found.train).mean())(flat), np.float64)
    held = np.asarray(jax.grad(lambda w: rows(w, found.held_out).mean())(flat), np.float64)
    damped = TRAIN * hessian + localization / beta * np.eye(len(flat))
    return (own - mean) @ np.linalg.solve(damped, held)


def sampled(
    found: Study, beta: float, localization: float, draws: int, key: int
) -> tuple[np.ndarray, slt.LLCResult]:  # fmt: skip
    """(beta Cov of each left-out example with the mean held-out loss (chain, example), the result)."""
    posterior = slt.LocalPosterior(loss, found.center, TRAIN, nbeta=beta * TRAIN, localization=localization)
    left = jax.tree.map(lambda x: x[found.left], found.train)
    result = slt.estimate_llc(
        posterior, found.train, num_chains=4, num_draws=draws, num_warmup=draws * 4, thinning=20, batch_size=TRAIN,
        observe={"left out": left, "held out": found.held_out}, key=key,
    )  # fmt: skip
    own = np.asarray(result.observed["left out"].values, np.float64)
    held = np.asarray(result.observed["held out"].values, np.float64).mean(-1)
    own = own - own.mean((0, 1))
    return beta * np.einsum("ctn,ct->cn", own, held - held.mean()) / (held.shape[1] - 1), result


def correlation(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Spearman's."""
    return float(np.corrcoef(np.argsort(np.argsort(predicted)), np.argsort(np.argsort(actual)))[0, 1])


def jackknifed(values: list[float]) -> float:
    return math.sqrt((len(values) - 1) * float(np.var(values)))


def row(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """``predicted``: (example,), or (chain, example), of which the mean is meant."""
    mean = predicted if predicted.ndim == 1 else predicted.mean(0)
    without = [correlation(np.delete(mean, k), np.delete(actual, k)) for k in range(len(actual))]
    found = {"rank_correlation": correlation(mean, actual), "stderr": jackknifed(without),
             "slope": float(mean @ actual / (mean @ mean))}  # fmt: skip
    if predicted.ndim == 2:
        chains = [correlation(np.delete(predicted, c, 0).mean(0), actual) for c in range(len(predicted))]
        found["stderr_of_draws"] = jackknifed(chains)
    return found


def described(one: dict[str, Any]) -> str:
    """The rank correlations of a row, for the screen."""
    each = [
        f"{way}: " + ", ".join(
            f"{kind} {found['rank_correlation']:.2f} ± {found['stderr']:.2f}" for kind, found in one[way].items()
        ) for way in ("near w*", "from scratch")
    ]  # fmt: skip
    return "; ".join(each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--beta", type=float, nargs="+", default=(1.0, 10.0))
    parser.add_argument("--localization", type=float, nargs="+", default=(1.0,))
    args = parser.parse_args()
    record: dict[str, Any] = {"train": TRAIN, "held_out": HELD_OUT, "left_out": LEFT_OUT, "rows": [],
                              "versions": versions()}  # fmt: skip
    for seed in range(args.seeds):
        start = time.perf_counter()
        found = study(seed)
        between = correlation(found.change["near w*"], found.change["from scratch"])
        record[f"seed {seed}"] = {"retraining_seconds": time.perf_counter() - start, "near_and_from_scratch": between}
        print(f"seed {seed}: trained again; rank correlation of the two ways {between:.2f}", flush=True)
        for beta in args.beta:
            for localization in args.localization:
                start = time.perf_counter()
                influence, result = sampled(found, beta, localization, args.draws, seed)
                one: dict[str, Any] = {
                    "seed": seed, "beta": beta, "localization": localization, "llc": result.llc,
                    "verdict": result.verdict, "seconds": time.perf_counter() - start,
                }  # fmt: skip
                for way, actual in found.change.items():
                    one[way] = {"influence": row(influence, actual),
                                "classical": row(classical(found, beta, localization), actual)}  # fmt: skip
                record["rows"].append(one)
                args.out.write_text(json.dumps(record, indent=1) + "\n")
                print(f"  beta {beta:g}, localization {localization:g}, {result.verdict}: {described(one)}", flush=True)


if __name__ == "__main__":
    main()
