"""How far chains get in the steps that they have: what the slow directions still owe the estimate.

A chain that starts at w* fills a direction of curvature a = x + localization, x that of nbeta L, at the rate at which
the dynamics relaxes there. After n steps its variance lacks the share e^(-2 r n) of the final one, r the relaxation in
one step, and the estimate lacks that share of the x / (2 a) which the direction adds to it. Slow directions have little
loss in their beginnings, so that an estimate without them looks as still as one that is done.
"""

from typing import NamedTuple

import numpy as np

FLOOR = 3e-6  # of the largest curvature: what lies under it is rounding in float32
MOST = 1e6  # times as long
DONE = 0.01  # of the LLC, that may be owed at the length that is asked for
_KNOWN = ("sgld", "sgld-matthews", "underdamped")


def is_known(sampler: str) -> bool:
    """Whether the sampler of this name has a relaxation that is known here."""
    return sampler in _KNOWN


def relaxation(sampler: str, curvature: np.ndarray, step_size: float, friction: float) -> np.ndarray:
    """The share of its distance from the mean that a chain loses in one step, in directions of these curvatures.

    SGLD, with either noise: step_size a / 2. Underdamped Langevin, a damped oscillator of which step_size a is the
    squared frequency in units of the step, and f = 2 tanh(friction / 2) the damping: the smaller root of
    r^2 - f r + step_size a = 0, or f / 2 where it oscillates. With tanh, as friction grows this is SGLD.

    Source: BAOAB's diffusion, (step_size / 2) coth(friction / 2), from Leimkuhler and Matthews, J. Chem. Phys. 138
    (2013) 174102.
    """
    if sampler != "underdamped":
        return step_size * curvature / 2
    damping = 2 * np.tanh(friction / 2)
    oscillating = 4 * step_size * curvature / damping**2
    return damping / 2 * (1 - np.sqrt(np.maximum(0.0, 1 - oscillating)))


class Chain(NamedTuple):
    """What decides how far a chain gets: the sampler's name and setting, and the steps of its first and last draw."""

    sampler: str
    step_size: float
    friction: float
    first: float
    last: float

    def left(self, curvature: np.ndarray) -> np.ndarray:
        """Share of the final variance that directions of these curvatures lack, in the mean over the draws."""
        twice = 2 * relaxation(self.sampler, curvature, self.step_size, self.friction)
        span = twice * (self.last - self.first)
        return np.exp(-twice * self.first) * np.where(span > 1e-9, -np.expm1(-span) / np.maximum(span, 1e-9), 1.0)


def debt(curvature: np.ndarray, localization: float, chain: Chain) -> tuple[float, float]:
    """(what slow directions owe, how many times as long a chain has to be to owe ``DONE`` of the LLC).

    Args:
        curvature: the eigenvalues of the Hessian of nbeta L at w*, where the chain starts.

    Returns:
        The first in units of the LLC, and a little too much: directions that are stiffer away from
        w*, and all in chains that started hot, are filled by more.
    """
    counting = np.where(curvature > FLOOR * curvature.max(initial=0.0), curvature, 0.0)
    held = counting + localization
    parts = counting / held / 2
    found, times = float((parts * chain.left(held)).sum()), 1.0
    while (parts * chain.left(held)).sum() > DONE * parts.sum() and times < MOST:
        times *= 1.25
        chain = chain._replace(first=1.25 * chain.first, last=1.25 * chain.last)
    return found, times
