"""Measurements when a run has ended: gradient noise and acceptance at the chains' ends, all curvatures at w*."""

import math
from collections.abc import Callable

import jax
import numpy as np

from slt_jax.calibration.probe import Probe
from slt_jax.diagnostics.relaxation import ChainLength, directions, unrelaxed_bias
from slt_jax.engine.keys import KeyTag
from slt_jax.engine.loop import Engine, Run
from slt_jax.engine.mesh import spans_processes
from slt_jax.engine.plan import Numbers, Schedule
from slt_jax.kernels.langevin import fold_in_on_host
from slt_jax.posterior.tree import to_host
from slt_jax.results.record import EndRecord
from slt_jax.samplers.base import Sampler

_PROBE_SHARE = 0.02  # of the steps' gradients, for measurements at the chains' ends
_LEAST_PROBE = 8  # gradients, under which there are none
_FEW_FOR_BLOCKS = 80  # gradients, under which acceptance is measured on one minibatch
_MOST_ENDS, _ENDS_FOR_ACCEPTANCE, _MOST_REPEATS = 4, 2, 8
_HESSIAN_SHARE = 0.04  # of the steps' gradients, for all curvatures at w*
_HESSIAN_BLOCKS = (2, 16)  # minibatches of examples that these are taken over, at least (or all there are) and at most


def measure_ends(
    engine: Engine, run: Run, numbers: Numbers, chains: range, mean_time: float, key: jax.Array
) -> tuple[EndRecord, tuple[str, ...]]:
    """(what is measured at the end of an estimate whose chains are these, with their ``numbers``; notes on failures).

    Nothing that the run is too short to pay for. A measurement that fails, or that Ctrl-C ends, is left out: the
    estimate does without.
    """
    if numbers.nbeta == 0:  # a control, whose draws have no gradient noise and no curvature but the localization
        return EndRecord(), ()
    measurements: dict[str, Callable[[], EndRecord]] = {
        "gradient noise and acceptance": lambda: _at_chains_ends(engine, run, numbers, chains, key),
        "the curvatures at w*": lambda: _slow_directions(engine, numbers, len(chains), mean_time, key),
    }
    record, notes = EndRecord(), []
    for name, measure in measurements.items():
        try:
            record |= measure()
        except KeyboardInterrupt:
            if spans_processes(engine.problem.mesh):
                raise
            notes.append(f"measuring {name} at the end was interrupted; the estimate does without.")
        except Exception as error:
            notes.append(f"measuring {name} at the end failed ({type(error).__name__}: {str(error)[:200]}).")
    return record, tuple(notes)


def end_temporaries(engine: Engine, num_chains: int) -> list[int]:
    """Temporary bytes of the measurements at the end of an estimate of this many chains."""
    sizes = []
    if _measures_ends(engine, num_chains):
        sizes = end_probe(engine, num_chains, engine.key, 1.0).temporaries(calibrates=False)
    probe = curvature_probe(engine, num_chains, engine.key, 1.0)
    return sizes if probe is None else [*sizes, probe.hessian_temporaries()]


def curvature_gradients(sampler: Sampler, num_free: int, num_data: int, batch_size: int, gradients: float) -> float:
    """What measuring all curvatures at w* will take of so many minibatch gradients, at most."""
    return 2.0 * num_free * _curvature_blocks(sampler, num_free, num_data, batch_size, gradients)


def end_probe(engine: Engine, num_chains: int, key: jax.Array, nbeta: float) -> Probe:
    """What measures at the chains' ends. ``key``: that of the estimate."""
    blocks = 1 if _probe_gradients(num_chains, engine.plan) < _FEW_FOR_BLOCKS else 4
    return Probe(engine.problem, nbeta, blocks, fold_in_on_host(key, KeyTag.END_PROBE))


