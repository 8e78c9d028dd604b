"""Pictures: loss traces, and the LLC over training."""

import os
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito


def _figure(size: tuple[float, float], path: str | os.PathLike | None, draw) -> Figure:
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        if path is not None:
            figure.savefig(path, dpi=150)
    return figure


def plot_result(result: Any, path: str | os.PathLike | None = None) -> Figure:
    """Loss by chain with the warm-up shaded, and below it the running estimate with its final error bar."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
        warm, thin = result.settings["num_warmup"], result.settings["thinning"]
        steps = warm + thin * (1 + np.arange(result.loss_trace.shape[1])) - 1
        for c, (before, after) in enumerate(zip(result.warmup_loss, result.loss_trace, strict=True)):
            color = _COLORS[c % len(_COLORS)]
            upper.plot(np.r_[np.arange(warm), steps], np.r_[before, after], color=color, lw=0.6, alpha=0.8)
        if warm:
            upper.axvspan(0, warm, color="0.9", zorder=0, label="warm-up")
        upper.axhline(result.init_loss, color="black", ls="--", lw=1, label="loss at w*")
        upper.set(ylabel="minibatch loss (nats per example)", xlabel="step")
        upper.set_title(f"LLC {result.estimate_text('±')}: {result.verdict}")
        upper.legend(frameon=False, loc="upper right")
        if result.llc_draws.size:
            mean = result.llc_draws.mean(0)
            lower.plot(steps, np.cumsum(mean) / np.arange(1, mean.size + 1), color=_COLORS[0])
            band = (result.llc - result.llc_stderr, result.llc + result.llc_stderr)
            lower.axhspan(*band, color=_COLORS[1], alpha=0.25, lw=0, label="estimate ± standard error")
            lower.legend(frameon=False)
        lower.set(ylabel="running LLC", xlabel="step")

    return _figure((7.0, 5.5), path, draw)


def plot_training(
    steps: list[int], losses: list[float], results: list[Any], path: str | os.PathLike | None = None
) -> Figure:
    """LLC with error bars and loss over training steps; hollow markers are estimates whose chains have not settled."""

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        right = axis.twinx()
        x, y = np.asarray(steps), np.array([r.llc for r in results])
        axis.errorbar(x, y, yerr=[r.llc_stderr for r in results], color=_COLORS[0], capsize=3, lw=1.5)
        good = np.array([r.verdict in ("converged", "depends on nbeta or localization") for r in results])
        axis.plot(x[good], y[good], "o", color=_COLORS[0], label="LLC ± standard error")
        if not good.all():
            axis.plot(x[~good], y[~good], "o", mfc="white", mec=_COLORS[0], label="LLC, chains not settled")
        right.plot(x, losses, "s--", color=_COLORS[1], lw=1.2, ms=4, label="loss")
        right.spines["right"].set_visible(True)
        axis.set(xscale="log", xlabel="training step")
        axis.set_ylabel("local learning coefficient", color=_COLORS[0])
        right.set_ylabel("loss (nats per byte)", color=_COLORS[1])
        handles = [h for a in (axis, right) for h in a.get_legend_handles_labels()[0]]
        labels = [t for a in (axis, right) for t in a.get_legend_handles_labels()[1]]
        axis.legend(handles, labels, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return _figure((7.0, 4.2), path, draw)
