"""A grid of inverse temperatures, localizations and step sizes: all cells in one compiled program."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slt_jax._checks import check_key, check_positive
from slt_jax.engine.checkpoint import RunStore
from slt_jax.engine.loop import Engine
from slt_jax.engine.memory import Need, layouts, need_of, state_bytes, weighs
from slt_jax.engine.mesh import automatic, check_mesh, gathered, leads
from slt_jax.engine.run import abandon, full_loss_at_center, run_to_end
from slt_jax.estimators.outcome import look_bytes, result_of
from slt_jax.estimators.prior_control import control_of
from slt_jax.estimators.request import Notes, Subject, calibrated, opened, subject_of
from slt_jax.posterior.local import LocalPosterior
from slt_jax.results.llc import LLCResult
from slt_jax.results.sweep import AXES, Sweep

_CONTROL, _CALIBRATION = 2**31 - 21, 2**31 - 22  # folded into the key


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
    checkpoint_dir: str | os.PathLike | None = None,
    progress: bool = False,
    chunk_size: int = 512,
    checkpoint_seconds: float = 60.0,
) -> Sweep:
    """Estimate the LLC at every combination of the given numbers, and read the grid.

    Cell ``i`` (step size counted fastest, then localization, then nbeta) equals ``estimate_llc`` at its numbers with
    ``key=jax.random.fold_in(key, i)``: its noise is its own. A cell that diverges is marked; the others go on. For each
    localization the control at nbeta = 0 is taken too, where the posterior is a Gaussian that can be drawn exactly.

    Args:
        posterior, data, sampler, batch_size, key, mesh, chain_batch, micro_batches, baseline, progress, chunk_size,
            checkpoint_seconds: as for ``estimate_llc``.
        nbeta, localization, step_size: the values of each axis, in any order. An axis left out has the one value of the
            posterior or the sampler; where they have none, calibration chooses it, at the largest nbeta.
        num_chains, num_draws, num_warmup, thinning: of each cell; default as many warm-up steps as go into the draws.
        memory_gib: GiB that the process (on a CPU) or each device may take; default all there is. As many cells are
            in the program at once as fit, and divide their number.
        checkpoint_dir: where to keep states and traces; the same call with the same directory resumes, and ends bit
            for bit equal.

    Returns:
        a Sweep: ``dataset`` (xarray, with named coordinates), ``reading`` (where the LLC stands, what to take),
        ``cell(...)``, ``plot``, ``save``.

    Raises:
        TypeError, ValueError: an argument that cannot be used. FloatingPointError: the loss is not finite at w*.
        MemoryError: not even one cell fits.
    """
    lengths = (num_chains, num_draws, num_warmup, thinning, batch_size, micro_batches, baseline, chunk_size)
    subject, key = subject_of(posterior, data, sampler, mesh, *lengths), check_key(key)
    given = {name: _axis(name, values) for name, values in zip(AXES, (nbeta, localization, step_size), strict=True)}
    if all(values is None for values in given.values()):
        raise ValueError("a sweep needs values for nbeta, localization or step_size: step_size=[1e-5, 3e-5, 1e-4].")
    if memory_gib is not None:
        check_positive("memory_gib", memory_gib, "It is the memory of the process or of a device, in GiB.")
    check_positive("checkpoint_seconds", checkpoint_seconds, "0 saves after every chunk.", zero=True)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    grid = {name: None if values is None else values.tolist() for name, values in given.items()}
    notes = opened(subject, key, {"grid": grid}, {}, folder)
    try:
        axes, friction = _filled(given, subject, key, notes)
        most = {name: max(axes[name]) for name in ("nbeta", "localization")}
        subject = subject._replace(posterior=posterior.with_numbers(**most))
        work = _Work(subject, key, mesh, chain_batch, memory_gib, axes, friction)
        engine, at_once, need = _fitted(work, notes)
    finally:
        abandon(notes.store)
    if progress and leads(engine.mesh):
        print(f"  {work.num_cells} cells of {num_chains} chains, {at_once} cells at once", file=sys.stderr)
    full = gathered(full_loss_at_center(engine), engine.mesh)[0] if baseline == "full" else None
    control = control_of(engine, axes["localization"], jax.random.fold_in(key, _CONTROL))
    results: list[LLCResult] = []
    for first in range(0, work.num_cells, at_once):
        cells = range(first, first + at_once)
        part = "" if at_once == work.num_cells else f"cells {first} to {cells[-1]}: "
        mine = {"sweep": notes.identity, "mesh": dict(engine.mesh.shape), "at once": engine.plan.chain_batch}
        store = None if folder is None else RunStore(folder / f"cells-{first}-{cells[-1]}", mine, engine.mesh)
        results += _run_cells(work, engine, cells, store, (progress, checkpoint_seconds, part), full, need)
    return Sweep(axes, tuple(results), control)


@dataclass(frozen=True)
class _Work:
    subject: Subject  # of one cell, at the largest nbeta and localization
    key: jax.Array
    mesh: Mesh | None
    chain_batch: int | None
    memory_gib: float | None
    axes: dict[str, np.ndarray]
    friction: float | None

    @property
    def num_cells(self) -> int:
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
        if name == "nbeta" and value == 0:
            raise ValueError(
                "nbeta holds 0: that control is drawn exactly, for every localization, without asking. Leave 0 out."
            )
        check_positive(f"each {name}", value, "Leave the others out of the list.")
    found = np.unique(np.asarray(listed, float))
    if len(found) < len(listed):
        raise ValueError(f"{name} holds a value twice: {[float(x) for x in listed]}. Give each once.")
    return found


def _filled(
    given: dict[str, np.ndarray | None], subject: Subject, key: jax.Array, notes: Notes
) -> tuple[dict[str, np.ndarray], float | None]:
    """(axes, friction), with what was left out: the posterior's own number, the sampler's, or the calibration's."""
    posterior, source, sampler, plan, layout = subject
    own = {"nbeta": posterior.nbeta, "localization": posterior.localization, "step_size": sampler.step_size}
    axes = {name: np.array([own[name]], float) if values is None else values for name, values in given.items()}
    missing = [name for name, values in axes.items() if np.isnan(values).any()]
    if not missing and sampler.friction is not None:
        return axes, sampler.friction
    gamma = None if "localization" in missing else float(max(axes["localization"]))
    known = None if "step_size" in missing else float(max(axes["step_size"]))
    one = posterior.with_numbers(nbeta=max(axes["nbeta"]), localization=gamma)

    def decide() -> dict[str, Any]:
        engine = Engine(one, source, sampler, plan, jax.random.fold_in(key, _CALIBRATION), layout)
        return calibrated(engine, sampler._replace(step_size=known), gamma)

    note = notes.kept("calibration", decide)
    for name in missing:
        axes[name] = np.array([note[name]])
    return axes, note["friction"]


