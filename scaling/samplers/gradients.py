"""Minibatch gradients until the estimate stays within 5 % of its own posterior's value, beside SGLD as published.

    python -m scaling.samplers.gradients            # about an hour on two cores
    python -m scaling.samplers.gradients --table    # the table, from what is there

Deep linear teachers of the 1K class. The reference of each method is HMC on the very posterior it samples (so type A
counts against what can be sampled, not against the learning coefficient).

``default``: ``estimate_llc`` with nothing but a budget, from 100 to 8,000; the smallest from which on all are within
5 %. Calibration, warm-up and every chain count. ``published``: one SGLD chain from w* at the published step size
and localization, 40,000 steps; the running estimate after t steps is the mean over the last tenth of them, as
published, or over the second half, which is kinder, and the number is the last t at which it was further off than 5 %.
A method that never stays counts as the end of its ladder.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

import slt_jax as slt
from scaling.dln.teachers import SIZES, Teacher, make_data, make_teacher
from scaling.samplers.teachers import BATCH, exact, posterior_of

BUDGETS = (100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200, 4800, 8000)
STEPS, THINNING = 40_000, 10
WITHIN = 0.05


def first_to_stay(counts: np.ndarray, estimates: np.ndarray, value: float) -> int | None:
    """The smallest count from which on every estimate is within 5 % of ``value``; None if the last one is not."""
    off = np.flatnonzero(~(np.abs(np.asarray(estimates, float) / value - 1) <= WITHIN))
    if not off.size:
        return int(counts[0])
    return int(counts[off[-1] + 1]) if off[-1] + 1 < len(counts) else None


def running_means(draws: np.ndarray, kept: float) -> np.ndarray:
    """After each draw, the mean over the last share ``kept`` of the draws so far."""
    sums = np.concatenate([[0.0], np.cumsum(draws, dtype=np.float64)])
    ends = np.arange(1, len(draws) + 1)
    starts = np.minimum((ends * (1 - kept)).astype(int), ends - 1)
    return (sums[ends] - sums[starts]) / (ends - starts)


def ours(teacher: Teacher, data: tuple) -> dict:
    def estimate(budget: int, localization: float | None) -> slt.LLCResult:
        posterior = posterior_of(teacher, localization)
        return slt.estimate_llc(posterior, data, budget=budget, batch_size=BATCH, key=teacher.seed)

    last = estimate(BUDGETS[-1], None)  # chooses the localization, so that all sample one posterior
    localization, step_size = last.settings.localization, last.settings.step_size
    estimates = [*(estimate(budget, localization).llc for budget in BUDGETS[:-1]), last.llc]
    reference = exact(teacher, localization, step_size / 4, draws=400)
    count = first_to_stay(np.array(BUDGETS), np.array(estimates), reference.llc)
    return {"default": count, "estimates": estimates, **_reference(reference), "step_size": step_size}


def published(teacher: Teacher, data: tuple, step_size: float) -> dict:
    result = slt.estimate_llc(
        posterior_of(teacher, 1.0), data, sampler=slt.sgld(SIZES[teacher.size].step_size), num_chains=1, num_warmup=0,
        num_draws=STEPS // THINNING, thinning=THINNING, batch_size=BATCH, key=teacher.seed,
    )  # fmt: skip
    reference = exact(teacher, 1.0, step_size / 4, draws=400)
    counts = THINNING * np.arange(1, STEPS // THINNING + 1)
    draws = result.llc_draws[0] if result.kept_chains.size else np.full(len(counts), np.nan)
    found = {share: first_to_stay(counts, running_means(draws, share), reference.llc) for share in (0.5, 0.1)}
    return {"second half": found[0.5], "last tenth": found[0.1], "end": float(draws[-1]), **_reference(reference)}


def _reference(result: slt.LLCResult) -> dict:
    settings = result.settings
    return {
        "reference": result.llc, "reference_stderr": result.llc_stderr, "localization": settings.localization,
        "device": settings.devices, "versions": settings.versions,
    }  # fmt: skip


def row_of(kind: str, seed: int) -> dict:
    teacher = make_teacher(kind, "1K", seed)
    data = make_data(teacher, seed=seed)
    own = ours(teacher, data)
    rival = published(teacher, data, own["step_size"])
    return {"kind": kind, "seed": seed, "truth": float(teacher.truth), "ours": own, "published": rival}


def table(rows: list[dict]) -> Iterator[str]:
    """Lines of Markdown; how many never stay is in brackets where there are any."""
    readings = {"second half": "by its second half", "last tenth": "by its last tenth"}
    yield "| type | default |" + "".join(
        f" SGLD {told} | ratio of the medians | median ratio |" for told in readings.values()
    )
    yield "|---" * (2 + 3 * len(readings)) + "|"
    for name in ("A", "B", "C", "ABC"):
        if not (mine := [r for r in rows if r["kind"] in name]):
            continue
        own = np.array([r["ours"]["default"] or BUDGETS[-1] for r in mine])
        never = sum(r["ours"]["default"] is None for r in mine)
        line = f"| {name if len(name) == 1 else 'all'} | {_told(own, never)} |"
        for reading in readings:
            sgld = np.array([r["published"][reading] or STEPS for r in mine])
            never = sum(r["published"][reading] is None for r in mine)
            ratios = np.median(sgld) / np.median(own), np.median(sgld / own)
            line += f" {_told(sgld, never)} | {ratios[0]:.1f} | {ratios[1]:.1f} |"
        yield line


def _told(counts: np.ndarray, never: int) -> str:
    return f"{np.median(counts):,.0f}" + (f" ({never} of {len(counts)} never)" if never else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gradients-1k.jsonl")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    there = {(r["kind"], r["seed"]) for r in rows}
    wanted = [(kind, seed) for seed in range(args.count) for kind in "ABC" if (kind, seed) not in there]
    for kind, seed in [] if args.table else wanted:
        rows.append(row_of(kind, seed))
        with args.out.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(kind, seed, rows[-1]["ours"]["default"], rows[-1]["published"]["second half"], flush=True)
        jax.clear_caches()
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