def curvature_probe(engine: Engine, num_chains: int, key: jax.Array, nbeta: float) -> Probe | None:
    """What measures all curvatures at w*; None where they cost too much, or cannot be computed or used."""
    plan, problem = engine.plan, engine.problem
    gradients = plan.step_gradients(num_chains)
    blocks = _curvature_blocks(engine.sampler, problem.num_free, problem.source.num_data, plan.batch_size, gradients)
    if not blocks:
        return None
    probe = Probe(problem, nbeta, blocks, fold_in_on_host(key, KeyTag.CURVATURES))
    return probe if probe.has_hessian else None


def _measures_ends(engine: Engine, num_chains: int) -> bool:
    """Whether an estimate is long enough to pay for measurements at its chains' ends, and they mean something."""
    return not engine.static.full_batch and _probe_gradients(num_chains, engine.plan) >= _LEAST_PROBE


def _probe_gradients(num_chains: int, plan: Schedule) -> float:
    return _PROBE_SHARE * num_chains * plan.total_steps


def _at_chains_ends(engine: Engine, run: Run, numbers: Numbers, chains: range, key: jax.Array) -> EndRecord:
    """Gradient noise and acceptance.

    Noise S in a step that takes the share t of the full time heats t times less: what counts is the mean of t S over
    time, E[t^2 S] / E[t] over steps. The chains end at equal steps.
    """
    alive = to_host(run.alive)
    kept = [c for c in chains if alive[c]][:_MOST_ENDS]
    if not kept or not _measures_ends(engine, len(chains)):
        return {}
    probe = end_probe(engine, len(chains), key, numbers.nbeta)
    repeats = int(np.clip(_probe_gradients(len(chains), engine.plan) / (4 * len(kept)), 1, _MOST_REPEATS))
    noises = [probe.noise(engine.position(run, c), repeats, numbers.metric)[0] for c in kept]
    values = np.array([noise.controlled if engine.plan.control_variate else noise.plain for noise in noises])
    shares = run.trace.time[list(chains), engine.plan.num_warmup : run.step].astype(np.float64)
    values *= run.trace.time[kept, run.step - 1].astype(np.float64) ** 2 / np.nanmean(shares)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else values.mean()
    accepted = [
        probe.acceptance(engine.position(run, c), numbers.step_size, numbers.localization, numbers.metric)
        for c in kept[:_ENDS_FOR_ACCEPTANCE]
    ]
    return {
        "noise": float(values.mean()),
        "noise_stderr": float(error),
        "acceptance": float(np.mean(accepted)),
        "gradients": probe.gradients,
    }


def _slow_directions(engine: Engine, numbers: Numbers, num_chains: int, mean_time: float, key: jax.Array) -> EndRecord:
    """What slow directions lack, where all curvatures at w* are affordable and say how chains relax."""
    plan, relaxation = engine.plan, engine.sampler.theory.relaxation
    probe = curvature_probe(engine, num_chains, key, numbers.nbeta)
    if probe is None or relaxation is None:
        return {}
    curvatures, rounding = probe.curvatures(probe.center)
    spent: EndRecord = {"curvature_gradients": probe.gradients}
    if not np.isfinite(curvatures).all():
        return spent
    first, last = mean_time * (plan.num_warmup + plan.thinning), mean_time * plan.total_steps
    friction = math.nan if numbers.friction is None else numbers.friction
    length = ChainLength(relaxation, numbers.step_size, friction, first, last)
    bias, times_longer = unrelaxed_bias(curvatures, numbers.localization, length, rounding)
    found = directions(curvatures, numbers.localization, length, rounding)
    return {
        "owed": bias, "longer": times_longer, "expected": found.expected, "hidden": found.hidden,
        "hides": found.hides, "quadratic": found.quadratic, **spent,
    }  # fmt: skip


def _curvature_blocks(sampler: Sampler, num_free: int, num_data: int, batch_size: int, gradients: float) -> int:
    """Minibatches over which all curvatures at w* are measured, beside so many gradients in steps; 0 for not at all."""
    least, most = (min(count, max(1, num_data // batch_size)) for count in _HESSIAN_BLOCKS)
    blocks = min(most, int(_HESSIAN_SHARE * gradients / (2 * num_free)))
    return blocks if blocks >= least and sampler.theory.relaxation is not None else 0
