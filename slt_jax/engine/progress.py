"""How far a run is: speed, time to go, and the running estimate."""

import time
from typing import NamedTuple

import jax
import numpy as np

from slt_jax.engine.plan import Schedule
from slt_jax.machine import peak_of_process

_LONG_CHUNK = 0.1  # seconds, from which the time of a chunk is that of its steps
_RECENT = 10.0  # seconds, over which the speed is taken


class _Mark(NamedTuple):
    """Where a run was at a time. ``work``: in steps of the warm-up."""

    at: float
    step: int
    work: float


class Progress:
    """Speed and time to go of a run, renewed after each chunk.

    ``part``: which part of something larger the run is. ``nbeta``: that of all chains; without it there is no running
    estimate. ``full``: steps of the longest chunk. ``passes``: minibatches that a draw takes through the model for
    further data sets and observables.

    The time to go is taken from the chunks of the last seconds. The first, which compiles, and short ones, most of
    whose time may be their start, do not count. A draw takes longer than another step, by its further forward passes;
    a gradient counts for three.
    """

    def __init__(self, plan: Schedule, *, full: int, part: str = "", nbeta: float | None = None, passes: float = 0.0):
        self._plan, self._full, self.part, self._nbeta = plan, full, part, nbeta
        passes += plan.baseline == "paired" and not plan.control_variate
        self._of_draw = 1 + passes / (3 * (2 if plan.control_variate else 1) * plan.thinning)
        self._first: _Mark | None = None
        self._last: _Mark | None = None
        self._marks: list[_Mark] = []
        self.text = f"{part}compiling"
        self.share = 0.0

    @property
    def first_chunk(self) -> bool:
        """Whether ``update`` has not been called yet."""
        return self._first is None

    @property
    def speed(self) -> float | None:
        """Steps/s of all chains, after the first chunk."""
        first, last = self._first, self._last
        if first is None or last is None or last.step == first.step:
            return None
        return (last.step - first.step) * self._plan.num_chains / (last.at - first.at)

    @property
    def left(self) -> float | None:
        """Seconds to go; None as long as that cannot be said."""
        if len(self._marks) < 2:
            return None
        begin, end = self._marks[0], self._marks[-1]
        rate = (end.work - begin.work) / max(end.at - begin.at, 1e-9)
        return (self._work(self._plan.total_steps) - end.work) / rate

    def _work(self, step: int) -> float:
        warm = min(step, self._plan.num_warmup)
        return warm + (step - warm) * self._of_draw

    def update(self, run) -> None:
        """Take note of where ``run`` is."""
        now = _Mark(time.perf_counter(), run.step, self._work(run.step))
        if self._first is None:
            self._first = now
        elif self._last is not None:
            self._take_speed(self._last, now)
        self._last = now
        self.text, self.share = self._text(run), run.step / self._plan.total_steps

    def _take_speed(self, before: _Mark, now: _Mark) -> None:
        if now.step - before.step < self._full and now.at - before.at < _LONG_CHUNK:
            return
        self._marks = [*(self._marks or [before]), now]
        recent = [mark for mark in self._marks if mark.at > now.at - _RECENT]
        self._marks = recent if len(recent) > 1 else self._marks[-2:]

    def _text(self, run) -> str:
        plan = self._plan
        phase = "warm-up" if run.step <= plan.num_warmup else "drawing"
        text = f"{self.part}{phase}, {run.step / plan.total_steps:.0%}"
        if (left := self.left) is not None and run.step < plan.total_steps:
            text += f", about {span(left)} to go"
        if phase == "drawing" and plan.baseline == "paired" and self._nbeta is not None:
            gap = (run.trace.loss - run.trace.baseline)[:, plan.num_warmup : run.step]
            if np.isfinite(gap).any():
                text += f", LLC {self._nbeta * np.nanmean(gap):.4g}"
        if (speed := self.speed) is not None:
            text += f", {speed:,.4g} steps/s"
        return text


def span(seconds: float) -> str:
    """Seconds, minutes or hours, in words."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def peak_memory() -> tuple[int | None, str]:
    """(MiB, what it is of): of one device where it reports that, else of this process; both since the process began."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] // 2**20, "device_peak_mib"
    return int(peak_of_process()) // 2**20 or None, "process_peak_mib"
