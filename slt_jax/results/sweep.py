"""What a sweep gives back: a result for each cell of a grid, as one labelled data set, on screen and on disk."""

import dataclasses
import functools
import html
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from slt_jax.results.card import card, tone_color
from slt_jax.results.llc import LLCResult
from slt_jax.results.observed_tree import groups_of, observed_in
from slt_jax.results.plateau import GridReading, read_grid
from slt_jax.results.record import RunRecord
from slt_jax.results.stacking import stack, unstack
from slt_jax.results.storage import FORMAT, SWEEP, load, write
from slt_jax.results.text import MARKED, estimate_text, interrupted_line, marked

if TYPE_CHECKING:
    import xarray as xr

AXES = ("nbeta", "localization", "step_size")
_NUMBERS = ("llc", "llc_stderr", "llc_raw", "rhat", "ess", "init_loss", "trend", "virial", "acceptance", "kinetic")


@dataclass(frozen=True, eq=False)
class Sweep:
    """A grid of estimates over nbeta, localization and step size.

    ``axes``: the values of each, increasing. ``results``: one for each cell, step size fastest, nbeta slowest.
    ``control``: for each localization, E[L(w)] - L(w*) at nbeta = 0 and its standard error (nats per example): by how
    much the loss would rise with the localization only.
    """

    axes: dict[str, np.ndarray]
    results: tuple[LLCResult, ...]
    control: Float[np.ndarray, "localization 2"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(self.axes[name]) for name in AXES)

    @property
    def settings(self) -> RunRecord:
        """What all cells have in common; the axes are NaN."""
        own = {**dict.fromkeys(AXES, math.nan), "probe": {}, "gradients": {}, "cost": {}}
        return dataclasses.replace(self.results[0].settings, **own)

    def cell(self, *, nbeta: float | None = None, localization: float | None = None, step_size: float | None = None):
        """The LLCResult of one cell. An axis with one value may be left out. Raises KeyError for a value not in it."""
        at = []
        for name, value in zip(AXES, (nbeta, localization, step_size), strict=True):
            values = self.axes[name]
            if value is None and len(values) > 1:
                raise KeyError(f"{name} has {len(values)} values: give one of {_listed(values)}.")
            near = 0 if value is None else int(np.argmin(np.abs(np.log(values) - np.log(value))))
            if value is not None and not np.isclose(values[near], value, rtol=1e-6):
                raise KeyError(f"{name} = {value:g} is not in the sweep, which has {_listed(values)}.")
            at.append(near)
        return self.results[int(np.ravel_multi_index(at, self.shape))]

    @functools.cached_property
    def dataset(self) -> "xr.Dataset":
        """Estimates, errors, verdicts and convergence numbers over named coordinates; ``diverged`` marks lost cells."""
        import xarray as xr

        dicts = [result.to_dict() for result in self.results]
        variables = {}
        for name in _NUMBERS:
            values = [np.nan if d[name] is None else d[name] for d in dicts]
            variables[name] = (AXES, np.array(values, float).reshape(self.shape))
        raw = np.array([result.llc_raw_stderr for result in self.results])
        variables["llc_raw_stderr"] = (AXES, raw.reshape(self.shape))
        for name in ("verdict", "reason"):
            variables[name] = (AXES, np.array([d[name] for d in dicts], object).reshape(self.shape))
        lost = [bool(result.stopped) for result in self.results]
        variables["diverged"] = (AXES, np.array(lost).reshape(self.shape))
        gap = variables["llc_raw"][1] / self.axes["nbeta"][:, None, None]
        variables["held"] = (AXES, 1 - gap / self.control[None, :, :1])
        variables["control"] = ("localization", self.control[:, 0])
        variables["control_stderr"] = ("localization", self.control[:, 1])
        dataset = xr.Dataset(variables, {name: self.axes[name] for name in AXES})
        for name, (long, unit) in _UNITS.items():
            dataset[name].attrs = {"long_name": long, "units": unit}
        return dataset

    @functools.cached_property
    def reading(self) -> GridReading:
        """Where the LLC stands, what it depends on, and which setting to take."""
        return read_grid(self.dataset)

    def __str__(self) -> str:
        return "\n".join([*table_of(self), "", str(self.reading)])

    def __repr__(self) -> str:
        return f"<Sweep: {self._size_text()}>"

    def _size_text(self) -> str:
        converged = sum(result.verdict == "converged" for result in self.results)
        axes = ", ".join(f"{name} {_listed(values)}" for name, values in self.axes.items())
        return f"{len(self.results)} cells over {axes}; {converged} of them converged"

    def _repr_html_(self) -> str:
        lines = self.reading.lines
        tone = "converged" if self.reading.recommended is not None else "diverged"
        table = f'<pre style="font-size:.85em;margin:.4em 0">{html.escape(chr(10).join(table_of(self)))}</pre>'
        return card(f"Sweep over {len(self.results)} cells", "", lines, table, tone_color(tone))

    def to_dict(self) -> dict[str, Any]:
        """Every cell's numbers and the reading, for JSON."""
        return {
            "axes": {name: values.tolist() for name, values in self.axes.items()},
            "control": self.control.tolist(),
            "cells": [result.to_dict() for result in self.results],
            "reading": self.reading.to_dict(),
        }

    def plot(self, path: str | os.PathLike | None = None):
        """Heat maps, one for each nbeta; written to ``path`` if given. Returns the figure, which a notebook shows."""
        from slt_jax.report.heatmaps import plot_sweep

        return plot_sweep(self.dataset, self.reading, path)

    def report(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Write everything as one self-contained HTML page."""
        from slt_jax.report.write import write_report

        return write_report(self, path, overwrite=overwrite)

    def to_xarray(self) -> "xr.DataTree":
        """DataTree: ``/`` is ``dataset``; ``sample_stats`` and ``warmup_sample_stats`` hold all traces, cells first.

        ``posterior`` has the LLC at each draw, for ArviZ; ``cell_0``, ... what was observed in each cell.
        """
        import xarray as xr

        groups, attrs = stack(self.results, AXES, self.shape)
        for i, result in enumerate(self.results):
            groups |= {f"/cell_{i}{group}": data for group, data in groups_of(result.observed).items()}
        tree = xr.DataTree.from_dict({"/": self.dataset, **groups})
        tree.attrs = {SWEEP: FORMAT, **attrs}
        return tree

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Write everything as zarr. Raises FileExistsError on an existing path, and OSError."""
        return write(self.to_xarray(), path, SWEEP, overwrite=overwrite)


_UNITS = {
    "llc": ("local learning coefficient", "1"), "llc_stderr": ("its standard error", "1"),
    "llc_raw": ("local learning coefficient before corrections", "1"),
    "rhat": ("split R-hat", "1"), "ess": ("effective number of draws", "1"),
    "init_loss": ("loss at w*", "nats per example"), "held": ("share of the rise in loss that the data prevent", "1"),
    "control": ("rise of the loss at nbeta = 0", "nats per example"),
    "nbeta": ("n times the inverse temperature", "1"), "localization": ("localization", "1 / weight^2"),
    "step_size": ("step size", "weight^2"),
}  # fmt: skip


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{x:.6g}" for x in values)


def load_sweep(path: str | os.PathLike) -> Sweep:
    """Read what ``Sweep.save`` wrote. Raises FileNotFoundError, or ValueError for a foreign or truncated file."""
    return load(path, SWEEP, _of_tree)


def _of_tree(tree: "xr.DataTree") -> Sweep:
    root = tree.to_dataset()
    axes = {name: np.asarray(root[name].values, float) for name in AXES}
    control = np.stack([root["control"].values, root["control_stderr"].values], -1)
    results = unstack(tree, len(AXES))
    if "cell_0" in tree.children:
        each = [observed_in(tree.children[f"cell_{i}"]) for i in range(len(results))]
        results = tuple(dataclasses.replace(r, observed=found) for r, found in zip(results, each, strict=True))
    return Sweep(axes, results, control)


def table_of(sweep: Sweep) -> list[str]:
    """One line for each cell, for a screen."""
    lines = [f"{'nbeta':>10} {'localization':>12} {'step_size':>10} {'LLC':>18} {'R-hat':>6} {'ESS':>6}  verdict"]
    for r in sweep.results:
        s = r.settings
        llc = "-" if not len(r.kept_chains) else marked(estimate_text(r.llc, r.llc_stderr, "±"), r.verdict)
        lines.append(
            f"{s.nbeta:>10.4g} {s.localization:>12.4g} {s.step_size:>10.3g} {llc:>18} {r.rhat:>6.3f} "
            f"{r.ess:>6.0f}  {r.verdict}"
        )
    if any(r.verdict != "converged" for r in sweep.results):
        lines.append(MARKED)
    if settings := next((r.settings for r in sweep.results if r.interrupted), None):
        lines.append(interrupted_line(settings))
    return lines
