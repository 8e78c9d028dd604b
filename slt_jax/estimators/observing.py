"""What an estimate observes: how it is kept, where it goes, and what is made of it when the run has ended."""

import dataclasses
import secrets
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from slt_jax._io import digest_of_json, user_path
from slt_jax.engine.loop import Engine, Run
from slt_jax.engine.mesh import allgather, is_main_process, spans_processes
from slt_jax.engine.observe import MOST_PARTS, PARTS, Sums, Watch
from slt_jax.engine.plan import Lengths, Schedule
from slt_jax.engine.values import Outlet, Outlets
from slt_jax.estimators.request import Request
from slt_jax.machine import free_of_process, size_text
from slt_jax.posterior.data import ArrayData
from slt_jax.posterior.fingerprint import program_digest
from slt_jax.posterior.observable import Observable, evaluation_of
from slt_jax.posterior.tree import to_host
from slt_jax.results.llc import LLCResult
from slt_jax.results.observed import Moments, Observed
from slt_jax.results.record import GradientRecord

MOST_VALUES = 2**30  # bytes of values in memory, from which on moments are kept instead
_LARGE = 2**28  # bytes of values, from which on their room is looked at


def watched(request: Request, lengths: Lengths, growth: float = 1.0) -> tuple[tuple[Watch, ArrayData], ...]:
    """What the compiled program is to know of each observable, with its examples.

    Args:
        growth: how many times as many draws a run may have that goes on until it is precise.

    Raises:
        ValueError, TypeError: an observable returns something else than one row for each example.
        MemoryError: values that were asked for do not fit into memory.
    """
    found = [(observable, data, _watch(request, name, observable, data))
             for name, (observable, data) in request.observables.items()]  # fmt: skip
    draws = lengths.num_chains * lengths.num_draws * growth
    held = sum(draws * watch.num_bytes for x, _, watch in found if x.path is None and x.keep != "moments")
    parts = MOST_PARTS if request.target_error is not None else PARTS
    chosen, total = [], 0.0
    for observable, data, watch in found:
        moments = observable.keep == "moments" or (
            observable.keep == "auto" and observable.path is None and held > MOST_VALUES
        )
        total += 0 if moments or observable.path is not None else draws * watch.num_bytes / growth
        chosen.append((watch._replace(parts=parts if moments else 0), data))
    if total > _LARGE and total > free_of_process():
        raise MemoryError(
            f"the values of the observables take {size_text(total)}, and {size_text(free_of_process())} are free. "
            "Observe fewer examples, keep='moments', or give them a path where one is taken."
        )
    return tuple(chosen)


