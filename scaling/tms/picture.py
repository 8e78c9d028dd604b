"""The picture: columns of W at each stage, LLC and loss over training, one column of panels for each kind of run."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from scaling.tms.model import population_loss
from scaling.tms.polygons import DOUBLED, OF_FUNCTION, doubled, polygon
from scaling.tms.stages import ELSEWHERE

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.55"  # Okabe and Ito
SHADES = ("#dbe9f4", "#f7e6cf", "#dcefe2")
FLOOR, TOP = 0.0, 11.0  # of the LLC panel
LIMITS = (21.0, 7200.0)  # of the training step
WIDTH = 0.27  # of a drawing, in panels
SETTLED = ("converged", "depends on nbeta or localization")
NAMES = {"0++++++": "no columns", DOUBLED: "5-gon, one\nvertex twice"}


def draw(record: dict[str, Any], path: Path) -> Figure:
    """The first run of each family, written to ``path``."""
    families = record["families"]
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.3 * len(families), 7.2), layout="constrained")
        grid = figure.subplots(3, len(families), sharex="col", sharey="row", squeeze=False, height_ratios=(4, 6, 4))
        for column, family in enumerate(families):
            top, middle, lower = grid[:, column]
            run = family["runs"][0]
            top.set_title(f"{family['name']} (seed {run['seed']})", fontsize=10, fontweight="bold")
            _drawings(top, run)
            _llc(middle, run)
            _loss(lower, run)
            for axis in (top, middle, lower):
                _shade(axis, run)
        grid[1, 0].set_ylabel("local learning coefficient")
        grid[2, 0].set_ylabel("loss")
        figure.legend(handles=_legend(), loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, dpi=85)
    return figure


def _steps(run: dict[str, Any]) -> np.ndarray:
    return np.array([c["step"] for c in run["checkpoints"]])


def _edges(run: dict[str, Any], stage: dict[str, Any]) -> tuple[float, float]:
    """First and last step of a stage, each widened by half a checkpoint."""
    steps = _steps(run)
    wide = np.sqrt(steps[1:] * steps[:-1])
    edges = np.r_[steps[0] / 1.1, wide, steps[-1] * 1.1]
    return float(edges[stage["first"]]), float(edges[stage["last"] + 1])


def _shade(axis: Axes, run: dict[str, Any]) -> None:
    for stage, color in zip(_known(run), SHADES, strict=False):
        axis.axvspan(*_edges(run, stage), color=color, lw=0, zorder=0)


def _middle(run: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of a stage at which the weights are nearest to its k-gon."""
    some = run["checkpoints"][stage["first"] : stage["last"] + 1]
    return min(some, key=lambda c: c["nearest"]["distance"])


def _drawings(axis: Axes, run: dict[str, Any]) -> None:
    """Arrows for the columns of W, above each stage."""
    axis.set_axis_off()
    axis.set_ylim(0, 1)
    low, high = np.log(LIMITS)
    edges = np.log([_edges(run, stage) for stage in _known(run)])
    for stage, at in zip(_known(run), _apart((edges.mean(1) - low) / (high - low)), strict=True):
        small = axis.inset_axes((at - WIDTH / 2, 0.0, WIDTH, 0.74))
        checkpoint = _middle(run, stage)
        _arrows(small, checkpoint)
        name = NAMES.get(stage["label"], f"{stage['label'][0]}-gon")
        signs = "" if stage["label"] == DOUBLED else f" ({stage['label']})"
        axis.text(at, 0.78, f"{name}{signs}", transform=axis.transAxes, ha="center", va="bottom")


def _apart(places: np.ndarray) -> np.ndarray:
    """The same places, moved to be at least ``WIDTH`` from one another and inside the panel."""
    moved = np.clip(places, WIDTH / 2, 1 - WIDTH / 2)
    for _ in range(50):
        short = np.maximum(WIDTH - np.diff(moved), 0) / 2
        moved = np.clip(moved - np.r_[short, 0] + np.r_[0, short], WIDTH / 2, 1 - WIDTH / 2)
    return moved


def _known(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage for stage in run["stages"] if stage["label"] != ELSEWHERE]


