"""One line of a result file: which teacher, how it was sampled, what came out, what it took."""

import dataclasses
from typing import Any

import jax

import slt_jax as slt
from scaling.dln.methods import Method
from scaling.dln.teachers import Teacher

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
    }