def _watch(request: Request, name: str, observable: Observable, data: ArrayData) -> Watch:
    """Its examples go through the model in blocks of a step's micro-batch at most."""
    program = request.posterior.program
    evaluate = evaluation_of(name, observable, program)
    blocks = -(-data.num_data // (request.batch_size // request.micro_batches))
    shape = jax.eval_shape(evaluate, *_described(request, data, blocks)).shape
    if observable.level != "custom" and len(shape) != (wanted := 1 + (observable.level == "token")):
        axes = "(example,)" if wanted == 1 else "(example, token)"
        raise ValueError(
            f"observe['{name}'] has level='{observable.level}', whose values have the shape {axes}; its function "
            f"returned {shape} for {shape[0]} examples. Take level='custom' for other shapes."
        )
    return Watch(evaluate, (data.num_data, *shape[1:]), blocks, 0)


def _described(request: Request, data: ArrayData, blocks: int) -> tuple[Any, Any, Any]:
    """(position, frozen weights, one block of the examples): shapes."""
    rows = -(-data.num_data // blocks)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), data.arrays)
    return *jax.eval_shape(request.posterior.program.split, request.posterior.center), batch


@dataclass(frozen=True)
class Observing:
    """What one estimate observes.

    ``observables``: by name. ``centers``: of each, the values at w* and which of them count. ``outlets``: see
    ``engine.values``. ``all_chains``: of all cells of a sweep, which takes no path; None without one.
    """

    observables: dict[str, Observable]
    centers: tuple[tuple[np.ndarray, np.ndarray | None], ...]
    outlets: Outlets
    all_chains: int | None = None

    @classmethod
    def begun(
        cls, request: Request, engine: Engine, identity: dict[str, Any], all_chains: int | None = None
    ) -> "Observing":
        """Raises FloatingPointError where a value at w* is not finite, and FileExistsError where a path is taken."""
        observables = {name: observable for name, (observable, _) in request.observables.items()}
        centers = tuple(engine.problem.values_at_center(k) for k in range(len(observables)))
        for name, (values, valid) in zip(observables, centers, strict=True):
            _check_finite(name, values, valid)
        outlets = _outlets(request, engine, observables, identity)
        return cls(observables, centers, outlets, all_chains)

    def record(self, engine: Engine, num_chains: int) -> dict[str, Any]:
        """For the record of so many chains: of each observable what was kept, and in how many bytes."""
        plan, found = engine.plan, {}
        for (name, observable), watch in zip(self.observables.items(), engine.problem.watches, strict=True):
            draws = plan.num_draws if not watch.parts else 3 * watch.parts
            found[name] = {
                "level": observable.level, "kept": "moments" if watch.parts else "values",
                "shape": list(watch.shape), "bytes": num_chains * draws * watch.num_bytes,
            }  # fmt: skip
            if observable.path is not None:
                found[name]["path"] = str(user_path(observable.path).absolute())
        return found

    def notes(self, engine: Engine) -> tuple[str, ...]:
        """Where moments were kept in the place of values."""
        told, chains = [], self.all_chains or engine.plan.num_chains
        remedy = "Give it a path, or keep='values'," if self.all_chains is None else "Give it keep='values'"
        for (name, x), watch in zip(self.observables.items(), engine.problem.watches, strict=True):
            if watch.parts and x.keep == "auto":
                size = size_text(watch.num_bytes * chains * engine.plan.num_draws)
                told.append(
                    f"of '{name}' only moments were kept: values at every draw would take {size}. {remedy} to keep "
                    "them."
                )
        return tuple(told)


def _check_finite(name: str, values: np.ndarray, valid: np.ndarray | None) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        rows = np.unique(np.nonzero(bad)[0])
        named = ", ".join(map(str, rows[:6])) + (" and others" if len(rows) > 6 else "")
        raise FloatingPointError(
            f"the values of observe['{name}'] at w* are not finite for {len(rows)} of {len(values)} examples: rows "
            f"{named}. Repair or remove them, or let fn also return a mask of the values that count."
        )
    if valid is not None and not valid.any():
        raise ValueError(f"the mask of observe['{name}'] is false everywhere: there is nothing to observe.")


def observe_identity(request: Request, watches: tuple[Watch, ...]) -> dict[str, Any]:
    """What of the observables a run's numbers depend on; {} without any."""
    found = {}
    for (name, (observable, data)), watch in zip(request.observables.items(), watches, strict=True):
        given = _described(request, data, watch.blocks)
        found[name] = {
            "level": observable.level, "moments": bool(watch.parts), "data": data.fingerprint(),
            "fn": "" if watch.evaluate.fn is None else program_digest(watch.evaluate, *given),
        }  # fmt: skip
    return {"observe": found} if found else {}


def _outlets(
    request: Request, engine: Engine, observables: dict[str, Observable], identity: dict[str, Any]
) -> Outlets:  # fmt: skip
    mesh = engine.problem.mesh
    owner = secrets.token_hex(16) if request.folder is None else digest_of_json([str(request.folder), identity])
    found = []
    for (name, observable), watch in zip(observables.items(), engine.problem.watches, strict=True):
        if watch.parts:
            continue
        place = None
        if observable.path is not None:
            names = ("token_pos",) if observable.level == "token" else tuple(
                f"axis_{k}" for k in range(1, len(watch.shape))
            )  # fmt: skip
            prefix = "value" if observable.level == "custom" else "loss"
            place = Outlet(
                user_path(observable.path).absolute(), f"{prefix}_{name}", ("chain", "draw", f"batch_{name}", *names),
                owner, is_main_process(mesh),
            )  # fmt: skip
        found.append(place)
    _check_free([place for place in found if place is not None], mesh)
    return tuple(found)


def _check_free(places: list[Outlet], mesh: Any) -> None:
    why = None
    try:
        for place in places:
            if place.writes:
                place.check_free()
    except FileExistsError as error:
        why = str(error)
    if (why := allgather(why, mesh)[0]) is not None:
        raise FileExistsError(why)


def at_draws(plan: Schedule) -> slice:
    """The steps at which a chain is drawn."""
    return slice(plan.num_warmup + plan.thinning - 1, None, plan.thinning)


def at_equal_times(times: np.ndarray) -> np.ndarray:
    """(chain, draw): which of the draws, of steps that took ``times``, stand for equal times, in the same order.

    A step that took twice the time is there twice as often. Nothing changes where all took the same.
    """
    picks = np.broadcast_to(np.arange(times.shape[1]), times.shape).copy()
    for chain, each in enumerate(times.astype(np.float64)):
        if np.isfinite(each).all() and each.min() < each.max():
            ends = np.cumsum(each)
            picks[chain] = np.searchsorted(ends, (picks[chain] + 0.5) * (ends[-1] / len(ends)))
    return picks


def with_observed(
    result: LLCResult, engine: Engine, run: Run, observing: Observing, full_loss: float | None, chains: range, *,
    partial: bool = False,
) -> LLCResult:  # fmt: skip
    """The result with what its observables read at its draws, of the chains that stayed finite, and what that took.

    Args:
        engine: with the schedule of the result, whose draws are the last ones of the run.
        full_loss: L_n(w*), where that is the baseline. chains: of the run, those that the result is of.
        partial: of a run that goes on, read by one process for itself: without what is on a disk, and without moments
            that other processes have a part of.
    """
    gradients: GradientRecord = {**result.settings.gradients, "observe": _gradients(engine, len(chains), run.drawn)}
    settings = dataclasses.replace(
        result.settings, gradients=gradients, observed=observing.record(engine, len(chains))
    )  # fmt: skip
    traces, kept = result.traces, result.kept_chains
    picks = at_equal_times(run.trace.time[chains.start : chains.stop, at_draws(engine.plan)])[kept]
    gap = (traces.loss.astype(np.float64) - traces.baseline)[kept]
    rows = chains.start + kept
    without_sums = partial and spans_processes(engine.problem.mesh)
    stored, outlets = iter(run.values), iter(observing.outlets)
    sums = iter(run.sums if without_sums else to_host(run.sums))
    found, notes = {}, list(result.notes)
    first = run.drawn - engine.plan.num_draws
    each = zip(observing.observables.items(), engine.problem.watches, observing.centers, strict=True)
    for (name, observable), watch, (center, valid) in each:
        values = moments = None
        if watch.parts:
            own = next(sums)
            if without_sums:
                continue
            moments = _moments(own, rows, first, run, full_loss)
        else:
            held, outlet = next(stored), next(outlets)
            if partial and outlet is not None:
                continue
            values = _drawn_values(held, outlet, rows, first + picks, engine.problem.mesh)
        one = Observed(
            name=name, level=str(observable.level), values=values, moments=moments, center=center, valid=valid, gap=gap,
            nbeta=settings.nbeta, num_data=settings.num_data, localization=settings.localization,
        )  # fmt: skip
        if not partial and not _finite(one):
            notes.append(f"some values of '{name}' are not finite at the draws, and nor is what is computed of them.")
        found[name] = one
    return dataclasses.replace(result, settings=settings, observed=found, notes=(*notes, *observing.notes(engine)))


def _finite(one: Observed) -> bool:
    if one.moments is not None:
        return bool(np.isfinite(one.moments.m2).all())
    return all(np.isfinite(rows).all() for _, _, rows in one.pieces())


def _drawn_values(stored: Any, outlet: Outlet | None, chains: np.ndarray, picks: np.ndarray, mesh: Mesh) -> Any:
    """The rows ``picks`` (chain, draw) of these chains, of those on disk as all processes can read them."""
    if outlet is None:
        return _rows_of(stored, None, chains, picks)
    values = None if stored is None else _rows_of(stored, outlet, chains, picks)
    moved = allgather(values is not None and values is not stored, mesh)[0]  # once it is written
    return (outlet.beside if moved else outlet).opened() if values is None else values


def _rows_of(stored: Any, outlet: Outlet | None, chains: np.ndarray, picks: np.ndarray) -> Any:
    """As they are stored where that is all there is, in order."""
    start, count = int(picks[0, 0]) if picks.size else 0, picks.shape[1]
    in_order = bool((picks == start + np.arange(count)).all())
    if outlet is None:
        first, last = (int(chains[0]), int(chains[-1]) + 1) if len(chains) else (0, 0)
        whole = in_order and last - first == len(chains)
        return stored[first:last, start : start + count] if whole else stored[chains[:, None], picks]
    if in_order and start == 0 and len(chains) == stored.shape[0]:
        if count < stored.shape[1]:
            stored.resize((stored.shape[0], count, *stored.shape[2:]))
        return stored
    return outlet.rearranged(stored, chains, picks)


def _moments(sums: Sums, chains: np.ndarray, first: int, run: Run, full_loss: float | None) -> Moments:
    """Of the blocks that begin at or after the draw ``first``; as if each draw had the same time."""
    per, draws = run.parts or (1, 1)
    part = (per * (np.arange(run.drawn) + 1) - 1) // draws
    counts = np.bincount(part, minlength=sums.weight.shape[1])
    begins = np.searchsorted(part, np.arange(len(counts)))
    kept = np.flatnonzero((counts > 0) & (begins >= first))
    sums = Sums(*(x[chains][:, kept] for x in sums))
    count = np.broadcast_to(counts[kept], sums.weight.shape).astype(np.float32)
    scale = count / sums.weight
    wide = scale.reshape(*scale.shape, *[1] * (sums.mean.ndim - 2))
    return Moments(
        count=count, mean=sums.mean, m2=wide * sums.m2, loss_mean=sums.loss_mean - np.float32(full_loss or 0.0),
        loss_m2=scale * sums.loss_m2, co=wide * sums.co,
    )  # fmt: skip


def _gradients(engine: Engine, num_chains: int, draws: int) -> float:
    """Minibatch gradients that observing so many draws of each chain took: a forward pass is a third of one."""
    return num_chains * draws * engine.problem.draw_passes / 3
