"""A grid of inverse temperatures, localizations and step sizes: all cells in one compiled program."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slt_jax._checks import check_positive
from slt_jax.engine.checkpoint import RunStore
from slt_jax.engine.keys import KeyTag
from slt_jax.engine.loop import Engine
from slt_jax.engine.loss_checks import check_loss
from slt_jax.engine.memory import (
    MemoryEstimate,
    estimate_memory,
    first_that_fits,
    layouts,
    needs_memory_check,
    observing_bytes,
    state_bytes,
)
from slt_jax.engine.observe import Watch
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.engine.run import abandon, full_loss_at_center, run_to_end
from slt_jax.engine.screen import Screen
from slt_jax.estimators.arguments import check_no_path
from slt_jax.estimators.context import in_own_context
from slt_jax.estimators.ends import end_temporaries
from slt_jax.estimators.observing import Observing, observe_identity, watched
from slt_jax.estimators.outcome import result_of
from slt_jax.estimators.prior_control import prior_control
from slt_jax.estimators.request import Notes, Request, check_no_metric, lengths_of_each
from slt_jax.estimators.shared import shared_calibration
from slt_jax.posterior.data import ArrayData
from slt_jax.posterior.local import LocalPosterior
from slt_jax.results.llc import LLCResult
from slt_jax.results.sweep import AXES, Sweep


@in_own_context
def sweep(
    posterior: LocalPosterior,
    data: Any,
    *,
    nbeta: Sequence[float] | None = None,
    localization: Sequence[float] | None = None,
    step_size: Sequence[float] | None = None,
    sampler: Any = None,
    num_chains: int = 4,
    num_draws: int = 200,
    num_warmup: int | None = None,
    thinning: int = 1,
    batch_size: int | None = None,
    key: Any = 0,
    mesh: Mesh | None = None,
    chain_batch: int | None = None,
    micro_batches: int = 1,
    baseline: str = "paired",
    memory_gib: float | None = None,
    observe: Mapping[str, Any] | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
    chunk_size: int = 512,
    checkpoint_seconds: float = 60.0,
) -> Sweep:
    """Estimate the LLC at every combination of the given numbers, and read the grid.

    Cell ``i`` (step size counted fastest, then localization, then nbeta) equals ``estimate_llc`` at its numbers with
    ``key=jax.random.fold_in(key, i)``: its noise is its own. A cell that diverges is marked; the others go on. For each
    localization the control at nbeta = 0 is taken too, where the posterior is a Gaussian that can be drawn exactly.

    Args:
        posterior, data, sampler, batch_size, key, mesh: as for ``estimate_llc``.
        chain_batch, micro_batches, baseline, progress, chunk_size, checkpoint_seconds: as for ``estimate_llc``.
        nbeta, localization, step_size: the values of each axis, in any order. An axis left out has the one value of the
            posterior or the sampler; where they have none, calibration chooses it, at the largest nbeta.
        num_chains, num_draws, num_warmup, thinning: of each cell. The warm-up is by default as long as the draws.
        memory_gib: GiB that the process (on a CPU) or each device may take; default all there is. As many cells are
            in the program at once as fit, and divide their number.
        observe: as for ``estimate_llc``, in each cell; ``cell(...).observed`` has what was observed there. The values
            of all cells are kept in memory, or moments of them: an ``Observable`` with a ``path`` is refused.
        checkpoint_dir: where to keep states and traces; the same call with the same directory resumes, and ends bit
            for bit equal.

    Returns:
        a Sweep: ``dataset`` (xarray, with named coordinates), ``reading`` (where the LLC is stable, what to take),
        ``cell(...)``, ``plot``, ``save``. Ctrl-C after the first draw gives the sweep of the draws so far if all cells
        run at once, and else raises KeyboardInterrupt, which says what was saved.

    Raises:
        TypeError, ValueError: an argument that cannot be used.
        FloatingPointError: the loss is not finite at w*.
        MemoryError: not even one cell fits.
    """
    request = Request.checked(
        posterior, data, sampler=sampler, num_chains=num_chains, num_draws=num_draws, num_warmup=num_warmup,
        thinning=thinning, batch_size=batch_size, key=key, mesh=mesh, chain_batch=chain_batch,
        checkpoint_dir=checkpoint_dir, progress=progress, micro_batches=micro_batches, baseline=baseline,
        observe=observe, chunk_size=chunk_size, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    check_no_metric(request)
    check_no_path(request.observables)
    given = {name: _axis(name, values) for name, values in zip(AXES, (nbeta, localization, step_size), strict=True)}
    if all(values is None for values in given.values()):
        raise ValueError("a sweep needs values for nbeta, localization or step_size: step_size=[1e-5, 3e-5, 1e-4].")
    if given["nbeta"] is None and not posterior.nbeta:
        raise ValueError(
            "the posterior has nbeta = 0, and a sweep draws that control without asking. Give it an nbeta."
        )
    if memory_gib is not None:
        check_positive("memory_gib", memory_gib, "It is the memory of the process or of a device, in GiB.")
    with request.screen() as screen:
        return _sweep(request, screen, given, memory_gib)


def _sweep(request: Request, screen: Screen, given: dict[str, np.ndarray | None], memory_gib: float | None) -> Sweep:
    plan = request.schedule(lengths_of_each(request))
    mesh = request.mesh_of_one(plan.num_chains)
    grid = {name: None if values is None else values.tolist() for name, values in given.items()}
    number = math.prod(len(values) for values in given.values() if values is not None)
    observed = watched(request, lengths_of_each(request)._replace(num_chains=number * plan.num_chains))
    more = observe_identity(request, tuple(watch for watch, _ in observed))
    notes = Notes.opened(request, plan, mesh, {"grid": grid, **more}, {})
    screen.phase("calibrating what is not given", "calibration")
    try:
        axes, friction = _filled(request, given, plan, mesh, notes)
        most = {name: max(axes[name]) for name in ("nbeta", "localization")}
        cells = _Cells(request, request.posterior.with_numbers(**most), plan, axes, friction, memory_gib, observed)
        engine, at_once, memory = _fitted(cells, notes)
    finally:
        abandon(notes.store)
    problem = engine.problem
    screen.say(f"{cells.number} cells of {plan.num_chains} chains, {at_once} cells at once")
    screen.phase("checking the loss, and drawing the controls at nbeta = 0", "preparation")
    check_loss(problem)
    full_loss = full_loss_at_center(problem) if request.baseline == "full" else None
    control_key = jax.random.fold_in(request.key, KeyTag.SWEEP_CONTROL)
    observing = None
    if observed:
        observing = Observing.begun(request, engine, {}, cells.number * plan.num_chains)
    control = prior_control(problem, axes["localization"], control_key, engine.key)
    results: list[LLCResult] = []
    for first in range(0, cells.number, at_once):
        block = range(first, first + at_once)
        store = None
        if request.folder is not None:
            identity = {"sweep": notes.identity, "mesh": dict(problem.mesh.shape), "at once": engine.plan.chain_batch}
            store = RunStore(request.folder / f"cells-{first}-{block[-1]}", identity, problem.mesh)
        try:
            results += _run_block(cells, engine, block, store, screen, full_loss, memory, observing)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_saved_text(request, first, cells.number)) from None
    return Sweep(axes, tuple(results), control)


def _saved_text(request: Request, done: int, number: int) -> str:
    """What is left of a sweep that was interrupted."""
    if request.folder is None:
        return f"{done} of {number} cells were done; none is saved. With a checkpoint_dir, the same call would resume."
    return f"{done} of {number} cells are done, and saved in {request.folder}: the same call resumes."


@dataclass(frozen=True)
class _Cells:
    """The grid. ``posterior``: that of a cell with the largest nbeta and localization. ``plan``: of one cell.

    ``observed``: see ``observing.watched``.
    """

    request: Request
    posterior: LocalPosterior
    plan: Schedule
    axes: dict[str, np.ndarray]
    friction: float | None
    memory_gib: float | None
    observed: tuple[tuple[Watch, ArrayData], ...]

    @property
    def number(self) -> int:
        return math.prod(len(values) for values in self.axes.values())

    def numbers(self, cells: range) -> dict[str, np.ndarray]:
        """nbeta, localization and step size of these cells."""
        grid = np.meshgrid(*(self.axes[name] for name in AXES), indexing="ij")
        return {name: values.reshape(-1)[cells.start : cells.stop] for name, values in zip(AXES, grid, strict=True)}


def _axis(name: str, values: Any) -> np.ndarray | None:
    """Increasing, distinct, positive; None when left out."""
    if values is None:
        return None
    listed = list(np.atleast_1d(np.asarray(values, object)))
    if not listed:
        raise ValueError(f"{name} has no values. Give at least one, or leave it out.")
    for value in listed:
        if name == "nbeta" and np.ndim(value) == 0 and value == 0:
            raise ValueError(
                "nbeta holds 0: that control is drawn exactly, for every localization, without asking. Leave 0 out."
            )
        check_positive(f"each {name}", value, "Leave the others out of the list.")
    axis = np.unique(np.asarray(listed, float))
    if len(axis) < len(listed):
        raise ValueError(f"{name} holds a value twice: {[float(x) for x in listed]}. Give each once.")
    return axis


def _filled(
    request: Request, given: dict[str, np.ndarray | None], plan: Schedule, mesh: Mesh, notes: Notes
) -> tuple[dict[str, np.ndarray], float | None]:
    """(axes, friction), with what was left out: the posterior's own number, the sampler's, or the calibration's."""
    posterior, sampler = request.posterior, request.sampler
    own = {"nbeta": posterior.nbeta, "localization": posterior.localization, "step_size": sampler.step_size}
    axes = {name: np.array([own[name]], float) if values is None else values for name, values in given.items()}
    missing = [name for name, values in axes.items() if np.isnan(values).any()]
    if not missing and sampler.friction is not None:
        return axes, sampler.friction
    gamma = None if "localization" in missing else float(max(axes["localization"]))
    known = None if "step_size" in missing else float(max(axes["step_size"]))
    stiffest = posterior.with_numbers(nbeta=max(axes["nbeta"]), localization=gamma)

    def decide() -> dict[str, Any]:
        key = jax.random.fold_in(request.key, KeyTag.SHARED_CALIBRATION)
        engine = Engine(request.problem(mesh, stiffest), sampler._replace(step_size=known), plan, key)
        return shared_calibration(engine, stiffest)

    note = notes.kept("calibration", [*missing, "friction"], decide)
    for name in missing:
        axes[name] = np.array([note[name]])
    return axes, note["friction"]


