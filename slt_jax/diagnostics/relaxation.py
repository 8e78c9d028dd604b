"""How far chains relax in the steps that they have, and what their slow directions still lack in the estimate.

A chain that starts at w* fills a direction of curvature a = x + localization, x that of nbeta L, at the rate at which
the dynamics relaxes there. After n steps its variance lacks the share e^(-2 r n) of the final one, r the relaxation in
one step, and the estimate lacks that share of the x / (2 a) which the direction adds to it. Slow directions have little
loss in their beginnings, so that an estimate without them can look as stationary as one that is done.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LONGEST = 1e6  # most times as long that is looked for
RELAXED = 0.01  # of the LLC, that may be lacking at the length that is recommended
Relaxation = Callable[[np.ndarray, float, float], np.ndarray]


def overdamped_relaxation(curvature: np.ndarray, step_size: float, friction: float) -> np.ndarray:
    """The share of its distance from the mean that SGLD, with either noise, loses in one step: step_size a / 2.

    In directions of these curvatures a, ``(direction,)``.
    """
    return step_size * curvature / 2


def underdamped_relaxation(curvature: np.ndarray, step_size: float, friction: float) -> np.ndarray:
    """The same for underdamped Langevin dynamics, a damped oscillator.

    step_size a is its squared frequency in units of the step, and f = 2 tanh(friction / 2) the damping: the smaller
    root of r^2 - f r + step_size a = 0, or f / 2 where it oscillates. With tanh, as friction grows this is SGLD's.

    Source: BAOAB's diffusion, (step_size / 2) coth(friction / 2), from Leimkuhler and Matthews, J. Chem. Phys. 138
    (2013) 174102.
    """
    damping = 2 * np.tanh(friction / 2)
    oscillating = 4 * step_size * curvature / damping**2
    return damping / 2 * (1 - np.sqrt(np.maximum(0.0, 1 - oscillating)))


class ChainLength(NamedTuple):
    """What decides how far a chain relaxes: its dynamics, its setting, and the steps of its first and last draw."""

    relaxation: Relaxation
    step_size: float
    friction: float
    first: float
    last: float

    def lacking(self, curvature: np.ndarray) -> np.ndarray:
        """Share of the final variance that directions of these curvatures lack, in the mean over the draws."""
        twice = 2 * self.relaxation(curvature, self.step_size, self.friction)
        span = twice * (self.last - self.first)
        return np.exp(-twice * self.first) * np.where(span > 1e-9, -np.expm1(-span) / np.maximum(span, 1e-9), 1.0)


class Directions(NamedTuple):
    """What the curvatures at w* say of an estimate.

    ``expected``: the LLC by them, of this run. ``hidden``: number of directions of a positive curvature below the
    localization, and ``hides``: by how much it lowers the estimate in all directions of positive curvature.
    ``quadratic``: the LLC by them of a run that is long enough.
    """

    expected: float
    hidden: int
    hides: float
    quadratic: float


def directions(curvature: np.ndarray, localization: float, chain: ChainLength, rounding: float) -> Directions:
    """See ``Directions``. The arguments are those of ``unrelaxed_bias``."""
    x = curvature[curvature > rounding]
    total = x + localization
    parts = x / total / 2
    return Directions(
        expected=float((parts * (1 - chain.lacking(total))).sum()),
        hidden=int((x < localization).sum()),
        hides=float((localization / total / 2).sum()),
        quadratic=float(parts.sum()),
    )


def unrelaxed_bias(
    curvature: np.ndarray, localization: float, chain: ChainLength, rounding: float = 0.0
) -> tuple[float, float]:
    """(what the estimate lacks in slow directions, how many times as long a chain has to be to lack ``RELAXED``).

    Args:
        curvature: the eigenvalues of the Hessian of nbeta L at w*, where the chain starts, ``(direction,)``.
        rounding: up to which they are taken for 0.

    Returns:
        The first in units of the LLC, and a little too much: directions that are stiffer away from
        w*, and all in chains that started hot, are filled by more.
    """
    counting = np.where(curvature > rounding, curvature, 0.0)
    total = counting + localization
    parts = counting / total / 2
    bias, times = float((parts * chain.lacking(total)).sum()), 1.0
    while (parts * chain.lacking(total)).sum() > RELAXED * parts.sum() and times < LONGEST:
        times *= 1.25
        chain = chain._replace(first=1.25 * chain.first, last=1.25 * chain.last)
    return bias, times
