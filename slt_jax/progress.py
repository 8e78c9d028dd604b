"""What a person sees while the chains run: one line with speed and the running estimate."""

import time

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A progress bar over the steps of a run, and the clock that says when a save is due."""

    def __init__(self, engine, *, enabled: bool, every: float):
        self._engine, self._every = engine, every
        self._saved = self._began = time.monotonic()
        self._first: int | None = None
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        console = Console(stderr=True)
        self._bar = RichProgress(
            *columns,
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not enabled,
            transient=True,
        )
        self._task = self._bar.add_task("compiling", total=engine.plan.total_steps, note="")

    def __enter__(self) -> "Progress":
        self._bar.__enter__()
        return self

    def __exit__(self, *details) -> None:
        self._bar.__exit__(*details)

    def update(self, run) -> None:
        """Show where ``run`` is. Speed is counted after the first chunk, which compiles."""
        if self._first is None:
            self._first, self._began = run.step, time.monotonic()
        plan, elapsed = self._engine.plan, time.monotonic() - self._began
        speed = (run.step - self._first) * plan.num_chains / elapsed if run.step > self._first else float("nan")
        phase = "warm-up" if run.step <= plan.num_warmup else "drawing"
        note = f"{speed:,.1f} steps/s"
        if phase == "drawing" and plan.baseline == "paired":
            gap = (run.trace.loss - run.trace.baseline)[:, plan.num_warmup : run.step]
            if np.isfinite(gap).any():
                note += f", LLC {self._engine.posterior.nbeta * np.nanmean(gap):.4g}"
        self._bar.update(self._task, completed=run.step, description=phase, note=note)

    def save_due(self) -> bool:
        """Whether ``every`` seconds have passed since the last time this said so."""
        due = time.monotonic() - self._saved >= self._every
        if due:
            self._saved = time.monotonic()
        return due
