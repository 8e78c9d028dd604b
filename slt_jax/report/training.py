"""The picture of a trajectory: LLC and loss over training."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from slt_jax.report.style import COLORS, MARKERS, figure_of
from slt_jax.results.plateau import SETTLED


def plot_training(
    steps: Sequence[int],
    losses: Sequence[float],
    results: Sequence[Any] | Mapping[str, Sequence[Any]],
    path: str | os.PathLike | None = None,
    *,
    stages: Any = None,
    unit: str = "nats per byte",
) -> Figure:
    """LLC with error bars and loss over training steps; hollow markers are not settled, or at no minimum.

    Args:
        steps: of training, (checkpoint,), with one of ``losses`` each, in ``unit``.
        results: one for each step; or name -> such a list, for several lines, e.g. refined LLCs.
        stages: of ``find_stages``: boundaries, each with a step and its interval from ``low`` to ``high``.

    Raises:
        ValueError: lists of different lengths.
    """
    series = dict(results) if isinstance(results, Mapping) else {"": results}
    for name, found in [("losses", losses), *((f"results {name}".strip(), rs) for name, rs in series.items())]:
        if len(found) != len(steps):
            raise ValueError(f"{name} has {len(found)} entries for {len(steps)} steps. Give one for each step.")

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        right = axis.twinx()
        for k, (name, found) in enumerate(series.items()):
            _line(axis, steps, found, COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)], name)
        if len(series) > 1 and any(r.verdict not in SETTLED for found in series.values() for r in found):
            axis.plot([], [], "o", mfc="white", mec="black", label="hollow: not settled or no minimum")
        one, loss = len(series) == 1, COLORS[1] if len(series) == 1 else "0.45"
        right.plot(steps, losses, "s--" if one else ":", color=loss, lw=1.2 if one else 2, ms=4, label="loss")
        right.spines["right"].set_visible(True)
        interval = f"stage boundary, {100 * getattr(stages, 'level', 0.9):g} % interval"
        for boundary in getattr(stages, "boundaries", ()):
            axis.axvspan(boundary.low, boundary.high, color="0.88", lw=0, zorder=0)
            axis.axvline(boundary.step, color="0.3", lw=1.3, ls="-.", label=interval)
        axis.set(xscale="log" if min(steps) > 0 else "linear", xlabel="training step")
        axis.set_ylabel("local learning coefficient", color=COLORS[0] if one else "black")
        right.set_ylabel(f"loss ({unit})", color=loss)
        entries: dict[str, Any] = {
            t: h for a in (axis, right) for h, t in zip(*a.get_legend_handles_labels(), strict=True)
        }
        if interval in entries:
            entries[interval] = (Patch(color="0.88"), entries[interval])
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3, "fontsize": 9}
        axis.legend(entries.values(), entries.keys(), frameon=False, **place)

    return figure_of((7.0, 4.2), path, draw)


def _line(axis: Axes, steps: Sequence[int], results: Sequence[Any], color: str, marker: str, name: str) -> None:
    x, y = np.asarray(steps), np.array([r.llc for r in results])
    axis.errorbar(x, y, yerr=[r.llc_stderr for r in results], color=color, capsize=3, lw=1.5)
    good = np.array([r.verdict in SETTLED for r in results])
    if good.any() or name:
        axis.plot(x[good], y[good], ls="", marker=marker, color=color, label=name or "LLC ± standard error")
    if not good.all():
        hollow = None if name else "LLC, not settled or no minimum"
        axis.plot(x[~good], y[~good], ls="", marker=marker, mfc="white", mec=color, label=hollow)
