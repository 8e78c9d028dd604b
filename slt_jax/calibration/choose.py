"""What nobody should have to pick by eye: step size, friction, localization, control variates, lengths.

The curvature x of nbeta L decides the step: step_size = 1/4 / x, a sixteenth of what is stable. A pilot run shows where
the chains go, since the curvature there may be another than at w*. The noise of the minibatch gradient then decides the
friction, and whether control variates pay. Everything is a pure function of the key.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from slt_jax.calibration.metric_pilot import Whitening
from slt_jax.calibration.probe import Noise, Probe
from slt_jax.diagnostics.bias import heating
from slt_jax.engine.loop import Engine
from slt_jax.samplers.base import Position, Sampler

STEP_SHARE = 0.25
KAPPA = 1e6  # curvature over localization
KAPPA_METRIC = 1e9  # the same where a metric takes care of the range
REACH = 2.5  # of a flat direction, in typical weights
REACH_METRIC = 0.35  # the same in a metric's coordinates, in which chains do get that far
FRICTION = 0.1  # the least; noise grows as chains spread, and what the pilot saw of it is too little
FRICTION_STILL = 0.03  # the same where steps have a limit, and noise could grow tenfold
SAMPLED = 0.01  # relative error of llc from chains' draws, whose loss has variance llc and lasts for 1 / friction steps
FRICTION_SHORT = 0.02  # the same for short chains: soft directions relax in friction / (step_size curvature) steps
MOST_FRICTION = 0.7
HEAT = 0.03  # of the estimate, that minibatch noise may add before friction rises
HEAT_CONTROLLED = 0.01  # with control variates, whose noise is not confined to directions that count
VARIED = 1.5  # curvature met over that at w*, from which on the chains will meet yet more
THROWN = 250.0  # step_size times curvature, 4 being stable, where a pilot's chain has not come by honest steps
GROWTH = 4.0  # of the curvature met, from which on steps shorten
_SHARE = 0.15  # of the gradients, for all of this
_SHORT = 4000  # steps of a chain, up to which it is short
_RICH = 15_000  # gradients for calibration, from which on a shorter step is affordable
_PILOT = 2**31 - 7  # folded into the key of the pilot's noise


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why in ``lines``; ``gradients``: minibatches spent on it; ``limit``: see ``Hyper``."""

    step_size: float
    friction: float
    localization: float
    control_variate: bool
    gradients: float = 0.0
    curvature: float = math.nan
    lines: tuple[str, ...] = ()
    limit: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "lines": list(self.lines)}


def step_scale(sampler: Sampler, rich: bool) -> float:
    """step_size times the largest curvature: smaller where the step size itself biases, and where steps are plenty.

    In a metric's coordinates all directions are about as stiff as the stiffest, and the curvature still varies from
    place to place: a step as short as where steps are plenty costs little there.
    """
    rich = rich or sampler.metric
    return {"euler": 0.1, "matthews": 0.5}.get(sampler.family, STEP_SHARE) / (4 if rich else 1)


def allowance(total: float) -> float:
    """Minibatch gradients that calibration may spend of ``total``."""
    return _SHARE * total


def default_budget(num_free: int) -> int:
    """Minibatch gradients for one estimate: more for few weights, where one draw says less and costs less.

    For a hundred to ten thousand weights that is the same time, some ten to thirty seconds of two cores.
    """
    return int(max(1e4, min(2e6, 4e6 / num_free), min(4e5, 1e8 / num_free)))


def _effort(total: float) -> tuple[int, int]:
    """(minibatches in a look, rounds of a power iteration): less where few gradients are to be spent."""
    allowed = allowance(total)
    return (4, 20) if allowed >= 800 else (2, 12) if allowed >= 200 else (1, 6)


def probe_of(engine: Engine, total: float) -> Probe:
    """The calibration's looks."""
    return Probe(engine, _effort(total)[0], jax.random.fold_in(engine.key, _PILOT))


