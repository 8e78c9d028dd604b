"""A run from its start to its end: checks of the loss at w*, progress, and saves on the way.

A directory that fails costs the durability of a run, not the run.
"""

import contextlib
import dataclasses
import errno
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from slt_jax.engine.bad_rows import bad_rows_text, cause_of_stops
from slt_jax.engine.checkpoint import RunStore
from slt_jax.engine.interrupts import SIGNALS, Interrupts
from slt_jax.engine.loop import Engine, Inputs, Run
from slt_jax.engine.mesh import allgather, place, spans_processes
from slt_jax.engine.plan import Schedule
from slt_jax.engine.problem import Problem
from slt_jax.engine.progress import Progress, peak_memory, span
from slt_jax.engine.screen import Screen
from slt_jax.engine.trace import Trace
from slt_jax.engine.values import Outlets, held, in_memory, new_values, resumed_values
from slt_jax.posterior.data import ArrayData, Source
from slt_jax.posterior.tree import to_host


def check_at_center(problem: Problem, loss: float, grad_norm: float) -> None:
    """Raise FloatingPointError unless the loss at w* and its gradient's norm are finite."""
    _check_finite(problem, loss, "over a sample of the data")
    if not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"the gradient of the loss at w* is not finite over a sample of the data, though the loss {loss:.4g} is. "
            f"Look for a square root, logarithm or norm of zero in loss_fn.{_found(problem, by_gradient=True)}"
        )


def _check_center(engine: Engine, run: Run) -> None:
    """The first step's loss and gradient are taken at w* itself."""
    first, drift_sq = run.trace.loss[:, 0], run.trace.drift_sq[:, 0]
    if not np.isfinite(first).all():
        chain = int(np.argmin(np.isfinite(first)))
        _check_finite(engine.problem, float(first[chain]), f"on the first batch of chain {chain}")
    if not np.isfinite(drift_sq).all():
        chain = int(np.argmin(np.isfinite(drift_sq)))
        found = _found(engine.problem, by_gradient=True)
        raise FloatingPointError(
            f"the gradient of the loss at w* is not finite on the first batch of chain {chain}, though the loss "
            f"{first[chain]:.4g} is. Look for a square root, logarithm or norm of zero in loss_fn, and for an "
            f"nbeta that makes nbeta times the gradient too large for float32.{found}"
        )


def full_loss_at_center(problem: Problem) -> float:
    """L_n(w*), on every process. Raises FloatingPointError when it is not finite."""
    loss = problem.full_loss()
    _check_finite(problem, loss, "over the whole data set")
    return allgather(loss, problem.mesh)[0]


def check_other_data(problem: Problem, others: Mapping[str, ArrayData]) -> None:
    """Raise FloatingPointError unless the loss at w* is finite on the first examples of each further data set."""
    for name, data in others.items():
        _check_finite(problem, problem.first_loss(data), f"on the first examples of '{name}'", data)


def check_first_loss(problem: Problem) -> None:
    """Raise FloatingPointError unless the loss at w* is finite on the first examples."""
    _check_finite(problem, problem.first_loss(), "on the first examples")


def _found(problem: Problem, data: Source | None = None, *, by_gradient: bool = False) -> str:
    """Which rows, after a space; nothing where none are found."""
    try:
        text = bad_rows_text(problem, data, by_gradient=by_gradient)
    except Exception:  # the search is for a better message alone
        return ""
    return f" {text[:1].upper()}{text[1:]}" if text else ""


def _check_finite(problem: Problem, loss: float, where: str, data: Source | None = None) -> None:
    if not math.isfinite(loss):
        example = problem.source.fetch(np.zeros(1, np.int64))
        whole = any(np.issubdtype(x.dtype, np.integer) for x in jax.tree.leaves(example))
        hint = " The data holds integers: are all token ids inside the model's vocabulary?" if whole else ""
        raise FloatingPointError(
            f"the loss at w* is {loss} {where}; an LLC needs a finite loss at the center. "
            f"Check the data for NaN, and that these weights belong to this loss.{hint}{_found(problem, data)}"
        )


