"""Does the verdict tell good estimates from bad ones? Hundreds of runs, most of them with deliberately bad settings.

    python -m scaling.samplers.verdicts                           # ten minutes on two cores
    python -m scaling.samplers.verdicts --problems kept-apart     # others; a few limits were set with these known
    python -m scaling.samplers.verdicts --problems second-apart   # others again, likewise
    python -m scaling.samplers.verdicts --problems fresh          # of other families; no limit was set with these known

Problems whose posterior's value is known exactly at any nbeta and localization, so that "off" means wrong about this
very posterior. Settings: step sizes over four decades (as multiples of 1 / curvature), for SGLD and for underdamped
Langevin; far too few steps; minibatches of two to eight examples; a center that is no minimum (whose estimate counts as
off whatever it is); and the defaults. On the fresh problems also SGHMC and preconditioned SGLD, and the center that is
no minimum is that of a training stopped early.
"""

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import slt_jax as slt
from scaling.known_answers import Target, by_name
from scaling.samplers.fresh_problems import Problem, fresh_problems
from scaling.samplers.verdict_settings import PROBLEMS, Setting, settings

CURVATURE = dict(zip(PROBLEMS["in-view"], (2e3, 2e3, 2.2e3, 7e2, 4e3, 3e4), strict=True))
PULL = 1.0


def problem_of(name: str) -> Target | Problem:
    fresh = fresh_problems()
    return fresh[name] if name in fresh else by_name(name)


@functools.cache
def curvature_of(name: str) -> float:
    """The largest curvature that a calibration meets."""
    if name in CURVATURE:
        return CURVATURE[name]
    problem = problem_of(name)
    result = slt.estimate_llc(posterior_of(problem, problem.center), problem.data, budget=10_000, key=99)
    return result.settings.calibration["curvature"]


def posterior_of(problem: Target | Problem, center: Any) -> slt.LocalPosterior:
    return slt.LocalPosterior(problem.loss_fn, center, problem.num_data, localization=PULL)


def center_of(setting: Setting) -> Any:
    problem = problem_of(setting.problem)
    if setting.excess:
        return stopped_early(problem, setting.excess)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda w: (w + setting.away * rng.normal(size=w.shape)).astype(np.float32), problem.center)


def stopped_early(problem: Target | Problem, excess: float) -> Any:
    """Weights of a training that did not arrive, its last step shortened so that

        nbeta (L - L(w*)) = excess exact(nbeta, PULL).

    Gradient descent from a random place far enough away, with steps that are halved until the loss falls.
    """
    flat, unravel = ravel_pytree(problem.center)
    loss = jax.jit(lambda w: problem.loss_fn(unravel(w), problem.data).mean())
    slope = jax.jit(jax.grad(loss))
    nbeta, lowest = posterior_of(problem, problem.center).nbeta, float(loss(flat))
    level = excess * problem.exact(nbeta, PULL) / nbeta
    above = lambda w: float(loss(w)) - lowest - level  # noqa: E731
    away = 0.3 * np.random.default_rng(2).normal(size=flat.shape).astype(np.float32)
    while above(flat + away) < 2 * level:
        away = 2 * away
    here, rate = flat + away, 1.0
    while above(here) > 0:
        there = here - rate * slope(here)
        if above(there) < above(here):
            before, here = here, there
        else:
            rate /= 2
    low, high = 0.0, 1.0  # shares of the last step
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if above(before + middle * (here - before)) > 0 else (low, middle)
    return jax.tree.map(np.asarray, unravel(before + high * (here - before)))


def run(setting: Setting) -> dict:
    problem, options = problem_of(setting.problem), setting.options
    if setting.sampler is not None:
        options = {**options, "sampler": setting.sampler(1 / curvature_of(setting.problem))}
    result = slt.estimate_llc(posterior_of(problem, center_of(setting)), problem.data, **options)
    exact = problem.exact(result.settings.nbeta, PULL)
    summary = result.to_dict()
    keep = ("llc", "llc_stderr", "llc_raw", "verdict", "reason", "rhat", "ess", "virial", "kinetic", "acceptance")
    row = {"problem": setting.problem, "setting": setting.name, "exact": exact, "minimum": setting.at_minimum}
    return {**row, **{k: summary[k] for k in keep}}


def judged(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(rows off by more than 10 %, those within 3 %); each row gets its ``error``, infinite where w* is no minimum."""
    for row in rows:
        off = row["llc"] is None or not row["minimum"]
        row["error"] = float("inf") if off else abs(row["llc"] / row["exact"] - 1)
    return [r for r in rows if r["error"] > 0.1], [r for r in rows if r["error"] <= 0.03]


def table(problems: str, rows: list[dict]) -> Iterator[str]:
    """Lines of Markdown: how often the verdict was right."""
    bad, good = judged(rows)
    caught = sum(r["verdict"] != "converged" for r in bad) / len(bad)
    passed = sum(r["verdict"] == "converged" for r in good) / len(good)
    yield "| problems | runs | off by more than 10 % | not called converged | within 3 % | called converged |"
    yield "|---|---|---|---|---|---|"
    yield f"| {problems.replace('-', ' ')} | {len(rows)} | {len(bad)} | {caught:.1%} | {len(good)} | {passed:.1%} |"


def tell(problems: str, rows: list[dict]) -> None:
    """Print how often the verdict was right, and where it was not."""
    bad, good = judged(rows)
    print(*table(problems, rows), sep="\n")
    print("\n| verdict | within 3 % | 3 to 10 % | off by more |\n|---|---|---|---|")
    for verdict in sorted({r["verdict"] for r in rows}):
        errors = [r["error"] for r in rows if r["verdict"] == verdict]
        counts = (sum(e <= 0.03 for e in errors), sum(0.03 < e <= 0.1 for e in errors), sum(e > 0.1 for e in errors))
        print(f"| {verdict} | {' | '.join(map(str, counts))} |")
    print()
    for row in rows:
        if (row in bad) == (row["verdict"] == "converged") and (row in bad or row in good):
            number = "nothing" if row["llc"] is None else f"{row['llc']:.4g} ± {row['llc_stderr'] or np.nan:.2g}"
            print(f"{row['problem']}, {row['setting']}: {number}, exact {row['exact']:.4g}, {row['verdict']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", choices=PROBLEMS, default="in-view")
    parser.add_argument("--out", type=Path, help="default: results/verdicts-PROBLEMS.jsonl")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    if args.out is None:
        args.out = Path(__file__).parent / "results" / f"verdicts-{args.problems}.jsonl"
    if not args.table:
        with args.out.open("w") as file:
            for setting in settings(args.problems):
                file.write(json.dumps(run(setting)) + "\n")
                file.flush()
    tell(args.problems, [json.loads(line) for line in args.out.read_text().splitlines()])


if __name__ == "__main__":
    main()