def _arrows(axis: Axes, checkpoint: dict[str, Any]) -> None:
    w, b = np.array(checkpoint["W"]), np.array(checkpoint["b"])
    axis.add_patch(Circle((0, 0), 1, fill=False, color="0.7", ls=":", lw=1))
    for column, bias in zip(w.T, b, strict=True):
        long = np.hypot(*column) > 0.5
        color = BLUE if long else ORANGE if bias > 0 else "black"
        if np.hypot(*column) > 0.1:
            axis.annotate("", column, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 0,
                                                          "shrinkB": 0, "mutation_scale": 9})  # fmt: skip
        else:
            axis.plot(*column, "o", color=color, ms=3)
    axis.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    axis.set_axis_off()


def _llc(axis: Axes, run: dict[str, Any]) -> None:
    for stage in _known(run):
        truth = OF_FUNCTION.get(stage["label"])
        if truth is not None:
            start, end = _edges(run, stage)
            axis.plot((start, end), (truth, truth), color="black", lw=1.6, zorder=2)
            axis.annotate(f"{truth:g}", (end, truth), xytext=(-2, -12), textcoords="offset points", ha="right")
    for boundary in run["llc_stages"]["boundaries"]:
        axis.axvline(boundary["step"], color="0.25", ls="-.", lw=1.2)
    _points(axis, run, "own", BLUE, "o")
    _points(axis, run, "data", GREEN, "s")
    axis.set_ylim(FLOOR - 0.6, TOP)


def _points(axis: Axes, run: dict[str, Any], which: str, color: str, marker: str) -> None:
    """Estimates; hollow where the verdict warns, and at the frame where they lie beyond it."""
    steps = _steps(run)
    llc = np.array([np.nan if c[which]["llc"] is None else c[which]["llc"] for c in run["checkpoints"]])
    error = np.array([c[which]["llc_stderr"] or 0 for c in run["checkpoints"]])
    good = np.array([c[which]["verdict"] in SETTLED for c in run["checkpoints"]])
    below, above = llc < FLOOR, llc > TOP
    inside = ~(below | above)
    for chosen, face in ((good & inside, color), (~good & inside, "white")):
        style = {"fmt": marker, "color": color, "mfc": face, "ms": 5, "capsize": 2, "lw": 1}
        axis.errorbar(steps[chosen], llc[chosen], error[chosen], **style)
    axis.plot(steps[below], np.full(below.sum(), FLOOR - 0.2), "v", color=color, mfc="white", ms=5)
    axis.plot(steps[above], np.full(above.sum(), TOP - 0.2), "^", color=color, mfc="white", ms=5)


def _loss(axis: Axes, run: dict[str, Any]) -> None:
    axis.plot(_steps(run), [c["loss"] for c in run["checkpoints"]], color=ORANGE, marker=".", lw=1.4)
    for stage in _known(run):
        start, end = _edges(run, stage)
        axis.plot((start, end), [_ideal_loss(stage["label"])] * 2, color="black", ls=":", lw=1.4)
    axis.set(xscale="log", yscale="log", xlabel="training step", xlim=LIMITS, ylim=(0.04, 0.35))
    axis.set_yticks([0.05, 0.1, 0.2, 0.3], ["0.05", "0.1", "0.2", "0.3"])
    axis.set_yticks([], minor=True)
    axis.set_xticks([30, 100, 300, 1000, 3000], ["30", "100", "300", "1,000", "3,000"])
    axis.set_xticks([], minor=True)


def _ideal_loss(label: str) -> float:
    at = doubled() if label == DOUBLED else polygon(int(label[0]), label.count("+"))
    return population_loss(at.w, at.b)


def _legend() -> list[Line2D]:
    line, point = {"color": "black"}, {"ls": "", "ms": 5}
    return [
        Line2D([], [], color=BLUE, marker="o", **point, label="LLC of the network's own function"),
        Line2D([], [], color=GREEN, marker="s", **point, label="LLC of the loss on the data"),
        Line2D([], [], color=GREEN, marker="v", mfc="white", **point, label="below 0: not a minimum"),
        Line2D([], [], color=BLUE, marker="^", mfc="white", **point, label=f"above {TOP:g}: chains left"),
        Line2D([], [], lw=1.6, **line, label="exact LLC"),
        Line2D([], [], color="0.25", ls="-.", lw=1.2, label="jump found in the blue curve"),
        Line2D([], [], color=ORANGE, marker=".", lw=1.4, label="loss"),
        Line2D([], [], ls=":", lw=1.4, **line, label="loss of the exact k-gon"),
        Line2D([], [], color=BLUE, lw=1.6, label="top: columns of W (circle: length 1)"),
        Line2D([], [], color=ORANGE, marker="o", **point, label="short column, open unit"),
        Line2D([], [], marker="o", **line, **point, label="short column, dead unit"),
    ]
