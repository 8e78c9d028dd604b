"""From a finished run to a result: its draws, the measurements at its end, and the record of what it was given."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from slt_jax.calibration.choose import FAILED, Choice
from slt_jax.engine.bad_rows import joined
from slt_jax.engine.clock import Clock
from slt_jax.engine.loop import Engine, Run
from slt_jax.engine.memory import MemoryEstimate
from slt_jax.engine.mesh import allgather
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.engine.run import so_far
from slt_jax.engine.trace import Trace
from slt_jax.estimators.ends import measure_ends
from slt_jax.estimators.observing import Observing, at_draws, at_equal_times, with_observed
from slt_jax.machine import versions
from slt_jax.posterior.local import LocalPosterior
from slt_jax.results.llc import LLCResult
from slt_jax.results.record import CostRecord, EndRecord, GradientRecord, RunRecord


def result_of(
    engine: Engine, run: Run, posterior: LocalPosterior, numbers: Numbers, clock: Clock, *,
    chains: range | None = None, key: jax.Array | None = None, full_loss: float | None = None,
    choice: Choice | None = None, memory: MemoryEstimate | None = None, other_names: tuple[str, ...] = (),
    notes: tuple[str, ...] = (), observing: Observing | None = None,
) -> LLCResult:  # fmt: skip
    """The result of a finished run, or of some of its chains; of one that was interrupted, the result so far.

    Args:
        posterior: what these chains sampled. numbers: what they were moved with. clock: of the call.
        chains, key: consecutive ones and the key of their estimate; default all, and the engine's. full_loss: L_n(w*),
            where the baseline is that. other_names: of the further data sets. notes: on what the caller gave.
        observing: what all chains observed.
    """
    asked, mesh = engine.plan.num_draws if run.interrupted else 0, engine.problem.mesh
    if run.interrupted:
        engine, run = so_far(engine, run)
    chains = range(engine.plan.num_chains) if chains is None else chains
    mean_time = _mean_time(engine, run, chains)
    ends, failed = measure_ends(engine, run, numbers, chains, mean_time, engine.key if key is None else key)
    ends = allgather(ends, mesh)[0]
    if cause := joined(run.causes, chains):
        ends["stopped_by"] = cause
    record = _record(
        engine, posterior, numbers, len(chains), mean_time, ends, choice, interrupted=asked,
        cost=allgather({"seconds": clock.seconds, "parts": clock.parts, **run.cost}, mesh)[0],
        memory=allgather(memory.to_dict() if memory else {}, mesh)[0],
    )  # fmt: skip
    calibration = () if choice is None or not choice.failed else (f"{FAILED}.",)
    notes = (*notes, *calibration, *run.notes, *failed)
    result = _drawn(engine, run, chains, record, full_loss, other_names, notes)
    return result if observing is None else with_observed(result, engine, run, observing, full_loss, chains)


def partial_result(
    engine: Engine, run: Run, posterior: LocalPosterior, numbers: Numbers, *, full_loss: float | None,
    choice: Choice | None, other_names: tuple[str, ...], observing: Observing | None,
) -> LLCResult:  # fmt: skip
    """What the draws so far give, without what is measured at the end; of a run that goes on, in one process."""
    engine, run = so_far(engine, run)
    chains = range(engine.plan.num_chains)
    record = _record(
        engine, posterior, numbers, len(chains), _mean_time(engine, run, chains), EndRecord(), choice, interrupted=0,
        cost={}, memory={},
    )  # fmt: skip
    result = _drawn(engine, run, chains, record, full_loss, other_names, tuple(run.notes))
    if observing is None:
        return result
    return with_observed(result, engine, run, observing, full_loss, chains, partial=True)


def _mean_time(engine: Engine, run: Run, chains: range) -> float:
    times = run.trace.time[chains.start : chains.stop, at_draws(engine.plan)]
    return float(np.nanmean(times)) if np.isfinite(times).any() else 1.0


def _record(
    engine: Engine, posterior: LocalPosterior, numbers: Numbers, num_chains: int, mean_time: float, ends: EndRecord,
    choice: Choice | None, *, interrupted: int, cost: CostRecord, memory: dict[str, Any],
) -> RunRecord:  # fmt: skip
    plan, mesh = engine.plan, engine.problem.mesh
    probe = ends.get("gradients", 0.0) + ends.get("curvature_gradients", 0.0)
    return RunRecord(
        **_lengths(plan, num_chains),
        nbeta=float(posterior.nbeta),
        localization=float(posterior.localization or 0.0),
        num_data=posterior.num_data,
        num_free=posterior.num_free,
        chance_loss=posterior.chance_loss,
        sampler=engine.sampler.name,
        family=engine.sampler.theory.family,
        metric=engine.sampler.metric,
        step_size=numbers.step_size,
        friction=numbers.friction,
        mean_time=mean_time,
        interrupted=interrupted,
        gradients=GradientRecord(
            steps=plan.step_gradients(num_chains), calibration=choice.gradients if choice else 0.0,
            control=engine.problem.passes if plan.control_variate else 0, probe=probe,
        ),
        calibration=choice.to_dict() if choice else {},
        probe=ends,
        devices=f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        versions=versions(),
        cost=cost,
        memory=memory,
    )  # fmt: skip


def _drawn(
    engine: Engine, run: Run, chains: range, record: RunRecord, full_loss: float | None, other_names: tuple[str, ...],
    notes: tuple[str, ...],
) -> LLCResult:  # fmt: skip
    """The draws of these chains, at equal times."""
    rows, kept = slice(chains.start, chains.stop), at_draws(engine.plan)
    evenly = evenly_in_time(run.trace.time[rows, kept])
    draws = {
        name: evenly(getattr(run.trace, name)[rows, kept]) for name in Trace._fields if name not in ("time", "also")
    }
    if full_loss is not None:
        draws["baseline"] = np.full_like(draws["loss"], np.float32(full_loss), dtype=np.float64)
    return LLCResult(
        traces=Trace(**draws, also=evenly(run.trace.also[rows, kept]) if other_names else ()),
        warmup_loss=run.trace.loss[rows, : engine.plan.num_warmup],
        stopped=_stopped(run, rows, kept, draws["baseline"]),
        settings=record,
        notes=notes,
        other_names=other_names,
        theory=engine.sampler.theory,
    )


def _lengths(plan: Schedule, num_chains: int) -> dict:
    return {**{k: v for k, v in vars(plan).items() if k != "chunk_size"}, "num_chains": num_chains}


def _stopped(run: Run, rows: slice, kept: slice, baseline: np.ndarray) -> dict[int, int]:
    """Chain -> step at which it went non-finite."""
    finite = np.isfinite(run.trace.loss[rows]) & np.isfinite(run.trace.drift_sq[rows])
    finite[:, kept] &= np.isfinite(baseline)
    return {c: int(np.argmin(ok)) for c, ok in enumerate(finite) if not ok.all()}


def evenly_in_time(times: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """From draws of steps that took ``times`` (chain, draw) to as many draws at equal times, in the same order."""
    rows, picks = np.arange(len(times))[:, None], at_equal_times(times)
    return lambda values: values[rows, picks]
