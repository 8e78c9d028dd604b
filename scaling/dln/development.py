"""A deep linear network learns rank by rank, and its learning coefficient rises in steps of exactly known height.

    python -m scaling.dln.development --out scaling/dln/results/development.json  # 200 CPU-seconds
    python -m scaling.dln.development --out scaling/dln/results/development.json --plot  # picture and tables again

The network: output = x W_1 W_2 W_3, widths 6-6-6-10, trained by full-batch gradient descent from weights of size 0.01.
Inputs are whitened (X'X / n = 1), so that with half the squared error, summed over outputs, as loss

    L(W_1, W_2, W_3) = |W_1 W_2 W_3 - W*|^2 / 2,

and plateau k, where the k largest singular values s_i of W* are learned, has the loss sum_{i > k} s_i^2 / 2.

What is estimated. A plateau is a saddle: with the true labels the posterior around it runs downhill, and no learning
coefficient exists. What exists is that of the function the network computes. So the labels are replaced by the
checkpoint's own outputs: the weights are an exact minimum of

    L_own(w) = |W_1 W_2 W_3 - M|^2 / 2,   M = the checkpoint's own product.

That is what is drawn. The estimate with the true labels is drawn below it: negative, "not a minimum", until the last
stage, where the two are one. (Chains that ran to the true minimum read its coefficient less nbeta times the loss at w*.
Where that is less than the coefficient, just before the end, the number is positive, too small, and looks sound.)

What it is compared with. From small weights all three layers have rank k on plateau k, up to what is left of the start:
the deepest point of the zero set of rank k, where the local coefficient is Aoyagi's, ``truth.learning_coefficient``.

The choice of nbeta. In exact arithmetic M has full rank at every step. A singular value sigma of M counts for the
posterior when removing it costs more than one unit of nbeta L, nbeta sigma^2 / 2 > 1: above 0.014 at nbeta 1e4. On a
plateau the unlearned ones are below 0.002 and the learned ones above 0.46, so the posterior sees rank k ("effective
rank" counts by this rule). The layers' own unlearned singular values, what is left of the start, are below half the
spread of the posterior in these directions, about nbeta^(-1/6) = 0.22.

What is expected at this nbeta. With multiplicity m the posterior's value is coefficient - (m - 1) / log(c nbeta) + ...,
with c unknown; "expected" is this for c = 1. Powers of 1 / nbeta and the pull of the localization come on top, so the
posterior itself is also sampled with HMC at each plateau: the distance to that is the sampler's, the rest the nbeta's.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import slt_jax as slt
from scaling.dln import truth
from scaling.dln.development_plot import draw
from scaling.throughput.compare import machine

WIDTHS = (6, 6, 6, 10)
SINGULAR = (4.0, 2.0, 1.0, 0.5)
START = 0.01  # standard deviation of a weight
LEARNING_RATE = 0.02
STEPS = 12_000
NBETA = 1e4
LOCALIZATION = 1.0
COPIES = 16  # of the one example that says everything
NEAR = 0.01  # of the smaller drop beside it: how near a plateau's loss is on the plateau

Weights = tuple[np.ndarray, ...]


class Snapshot(NamedTuple):
    step: int
    loss: float
    weights: Weights


def make_target(rng: np.random.Generator) -> np.ndarray:
    """W*: the singular values of ``SINGULAR`` in random bases, ``(H_0, H_L)``."""
    left, right = (np.linalg.qr(rng.standard_normal((h, h)))[0] for h in (WIDTHS[0], WIDTHS[-1]))
    rank = len(SINGULAR)
    return left[:, :rank] * SINGULAR @ right[:, :rank].T


def make_start(rng: np.random.Generator) -> Weights:
    return tuple(START * rng.standard_normal(pair) for pair in itertools.pairwise(WIDTHS))


def product(weights: Sequence[np.ndarray]) -> np.ndarray:
    """W_1 W_2 ... W_L."""
    result = weights[0]
    for layer in weights[1:]:
        result = result @ layer
    return result


def gradients(weights: Weights, target: np.ndarray) -> Weights:
    """d L / d W_k = (W_1 ... W_{k-1})' (W_1 ... W_L - W*) (W_{k+1} ... W_L)'."""
    gap, found = product(weights) - target, []
    for k in range(len(weights)):
        left = product((np.eye(WIDTHS[0]), *weights[:k]))
        right = product((*weights[k + 1 :], np.eye(WIDTHS[-1])))
        found.append(left.T @ gap @ right.T)
    return tuple(found)


def train(weights: Weights, target: np.ndarray, steps: int, looks: int = 400) -> list[Snapshot]:
    """Gradient descent in float64; snapshots at ``looks`` steps, equally spaced in log step from step 300 on."""
    wanted, history = set(np.geomspace(300, steps, looks).astype(int).tolist()), []
    for step in range(1, steps + 1):
        weights = tuple(w - LEARNING_RATE * g for w, g in zip(weights, gradients(weights, target), strict=True))
        if step in wanted:
            history.append(Snapshot(step, 0.5 * float(np.sum((product(weights) - target) ** 2)), weights))
    return history


def plateau_losses() -> list[float]:
    """sum_{i > k} s_i^2 / 2 for k = 0, 1, ..."""
    return [0.5 * sum(s**2 for s in SINGULAR[k:]) for k in range(len(SINGULAR) + 1)]


def plateau_of(loss: float) -> int | None:
    """The rank k on whose plateau this loss is, None between plateaus."""
    levels = plateau_losses()
    for k, level in enumerate(levels):
        drops = [a - b for a, b in itertools.pairwise(levels[max(0, k - 1) : k + 2])]
        if abs(loss - level) <= NEAR * min(drops):
            return k
    return None


def choose(history: list[Snapshot], count: int) -> list[Snapshot]:
    """``count`` snapshots equally far apart in (log step, root of the loss), and the stillest one of each plateau."""
    x, y = np.log([s.step for s in history]), np.sqrt([s.loss for s in history])
    length = np.cumsum(np.hypot(np.diff(x, prepend=x[0]) / np.ptp(x), np.diff(y, prepend=y[0]) / np.ptp(y)))
    chosen = {int(np.argmin(np.abs(length - at))) for at in np.linspace(0, length[-1], count)}
    return [history[i] for i in sorted(chosen | set(stillest(history).values()))]


def stillest(history: list[Snapshot]) -> dict[int, int]:
    """Plateau -> index of the snapshot where the loss moves least in log step."""
    x, losses = np.log([s.step for s in history]), np.array([s.loss for s in history])
    speed = np.abs(np.gradient(losses, x))
    on = [plateau_of(loss) for loss in losses]
    return {k: min((i for i, p in enumerate(on) if p == k), key=lambda i: speed[i]) for k in set(on) - {None}}


def window(history: list[Snapshot], rank: int) -> tuple[int, int]:
    """First and last step seen on a plateau."""
    steps = [s.step for s in history if plateau_of(s.loss) == rank]
    return min(steps), max(steps)


def effective_rank(matrix: np.ndarray, nbeta: float = NBETA) -> int:
    """Singular values sigma with nbeta sigma^2 / 2 > 1."""
    return int(np.sum(nbeta * np.linalg.svd(matrix, compute_uv=False) ** 2 / 2 > 1))


def exact(rank: int) -> dict:
    """What is known of a plateau; an estimate there is compared with ``exact``."""
    value, multiplicity = truth.learning_coefficient(WIDTHS, rank)
    return {
        "rank": rank,
        "loss": plateau_losses()[rank],
        "exact": float(value),
        "multiplicity": multiplicity,
        "expected": float(value) - (multiplicity - 1) / math.log(NBETA),
    }


def loss_fn(weights: Sequence[jax.Array], batch: jax.Array) -> jax.Array:
    """|W_1 ... W_L - M|^2 / 2 for each M of the batch ``(m, H_0, H_L)``: the loss over all whitened inputs at once.

    So a minibatch is the whole data set, and its gradient has no noise.
    """
    return 0.5 * jnp.sum((product(weights) - batch) ** 2, axis=(-2, -1))


def estimate(
    weights: Weights, labels: np.ndarray, budget: int, key: int, sampler: slt.Sampler | None = None
) -> slt.LLCResult:
    """The LLC at these weights when ``labels`` is the map to be learned; all but nbeta and localization calibrated."""
    posterior = slt.LocalPosterior(loss_fn, weights, COPIES, nbeta=NBETA, localization=LOCALIZATION)
    data = np.broadcast_to(labels, (COPIES, *labels.shape))
    batch_size = None if sampler is not None and sampler.family == "exact" else 4
    return slt.estimate_llc(posterior, data, sampler=sampler, batch_size=batch_size, budget=budget, key=key)


def summary(result: slt.LLCResult) -> dict:
    numbers = result.to_dict()
    return {name: numbers[name] for name in ("llc", "llc_stderr", "rhat", "ess", "verdict", "reason")}


def measure(snapshot: Snapshot, target: np.ndarray, budget: int, reference: bool) -> dict:
    """Everything about one checkpoint; with ``reference`` also HMC on the posterior of its own function."""
    weights = tuple(w.astype(np.float32) for w in snapshot.weights)
    own = np.asarray(jax.jit(product)(weights))
    found = estimate(weights, own, budget, snapshot.step)
    row = {
        "step": snapshot.step,
        "loss": snapshot.loss,
        "plateau": plateau_of(snapshot.loss),
        "effective_rank": effective_rank(own),
        "singular_values": np.linalg.svd(own, compute_uv=False).tolist(),
        "own": summary(found),
        "labels": summary(estimate(weights, target.astype(np.float32), budget // 8, snapshot.step)),
    }
    if reference:
        sampler = slt.hmc(found.settings.step_size, num_steps=64)
        row["hmc"] = summary(estimate(weights, own, budget // 20, snapshot.step, sampler))
    return row


def study(count: int, budget: int, seed: int = 0) -> dict:
    """Train, choose ``count`` checkpoints or a few more, estimate at each."""
    began, rng = time.perf_counter(), np.random.default_rng(seed)
    target = make_target(rng)
    history = train(make_start(rng), target, STEPS)
    still = {history[i].step for i in stillest(history).values()}
    rows = []
    for snapshot in choose(history, count):
        rows.append(measure(snapshot, target, budget, snapshot.step in still))
        print(line(rows[-1]), flush=True)
    return {
        "machine": machine(),
        "settings": {
            "widths": WIDTHS, "singular_values": SINGULAR, "start": START, "learning_rate": LEARNING_RATE,
            "nbeta": NBETA, "localization": LOCALIZATION, "budget": budget, "seed": seed,
        },
        "seconds": time.perf_counter() - began,
        "plateaus": [exact(k) | {"steps": window(history, k)} for k in range(len(SINGULAR) + 1)],
        "history": {"step": [s.step for s in history], "loss": [s.loss for s in history]},
        "checkpoints": rows,
    }  # fmt: skip


def text(found: dict) -> str:
    """Estimate and error bar."""
    if found["llc"] is None:
        return "none"
    return f"{found['llc']:.4g} ± {found['llc_stderr'] or math.nan:.2g}"


def line(row: dict) -> str:
    """One row of the table."""
    k = row["plateau"]
    value = "" if k is None else f"{exact(k)['exact']:g}"
    cells = (
        row["step"], f"{row['loss']:.4f}", row["effective_rank"], text(row["own"]), value, row["own"]["verdict"],
        text(row["labels"]), row["labels"]["verdict"],
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def print_tables(record: dict) -> None:
    print("\n| step | loss | effective rank | LLC | exact | verdict | with the true labels | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    print(*map(line, record["checkpoints"]), sep="\n")
    print("\n| plateau | step | exact | m | expected at this nbeta | HMC | LLC | LLC / exact - 1 | z to HMC |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in record["checkpoints"]:
        if "hmc" in row:
            known, own, hmc = record["plateaus"][row["plateau"]], row["own"], row["hmc"]
            z = (own["llc"] - hmc["llc"]) / math.hypot(own["llc_stderr"], hmc["llc_stderr"])
            cells = (
                known["rank"], row["step"], f"{known['exact']:g}", known["multiplicity"], f"{known['expected']:.2f}",
                text(hmc), text(own), f"{own['llc'] / known['exact'] - 1:+.1%}", f"{z:+.1f}",
            )  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "development.json")
    parser.add_argument("--plot", action="store_true", help="only the picture and the tables of what is there")
    parser.add_argument("--checkpoints", type=int, default=18)
    parser.add_argument("--budget", type=int, default=200_000, help="gradients for one estimate")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    if not args.plot:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(study(args.checkpoints, args.budget), indent=1) + "\n")
    record = json.loads(args.out.read_text())
    print_tables(record)
    draw(record, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
