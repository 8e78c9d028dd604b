"""A pilot run in coordinates that are measured anew as it goes: see ``slt_jax.samplers.kronecker``.

At w* itself a singular model has directions without curvature that get some as soon as the chain moves. So the metric
is first measured at w*, then, a few times, where the chains have come to in the last one's coordinates.
"""

import functools
import math

import jax

from slt_jax.calibration.effort import Effort
from slt_jax.calibration.pilot import Pilot, rough_llc
from slt_jax.calibration.probe import Probe
from slt_jax.engine.keys import KeyTag
from slt_jax.engine.loop import Engine, Run
from slt_jax.engine.plan import Numbers
from slt_jax.samplers.base import Metric, Position
from slt_jax.samplers.kronecker import largest, measure

STEP_SHARE = 0.06  # step_size times the largest curvature while the metric is not trusted yet
STEPS = 40  # between two measurements
FRICTION = 0.3
HOTTEST = 3.0  # kinetic temperature of a pilot chain
_MOST_CAUTION = 8**5


def run_metric_pilot(
    engine: Engine, probe: Probe, effort: Effort, at_center: float, nbeta: float, localization: float
) -> Pilot:
    """A Pilot with a metric, whose ``curvature`` is the largest in the metric's coordinates.

    A run that goes non-finite or hot starts again from w* with an eighth of the step; after five of them in a row the
    run itself is left to say so.

    Args:
        at_center: the largest curvature at w* in the weights' own coordinates, which sets the secants' length.
    """
    measured = functools.partial(_measured, engine, probe, (at_center + localization) ** -0.5, localization)
    key = jax.random.fold_in(engine.key, KeyTag.METRIC_PILOT)
    numbers = Numbers(nbeta, localization, 1.0, FRICTION)
    caution, gradients, llc, rounds = 1.0, 0.0, math.inf, 0
    run, positions = None, [probe.center]
    metric, curvature = measured(positions, 8, (), 0)
    while math.isfinite(curvature) and caution < _MOST_CAUTION:
        before = gradients + probe.gradients
        size = STEP_SHARE / (caution * curvature)
        inputs = engine.inputs(numbers._replace(step_size=size, metric=metric), key, hot=1.0)
        run = run or engine.start(inputs)
        began = run.step
        engine.move(run, inputs, STEPS)
        gradients += STEPS * engine.plan.num_chains
        rounds += 1
        if not engine.all_alive(run) or not _is_calm(run, began):
            run, caution = None, 8 * caution
            continue
        caution = 1.0
        llc = rough_llc(run, slice(began, run.step), localization)
        positions = [engine.position(run, c) for c in range(min(2, engine.plan.num_chains))]
        metric, curvature = measured(positions, 4, metric, rounds)
        one_more = 2 * (gradients + probe.gradients) - before
        if one_more > effort.allowed or run.step + STEPS > engine.plan.total_steps:
            break
    succeeded = math.isfinite(curvature) and caution < _MOST_CAUTION
    curvature = curvature if succeeded else _MOST_CAUTION * at_center
    return Pilot(curvature, positions, llc, gradients=gradients, rounds=rounds, metric=metric)


def _measured(
    engine: Engine, probe: Probe, reach: float, localization: float, positions: list[Position], count: int,
    begun: Metric, number: int,
) -> tuple[Metric, float]:  # fmt: skip
    """(the metric at these positions, the largest curvature left in its coordinates); NaN where there is none."""
    curvature = functools.partial(probe.curvature, localization=localization)
    hessian = functools.partial(probe.hessian, localization=localization)
    problem = engine.problem
    own = problem.on_first_device(engine.key)
    key = jax.random.fold_in(jax.random.fold_in(own, KeyTag.METRIC_PROBES), number)
    metric = measure(curvature, positions, count, reach, localization, key, problem.on_first_device(begun))
    if metric is None:
        return begun, math.nan
    metric = problem.put(metric)
    key = jax.random.fold_in(jax.random.fold_in(own, KeyTag.METRIC_POWER_ITERATION), number)
    here = problem.on_first_device(metric)
    return metric, max(largest(curvature, here, position, 8, key, hessian) for position in positions)


def _is_calm(run: Run, began: int) -> bool:
    """No chain is far hotter than it should be: one that has left the region of the metric heats up at once."""
    return bool((run.trace.kinetic[:, began : run.step].mean(1) < HOTTEST).all())
