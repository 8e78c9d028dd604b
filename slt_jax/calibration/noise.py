"""The stages that answer gradient noise: whether control variates pay, friction, and if need be a shorter step."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from slt_jax.calibration.probe import Noise, Probe
from slt_jax.samplers.base import Metric, Position, Theory

FRICTION = 0.1  # the least; noise grows as chains spread, and what the pilot saw of it is too little
FRICTION_STILL = 0.03  # the same where steps have a limit, and noise could grow tenfold
FRICTION_SHORT = 0.02  # the same for short chains: soft directions relax in friction / (step_size curvature) steps
FRICTION_METRIC = 0.3  # the same in a metric's coordinates
FRICTION_ASSUMED = 0.1  # where the noise is judged before friction is chosen
MOST_FRICTION = 0.7
SAMPLED = 0.01  # relative error of llc from chains' draws, whose loss has variance llc and lasts for 1 / friction steps
HEAT = 0.03  # of the estimate, that minibatch noise may add before friction rises
HEAT_CONTROLLED = 0.01  # with control variates, whose noise is not confined to directions that count
SHORT = 4000  # steps of a chain, up to which it is short
CONTROL_HEAT = 0.1  # of the estimate, that minibatch noise adds, from which on control variates are considered
CONTROL_GAIN = 4.0  # by how much they have to lower it
CONTROL_PASS = 0.05  # of all gradients, that their pass over the data may take


class Damping(NamedTuple):
    """A friction and a step size, and why, for a person."""

    friction: float
    step_size: float
    line: str | None


def mean_noise(probe: Probe, positions: Iterable[Position], metric: Metric) -> Noise:
    """Gradient noise where a pilot run's chains ended."""
    measured = [probe.noise(position, 2, metric)[0] for position in positions]
    return Noise(*(sum(values) / len(values) for values in zip(*measured, strict=True)))


def choose_control(
    theory: Theory, noise: Noise, step_size: float, friction: float | None, llc: float, *, affordable: bool
) -> tuple[bool, str | None]:
    """(whether control variates pay, why).

    Args:
        llc: a rough one, infinite where there is none. affordable: whether their pass over the data is.
    """
    each = theory.heating(step_size, FRICTION_ASSUMED if friction is None else friction)
    plain, controlled = each * noise.plain / llc, each * noise.controlled / llc
    if not (plain > CONTROL_HEAT and controlled < plain / CONTROL_GAIN and affordable):
        return False, None
    return True, (
        f"control variates at w*: minibatch noise would add {plain:.0%} to the estimate, with them "
        f"{controlled:.1%}; each step costs two gradients"
    )


def choose_friction(
    theory: Theory, noise: Noise, step_size: float, llc: float, *, control: bool, metric: bool, limited: bool,
    short: bool, total: float, may_shorten: bool,
) -> Damping:  # fmt: skip
    """The least friction with which noise adds little to the estimate.

    Args:
        llc: a rough one, infinite where there is none. limited: whether steps have a limit. short: whether chains are.
        total: minibatch gradients of the whole estimate. may_shorten: whether the step size was chosen here.
    """
    strength = noise.controlled if control else noise.plain
    most = HEAT_CONTROLLED if control else HEAT
    least = FRICTION_METRIC if metric else FRICTION_SHORT if short else FRICTION
    if limited:
        slow = min(FRICTION, max(FRICTION_STILL, 1 / (SAMPLED**2 * llc * total)))
        least = min(least, _damped(theory, step_size, strength, llc, most / 10, slow, False).friction)
    return _damped(theory, step_size, strength, llc, most, least, may_shorten)


def _damped(
    theory: Theory, step_size: float, noise: float, llc: float, most: float, least: float, may_shorten: bool
) -> Damping:
    """Friction, and if need be a shorter step, so that noise adds at most ``most`` of the estimate."""
    if math.isinf(llc):
        return Damping(
            least, step_size, f"friction {least:.2g}: the pilot run has no positive estimate to keep from heat"
        )
    room = most * llc * 8 / max(step_size * noise, 1e-30)  # the coth(friction / 2) that is allowed
    friction = min(MOST_FRICTION, max(least, 2 * math.atanh(1 / room) if room > 1 else MOST_FRICTION))
    heat = theory.heating(step_size, friction) * noise / llc
    line = f"friction {friction:.2g}: minibatch noise adds about {heat:.1%} to the estimate"
    if heat > 1.01 * most and may_shorten:
        step_size *= most / heat
        line += f", so step_size is shortened to {step_size:.3g}"
    return Damping(friction, step_size, line)


def shorten_step(theory: Theory, noise: float, step_size: float, friction: float, llc: float) -> Damping:
    """With a friction that was given: a shorter step where noise would add more than twice ``HEAT``."""
    heat = theory.heating(step_size, friction) * noise / llc
    if heat <= 2 * HEAT:
        return Damping(friction, step_size, None)
    shorter = step_size * max(2 * HEAT / heat, 1e-3)
    return Damping(friction, shorter, f"step_size shortened to {shorter:.3g}: minibatch noise would add {heat:.0%}")