def _fitted(work: _Work, notes: Notes) -> tuple[Engine, int, Need | None]:
    """An engine for as many cells at once as memory takes, and divide their number; resumed, for as many as before."""
    found: list[Any] = []

    def decide() -> dict[str, Any]:
        found.extend(_fitting(work, range(work.num_cells, 0, -1), notes.store is not None))
        return {"cells": found[1]}

    cells = notes.kept("at-once", decide)["cells"]
    engine, _, need = found or _fitting(work, [cells], notes.store is not None)
    return engine, cells, need


def _fitting(work: _Work, counts: Iterable[int], saves: bool) -> tuple[Engine, int, Need | None]:
    """(engine, cells at once, its need) for the first of ``counts`` that divides the cells and fits."""
    posterior, source, sampler, plan, _ = work.subject
    sampler = sampler._replace(step_size=float(work.axes["step_size"][0]), friction=work.friction)
    limit, need = math.inf if work.memory_gib is None else work.memory_gib * 2**30, None
    for cells in (k for k in counts if work.num_cells % k == 0):
        rows = cells * plan.num_chains
        mesh = None if work.mesh is None else check_mesh(automatic(work.mesh), rows)
        for layout, group in layouts(rows, mesh, work.chain_batch, posterior.num_free):
            laid = dataclasses.replace(plan, num_chains=rows, chain_batch=group)
            engine = Engine(posterior, source, sampler, laid, work.key, layout)
            if work.memory_gib is None and not weighs(posterior, rows):
                return engine, cells, None
            if state_bytes(engine) > limit:
                continue
            need = need_of(engine, look_bytes(engine, plan.num_chains), saves=saves)
            need = dataclasses.replace(need, free=min(need.free, limit - need.now))
            if all(gathered(need.fits, layout)):
                return engine, cells, need
    told = f"memory_gib = {work.memory_gib} is less than the chains of one cell hold. Give more."
    raise MemoryError(need.refusal() if need else told)


def _run_cells(
    work: _Work, engine: Engine, cells: range, store: RunStore | None, show: tuple, full: float | None,
    need: Need | None,
) -> list[LLCResult]:  # fmt: skip
    numbers, chains = work.numbers(cells), work.subject.plan.num_chains
    keys = jnp.stack([jax.random.fold_in(work.key, i) for i in cells])
    engine.share_out(keys, chains, **numbers)
    progress, seconds, part = show
    run = run_to_end(engine, store, progress, seconds, part)
    found = []
    for i in range(len(cells)):
        one = {name: float(values[i]) for name, values in numbers.items()}
        posterior = work.subject.posterior.with_numbers(nbeta=one["nbeta"], localization=one["localization"])
        mine = range(i * chains, (i + 1) * chains)
        given = (engine, run, posterior, one["step_size"], work.friction)
        found.append(result_of(*given, chains=mine, key=keys[i], full_loss=full, need=need))
    return found
