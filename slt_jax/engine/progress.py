"""What a person sees while the chains run: one line with speed and the running estimate."""

import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from slt_jax.engine.plan import Schedule
from slt_jax.machine import peak_of_process

_WORTH_SHOWING = 60  # seconds


class Progress:
    """A progress bar over the steps of a run, and the clock that says when a save is due.

    ``part``: which part of something larger the run is. ``nbeta``: that of all chains; without it no running estimate
    is shown.
    """

    def __init__(self, plan: Schedule, *, enabled: bool, every: float, part: str = "", nbeta: float | None = None):
        self._plan, self._every, self._part, self._nbeta = plan, every, part, nbeta
        self._saved = self._began = self._started = time.monotonic()
        self._first: int | None = None
        self._enabled, self._announced = enabled, False
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        console = Console(stderr=True)
        self._bar = RichProgress(
            *columns,
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (enabled and (console.is_terminal or console.is_jupyter)),  # a log needs no bars
            transient=True,
        )
        self._task = self._bar.add_task(f"{part}compiling", total=plan.total_steps, note="")

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, *details) -> None:
        self._bar.__exit__(*details)

    @property
    def first_chunk(self) -> bool:
        """Whether ``update`` has not been called yet."""
        return self._first is None

    def cost(self, run) -> dict[str, Any]:
        """What it took: seconds with compilation, steps/s of all chains after the first chunk, peak memory in MiB."""
        memory, where = peak_memory()
        return {"seconds": time.monotonic() - self._started, "steps_per_s": self._speed(run), where: memory}

    def _speed(self, run) -> float | None:
        if self._first is None or run.step == self._first:
            return None
        return (run.step - self._first) * self._plan.num_chains / (time.monotonic() - self._began)

    def update(self, run) -> None:
        """Show where ``run`` is. Speed is counted after the first chunk, which compiles."""
        if self._first is None:
            self._first, self._began = run.step, time.monotonic()
        plan, speed = self._plan, self._speed(run)
        phase = "warm-up" if run.step <= plan.num_warmup else "drawing"
        note = "" if speed is None else f"{speed:,.1f} steps/s"
        if phase == "drawing" and plan.baseline == "paired" and self._nbeta is not None:
            gap = (run.trace.loss - run.trace.baseline)[:, plan.num_warmup : run.step]
            if np.isfinite(gap).any():
                note += f", LLC {self._nbeta * np.nanmean(gap):.4g}"
        if speed is not None and not self._announced:
            self._announced = True
            each = plan.num_chains / speed
            if self._enabled and (left := (plan.total_steps - run.step) * each) > _WORTH_SHOWING:
                line = f"  {each:.2g} s a step of all chains: about {span(left)} to go"
                self._bar.console.print(line, highlight=False, soft_wrap=True)
        self._bar.update(self._task, completed=run.step, description=f"{self._part}{phase}", note=note)

    def save_due(self) -> bool:
        """Whether ``every`` seconds have passed since the last time this said so."""
        due = time.monotonic() - self._saved >= self._every
        if due:
            self._saved = time.monotonic()
        return due


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
