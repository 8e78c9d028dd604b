"""The stage that learns the curvature where chains go, by a short run of all of them from w*."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from slt_jax.calibration.effort import Effort
from slt_jax.calibration.probe import Probe
from slt_jax.engine.keys import KeyTag
from slt_jax.engine.loop import Engine, Run
from slt_jax.engine.plan import Numbers
from slt_jax.kernels.langevin import fold_in_on_host
from slt_jax.samplers.base import Metric, Position, Sampler

DIVERGED = 250.0  # step_size times curvature, 4 being stable, where a pilot's chain has not come by honest steps
_ATTEMPTS = 5


@dataclass(frozen=True)
class Pilot:
    """What a pilot run measured.

    ``curvature``: the largest of nbeta L that it met. ``positions``: where chains ended, made one at a time. ``llc``: a
    rough one; infinite where there is none. ``force_sq``: mean of |G|^2. ``gradients``: spent by its steps.
    ``rounds``, ``metric``: of a pilot that measures a metric. ``failed``: whether chains diverged in every attempt.
    """

    curvature: float
    positions: Iterable[Position]
    llc: float = math.inf
    force_sq: float = math.nan
    gradients: float = 0.0
    rounds: int = 0
    metric: Metric = ()
    failed: bool = False


def step_scale(sampler: Sampler, rich: bool) -> float:
    """step_size times the largest curvature: smaller where the step size itself biases, and where steps are plenty.

    In a metric's coordinates all directions are about as stiff as the stiffest, and the curvature still varies from
    place to place: a step as short as where steps are plenty costs little there.
    """
    return sampler.theory.step_share / (4 if rich or sampler.metric else 1)


def rough_llc(run: Run, rows: slice, localization: float) -> float:
    """Half of <w - w*, nbeta grad L> over these steps."""
    fall = run.trace.virial[:, rows].mean(dtype=float)
    return float(0.5 * (fall - localization * run.trace.distance_sq[:, rows].mean(dtype=float)))


def run_pilot(
    engine: Engine, sampler: Sampler, probe: Probe, effort: Effort, curvature: float, nbeta: float, localization: float
) -> Pilot:
    """Move all chains from w* for two fifths of the allowance, and measure the curvature on the way.

    A chain that goes non-finite, or to where the step was far from stable, starts it anew with 1/8 the step. A
    ``step_size`` that was given is kept: then a divergence is left for the run and its verdict to report.
    """
    num_chains, center = engine.plan.num_chains, probe.center
    steps, rounds = max(12, int(0.4 * effort.allowed / num_chains)), max(4, effort.rounds // 3)
    # The curvature along a valley varies: measure as often as a quarter of the allowance pays for.
    one_measurement = 2 * rounds * probe.num_blocks * min(2, num_chains)
    measurements = int(min(24, max(3, effort.allowed / 4 / one_measurement)))
    shares = (0.1, *[0.9 / (measurements - 1)] * (measurements - 1))
    key = fold_in_on_host(engine.key, KeyTag.PILOT)
    least, gradients = curvature, 0.0
    for _ in range(_ATTEMPTS):
        run = None
        for share in shares:
            size = sampler.step_size or step_scale(sampler, effort.rich) / (curvature + localization)
            inputs = engine.inputs(Numbers(nbeta, localization, size, sampler.friction or 0.2), key, hot=1.0)
            run, count = run or engine.start(inputs), max(2, int(share * steps))
            engine.move(run, inputs, count)
            gradients += count * num_chains
            if not engine.all_alive(run):
                break
            met = max(probe.sharpness(engine.position(run, c), rounds) for c in range(min(2, num_chains)))
            if sampler.step_size is None and met * size > DIVERGED:
                break
            curvature = max(curvature, met)
        else:
            assert run is not None
            return _finished(engine, run, curvature, localization, gradients)
        if sampler.step_size is not None:
            return Pilot(curvature, iter([center]), gradients=gradients)
        curvature = least = 8 * max(curvature, least)
    # Some example's loss may be non-finite wherever a chain goes: let the run name the chains that meet it.
    return Pilot(curvature, iter([center]), gradients=gradients, failed=True)


def _finished(engine: Engine, run: Run, curvature: float, localization: float, gradients: float) -> Pilot:
    rows = slice(run.step // 2, run.step)
    positions = (engine.position(run, c) for c in range(min(4, engine.plan.num_chains)))
    force_sq = float(run.trace.drift_sq[:, rows].mean(dtype=float))
    return Pilot(curvature, positions, rough_llc(run, rows, localization), force_sq, gradients)
