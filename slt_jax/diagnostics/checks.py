"""A check: one number beside what is accepted, whether it is, and what the verdict says where it is not."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from slt_jax.diagnostics.sensitivity import UNKNOWN, Slope

UNKNOWN_TEXT = "not known"


class Fault(NamedTuple):
    """What a check that fails says: the verdict in few words, why and what to do, where a moving estimate would end."""

    verdict: str
    reason: str
    end: Slope = UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number of the verdict beside what is accepted.

    ``value``: NaN where unknown. ``limit``: of ``value``, None where no single number decides. ``value_text`` and
    ``limit_text``: both as a page shows them. ``ok``: None where the check was not made. ``meaning``: one sentence.
    ``fault``: what is wrong and what to do, exactly where ``ok`` is False.
    """

    name: str
    value: float
    limit: float | None
    ok: bool | None
    meaning: str
    value_text: str
    limit_text: str
    fault: Fault | None = None

    def __post_init__(self):
        if (self.ok is False) != (self.fault is not None):
            raise ValueError(f"the check {self.name!r} needs a fault exactly where it fails, got ok {self.ok}")


def fault_if(ok: bool | None, verdict: str, reason: str, end: Slope = UNKNOWN) -> Fault | None:
    """The fault of a check that fails, None of any other."""
    return Fault(verdict, reason, end) if ok is False else None


def outcome(failed: bool, *needed: float) -> bool | None:
    """``ok`` of a check: None where something that it needs is NaN."""
    return None if any(math.isnan(x) for x in needed) else not failed


def number(value: float, form: str = ".4g") -> str:
    return format(value, form) if math.isfinite(value) else UNKNOWN_TEXT


def with_error(measured: Slope) -> str:
    return (
        f"{number(measured.value, '+.3g')} ± {number(measured.stderr, '.2g')}" if measured.stderr > 0 else UNKNOWN_TEXT
    )
