"""The LLC along training, at all checkpoints with one setting, and its stages beside those of the weights."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import slt_jax as slt
from scaling.tms.model import loss_fn, mean_loss, own_loss_fn
from scaling.tms.polygons import Nearest, nearest
from scaling.tms.stages import ELSEWHERE, Stage, match, stages_of, strays
from scaling.tms.training import Params, Start, checkpoints, train
from slt_jax.results.plateau import SETTLED

STEPS = checkpoints(25, 6000, 26)
NUM_DATA = 100_000
LOCALIZATION = 10.0
FRICTION = 0.4  # enough for the minibatch noise of the second curve; the first has none at w*
CANDIDATES = range(256)  # seeds


class Family(NamedTuple):
    """Runs that start alike and pass these stages."""

    name: str
    start: Start
    path: tuple[str, ...]


FAMILIES = (
    Family("from nothing to the 6-gon", Start(0, 0.02, 0.0), ("0++++++", "5 doubled", "6")),
    Family("from nothing to the 5-gon", Start(0, 0.02, 0.0), ("0++++++", "4++", "5+")),
    Family("from near a 4-gon to the 5-gon", Start(4, 0.3, 0.5), ("4+-", "5-")),
)


class Run(NamedTuple):
    """One seed's checkpoints, ``(steps, params)``, and what they are near to."""

    seed: int
    params: list[Params]
    near: list[Nearest]

    @property
    def stages(self) -> list[Stage]:
        return stages_of(self.near)

    @property
    def blur(self) -> float:
        """The distance to the k-gon in the middle of the stage in which the weights come least near to theirs."""
        known = [s for s in self.stages if s.label != ELSEWHERE]
        return max(min(n.distance for n in self.near[s.first : s.last + 1]) for s in known)


def candidates(start: Start, data: np.ndarray) -> list[Run]:
    """All seeds from one start."""
    by_step = train(start, CANDIDATES, STEPS, data)
    paths = [[by_step[step][k] for step in STEPS] for k in range(len(CANDIDATES))]
    near = [[nearest(p["W"], p["b"]) for p in path] for path in paths]
    return [Run(*one) for one in zip(CANDIDATES, paths, near, strict=True)]


def choose(runs: Sequence[Run], path: tuple[str, ...], count: int) -> list[Run]:
    """Of the runs that pass these stages, the ``count`` that come nearest to all their k-gons."""
    passing = [run for run in runs if tuple(s.label for s in run.stages if s.label != ELSEWHERE) == path]
    return sorted(passing, key=lambda run: run.blur)[:count]


def along(run: Run, data: np.ndarray, draws: int) -> tuple[slt.Trajectory, slt.Trajectory]:
    """(LLC of the network's own function, LLC of the loss on the data) at every checkpoint.

    The first has its step size calibrated; the second takes it over.
    """
    centers = dict(zip(STEPS, run.params, strict=True))
    twice = {step: {"own": p, "teacher": p} for step, p in centers.items()}
    # Chains that once left a stage's valley would be carried along by warm starts.
    lengths = {"num_draws": draws, "num_warmup": 2 * draws, "thinning": 4, "key": run.seed, "warm_start": False}
    own = slt.trajectory(
        slt.LocalPosterior(own_loss_fn, twice[STEPS[0]], len(data), None, LOCALIZATION, lambda path: path[0] == "own"),
        twice, data, sampler=slt.underdamped(friction=FRICTION), **lengths,
    )  # fmt: skip
    sampler = slt.underdamped(own.setting["step_size"], FRICTION)
    posterior = slt.LocalPosterior(loss_fn, centers[STEPS[0]], len(data), None, LOCALIZATION)
    loss = slt.trajectory(posterior, centers, data, sampler=sampler, **lengths)
    return own, loss


def record(run: Run, data: np.ndarray, draws: int) -> dict[str, Any]:
    """A run in numbers, for JSON."""
    own, loss = along(run, data, draws)
    found, stages = llc_stages([numbers(r) for r in own.results["all"]]), run.stages
    jumps = [STEPS.index(int(b.between[1])) for b in found.boundaries]
    return {
        "seed": run.seed,
        "setting": own.setting,
        "checkpoints": [
            {
                "step": step,
                "loss": mean_loss(params, data),
                "nearest": near._asdict(),
                "own": numbers(a),
                "data": numbers(b),
                "W": np.round(params["W"], 4).tolist(),
                "b": np.round(params["b"], 4).tolist(),
            }
            for step, params, near, a, b in zip(
                STEPS, run.params, run.near, own.results["all"], loss.results["all"], strict=True
            )
        ],
        "stages": [s._asdict() for s in stages],
        "llc_stages": found.to_dict(),
        "matches": [m._asdict() for m in match(stages, jumps)],
        "strays": strays(stages, jumps),
        "levels": [level(s, own.results["all"]) for s in stages],
    }


def llc_stages(rows: Sequence[dict[str, Any]]) -> slt.Stages:
    """Stages of the LLC over ``STEPS``, by the estimates whose chains have settled."""
    some = [(step, row) for step, row in zip(STEPS, rows, strict=True) if row["verdict"] in SETTLED]
    return slt.find_stages([s for s, _ in some], [r["llc"] for _, r in some], [r["llc_stderr"] for _, r in some])


def numbers(result: slt.LLCResult) -> dict[str, Any]:
    """What of an estimate is kept; None for what is not finite."""
    told = result.to_dict()
    return {name: told[name] for name in ("llc", "llc_stderr", "rhat", "ess", "verdict")}


def level(stage: Stage, results: Sequence[slt.LLCResult]) -> dict[str, Any]:
    """The LLC at the checkpoints of a stage, mean and its standard error."""
    some = results[stage.first : stage.last + 1]
    llc, error = float(np.mean([r.llc for r in some])), math.hypot(*(r.llc_stderr for r in some)) / len(some)
    return {"label": stage.label, "llc": llc, "llc_stderr": error}
