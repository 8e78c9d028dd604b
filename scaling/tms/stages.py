"""Stages told from the weights, and how the jumps of an LLC curve lie to them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from scaling.tms.polygons import OF_FUNCTION, Nearest

NEAR = 0.6  # distance to a k-gon up to which weights are at it; the shortest between two of the paths here is 1.0
LEAST = 2  # checkpoints in a row that make a stage, as for the LLC's
TOLERANCE = 2  # checkpoints
ELSEWHERE = "elsewhere"


class Stage(NamedTuple):
    """Checkpoints ``first`` to ``last``, by number, at which the weights are at one k-gon."""

    label: str
    first: int
    last: int


def stages_of(found: Sequence[Nearest]) -> list[Stage]:
    """Runs of at least ``LEAST`` checkpoints at one k-gon; what lies between two runs of the same joins them.

    What comes before the first is a stage of its own, ``ELSEWHERE``.
    """
    runs: list[Stage] = []
    for i, (label, distance) in enumerate(found):
        if distance > NEAR:
            continue
        if runs and runs[-1].label == label and runs[-1].last == i - 1:
            runs[-1] = runs[-1]._replace(last=i)
        else:
            runs.append(Stage(label, i, i))
    joined: list[Stage] = []
    for run in (r for r in runs if r.last - r.first + 1 >= LEAST):
        if joined and joined[-1].label == run.label:
            joined[-1] = joined[-1]._replace(last=run.last)
        else:
            joined.append(run)
    if joined and joined[0].first > 0:
        joined.insert(0, Stage(ELSEWHERE, 0, joined[0].first - 1))
    return joined


def tells(before: str, after: str) -> bool | None:
    """Whether the coefficient of the function changes from one k-gon to the next; None where one is not known."""
    if before not in OF_FUNCTION or after not in OF_FUNCTION:
        return None
    return OF_FUNCTION[before] != OF_FUNCTION[after]


def gap(first: int, before: Stage, after: Stage) -> int:
    """Checkpoints between a jump of the LLC and a change of the weights, 0 where they agree.

    ``first`` is the first checkpoint after the jump; the weights leave ``before`` at ``before.last`` + 1 at the
    earliest and have arrived at ``after.first``.
    """
    return max(0, before.last + 1 - first, first - after.first)


class Match(NamedTuple):
    """A change of the weights: whether the coefficient changes too, the LLC's nearest jump and the checkpoints between.

    ``jump``: number of the first checkpoint after it; None, as ``checkpoints``, without any jump.
    """

    before: str
    after: str
    tells: bool | None
    jump: int | None
    checkpoints: int | None


def match(stages: Sequence[Stage], jumps: Sequence[int]) -> list[Match]:
    """The changes of ``stages``, with ``jumps`` the first checkpoints after each jump of the LLC."""
    found = []
    for before, after in itertools.pairwise(stages):
        by_gap = sorted((gap(jump, before, after), jump) for jump in jumps)
        away, jump = by_gap[0] if by_gap else (None, None)
        found.append(Match(before.label, after.label, tells(before.label, after.label), jump, away))
    return found


def strays(stages: Sequence[Stage], jumps: Sequence[int]) -> list[int]:
    """Jumps of the LLC that are more than ``TOLERANCE`` checkpoints from every change of the weights."""
    pairs = list(itertools.pairwise(stages))
    return [jump for jump in jumps if all(gap(jump, *pair) > TOLERANCE for pair in pairs)]
