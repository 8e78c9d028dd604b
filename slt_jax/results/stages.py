"""Stages of training: where the LLC jumps from one level to the next, with intervals."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike

_MIN_SIZE = 2  # checkpoints in a stage
_GRID = 12  # positive values of scatter, and of drift, that are tried
Curve = Float64[np.ndarray, " checkpoint"]
Edges = tuple[int, ...]  # 0, the first checkpoint of each later stage, the number of checkpoints


@dataclass(frozen=True)
class Boundary:
    """A jump of the LLC.

    ``between``: the steps of the checkpoints before and after it. ``step``: their geometric mean (their mean if one is
    0). ``low``, ``high``: interval of steps with a fraction ``level`` of the resamples that have this boundary.
    ``support``: fraction of all resamples that have it in that interval, or within one checkpoint of its place.
    ``jump``: mean LLC of the stage after it minus that of the stage before it.
    """

    between: tuple[float, float]
    step: float
    low: float
    high: float
    support: float
    jump: float
    jump_stderr: float


@dataclass(frozen=True)
class Stage:
    """The checkpoints between two boundaries.

    ``llc``: their mean, weighted by 1 / (stderr^2 + scatter^2). ``llc_stderr``: standard error of the mean at these
    checkpoints; it does not include the drift of the level between them.
    """

    first_step: float
    last_step: float
    llc: float
    llc_stderr: float
    num_checkpoints: int


@dataclass(frozen=True)
class Stages:
    """Boundaries and the stages between them.

    ``scatter``: standard deviation of an estimate about its level, beyond the standard errors. ``drift``: standard
    deviation of the level's change from one checkpoint to the next within a stage. ``level``: of the intervals.
    """

    boundaries: tuple[Boundary, ...]
    stages: tuple[Stage, ...]
    scatter: float
    drift: float
    level: float

    def __repr__(self) -> str:
        at = ", ".join(f"{boundary.step:,.4g}" for boundary in self.boundaries)
        return f"<Stages: {len(self.stages)}{f', with boundaries near the steps {at}' if at else ''}>"

    def __str__(self) -> str:
        lines = [
            f"{len(self.stages)} stage{'s' if len(self.boundaries) else ''}; within a stage the LLC scatters by "
            f"{self.scatter:.2g} beyond its standard errors and drifts by {self.drift:.2g} a checkpoint."
        ]
        for stage, b in itertools.zip_longest(self.stages, self.boundaries):
            steps = f"Steps {stage.first_step:,g} to {stage.last_step:,g} ({stage.num_checkpoints} checkpoints)"
            lines.append(f"{steps}: LLC {stage.llc:.4g} +/- {stage.llc_stderr:.2g}")
            if b is not None:
                lines.append(
                    f"  jump {b.jump:+.3g} +/- {b.jump_stderr:.2g} between {b.between[0]:,g} and {b.between[1]:,g} "
                    f"({self.level:.0%}: {b.low:,g} to {b.high:,g}; in {b.support:.0%} of the resamples)"
                )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return dataclasses.asdict(self)


def find_stages(
    steps: ArrayLike,
    llc: ArrayLike,
    llc_stderr: ArrayLike,
    *,
    level: float = 0.9,
    resamples: int = 200,
    seed: int = 0,
    max_stages: int | None = None,
    drift: float | None = None,
) -> Stages:
    """Cut an LLC curve where it jumps. A stage has at least two checkpoints, since a single one may be a bad estimate.

    The model of T checkpoints; stages are independent of each other:

        llc_t   = level_t + noise,       noise ~ N(0, stderr_t^2 + scatter^2)
        level_t = level_{t-1} + change,  change ~ N(0, drift^2) within a stage,
        level_t ~ N(mean, variance of the curve)  where a stage begins.

    The levels are integrated out. The cuts, their number, scatter and drift minimize

        -2 log p(llc | cuts, scatter, drift) + 2 log C(T - 1, cuts) + [drift > 0] log T.

    The cuts are optimal for a given scatter and drift (dynamic programming, by ruptures). Scatter and drift are
    optimized on a grid, in alternation with the cuts, from five starting points. In this model a steady rise is drift
    and has no boundary, and noise that exceeds the standard errors is scatter.

    Intervals are from a parametric bootstrap around the fitted stages: each resample is the mean of a stage plus new
    noise and a new drift around that mean. It is cut again, with the same scatter and drift, and each of its boundaries
    counts for the nearest fitted boundary. (Noise added to the curve itself would count twice, since the curve already
    contains noise.)

    Args:
        steps: training steps, ``(T,)``, increasing.
        llc, llc_stderr: estimates and their standard errors, ``(T,)``. Checkpoints with one that is not finite are
            ignored.
        level: of the intervals.
        resamples, seed: of the bootstrap.
        max_stages: default 10; never more than half the checkpoints.
        drift: default estimated from the curve. With 0 the LLC is constant within a stage, so that any rise is cut.

    Raises:
        ValueError: shapes that differ, steps not increasing, errors that are not positive, fewer than 4 checkpoints, or
            an option out of range.

    Error: the coverage of an interval is near ``level`` for boundaries that most resamples have (``support``), and
    below it for those that few have. Takes a second for 20 checkpoints and minutes for 200.

    Source: Romano et al., arXiv:2005.01379, for drift with jumps; Truong et al., Signal Processing 167 (2020) 107299,
    for the search.
    """
    steps, llc, errors = _usable(steps, llc, llc_stderr)
    _check_options(level, resamples, max_stages, drift)
    most_stages = min(len(llc) // _MIN_SIZE, 10 if max_stages is None else max_stages)
    noise, edges = _fit(llc, errors, most_stages, drift)
    stages = tuple(_stage(steps, llc, np.hypot(errors, noise[0]), *pair) for pair in itertools.pairwise(edges))
    count = resamples if len(stages) > 1 else 0
    resampled = bootstrap(np.random.default_rng(seed), count, llc, errors, stages, edges, noise, most_stages)
    boundaries = boundaries_of(steps, edges, stages, resampled, level)
    return Stages(boundaries, stages, scatter=float(noise[0]), drift=float(noise[1]), level=level)


def _usable(steps: ArrayLike, llc: ArrayLike, errors: ArrayLike) -> tuple[Curve, Curve, Curve]:
    """The three curves at the checkpoints where all are finite. Raises ValueError."""
    steps, llc, errors = (np.asarray(x, np.float64) for x in (steps, llc, errors))
    if not (steps.ndim == 1 and steps.shape == llc.shape == errors.shape):
        raise ValueError(
            f"steps, llc and llc_stderr must be of one length, got shapes {steps.shape}, {llc.shape}, {errors.shape}."
        )
    if not (np.isfinite(steps).all() and (np.diff(steps) > 0).all()):
        raise ValueError(f"steps must increase, got {steps.tolist()}. Sort the checkpoints, and pass each once.")
    kept = np.isfinite(llc) & np.isfinite(errors)
    if (errors[kept] <= 0).any():
        step = steps[kept][errors[kept] <= 0][0]
        raise ValueError(f"llc_stderr must be > 0, got {errors[steps == step][0]} at step {step:g}.")
    if kept.sum() < 4:
        raise ValueError(f"stages need 4 checkpoints with an LLC and its error, got {kept.sum()} of {len(steps)}.")
    return steps[kept], llc[kept], errors[kept]


def _check_options(level: float, resamples: int, max_stages: int | None, drift: float | None) -> None:
    for name, value in {"resamples": resamples, "max_stages": 1 if max_stages is None else max_stages}.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}. Leave it out for the default.")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}. The usual choice is 0.9.")
    if drift is not None and not 0 <= drift < math.inf:
        raise ValueError(f"drift must be >= 0, got {drift}. It is a standard deviation, in units of the LLC.")


def _fit(llc: Curve, errors: Curve, most_stages: int, drift: float | None) -> tuple[Float64[np.ndarray, "2"], Edges]:
    """((scatter, drift), edges) that minimize the criterion."""
    largest = math.sqrt(llc.var() + np.mean(errors**2))
    values = np.r_[0, np.geomspace(min(np.median(errors) / 2, largest / 2), largest, _GRID)]
    grid = np.array(list(itertools.product(values, values if drift is None else [drift])))
    penalty = math.log(len(llc)) * (grid[:, 1] > 0)
    costs = stage_costs(llc, errors, grid)
    change = np.median(np.abs(np.diff(llc)))
    starts = np.array([(0, 0), (change, 0), (0, change), (change / 2, change / 2), (largest, 0)])
    nearest = {int(np.argmin(np.sum((grid - start) ** 2, axis=1))) for start in starts}
    _, best, edges = min(_alternate(costs, penalty, start, most_stages) for start in sorted(nearest))
    return grid[best], edges


def _alternate(
    costs: Float64[np.ndarray, "noise start end"], penalty: Float64[np.ndarray, " noise"], start: int, most_stages: int
) -> tuple[float, int, Edges]:
    """(criterion, index of the noise, edges): the best cuts for a noise and the best noise for the cuts, in
    alternation from the noise ``start``, until the criterion no longer falls.
    """
    current = start
    while True:
        edges = best_cuts(costs[current], most_stages)
        totals = penalty + _score(costs, edges)
        best = int(np.argmin(totals))
        if totals[best] >= totals[current]:
            return float(totals[current]), current, edges
        current = best


def stage_costs(
    llc: Curve, errors: Curve, grid: Float64[np.ndarray, "noise 2"]
) -> Float64[np.ndarray, "noise start end"]:
    """-2 log p(llc[start:end]) - (end - start) log 2 pi as one stage, by a Kalman filter from every start.

    Args:
        grid: pairs (scatter, drift).

    Returns:
        Shape ``(G, T, T + 1)``; infinite where ``end`` is not after ``start``.
    """
    count, prior = len(llc), llc.var() + np.mean(errors**2)
    scatter, drift = grid[:, :1] ** 2, grid[:, 1:] ** 2
    mean, variance = np.full((len(grid), count), llc.mean()), np.full((len(grid), count), prior)
    cost, costs = np.zeros((len(grid), count)), np.full((len(grid), count, count + 1), np.inf)
    for t in range(count):
        begun = slice(0, t + 1)  # stages that start at t or before
        variance[:, :t] += drift
        noise = errors[t] ** 2 + scatter
        spread, residual = variance[:, begun] + noise, llc[t] - mean[:, begun]
        cost[:, begun] += np.log(spread) + residual**2 / spread
        mean[:, begun] += variance[:, begun] / spread * residual
        variance[:, begun] *= noise / spread
        costs[:, begun, t + 1] = cost[:, begun]
    return costs


def _score(costs: Float64[np.ndarray, "*noise start end"], edges: Edges) -> Any:
    """Cost of the stages plus 2 log C(T - 1, cuts): given their number, all places of the cuts are equally likely."""
    places = math.comb(edges[-1] - 1, len(edges) - 2)
    return sum(costs[..., i, j] for i, j in itertools.pairwise(edges)) + 2 * math.log(places)


def best_cuts(cost: Float64[np.ndarray, "start end"], most_stages: int) -> Edges:
    """The edges of the lowest score with at most ``most_stages`` stages."""
    dynp, table = _dynamic_programming()
    search = dynp(custom_cost=table(cost.tolist()), min_size=_MIN_SIZE, jump=1).fit(np.zeros(len(cost)))
    candidates = [(0, *search.predict(cuts)) for cuts in range(most_stages)]
    return min(candidates, key=lambda edges: _score(cost, edges))


@functools.cache
def _dynamic_programming() -> tuple[Any, Any]:
    """(ruptures' dynamic programming, a cost class for it that looks costs up in a table)."""
    from ruptures import Dynp
    from ruptures.base import BaseCost

    class Table(BaseCost):
        min_size = _MIN_SIZE

        def __init__(self, cost: list[list[float]]) -> None:
            self.cost = cost

        @property
        def model(self) -> str:
            return "table"

        def fit(self, signal: np.ndarray) -> "Table":
            self.signal = signal
            return self

        def error(self, start: int, end: int) -> float:
            return self.cost[start][end]

    return Dynp, Table


def _stage(steps: Curve, llc: Curve, spread: Curve, start: int, end: int) -> Stage:
    weights = 1 / spread[start:end] ** 2
    mean, error = np.sum(weights * llc[start:end]) / weights.sum(), 1 / math.sqrt(weights.sum())
    return Stage(float(steps[start]), float(steps[end - 1]), float(mean), error, end - start)


def bootstrap(
    rng: np.random.Generator, count: int, llc: Curve, errors: Curve, stages: tuple[Stage, ...], edges: Edges,
    noise: Float64[np.ndarray, "2"], most_stages: int,
) -> list[Edges]:  # fmt: skip
    """The edges of ``count`` resamples of the fitted stages, each cut into at most two stages more."""
    means = np.repeat([stage.llc for stage in stages], np.diff(edges))
    spread, resampled = np.hypot(errors, noise[0]), []
    for _ in range(count):
        walk = noise[1] * rng.standard_normal(len(llc))
        walk = np.concatenate([np.cumsum(w) - np.cumsum(w).mean() for w in np.split(walk, edges[1:-1])])
        resample = means + walk + spread * rng.standard_normal(len(llc))
        resampled.append(best_cuts(stage_costs(resample, errors, noise[None])[0], min(most_stages, len(stages) + 2)))
    return resampled


def boundaries_of(
    steps: Curve, edges: Edges, stages: tuple[Stage, ...], resampled: list[Edges], level: float
) -> tuple[Boundary, ...]:
    """The boundaries between fitted stages, with intervals from the edges of the resamples."""
    cuts, boundaries = np.array(edges[1:-1]), []
    for cut, (before, after) in zip(cuts.tolist(), itertools.pairwise(stages), strict=True):
        places = [place for resample in resampled for place in _matching(cut, cuts, resample[1:-1])]
        low, high = 1, len(steps) - 1
        if places:
            tails = (1 - level) / 2, (1 + level) / 2
            low = min(cut, int(np.quantile(places, tails[0], method="lower")))
            high = max(cut, int(np.quantile(places, tails[1], method="higher")))
        near = sum(low <= place <= high or abs(place - cut) <= 1 for place in places)
        x, y = float(steps[cut - 1]), float(steps[cut])
        middle = math.sqrt(x * y) if x > 0 else (x + y) / 2
        jump, error = after.llc - before.llc, math.hypot(before.llc_stderr, after.llc_stderr)
        boundaries.append(
            Boundary(
                between=(x, y),
                step=middle,
                low=float(steps[low - 1]),
                high=float(steps[high]),
                support=float(near / len(resampled)),
                jump=jump,
                jump_stderr=error,
            )
        )
    return tuple(boundaries)


def _matching(cut: int, cuts: Int[np.ndarray, " cut"], places: Sequence[int]) -> list[int]:
    """Of a resample's boundaries that have ``cut`` as their nearest fitted boundary, the one nearest to it; or []."""
    nearest = [place for place in places if abs(place - cut) == np.abs(cuts - place).min()]
    return sorted(nearest, key=lambda place: abs(place - cut))[:1]