def _fitted(cells: _Cells, notes: Notes) -> tuple[Engine, int, MemoryEstimate | None]:
    """An engine for as many cells at once as memory takes, and divide their number; resumed, for as many as before."""
    saves = notes.store is not None
    fitted: list[tuple[Engine, MemoryEstimate | None]] = []

    def decide() -> dict[str, Any]:
        fitted.append(_fitting(cells, range(cells.number, 0, -1), saves))
        return {"cells": fitted[0][0].plan.num_chains // cells.plan.num_chains}

    at_once = notes.kept("at-once", ["cells"], decide)["cells"]
    engine, memory = fitted[0] if fitted else _fitting(cells, [at_once], saves)
    return engine, at_once, memory


def _fitting(cells: _Cells, counts: Iterable[int], saves: bool) -> tuple[Engine, MemoryEstimate | None]:
    """(an engine, its memory) for the first of ``counts`` cells that divides all of them and fits."""
    request, gib = cells.request, cells.memory_gib
    sampler = request.sampler._replace(step_size=float(cells.axes["step_size"][0]), friction=cells.friction)
    limit = math.inf if gib is None else gib * 2**30

    def engines() -> Iterator[Engine]:
        for count in (k for k in counts if cells.number % k == 0):
            rows = count * cells.plan.num_chains
            mesh = request.given_mesh(rows)
            for layout, group in layouts(rows, mesh, request.chain_batch, cells.posterior.num_free):
                plan = dataclasses.replace(cells.plan, num_chains=rows, chain_batch=group)
                engine = Engine(request.problem(layout, cells.posterior, cells.observed), sampler, plan, request.key)
                if gib is None or state_bytes(engine) <= limit:
                    yield engine

    def estimate(engine: Engine) -> MemoryEstimate | None:
        if gib is None and not needs_memory_check(cells.posterior, engine.plan.num_chains, observing_bytes(engine)):
            return None
        memory = estimate_memory(engine, end_temporaries(engine, cells.plan.num_chains), saves=saves)
        return dataclasses.replace(memory, available=min(memory.available, limit - memory.in_use))

    return first_that_fits(
        engines(), estimate, f"memory_gib = {gib} is less than the chains of one cell hold. Give more."
    )


def _run_block(
    cells: _Cells, engine: Engine, block: range, store: RunStore | None, screen: Screen, full_loss: float | None,
    memory: MemoryEstimate | None, observing: Observing | None,
) -> list[LLCResult]:  # fmt: skip
    """The results of these cells, which run together."""
    request, chains, values = cells.request, cells.plan.num_chains, cells.numbers(block)
    keys = jnp.stack([jax.random.fold_in(request.key, i) for i in block])
    inputs = engine.cell_inputs(_numbers(values, cells.friction or 0.1), keys, chains)
    whole = len(block) == cells.number
    part = "" if whole else f"cells {block[0]} to {block[-1]} of {cells.number}: "
    screen.clock.restart()
    run = run_to_end(engine, inputs, store, screen, every=request.checkpoint_seconds, part=part, partial=whole)
    screen.phase(f"{part}final checks", "final checks")
    results = []
    for i in range(len(block)):
        numbers = _numbers({name: float(x[i]) for name, x in values.items()}, cells.friction)
        posterior = cells.posterior.with_numbers(nbeta=numbers.nbeta, localization=numbers.localization)
        own = range(i * chains, (i + 1) * chains)
        result = result_of(
            engine, run, posterior, numbers, screen.clock, chains=own, key=keys[i], full_loss=full_loss, memory=memory,
            notes=request.notes, observing=observing,
        )  # fmt: skip
        results.append(result)
    return results


def _numbers(values: Mapping[str, Any], friction: float | None) -> Numbers:
    return Numbers(values["nbeta"], values["localization"], values["step_size"], friction)
