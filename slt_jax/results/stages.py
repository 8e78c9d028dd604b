"""Stages of training: where the LLC jumps from one level to the next, and how surely."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_MIN_SIZE = 2  # checkpoints of a stage
_GRID = 12  # values of scatter, and of drift, beside 0


@dataclass(frozen=True)
class Boundary:
    """A jump of the LLC.

    ``between``: the checkpoints before and after it. ``step``: their geometric mean (their mean where one is 0).
    ``low``, ``high``: the steps that hold ``level`` of the resamples that have this boundary. ``support``: the share of
    all resamples that have it there, or within one checkpoint of its place. ``jump``: mean LLC of the stage after less
    that of the stage before.
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

    ``llc``: their mean, weighted by 1 / (stderr^2 + scatter^2). ``llc_stderr``: of the mean at these checkpoints; how
    far the level drifts between them is not in it.
    """

    first_step: float
    last_step: float
    llc: float
    llc_stderr: float
    num_checkpoints: int


@dataclass(frozen=True)
class Stages:
    """Boundaries and the stages between them.

    ``scatter``: standard deviation of a checkpoint about its level, beyond the standard errors. ``drift``: standard
    deviation of the level's change from one checkpoint to the next within a stage. ``level``: of the intervals.
    """

    boundaries: tuple[Boundary, ...]
    stages: tuple[Stage, ...]
    scatter: float
    drift: float
    level: float

    def __str__(self) -> str:
        lines = [
            f"{len(self.stages)} stage{'s' if len(self.boundaries) else ''}; within a stage the LLC scatters by "
            f"{self.scatter:.2g} beyond its standard errors and drifts by {self.drift:.2g} a checkpoint."
        ]
        for s, b in itertools.zip_longest(self.stages, self.boundaries):
            steps = f"Steps {s.first_step:,g} to {s.last_step:,g} ({s.num_checkpoints} checkpoints)"
            lines.append(f"{steps}: LLC {s.llc:.4g} +/- {s.llc_stderr:.2g}")
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
    """Cut an LLC curve where it jumps. A stage has two checkpoints at least: one alone may be a bad estimate.

    The model of T checkpoints, independent from stage to stage:

        llc_t   = level_t + noise,       noise ~ N(0, stderr_t^2 + scatter^2)
        level_t = level_{t-1} + change,  change ~ N(0, drift^2) within a stage,
        level_t ~ N(mean, variance of the curve)  where a stage begins.

    The levels are integrated out, and what is minimized, over the cuts, their number and scatter and drift, is

        -2 log p(llc | cuts, scatter, drift) + 2 log C(T - 1, cuts) + [drift > 0] log T.

    The cuts are exact for any scatter and drift (dynamic programming over all of them, by ruptures); these two are
    found in turn with the cuts, on a grid, from five starts. A curve that rises everywhere is drift and has no
    boundary; what error bars that are too small leave unexplained is scatter.

    Intervals are from a parametric bootstrap around the fitted stages: each resample is the stage's mean plus new noise
    and a new drift about that mean. It is cut anew, scatter and drift held, and each boundary found counts for the
    nearest fitted one. (Noise added to the curve itself would count it twice: the curve has it already.)

    Args:
        steps: training steps, ``(T,)``, increasing.
        llc, llc_stderr: estimates and their standard errors, ``(T,)``; left out where one of them is not finite.
        level: share of the resamples that an interval holds.
        resamples, seed: of the bootstrap.
        max_stages: default 10; never more than half the checkpoints.
        drift: default found from the curve; 0 for stages of constant LLC, which cuts whatever rises.

    Raises:
        ValueError: shapes that differ, steps not increasing, errors that are not positive, fewer than 4 checkpoints.

    Error: an interval's coverage is near ``level`` for boundaries that most resamples find (``support``), and below it
    for those that few find, which are seen only where the noise helps. Takes a second for 20 checkpoints and minutes
    for 200.

    Source: Romano et al., arXiv:2005.01379, for drift beside jumps; Truong et al., Signal Processing 167 (2020) 107299,
    for the search.
    """
    steps, llc, errors = _usable(steps, llc, llc_stderr)
    _check_options(level, resamples, max_stages, drift)
    most = min(len(llc) // _MIN_SIZE, 10 if max_stages is None else max_stages)
    noise, edges = _fitted(llc, errors, most, drift)
    stages = tuple(_stage(steps, llc, np.hypot(errors, noise[0]), *pair) for pair in itertools.pairwise(edges))
    count = resamples if len(stages) > 1 else 0
    drawn = _bootstrap(np.random.default_rng(seed), count, llc, errors, stages, edges, noise, most)
    boundaries = _boundaries(steps, edges, stages, drawn, level)
    return Stages(boundaries, stages, scatter=float(noise[0]), drift=float(noise[1]), level=level)


def _usable(steps: Any, llc: Any, errors: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    steps, llc, errors = (np.asarray(x, np.float64) for x in (steps, llc, errors))
    if not (steps.ndim == 1 and steps.shape == llc.shape == errors.shape):
        raise ValueError(
            f"steps, llc and llc_stderr must be of one length, got shapes {steps.shape}, {llc.shape}, {errors.shape}."
        )
    if not (np.isfinite(steps).all() and (np.diff(steps) > 0).all()):
        raise ValueError(f"steps must increase, got {steps.tolist()}. Sort the checkpoints, and give each once.")
    kept = np.isfinite(llc) & np.isfinite(errors)
    if (errors[kept] <= 0).any():
        where = steps[kept][errors[kept] <= 0][0]
        raise ValueError(f"llc_stderr must be > 0, got {errors[steps == where][0]} at step {where:g}.")
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


def _fitted(llc: np.ndarray, errors: np.ndarray, most: int, drift: float | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """((scatter, drift), edges) of the least criterion. Edges: 0, the first checkpoint of each later stage, T."""
    top = math.sqrt(llc.var() + np.mean(errors**2))
    values = np.r_[0, np.geomspace(min(np.median(errors) / 2, top / 2), top, _GRID)]
    grid = np.array(list(itertools.product(values, values if drift is None else [drift])))
    extra = math.log(len(llc)) * (grid[:, 1] > 0)
    costs = _costs(llc, errors, grid)
    jitter = np.median(np.abs(np.diff(llc)))
    starts = np.array([(0, 0), (jitter, 0), (0, jitter), (jitter / 2, jitter / 2), (top, 0)])
    nearest = {int(np.argmin(np.sum((grid - start) ** 2, axis=1))) for start in starts}
    _, at, edges = min(_in_turn(costs, extra, at, most) for at in sorted(nearest))
    return grid[at], edges


def _in_turn(costs: np.ndarray, extra: np.ndarray, at: int, most: int) -> tuple[float, int, tuple[int, ...]]:
    """The best cuts for this noise, the best noise for these cuts, and so on until nothing is gained."""
    while True:
        edges = _cut(costs[at], most)
        totals = extra + _score(costs, edges)
        best = int(np.argmin(totals))
        if totals[best] >= totals[at]:
            return float(totals[at]), at, edges
        at = best


def _costs(llc: np.ndarray, errors: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """``(G, T, T + 1)``: -2 log p(llc[i:j]) - (j - i) log 2 pi as one stage, by a Kalman filter from every i.

    grid: (scatter, drift), ``(G, 2)``.
    """
    count, prior = len(llc), llc.var() + np.mean(errors**2)
    scatter, drift = grid[:, :1] ** 2, grid[:, 1:] ** 2
    mean, variance = np.full((len(grid), count), llc.mean()), np.full((len(grid), count), prior)
    cost, costs = np.zeros((len(grid), count)), np.full((len(grid), count, count + 1), np.inf)
    for t in range(count):
        now = slice(0, t + 1)  # stages that began at t or before
        variance[:, :t] += drift
        noise = errors[t] ** 2 + scatter
        spread, gap = variance[:, now] + noise, llc[t] - mean[:, now]
        cost[:, now] += np.log(spread) + gap**2 / spread
        mean[:, now] += variance[:, now] / spread * gap
        variance[:, now] *= noise / spread
        costs[:, now, t + 1] = cost[:, now]
    return costs


def _score(costs: np.ndarray, edges: tuple[int, ...]) -> Any:
    """Cost of the stages, and 2 log C(T - 1, cuts): all places for this number of cuts are alike."""
    places = math.comb(edges[-1] - 1, len(edges) - 2)
    return sum(costs[..., i, j] for i, j in itertools.pairwise(edges)) + 2 * math.log(places)


def _cut(cost: np.ndarray, most: int) -> tuple[int, ...]:
    """The edges of the best score of at most ``most`` stages."""
    dynp, table = _search()
    search = dynp(custom_cost=table(cost.tolist()), min_size=_MIN_SIZE, jump=1).fit(np.zeros(len(cost)))
    found = [(0, *search.predict(cuts)) for cuts in range(most)]
    return min(found, key=lambda edges: _score(cost, edges))


@functools.cache
def _search() -> tuple[Any, Any]:
    """(ruptures' dynamic programming, a cost for it that is read off a table)."""
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


def _stage(steps: np.ndarray, llc: np.ndarray, spread: np.ndarray, start: int, end: int) -> Stage:
    weights = 1 / spread[start:end] ** 2
    mean, error = np.sum(weights * llc[start:end]) / weights.sum(), 1 / math.sqrt(weights.sum())
    return Stage(float(steps[start]), float(steps[end - 1]), float(mean), error, end - start)


def _bootstrap(
    rng: np.random.Generator, count: int, llc: np.ndarray, errors: np.ndarray, stages: tuple[Stage, ...],
    edges: tuple[int, ...], noise: np.ndarray, most: int,
) -> list[tuple[int, ...]]:  # fmt: skip
    """The edges of ``count`` resamples of the fitted stages, cut into two stages more at most."""
    means = np.repeat([stage.llc for stage in stages], np.diff(edges))
    spread, found = np.hypot(errors, noise[0]), []
    for _ in range(count):
        walk = noise[1] * rng.standard_normal(len(llc))
        walk = np.concatenate([np.cumsum(w) - np.cumsum(w).mean() for w in np.split(walk, edges[1:-1])])
        resample = means + walk + spread * rng.standard_normal(len(llc))
        found.append(_cut(_costs(resample, errors, noise[None])[0], min(most, len(stages) + 2)))
    return found


def _boundaries(
    steps: np.ndarray, edges: tuple[int, ...], stages: tuple[Stage, ...], drawn: list[tuple[int, ...]], level: float
) -> tuple[Boundary, ...]:
    cuts, found = np.array(edges[1:-1]), []
    for cut, (before, after) in zip(cuts.tolist(), itertools.pairwise(stages), strict=True):
        places = [place for resample in drawn for place in _own(cut, cuts, resample[1:-1])]
        low, high = 1, len(steps) - 1
        if places:
            tails = (1 - level) / 2, (1 + level) / 2
            low = min(cut, int(np.quantile(places, tails[0], method="lower")))
            high = max(cut, int(np.quantile(places, tails[1], method="higher")))
        near = sum(low <= place <= high or abs(place - cut) <= 1 for place in places)
        x, y = float(steps[cut - 1]), float(steps[cut])
        middle = math.sqrt(x * y) if x > 0 else (x + y) / 2
        jump, error = after.llc - before.llc, math.hypot(before.llc_stderr, after.llc_stderr)
        interval, support = (float(steps[low - 1]), float(steps[high])), float(near / len(drawn))
        found.append(Boundary((x, y), middle, *interval, support, jump, error))
    return tuple(found)


def _own(cut: int, cuts: np.ndarray, places: Sequence[int]) -> list[int]:
    """The nearest of a resample's boundaries to which this fitted one is the nearest; [] without one."""
    own = [place for place in places if abs(place - cut) == np.abs(cuts - place).min()]
    return sorted(own, key=lambda place: abs(place - cut))[:1]
