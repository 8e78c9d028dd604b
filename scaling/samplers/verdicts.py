"""Does the verdict tell good estimates from bad ones? Two hundred runs, most of them with deliberately bad settings.

    python -m scaling.samplers.verdicts                         # ten minutes on two cores
    python -m scaling.samplers.verdicts --problems kept-apart   # others, on which no limit was set
    python -m scaling.samplers.verdicts --problems unseen       # others again, run once, after the last change

Problems whose posterior's value is known exactly at any nbeta and localization, so that "off" means wrong about this
very posterior. Settings: step sizes over four decades (as multiples of 1 / curvature), for SGLD and for underdamped
Langevin; far too few steps; minibatches of two to eight examples; a center that is no minimum (whose estimate counts as
off whatever it reads); and the defaults.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

import slt_jax as slt
from scaling.known_answers import Target, by_name

PROBLEMS = {
    "in-view": (
        "quadratic, d = 10, 2 decades", "quadratic, d = 20, 1 decades", "noisy regression, d = 10", "|w|^4, d = 4",
        "x^2 + y^4", "deep linear 2-3-3, rank 0",
    ),
    "kept-apart": (
        "quadratic, d = 2", "|w|^4, d = 2", "|w|^6, d = 3", "x^2 y^2", "one tanh unit", "Gaussian mixture",
        "deep linear 2-2-2, rank 0",
    ),
    "unseen": (
        "quadratic, d = 1", "x^4", "x^6", "(y^2 - x^3)^2", "x^2 y^4", "x^2 y^2 z^2", "x^2 y^2 + z^2",
        "deep linear 1-2-2, rank 0",
    ),
}  # fmt: skip
FIRST_KEY = {"in-view": 0, "kept-apart": 100, "unseen": 200}
CURVATURE = dict(zip(PROBLEMS["in-view"], (2e3, 2e3, 2.2e3, 7e2, 4e3, 3e4), strict=True))
PULL = 1.0


def curvature_of(name: str) -> float:
    """The largest curvature that a calibration meets."""
    target = by_name(name)
    result = slt.estimate_llc(posterior_of(target, 0.0), target.data, budget=10_000, key=99)
    return result.settings.calibration["curvature"]


def settings(problems: str) -> Iterator[tuple[str, str, dict]]:
    """(name of the problem, name of the setting, arguments)."""
    first = FIRST_KEY[problems]
    lengths = {"num_chains": 4, "num_warmup": 1000, "num_draws": 2000, "key": first}
    for name in PROBLEMS[problems]:
        scale = 1 / (CURVATURE.get(name) or curvature_of(name))
        for share in (1e-3, 3e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 2.0, 3.5, 10.0):
            yield name, f"sgld {share:g}", {"sampler": slt.sgld(share * scale), **lengths}
        for share in (1e-3, 1e-2, 0.1, 0.5, 2.0, 3.5, 10.0):
            yield name, f"underdamped {share:g}", {"sampler": slt.underdamped(share * scale, 0.2), **lengths}
        for draws in (8, 20, 60):
            for share in (0.01, 0.1):
                few = {**lengths, "num_chains": 2, "num_warmup": draws, "num_draws": draws}
                yield name, f"few steps {draws}, sgld {share:g}", {"sampler": slt.sgld(share * scale), **few}
        for batch in (2, 8):
            for share in (0.03, 0.3):
                noisy = {"sampler": slt.sgld(share * scale), "batch_size": batch, **lengths}
                yield name, f"batch {batch}, sgld {share:g}", noisy
        for away in (0.05, 0.3):
            for share in (0.03, 0.1):
                yield name, f"no minimum {away:g}, sgld {share:g}", {"sampler": slt.sgld(share * scale), **lengths}
        for key in range(first, first + 4):
            yield name, f"defaults {key}", {"key": key, "budget": 60_000}


def posterior_of(target: Target, away: float) -> slt.LocalPosterior:
    rng = np.random.default_rng(1)
    center = jax.tree.map(lambda w: (w + away * rng.normal(size=w.shape)).astype(np.float32), target.center)
    return slt.LocalPosterior(target.loss_fn, center, target.num_data, localization=PULL)


def run(name: str, setting: str, options: dict) -> dict:
    target = by_name(name)
    away = float(setting.split()[2].rstrip(",")) if setting.startswith("no minimum") else 0.0
    result = slt.estimate_llc(posterior_of(target, away), target.data, **options)
    exact = target.exact(result.settings.nbeta, PULL)
    summary = result.to_dict()
    keep = ("llc", "llc_stderr", "llc_raw", "verdict", "reason", "rhat", "ess", "virial", "kinetic", "acceptance")
    return {"problem": name, "setting": setting, "exact": exact, "minimum": not away, **{k: summary[k] for k in keep}}


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
            for name, setting, options in settings(args.problems):
                file.write(json.dumps(run(name, setting, options)) + "\n")
                file.flush()
    tell(args.problems, [json.loads(line) for line in args.out.read_text().splitlines()])


if __name__ == "__main__":
    main()
