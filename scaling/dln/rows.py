"""One line of a result file: which teacher, how it was sampled, what came out, what it took."""

import dataclasses
from typing import Any

import jax
import numpy as np

import slt_jax as slt
from scaling.dln.methods import Method
from scaling.dln.teachers import INPUT_VARIANCE, Teacher, end_to_end
from scaling.dln.truth import resolved_coefficient

KEY = ("class", "kind", "seed", "request")  # two rows that agree in these are the same run
FOUND = (
    "llc", "llc_stderr", "llc_raw", "rhat", "ess", "verdict", "flags", "reason", "nbeta_slope", "localization_slope",
    "degree", "stopped",
)  # fmt: skip
CHOSEN = (
    "nbeta", "localization", "step_size", "friction", "control_variate", "num_chains", "num_warmup", "num_draws",
    "thinning", "hot", "cost", "versions",
)  # fmt: skip


def identity(size: str, kind: str, seed: int, method: Method) -> dict[str, Any]:
    """The part of a row that says which it is."""
    return {"class": size, "kind": kind, "seed": seed, "request": dataclasses.asdict(method)}


def row_of(teacher: Teacher, method: Method, result: slt.LLCResult | str, seconds: float) -> dict[str, Any]:
    """A result, or the sentence that says why there is none. ``seconds`` of wall clock, with compilation."""
    row = {
        **identity(teacher.size, teacher.kind, teacher.seed, method), "method": method.name,
        "widths": list(teacher.widths), "layer_ranks": list(teacher.layer_ranks), "rank": teacher.rank,
        "truth": float(teacher.truth), "multiplicity": teacher.multiplicity, "bounds": [*map(float, teacher.bounds)],
        "doubtful": teacher.doubtful, "seconds": round(seconds, 3), "processes": jax.process_count(),
    }  # fmt: skip
    if isinstance(result, str):
        return {**row, "llc": None, "verdict": "not finite at w*", "flags": [], "reason": result}
    found = result.to_dict()
    settings = found["settings"]
    spent = settings["gradients"]
    return {
        **row,
        **{name: found[name] for name in FOUND},
        **{name: settings[name] if settings[name] == settings[name] else None for name in CHOSEN},  # no NaN in JSON
        "gradients": {**spent, "total": sum(spent.values())},
        "device": settings["devices"],
        **resolved(teacher, settings["nbeta"]),
    }


def resolved(teacher: Teacher, nbeta: float) -> dict[str, Any]:
    """For type A, the rank that this nbeta resolves and the coefficient of such a network."""
    if teacher.kind != "A":
        return {}
    values = np.linalg.svd(end_to_end(teacher.weights), compute_uv=False)[: teacher.rank]
    rank, value = resolved_coefficient(teacher.widths, values**2 * INPUT_VARIANCE / teacher.widths[-1], nbeta)
    return {"resolved_rank": rank, "resolved": round(value, 4)}