def begun(engine: Engine, inputs: Inputs, outlets: Outlets = ()) -> Run:
    """A run at its start, with room for what its observables read. ``outlets``: see ``engine.values``."""
    run = engine.start(inputs)
    run.values = new_values(engine.problem.watches, outlets, engine.plan.num_chains, engine.plan.num_draws)
    return run


def restored(engine: Engine, inputs: Inputs, store: RunStore, outlets: Outlets = ()) -> Run | None:
    """The run as ``store`` last saved it, if it did."""
    run, watches, plan = engine.start(inputs), engine.problem.watches, engine.plan
    run.values = new_values(held(watches, outlets), (), plan.num_chains, plan.num_draws)
    if (saved := store.restore(_device_part(run), _host_part(run))) is None:
        return None
    run.step, device, host = saved
    run.state, run.sums = device if run.sums else (device, ())
    run.trace = Trace(**{name: host.get(name, ()) for name in Trace._fields})
    run.alive = place(np.asarray(host["alive"]), engine.problem.per_chain)
    run.drawn = draws_of(plan, run)
    if run.parts:
        run.parts = (int(host["parts"][0]), int(host["parts"][1]))
    kept = [host[f"values_{k}"] for k in range(len(run.values))]
    run.values = resumed_values(watches, outlets, kept, plan.num_chains, plan.num_draws)
    return run


def run_to_end(
    engine: Engine, inputs: Inputs, store: RunStore | None, screen: Screen, *, every: float, part: str = "",
    nbeta: float | None = None, start: Run | None = None, partial: bool = False,
    on_chunk: Callable[[Run], None] | None = None, outlets: Outlets = (),
) -> Run:  # fmt: skip
    """All steps, from where ``store`` left off if it has any; saved at most once in ``every`` seconds.

    ``part``: which part of something larger the run is, for the screen; ``nbeta``: that of all its chains, with which
    the running estimate is shown. ``start``: where the chains begin, if not at w*. ``on_chunk``: called after each
    chunk. ``outlets``: where the values of observables go that are not kept in memory. SIGINT and SIGTERM act after the
    chunk that is under way and a save, if there is a ``store`` of this process alone. With ``partial``, Ctrl-C after
    the first draw ends the run, which is returned with ``interrupted`` set.
    Raises FloatingPointError when the loss or its gradient at w* is not finite on the first batch.
    """
    screen.phase(f"{part}compiling the steps", "sampling")
    run = None if store is None else restored(engine, inputs, store, outlets)
    run = run or start or begun(engine, inputs, outlets)
    mesh, plan = engine.problem.mesh, engine.plan
    passes = 2 * len(engine.problem.also) + engine.problem.draw_passes
    progress = Progress(plan, full=engine.static.length, part=part, nbeta=nbeta, passes=passes)
    saves, alone = Timer(every), not spans_processes(mesh)
    with _interrupts(plan, run, saves=store is not None and alone, partial=partial and alone) as interrupts:
        kept = lambda: partial and interrupts.is_keyboard and draws_of(plan, run) > 0  # noqa: E731
        try:
            for _ in engine.steps(run, inputs):
                if progress.first_chunk and start is None:
                    _check_center(engine, run)
                announce = progress.left is None
                progress.update(run)
                screen.follow(progress)
                if announce and progress.left is not None and not part:
                    screen.say(_announcement(plan, progress.left))
                if on_chunk is not None:
                    on_chunk(run)
                due = saves.due() or interrupts.pending is not None
                if store is not None and (allgather(due, mesh)[0] or run.step == plan.total_steps):
                    store = _save(store, run)
                if interrupts.pending is not None:
                    store = store and _written(store, run)
                    if kept():
                        interrupts.dismiss()
                        run.interrupted = run.step < plan.total_steps
                        break
                    interrupts.deliver()
        except BaseException:
            abandon(store)
            raise
        memory, where = peak_memory()
        run.cost = {"steps_per_s": progress.speed, where: memory}
        _explain_stops(engine, run, inputs)
        if store is not None:
            _finish(store, run)
        if kept():  # Ctrl-C after the last chunk: nothing is lost
            interrupts.dismiss()
    return run


