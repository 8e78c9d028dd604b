"""A pilot run in coordinates that are measured anew as it goes: see ``slt_jax.samplers.kronecker``.

At w* itself a singular model has directions without curvature that get some as soon as the chain moves. So the metric
is first measured at w*, then, a few times, where the chains have come to in the last one's coordinates.
"""

import math
from typing import Any

import jax

from slt_jax.calibration.probe import Probe
from slt_jax.engine.loop import Engine
from slt_jax.samplers.kronecker import largest, measure

SHARE = 0.06  # step_size times the largest curvature while the metric is not trusted yet
STEPS = 40  # between two measurements
FRICTION = 0.3
HOTTEST = 3.0  # kinetic temperature of a pilot chain
_PILOT = 2**31 - 11  # folded into the key of its noise
_PROBES, _ITERATIONS = 2**31 - 12, 2**31 - 13


class Whitening:
    """``explore`` leaves the engine with a metric. ``llc``: a rough one; ``gradients``: spent by the pilot's steps."""

    def __init__(self, engine: Engine, probe: Probe, allowed: float):
        self.engine, self.probe, self.allowed = engine, probe, allowed
        self.gradients, self.llc, self.rounds = 0.0, math.inf, 0

    def explore(self, at_center: float, localization: float) -> tuple[float, list]:
        """(largest curvature in the metric's coordinates, final positions).

        ``at_center``: the largest curvature at w* in the weights' own coordinates, which sets the secants' length. A
        pilot that goes non-finite or hot starts again from w* with an eighth of the step; after five of them in a row
        the run itself is left to say so.
        """
        engine, reach, caution = self.engine, (at_center + localization) ** -0.5, 1.0
        run, at = engine.start(), [self.probe.center]
        curvature = self._measure(at, 8, reach, localization)
        while math.isfinite(curvature) and caution < 8**5:
            before, began = self._spent(), run.step
            engine.pilot(run, STEPS, SHARE / (caution * curvature), FRICTION, _PILOT)
            self.gradients += STEPS * engine.plan.num_chains
            self.rounds += 1
            if not engine.all_alive(run) or not self._calm(run, began):
                run, caution = engine.start(), 8 * caution
                continue
            caution = 1.0
            self._read(run, began, localization)
            at = [engine.position(run, c) for c in range(min(2, engine.plan.num_chains))]
            curvature = self._measure(at, 4, reach, localization)
            one_more = 2 * self._spent() - before
            if one_more > self.allowed or run.step + STEPS > engine.plan.total_steps:
                break
        return (curvature if math.isfinite(curvature) and caution < 8**5 else 8**5 * at_center), at

    def _measure(self, at: list, count: int, reach: float, localization: float) -> float:
        """Give the engine the metric at these positions; the largest curvature left in its coordinates."""
        engine, probe = self.engine, self.probe
        key = jax.random.fold_in(jax.random.fold_in(engine.alone(engine.key), _PROBES), self.rounds)
        begun = engine.alone(engine.metric) if self.rounds else ()
        metric = measure(probe.curvature, at, count, reach, localization, key, begun)
        if metric is None:
            return math.nan
        engine.measure_in(metric)
        key = jax.random.fold_in(jax.random.fold_in(engine.alone(engine.key), _ITERATIONS), self.rounds)
        return max(largest(probe.curvature, engine.alone(engine.metric), p, 8, key, probe.hessian) for p in at)

    def _calm(self, run: Any, began: int) -> bool:
        """No chain is far hotter than it should be: one that has left the region of the metric heats up at once."""
        return bool((run.trace.kinetic[:, began : run.step].mean(1) < HOTTEST).all())

    def _read(self, run: Any, began: int, localization: float) -> None:
        rows = slice(began, run.step)
        fall = run.trace.virial[:, rows].mean(dtype=float)
        self.llc = 0.5 * (fall - localization * run.trace.distance_sq[:, rows].mean(dtype=float))

    def _spent(self) -> float:
        return self.gradients + self.probe.gradients
