"""What nobody should have to pick by eye: step size, friction, localization, control variates.

The curvature x of nbeta L decides the step: step_size = 1/4 / x, a sixteenth of what is stable. A pilot run shows where
the chains go, since the curvature there may be another than at w*. The noise of the minibatch gradient then decides the
friction, and whether control variates pay. Everything is a pure function of the key; each stage is a function that
returns a value.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import jax

from slt_jax.calibration.effort import effort_for
from slt_jax.calibration.localization import choose_localization, is_set_by_curvature, localization_line
from slt_jax.calibration.metric_pilot import run_metric_pilot
from slt_jax.calibration.noise import (
    CONTROL_PASS,
    MOST_FRICTION,
    SHORT,
    Damping,
    choose_control,
    choose_friction,
    mean_noise,
    shorten_step,
)
from slt_jax.calibration.pilot import Pilot, run_pilot, step_scale
from slt_jax.calibration.probe import Probe
from slt_jax.engine.keys import KeyTag
from slt_jax.engine.loop import Engine
from slt_jax.engine.plan import Numbers
from slt_jax.engine.problem import Problem
from slt_jax.kernels.langevin import fold_in_on_host
from slt_jax.posterior.local import LocalPosterior
from slt_jax.samplers.base import Metric, Sampler

FAILED = "the calibration failed: the chains of its pilot run diverged in every attempt, and its step size is a guess"
VARIED = 1.5  # curvature met over that at w*, from which on the chains will meet yet more
GROWTH = 4.0  # of the curvature met, from which on steps shorten


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why in ``lines``; ``gradients``: minibatches spent on it; ``limit``: see ``Hyper``;
    ``chose_step``: whether the step size was left open; ``failed``: whether no pilot run stayed near w*;
    ``by_curvature``: whether the largest curvature set the localization.
    """

    step_size: float
    friction: float
    localization: float
    control_variate: bool
    gradients: float = 0.0
    curvature: float = math.nan
    lines: tuple[str, ...] = ()
    limit: float | None = None
    chose_step: bool = False
    failed: bool = False
    by_curvature: bool = False

    REQUIRED: ClassVar[tuple[str, ...]] = ("step_size", "friction", "localization", "control_variate", "lines")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "lines": list(self.lines)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Choice":
        return cls(**{**values, "lines": tuple(values["lines"])})

    def numbers(self, nbeta: float, metric: Metric) -> Numbers:
        """What chains are moved with. ``metric``: as ``calibrate`` measured it."""
        limit = math.inf if self.limit is None else self.limit
        return Numbers(nbeta, self.localization, self.step_size, self.friction, limit, metric)


def calibration_probe(problem: Problem, nbeta: float, key: jax.Array, total: float) -> Probe:
    """What the stages measure with, of an estimate of ``total`` minibatch gradients."""
    return Probe(problem, nbeta, effort_for(total).blocks, fold_in_on_host(key, KeyTag.PILOT))


def calibrate(
    engine: Engine, posterior: LocalPosterior, control: bool | None, total: float,
    check: Callable[[float, float], None], *, limits_steps: bool = True,
) -> tuple[Choice, Metric]:  # fmt: skip
    """(what is open: a ``step_size`` or ``friction`` of None in the sampler, localization, control variates; a metric).

    Args:
        engine: compiled for this posterior, data and sampler.
        total: minibatch gradients of the whole estimate.
        check: called with the loss and the norm of its gradient at w*, over some examples; raises if they will not do.
        limits_steps: for one estimate, whose steps may shorten; settings that are shared by many have no limit.
    """
    sampler, problem, nbeta = engine.sampler, engine.problem, float(posterior.nbeta)
    effort, probe = effort_for(total), calibration_probe(problem, nbeta, engine.key, total)
    check(*probe.loss_and_grad_norm(probe.center))
    if nbeta == 0:
        return _of_control(sampler, float(posterior.localization or 0.0), bool(control), probe.gradients), ()
    at_center = probe.sharpness(probe.center, effort.rounds)

    def localization(curvature: float) -> float:
        if posterior.localization is not None:
            return posterior.localization
        return choose_localization(curvature, problem.center, metric=sampler.metric)

    settled, is_open = localization(at_center), sampler.step_size is None or sampler.friction is None or control is None
    if sampler.metric:
        pilot = run_metric_pilot(engine, probe, effort, at_center, nbeta, settled)
    elif is_open:
        pilot = run_pilot(engine, sampler, probe, effort, at_center, nbeta, settled)
        settled = localization(pilot.curvature)
    else:
        pilot = Pilot(at_center, ())
    lines = [FAILED] if pilot.failed else []
    lines.append(_curvature_line(sampler, at_center, pilot))
    by_curvature = False
    if posterior.localization is None:
        stiffest = at_center if sampler.metric else pilot.curvature
        by_curvature = is_set_by_curvature(settled, stiffest, metric=sampler.metric)
        lines.append(localization_line(settled, stiffest, metric=sampler.metric))
    limit = _limit(engine, pilot, at_center) if limits_steps else None
    if sampler.step_size is None or sampler.friction is None or control is None:
        damping, control, more = _dynamics(engine, probe, pilot, settled, limit, control, total)
        lines += more
    else:
        damping = Damping(sampler.friction, sampler.step_size, None)
    spent = probe.gradients + pilot.gradients
    choice = Choice(
        damping.step_size, damping.friction, settled, bool(control), spent, pilot.curvature, tuple(lines), limit,
        chose_step=sampler.step_size is None, failed=pilot.failed, by_curvature=by_curvature,
    )  # fmt: skip
    return choice, pilot.metric


