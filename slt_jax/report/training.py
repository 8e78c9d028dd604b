"""The picture of a trajectory: LLC and loss over training."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from slt_jax.report.style import COLORS, MARKERS, figure_of
from slt_jax.results.text import MARK, MARKED


def plot_training(
    steps: Sequence[int],
    losses: Sequence[float],
    results: Sequence[Any] | Mapping[str, Sequence[Any]],
    path: str | os.PathLike | None = None,
    *,
    stages: Any = None,
    unit: str = "nats per byte",
) -> Figure:
    """LLC with error bars and loss over training steps.

    An estimate that has not converged has a hollow marker with a star above it.

    Args:
        steps: training steps of the checkpoints.
        losses: of the checkpoints, in ``unit``.
        results: one for each step; or name -> such a list, for several lines, e.g. refined LLCs.
        path: the picture is written there if it is given.
        stages: from ``find_stages``; their boundaries are drawn with intervals.
        unit: of the losses.

    Raises:
        ValueError: lists of different lengths.
    """
    series = dict(results) if isinstance(results, Mapping) else {"": results}
    named = [("losses", losses), *((f"results {name}".strip(), values) for name, values in series.items())]
    for name, values in named:
        if len(values) != len(steps):
            raise ValueError(f"{name} has {len(values)} entries for {len(steps)} steps. Pass one for each step.")

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        right = axis.twinx()
        for k, (name, line) in enumerate(series.items()):
            _plot_line(axis, steps, line, COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)], name)
        if any(r.verdict != "converged" for line in series.values() for r in line):
            axis.plot([], [], "o", mfc="white", mec="black", label=MARKED)
        single, loss = len(series) == 1, COLORS[1] if len(series) == 1 else "0.45"
        right.plot(steps, losses, "s--" if single else ":", color=loss, lw=1.2 if single else 2, ms=4, label="loss")
        right.spines["right"].set_visible(True)
        interval = f"stage boundary, {100 * getattr(stages, 'level', 0.9):g} % interval"
        for boundary in getattr(stages, "boundaries", ()):
            axis.axvspan(boundary.low, boundary.high, color="0.88", lw=0, zorder=0)
            axis.axvline(boundary.step, color="0.3", lw=1.3, ls="-.", label=interval)
        axis.set(xscale="log" if min(steps) > 0 else "linear", xlabel="training step")
        axis.set_ylabel("local learning coefficient", color=COLORS[0] if single else "black")
        right.set_ylabel(f"loss ({unit})", color=loss)
        entries: dict[str, Any] = {
            t: h for a in (axis, right) for h, t in zip(*a.get_legend_handles_labels(), strict=True)
        }
        if interval in entries:
            entries[interval] = (Patch(color="0.88"), entries[interval])
        figure.suptitle("LLC and loss over training", fontweight="bold")
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3, "fontsize": 9}
        axis.legend(entries.values(), entries.keys(), frameon=False, **place)

    return figure_of((7.0, 4.2), path, draw)


def _plot_line(axis: Axes, steps: Sequence[int], results: Sequence[Any], color: str, marker: str, name: str) -> None:
    x, y = np.asarray(steps), np.array([r.llc for r in results])
    axis.errorbar(x, y, yerr=[r.llc_stderr for r in results], color=color, capsize=3, lw=1.5)
    converged = np.array([r.verdict == "converged" for r in results])
    axis.plot(x[converged], y[converged], ls="", marker=marker, color=color, label=name or "LLC ± standard error")
    axis.plot(x[~converged], y[~converged], ls="", marker=marker, mfc="white", mec=color)
    for step, llc in zip(x[~converged], y[~converged], strict=True):
        axis.annotate(MARK, (step, llc), (0, 3), textcoords="offset points", ha="center", color=color)