def draws_of(plan: Schedule, run: Run) -> int:
    """Draws that each chain has taken."""
    return max(0, run.step - plan.num_warmup) // plan.thinning


def so_far(engine: Engine, run: Run) -> tuple[Engine, Run]:
    """The same run as one that was meant to have no more draws than it has taken, and its engine."""
    plan = dataclasses.replace(engine.plan, num_draws=draws_of(engine.plan, run))
    trace = jax.tree.map(lambda x: x[:, : plan.total_steps], run.trace)
    return engine.replanned(plan), dataclasses.replace(run, trace=trace, step=plan.total_steps)


def _interrupts(plan: Schedule, run: Run, *, saves: bool, partial: bool) -> Interrupts:
    signals = SIGNALS if saves else (signal.SIGINT,) if partial else ()
    told = "saving before this run ends" if saves else "ending this run with the draws so far"
    return Interrupts(signals, lambda: saves or draws_of(plan, run) > 0, told)


def _announcement(plan: Schedule, left: float) -> str:
    chains = f"{plan.num_chains} chain{'s' * (plan.num_chains > 1)}"
    return f"sampling: {plan.total_steps:,} steps of {chains}, about {span(left)} to go, then final checks"


class Timer:
    """Says when ``every`` seconds have passed since it last said so."""

    def __init__(self, every: float):
        self._every, self._saved = every, time.monotonic()

    def due(self) -> bool:
        if due := time.monotonic() - self._saved >= self._every:
            self._saved = time.monotonic()
        return due


def _explain_stops(engine: Engine, run: Run, inputs: Inputs) -> None:
    """Look whether the data stopped the chains that went non-finite; a search that fails costs nothing but a note."""
    try:
        run.causes = cause_of_stops(engine, run, inputs)
    except Exception as error:
        run.notes.append(f"the cause of non-finite losses was not found ({type(error).__name__}: {str(error)[:200]}).")


def _host_part(run: Run) -> dict[str, np.ndarray]:
    kept = {name: value for name, value in run.trace._asdict().items() if not isinstance(value, tuple)}
    values = {f"values_{k}": value for k, value in enumerate(in_memory(run.values))}
    parts = {"parts": np.array(run.parts, np.int64)} if run.parts else {}
    return {**kept, **values, **parts, "alive": to_host(run.alive)}


def _device_part(run: Run) -> Any:
    return (run.state, run.sums) if run.sums else run.state


def _save(store: RunStore, run: Run) -> RunStore | None:
    """Save; a directory that fails costs the durability of the run, not the run."""
    if (why := _failure(store, lambda: store.save(run.step, _device_part(run), _host_part(run)))) is None:
        return store
    _forgo(store, run, why)
    abandon(store)
    return None


def _written(store: RunStore, run: Run) -> RunStore | None:
    """Wait until the save is on disk; as ``_save`` if it fails."""
    if (why := _failure(store, store.wait)) is None:
        return store
    _forgo(store, run, why)
    abandon(store)
    return None


def _finish(store: RunStore, run: Run) -> None:
    abandon(_written(store, run))


def _failure(store: RunStore, action: Callable[[], None]) -> str | None:
    """What went wrong with ``action`` on the first process on which it did; None when all went well."""
    reason = None
    try:
        action()
    except Exception as error:
        reason = str(error)
    return next((why for why in allgather(reason, store.mesh) if why is not None), None)


def abandon(store: RunStore | None) -> None:
    """End the background writer after what it has begun; its errors were reported, or another one is being raised."""
    if store is not None:
        with contextlib.suppress(Exception):
            store.close()


def _forgo(store: RunStore, run: Run, why: str) -> None:
    full = os.strerror(errno.ENOSPC)
    told = why if len(why) <= 300 else f"{why[:100]} ... {why[-200:]}"  # the system's reason mostly comes last
    why = f"{full}: {told}" if full in why and full not in told else told
    note = f"checkpoints in {store.path} stopped at or before step {run.step} ({why}); the estimate is complete."
    run.notes.append(note)
    warnings.warn(note, RuntimeWarning, stacklevel=2)
