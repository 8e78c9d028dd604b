"""One layer times s, the next by s: the same function, the same learning coefficient. Do the samplers see it so?

    python -m scaling.dln.invariance --out scaling/dln/results/invariance.json  # 360 CPU-seconds
    python -m scaling.dln.invariance --out scaling/dln/results/invariance.json --plot  # picture and tables again

Two networks, output = act(x W_1) W_2, each its own teacher, loss = half the squared error summed over outputs:

- linear, 6-4-5, act(z) = z, full rank (type B of ``teachers``): coefficient r (H_0 + H_2 - r) / 2 = 14, r = 4;
- ReLU, 5-5-3, one of the inputs constant 1, so that its weights are biases. Each hidden unit can be rescaled, so the
  zero set has dimension 5 at least and the coefficient is at most (d - 5) / 2; half the rank of the Jacobian is a lower
  bound, and where that rank is d - 5, as here, the two are the coefficient, with multiplicity 1.

Weights (s W_1, W_2 / s), s from 1e-4 to 1e4, compute the same function, for s > 0 also with the ReLU. The coefficient
belongs to the function's zero set up to a smooth change of coordinates, so it does not depend on s.

What does depend on s. With J = (J_1, J_2) the Jacobian at s = 1, the one at s is (J_1 / s, s J_2):

- curvatures of nbeta L along W_1 scale as s^-2, along W_2 as s^2; the ratio of the two as s^4;
- a step that is stable at s = 1 is stable up to max(s, 1/s)^2 < 4 / (step_size curvature); a step that is right for the
  stiff layer needs about max(s, 1/s)^4 steps for the soft one, the root of it with momentum;
- the localization pulls W_1 and W_2 alike. A direction of curvature x (an eigenvalue of nbeta J'J / n) holds
  x / (2 (x + localization)) of the coefficient, and the soft layer's own directions are lost when x falls below the
  localization. The sum over directions is ``posterior_value``: what a perfect sampler would read. It holds where the
  loss is quadratic over the posterior's width, and along valleys whose curvature changes little;
- what is left at the far ends is what the stiff layer spans alone: ``far_value``, (rank J_2) / 2 for s to infinity and
  (rank J_1) / 2 for s to 0.

What a diagonal preconditioner does. P = 1 / root mean square of the gradient, so along W_1 it scales as s, along W_2 as
1/s, and the preconditioned curvatures as 1/s and s: the ratio of s^4 becomes s^2. Full invariance would need
P = 1 / mean square. A floor on the gradient's size (0.1 of the typical one) ends even that where the layers' gradients
differ by more than a factor 10, beyond s = 3. No preconditioner touches the localization, which is part of the target.

What the verdict cannot see. A direction that is held entirely does not move the estimate when nbeta or localization
moves a little: at the far ends a posterior that has lost half the coefficient is sampled well, and called converged.

What is invariant: to choose the representative of the function before sampling. ``balance`` gives both layers the same
norm; every s then leads to the same weights, up to rounding. One key serves all runs: differences come from s alone.
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
from scaling.dln import teachers, truth
from scaling.dln.invariance_plot import draw
from scaling.throughput.compare import machine

EXPONENTS = (-4, -2, -1, -0.5, 0, 0.5, 1, 2, 4)
NUM_DATA = 100_000
LOCALIZATION = 1.0  # of SGLD at its fixed step
STEP_SHARE = 0.1  # of 1 / curvature at s = 1, the fixed step
METHODS = ("SGLD, fixed step", "default", "preconditioned", "preconditioned, no floor", "balanced, default")


class Network(NamedTuple):
    """Weights (W_1, W_2), inputs ``(n, H_0)``, outputs and the exact coefficient."""

    name: str
    weights: tuple[np.ndarray, np.ndarray]
    x: np.ndarray
    y: np.ndarray
    coefficient: float


def linear_loss(weights: Sequence[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """|x W_1 W_2 - y|^2 / 2, ``(m,)``."""
    return 0.5 * jnp.sum((batch[0] @ weights[0] @ weights[1] - batch[1]) ** 2, axis=-1)


def relu_loss(weights: Sequence[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """|max(x W_1, 0) W_2 - y|^2 / 2, ``(m,)``."""
    return 0.5 * jnp.sum((jax.nn.relu(batch[0] @ weights[0]) @ weights[1] - batch[1]) ** 2, axis=-1)


LOSSES = {"linear": linear_loss, "relu": relu_loss}


def hidden(name: str, weights: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
    pre = x @ weights[0]
    return np.maximum(pre, 0) if name == "relu" else pre


def make_network(name: str, seed: int = 0) -> Network:
    """The teacher ``"linear"`` or ``"relu"``, with ``NUM_DATA`` standard normal inputs."""
    rng = np.random.default_rng(seed)
    widths = {"linear": (6, 4, 5), "relu": (5, 5, 3)}[name]
    first, second = (teachers.draw_layer(rng, *pair, min(pair)) for pair in itertools.pairwise(widths))
    x = rng.standard_normal((NUM_DATA, widths[0]), dtype=np.float32)
    if name == "relu":
        x[:, -1] = 1
    network = Network(name, (first, second), x, hidden(name, (first, second), x) @ second, math.nan)
    return network._replace(coefficient=exact_coefficient(network))


def exact_coefficient(network: Network) -> float:
    """The theorem's value, or half the rank of the Jacobian where that is all weights less one a hidden unit."""
    widths = (network.x.shape[1], *(w.shape[1] for w in network.weights))
    if network.name == "linear":
        return float(truth.learning_coefficient(widths, min(widths))[0])
    free, rank = sum(w.size for w in network.weights), int(np.linalg.matrix_rank(jacobian(network)))
    if rank != free - widths[1]:
        raise ValueError(
            f"the Jacobian of this ReLU network has rank {rank}, not {free - widths[1]} (weights less hidden "
            "units), so its coefficient is not known. Take another seed."
        )
    return rank / 2


