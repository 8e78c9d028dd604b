"""The LLC at 5-gons and 6-gons that training ended at, against 7.0 and 8.5, at several nbeta and localizations."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import slt_jax as slt
from scaling.tms.curves import LOCALIZATION, numbers
from scaling.tms.model import loss_fn, mean_loss
from scaling.tms.polygons import OF_LOSS, gaussian, nearest, polygon
from scaling.tms.training import Params, Start, to_minimum, train

START = Start(0, 1.0, 1.0)  # wide enough that all kinds of ends occur
SEEDS = range(256)
STEPS = 3000
ARRIVED = 0.2  # distance to a k-gon
AT = {"5-": polygon(5), "5+": polygon(5, 1), "6": polygon(6)}


def settings(num_data: int) -> dict[str, tuple[float | None, float | None]]:
    """Name -> (nbeta, localization); None is left to the package."""
    return {
        "default": (None, None),
        "localization 10": (None, LOCALIZATION),
        "nbeta / 4": (num_data / math.log(num_data) / 4, LOCALIZATION),
        "nbeta x 4": (4 * num_data / math.log(num_data), LOCALIZATION),
        "localization 40": (None, 4 * LOCALIZATION),
    }


def ends(data: np.ndarray) -> list[tuple[str, Params]]:
    """(label, weights) of each seed; the label of weights that are not at a k-gon is empty."""
    trained = train(START, SEEDS, [STEPS], data)[STEPS]
    near = [nearest(p["W"], p["b"]) for p in trained]
    return [(n.label if n.distance < ARRIVED else "", p) for n, p in zip(near, trained, strict=True)]


def estimates(center: Params, data: np.ndarray, seed: int, budget: int) -> dict[str, Any]:
    found = {}
    for name, (nbeta, localization) in settings(len(data)).items():
        posterior = slt.LocalPosterior(loss_fn, center, len(data), nbeta, localization)
        result = slt.estimate_llc(posterior, data, budget=budget, key=seed)
        used = {key: getattr(result.settings, key) for key in ("nbeta", "localization", "step_size", "friction")}
        found[name] = numbers(result) | used
    return found


def measure(label: str, seed: int, params: Params, data: np.ndarray, budget: int) -> dict[str, Any]:
    """One end of training: how far it had to go to the minimum over the data, and the LLC there."""
    center = to_minimum(params, data)
    shut = np.argmin(np.sum(center["W"] ** 2, 0))
    return {
        "label": label,
        "seed": seed,
        "truth": OF_LOSS[label],
        "distance": nearest(center["W"], center["b"]).distance,
        "loss_after_sgd": mean_loss(params, data),
        "loss": mean_loss(center, data),
        "bias_of_shortest_column": float(center["b"][shut]),
        "estimates": estimates(center, data, seed, budget),
    }


def expected(label: str, nbeta: float, localization: float) -> float:
    """What the localization leaves of the coefficient."""
    return gaussian(AT[label], nbeta, localization)


def study(data: np.ndarray, each: int, budget: int) -> dict[str, Any]:
    """The first ``each`` seeds that ended at each of ``OF_LOSS``."""
    found = ends(data)
    labels = [label for label, _ in found]
    rows: list[dict[str, Any]] = []
    for label in OF_LOSS:
        for seed in [s for s in SEEDS if labels[s] == label][:each]:
            rows.append(measure(label, seed, found[seed][1], data, budget))
            print(line(rows[-1]), flush=True)
    return {"ends": {label: labels.count(label) for label in sorted(set(labels))}, "rows": rows}


def text(found: dict[str, Any]) -> str:
    """Estimate and error bar, and the verdict where it is not "converged"."""
    if found["llc"] is None:
        return found["verdict"]
    told = "" if found["verdict"] == "converged" else f" ({found['verdict']})"
    return f"{found['llc']:.2f} ± {found['llc_stderr'] or math.nan:.2f}{told}"


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = (row["label"], row["seed"], f"{row['truth']:g}", *(text(e) for e in row["estimates"].values()))
    return f"| {' | '.join(map(str, cells))} |"


def summary(rows: Sequence[dict[str, Any]], label: str, name: str) -> dict[str, Any]:
    """Mean over the seeds of a label at one setting, its error, and the largest single error."""
    some = [row["estimates"][name] for row in rows if row["label"] == label]
    llc = np.array([math.nan if e["llc"] is None else e["llc"] for e in some])
    errors = [e["llc_stderr"] or math.nan for e in some]
    truth = OF_LOSS[label]
    return {
        "llc": float(llc.mean()),
        "llc_stderr": math.hypot(*errors) / len(some),
        "spread": float(llc.std(ddof=1)),
        "error": float(llc.mean() / truth - 1),
        "worst": float(np.abs(llc / truth - 1).max()),
        "expected": expected(label, some[0]["nbeta"], np.mean([e["localization"] for e in some])),
    }