def _of_control(sampler: Sampler, localization: float, control: bool, spent: float) -> Choice:
    """At nbeta = 0 the curvature is the localization, everywhere and in every direction: nothing needs to be measured.

    A step that biases the draws is a quarter as long; friction is near the critical one.
    """
    share = step_scale(sampler, rich=not sampler.theory.second_order)
    step_size = share / localization if sampler.step_size is None else sampler.step_size
    friction = MOST_FRICTION if sampler.friction is None else sampler.friction
    lines = (f"nbeta = 0: the curvature is the localization alone; step_size {step_size:.3g}, friction {friction:.2g}",)
    return Choice(step_size, friction, localization, control, spent, 0.0, lines)


def _curvature_line(sampler: Sampler, at_center: float, pilot: Pilot) -> str:
    if sampler.metric:
        return (
            f"Kronecker metric: largest curvature {at_center:.3g} at w*, {pilot.curvature:.3g} in its coordinates "
            f"({pilot.rounds} rounds of a pilot run)"
        )
    return f"largest curvature of nbeta L: {at_center:.3g} at w*, {pilot.curvature:.3g} where a pilot run went"


def _limit(engine: Engine, pilot: Pilot, at_center: float) -> float | None:
    """Of the mean squared force, above which steps shorten, where the curvature varies; None for none."""
    sampler = engine.sampler
    varies = sampler.step_size is None and sampler.theory.can_shorten_steps and pilot.curvature > VARIED * at_center
    settled = (
        pilot.force_sq < pilot.curvature * engine.problem.num_free
    )  # else noise, or chains that diverged temporarily
    return GROWTH * max(pilot.curvature, pilot.force_sq) if varies and settled else None


def _dynamics(
    engine: Engine, probe: Probe, pilot: Pilot, localization: float, limit: float | None, control: bool | None,
    total: float,
) -> tuple[Damping, bool, list[str]]:  # fmt: skip
    """(step size and friction, whether to take control variates, why): the stages after the pilot run."""
    sampler, lines = engine.sampler, []
    noise = mean_noise(probe, pilot.positions, pilot.metric)
    llc = pilot.llc if pilot.llc > 0 else math.inf  # around a saddle there is no estimate to keep from heat
    step_size = sampler.step_size
    if step_size is None:
        share = step_scale(sampler, effort_for(total).rich)
        step_size = share / (pilot.curvature + (0.0 if sampler.metric else localization))
        lines.append(f"step_size {step_size:.3g}: {share:.2g} / curvature")
        if limit is not None:
            lines.append(f"steps shortened where the mean squared force is above {limit:.3g}: the curvature varies")
    if control is None:
        affordable = engine.problem.passes <= CONTROL_PASS * total
        control, why = choose_control(sampler.theory, noise, step_size, sampler.friction, llc, affordable=affordable)
        lines += [why] if why else []
    if sampler.friction is None:
        damping = choose_friction(
            sampler.theory, noise, step_size, llc, control=control, metric=sampler.metric, limited=limit is not None,
            short=total < SHORT * engine.plan.num_chains, total=total, may_shorten=sampler.step_size is None,
        )  # fmt: skip
    elif sampler.step_size is None:
        strength = noise.controlled if control else noise.plain
        damping = shorten_step(sampler.theory, strength, step_size, sampler.friction, llc)
    else:
        damping = Damping(sampler.friction, step_size, None)
    return damping, control, lines + ([damping.line] if damping.line else [])