def rescale(weights: Sequence[np.ndarray], s: float) -> tuple[np.ndarray, np.ndarray]:
    """(s W_1, W_2 / s), float32."""
    return (weights[0] * np.float32(s), weights[1] / np.float32(s))


def balance(weights: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rescaled weights whose layers have equal norms."""
    return rescale(weights, math.sqrt(np.linalg.norm(weights[1]) / np.linalg.norm(weights[0])))


def jacobian(network: Network, count: int = 2000) -> np.ndarray:
    """J at s = 1 over the first examples, float64 ``(count H_2, d)``; rows are divided by sqrt(count).

    d out_j / d W_1[i, k] = x_i act'(z_k) W_2[k, j] and d out_j / d W_2[k, l] = act(z_k) [j = l].
    """
    x = network.x[:count].astype(np.float64)
    first, second = (w.astype(np.float64) for w in network.weights)
    features = hidden(network.name, (first, second), x)
    slope = (features > 0).astype(float) if network.name == "relu" else np.ones_like(features)
    by_first = np.einsum("ni,nk,kj->njik", x, slope, second).reshape(count * second.shape[1], -1)
    by_second = np.einsum("nk,jl->njkl", features, np.eye(second.shape[1])).reshape(count * second.shape[1], -1)
    return np.concatenate([by_first, by_second], axis=1) / math.sqrt(count)


def curvatures(network: Network, s: float, nbeta: float) -> np.ndarray:
    """Eigenvalues of nbeta J'J / n at (s W_1, W_2 / s)."""
    scale = np.repeat([1 / s, s], [w.size for w in network.weights])
    return nbeta * np.linalg.svd(jacobian(network) * scale, compute_uv=False) ** 2


def posterior_value(network: Network, s: float, nbeta: float, localization: float) -> float:
    """sum of x / (2 (x + localization)) over the curvatures x."""
    x = curvatures(network, s, nbeta)
    return float(np.sum(x / (x + localization)) / 2)


def far_value(network: Network, s: float) -> float:
    """What the stiff layer spans alone: half its Jacobian's rank."""
    by_first, by_second = np.split(jacobian(network), [network.weights[0].size], axis=1)
    return float(np.linalg.matrix_rank(by_second if s > 1 else by_first)) / 2


def fixed_step(network: Network) -> float:
    """``STEP_SHARE`` / largest curvature at s = 1."""
    return STEP_SHARE / float(curvatures(network, 1.0, NUM_DATA / math.log(NUM_DATA)).max())


def estimate(network: Network, method: str, s: float, budget: int) -> slt.LLCResult:
    """The LLC at (s W_1, W_2 / s) by one of ``METHODS``."""
    weights = rescale(network.weights, s)
    sampler = {
        "SGLD, fixed step": slt.sgld(fixed_step(network)),
        "preconditioned": slt.preconditioned_sgld(),
        "preconditioned, no floor": slt.preconditioned_sgld(floor=1e-6),
    }.get(method)
    posterior = slt.LocalPosterior(
        LOSSES[network.name],
        balance(weights) if method.startswith("balanced") else weights,
        NUM_DATA,
        localization=LOCALIZATION if method == "SGLD, fixed step" else None,
    )
    return slt.estimate_llc(posterior, (network.x, network.y), sampler=sampler, budget=budget)


def measure(network: Network, method: str, exponent: float, budget: int) -> dict:
    s = 10.0**exponent
    found = estimate(network, method, s, budget)
    numbers, settings = found.to_dict(), found.settings
    where = balance_scale(network) if method.startswith("balanced") else s
    names = ("llc", "llc_stderr", "rhat", "ess", "verdict", "reason", "flags")
    return {
        "network": network.name, "method": method, "exponent": exponent, "coefficient": network.coefficient,
        **{name: numbers[name] for name in names},
        "posterior_value": posterior_value(network, where, settings.nbeta, settings.localization),
        "step_size": settings.step_size, "localization": settings.localization,
    }  # fmt: skip


def balance_scale(network: Network) -> float:
    """The s at which ``balance`` puts the weights."""
    return float(np.linalg.norm(balance(network.weights)[0]) / np.linalg.norm(network.weights[0]))


def study(budget: int) -> dict:
    began, rows = time.perf_counter(), []
    networks = [make_network(name) for name in LOSSES]
    for network, method, exponent in itertools.product(networks, METHODS, EXPONENTS):
        rows.append(measure(network, method, exponent, budget))
        print(line(rows[-1]), flush=True)
    return {
        "machine": machine(),
        "settings": {"num_data": NUM_DATA, "budget": budget, "fixed localization": LOCALIZATION},
        "seconds": time.perf_counter() - began,
        "far": {net.name: [far_value(net, s) / net.coefficient for s in (0.0, math.inf)] for net in networks},
        "rows": rows,
    }


def line(row: dict) -> str:
    """One row of the long table."""
    number = "none" if row["llc"] is None else f"{row['llc']:.4g} ± {row['llc_stderr'] or math.nan:.2g}"
    cells = (
        row["network"], row["method"], f"{row['exponent']:g}", f"{row['coefficient']:g}",
        f"{row['posterior_value']:.4g}", number, row["verdict"], f"{row['step_size']:.2g}",
        f"{row['localization']:.2g}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def spread(rows: list[dict]) -> tuple:
    """Of one network and method: cells of the short table, see ``print_tables``."""
    off = [math.inf if r["llc"] is None else abs(r["llc"] / r["coefficient"] - 1) for r in rows]
    apart = [math.inf if r["llc"] is None else abs(r["llc"] / r["posterior_value"] - 1) for r in rows]
    ratios = [r["llc"] / r["coefficient"] for r in rows if r["llc"] is not None]
    good = [r["verdict"] == "converged" for r in rows]
    return (
        f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "none",
        sum(r["llc"] is None for r in rows),
        ", ".join(f"{r['exponent']:g}" for r, o in zip(rows, off, strict=True) if o <= 0.05),
        f"{sum(o > 0.1 for o in off)} ({sum(o > 0.1 and g for o, g in zip(off, good, strict=True))})",
        f"{sum(a > 0.1 for a in apart)} ({sum(a > 0.1 and g for a, g in zip(apart, good, strict=True))})",
    )


def print_tables(record: dict) -> None:
    print(
        "\n| network | method | log10 s | coefficient | posterior's value | estimate | verdict | step | localization |"
        f"\n{'|---' * 9}|"
    )
    print(*map(line, record["rows"]), sep="\n")
    print(
        "\n| network | method | estimate / coefficient | no number | within 5 % at log10 s | off by more than 10 % "
        f"| off the posterior's value by more than 10 % |\n{'|---' * 7}|"
    )
    kinds = dict.fromkeys((row["network"], row["method"]) for row in record["rows"])
    for network, method in kinds:
        rows = [row for row in record["rows"] if (row["network"], row["method"]) == (network, method)]
        print(f"| {' | '.join(map(str, (network, method, *spread(rows))))} |")
    print("(in brackets: how many of them are called converged)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "invariance.json")
    parser.add_argument("--plot", action="store_true", help="only the picture and the tables of what is there")
    parser.add_argument("--budget", type=int, default=60_000, help="gradients for one estimate")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    if not args.plot:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(study(args.budget), indent=1) + "\n")
    record = json.loads(args.out.read_text())
    print_tables(record)
    draw(record, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