def calibrate(
    engine: Engine, sampler: Sampler, localization: float | None, control: bool | None, total: float, check: Callable,
    *, alone: bool = True,
) -> Choice:  # fmt: skip
    """Choose what is open: a ``step_size`` or ``friction`` of None in ``sampler``, localization, control variates.

    Args:
        engine: compiled for this posterior, data and sampler; its run is not touched.
        total: minibatch gradients of the whole estimate.
        check: called with the loss and the norm of its gradient at w*, over some examples; raises if they will not do.
        alone: for one estimate, whose steps may be limited; settings that are shared by many have no limit.
    """
    allowed = allowance(total)
    rich = allowed >= _RICH
    rounds, probe = _effort(total)[1], probe_of(engine, total)
    family = {"sgnht": "baoab", "": "euler"}.get(sampler.family, sampler.family)  # those whose heat is known
    lines: list[str] = []
    check(*probe.loss_and_grad_norm(probe.center))
    at_center = probe.sharpness(probe.center, rounds)
    curvature = at_center
    kappa, reach = (KAPPA_METRIC, REACH_METRIC) if sampler.metric else (KAPPA, REACH)
    settle = localization if localization is not None else _localization(curvature / kappa, reach, engine.center)
    engine.localize(settle)
    step_size, friction = sampler.step_size, sampler.friction
    llc, by_pilot, limit = math.inf, 0.0, None
    full_pass = math.ceil(engine.source.num_data / engine.plan.batch_size)
    if sampler.metric:
        pilot = Whitening(engine, probe, allowed)
        curvature, positions = pilot.explore(at_center, settle)
        llc, by_pilot = pilot.llc, pilot.gradients
        lines.append(
            f"Kronecker metric: largest curvature {at_center:.3g} at w*, {curvature:.3g} in its coordinates "
            f"({pilot.rounds} rounds of a pilot run)"
        )
    elif step_size is None or friction is None or control is None:
        steps = max(12, int(0.4 * allowed / engine.plan.num_chains))
        pilot = _Pilot(engine, sampler, probe, steps, max(4, rounds // 3), allowed)
        curvature, positions = pilot.explore(curvature, step_size)
        llc, by_pilot = pilot.llc, pilot.gradients
        varies = alone and step_size is None and curvature > VARIED * at_center
        settled = pilot.force_sq < curvature * engine.posterior.num_free  # else noise, or chains that were thrown off
        if varies and settled and sampler.family == "baoab":
            limit = GROWTH * max(curvature, pilot.force_sq)
        if localization is None:
            settle = _localization(curvature / kappa, reach, engine.center)
            engine.localize(settle)
    stiffest = at_center if sampler.metric else curvature
    if not sampler.metric:
        lines.append(f"largest curvature of nbeta L: {at_center:.3g} at w*, {curvature:.3g} where a pilot run went")
    if localization is None:
        why = f"a flat direction moves a weight by {reach} typical weights"
        why = f"largest curvature / {kappa:.0g}" if settle * kappa < 1.01 * stiffest else why
        lines.append(f"localization {settle:.3g}: {why}")
    if step_size is None or friction is None or control is None:
        noise = _mean_noise([probe.noise(p, 2)[0] for p in positions])
        scale = llc if llc > 0 else math.inf  # around a saddle there is no estimate to keep from heat
        if step_size is None:
            step_size = step_scale(sampler, rich) / (curvature + (0.0 if sampler.metric else settle))
            lines.append(f"step_size {step_size:.3g}: {step_scale(sampler, rich):.2g} / curvature")
            if limit is not None:
                lines.append(f"steps shortened where the mean squared force is above {limit:.3g}: the curvature varies")
        first = 0.1 if friction is None else friction
        heat = [heating(family, step_size, first, n) / scale for n in noise]
        if control is None:
            affordable = full_pass <= 0.05 * total
            control = heat[0] > 0.1 and heat[1] < heat[0] / 4 and affordable
            if control:
                lines.append(
                    f"control variates at w*: minibatch noise would add {heat[0]:.0%} to the estimate, with them "
                    f"{heat[1]:.1%}; each step costs two gradients"
                )
        mine = noise.controlled if control else noise.plain
        if friction is None:
            warm = HEAT_CONTROLLED if control else HEAT
            short = total < _SHORT * engine.plan.num_chains
            least = 0.3 if sampler.metric else FRICTION_SHORT if short else FRICTION
            if limit is not None:
                slow = min(FRICTION, max(FRICTION_STILL, 1 / (SAMPLED**2 * scale * total)))
                still, *_ = _damp(family, step_size, mine, scale, warm / 10, slow, False)
                least = min(least, still)
            friction, step_size, line = _damp(family, step_size, mine, scale, warm, least, sampler.step_size is None)
            lines.append(line)
        elif sampler.step_size is None:
            now = heating(family, step_size, friction, mine) / scale
            if now > 2 * HEAT:
                step_size *= max(2 * HEAT / now, 1e-3)
                lines.append(f"step_size shortened to {step_size:.3g}: minibatch noise would add {now:.0%}")
    spent = probe.gradients + by_pilot
    return Choice(step_size, friction, settle, bool(control), spent, curvature, tuple(lines), limit)


def _localization(least: float, reach: float, center: tuple) -> float:
    """A flat direction moves a weight by ``reach`` typical weights, or by as little as ``least`` allows."""
    count = sum(w.size for w in center)
    mean_square = sum(float(jnp.sum(w * w)) for w in center) / count
    # All zeros have no scale of their own: flat directions then move by 1.
    return max(least, reach**-2 / mean_square if mean_square > 0 else 1.0)


def _mean_noise(found: list[Noise]) -> Noise:
    return Noise(*(sum(values) / len(values) for values in zip(*found, strict=True)))


def _damp(family: str, step_size: float, noise: float, llc: float, limit: float, least: float, may_shorten: bool):
    """(friction, step_size, why): friction, and if need be a shorter step, so that noise adds at most ``limit``."""
    if math.isinf(llc):
        return least, step_size, f"friction {least:.2g}: the pilot run has no positive estimate to keep from heat"
    room = limit * llc * 8 / max(step_size * noise, 1e-30)  # the coth(friction / 2) that is allowed
    friction = min(MOST_FRICTION, max(least, 2 * math.atanh(1 / room) if room > 1 else MOST_FRICTION))
    heat = heating(family, step_size, friction, noise) / llc
    text = f"friction {friction:.2g}: minibatch noise adds about {heat:.1%} to the estimate"
    if heat > 1.01 * limit and may_shorten:
        step_size *= limit / heat
        text += f", so step_size is shortened to {step_size:.3g}"
    return friction, step_size, text


class _Pilot:
    """A short run of all chains from w*, to learn the curvature where they go."""

    def __init__(self, engine: Engine, sampler: Sampler, probe: Probe, steps: int, rounds: int, allowed: float):
        self.engine, self.sampler, self.probe, self.steps, self.rounds = engine, sampler, probe, steps, rounds
        self.gradients = 0.0
        self.llc, self.force_sq, self.rich = math.nan, math.nan, allowed >= _RICH
        # The curvature along a valley varies: look as often as a quarter of the allowance pays for.
        one_look = 2 * rounds * probe.num_blocks * min(2, engine.plan.num_chains)
        looks = int(min(24, max(3, allowed / 4 / one_look)))
        self.shares = (0.1, *[0.9 / (looks - 1)] * (looks - 1))

    def explore(self, curvature: float, step_size: float | None) -> tuple[float, Iterator[Position]]:
        """(largest curvature met, final positions, made one at a time).

        A chain that goes non-finite, or to where the step was far from stable, starts it anew with 1/8 the step.
        """
        engine, floor = self.engine, curvature
        for _ in range(5):
            run = engine.start()
            for share in self.shares:
                size = step_size or step_scale(self.sampler, self.rich) / (
                    curvature + float(engine.posterior.localization or 0)
                )
                count = max(2, int(share * self.steps))
                engine.pilot(run, count, size, self.sampler.friction or 0.2, _PILOT)
                self.gradients += count * engine.plan.num_chains
                if not engine.all_alive(run):
                    break
                positions = (engine.position(run, c) for c in range(min(2, engine.plan.num_chains)))
                met = max(self.probe.sharpness(p, self.rounds) for p in positions)
                if step_size is None and met * size > THROWN:
                    break
                curvature = max(curvature, met)
            else:
                half = run.step // 2
                fall = run.trace.virial[:, half : run.step].mean(dtype=float)
                pull = engine.posterior.localization * run.trace.distance_sq[:, half : run.step].mean(dtype=float)
                self.llc = 0.5 * (fall - pull)
                self.force_sq = float(run.trace.drift_sq[:, half : run.step].mean(dtype=float))
                return curvature, (engine.position(run, c) for c in range(min(4, engine.plan.num_chains)))
            if step_size is not None:
                # The step was given: go on with what w* says, and let the verdict tell of the divergence.
                self.llc = math.inf
                return curvature, iter([self.probe.center])
            curvature = floor = 8 * max(curvature, floor)
        # Some example's loss may be non-finite wherever a chain goes: let the run name the chains that meet it.
        self.llc = math.inf
        return curvature, iter([self.probe.center])
