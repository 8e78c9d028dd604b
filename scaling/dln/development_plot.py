"""The picture of ``development``: loss, LLC of the network's own function, and what the true labels give."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito


def draw(record: dict, path: Path) -> Figure:
    """Three panels over the training step, written to ``path``."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 9), layout="constrained")
        upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(2, 3, 2))
        for axis in (upper, middle, lower):
            for known in record["plateaus"]:
                axis.axvspan(*known["steps"], color="0.94", lw=0, zorder=0)
        _losses(upper, record)
        _own(middle, record)
        _labels(lower, record)
        settings = record["settings"]
        widths = "-".join(map(str, settings["widths"]))
        figure.suptitle(
            f"A deep linear network, {widths}, learns rank by rank "
            f"(nbeta {settings['nbeta']:,.0f}, localization {settings['localization']:g})",
            fontsize=11,
        )
        figure.savefig(path, dpi=150)
    return figure


def _losses(axis: Axes, record: dict) -> None:
    axis.plot(record["history"]["step"], record["history"]["loss"], color=ORANGE, lw=1.5)
    for known in record["plateaus"][:-1]:
        axis.axhline(known["loss"], color="black", ls=":", lw=1)
    for known in record["plateaus"]:
        start, end = known["steps"]
        at = ((start * end) ** 0.5, 1.02)
        axis.annotate(f"rank {known['rank']}", at, xycoords=("data", "axes fraction"), ha="center", fontsize=9)
    first, last = (record["history"]["step"][i] for i in (0, -1))
    axis.set(xscale="log", xlim=(0.9 * first, 1.3 * last), yscale="log", ylim=(0.01, 30))
    axis.set_ylabel("loss (nats per example)")
    key = "shaded: on a plateau; dotted: its exact loss"
    axis.text(0.03, 0.06, key, transform=axis.transAxes, fontsize=9)


def _points(axis: Axes, record: dict, which: str, color: str, name: str) -> None:
    """Estimates with error bars; filled where the verdict is "converged", hollow elsewhere."""
    rows = [row for row in record["checkpoints"] if row[which]["llc"] is not None]
    for good in (True, False):
        some = [row for row in rows if (row[which]["verdict"] == "converged") == good]
        if some:
            verdicts = sorted({row[which]["verdict"] for row in some}, reverse=True)
            axis.errorbar(
                [row["step"] for row in some], [row[which]["llc"] for row in some],
                yerr=[row[which]["llc_stderr"] or 0 for row in some], fmt="o", color=color, ms=6, capsize=3, lw=1.2,
                mfc=color if good else "white", label=f"{name}: {' or '.join(verdicts)}",
            )  # fmt: skip


def _own(axis: Axes, record: dict) -> None:
    for known in record["plateaus"]:
        start, end = known["steps"]
        label = "exact (Aoyagi's theorem)" if known["rank"] == 0 else None
        axis.plot((start, end), [known["exact"]] * 2, color="black", lw=2, label=label, zorder=1)
        name, at = f"{known['exact']:g}", (end, known["exact"])
        axis.annotate(name, at, xytext=(0, 5), textcoords="offset points", ha="right", fontsize=9)
    _points(axis, record, "own", BLUE, "estimate")
    rows = [row for row in record["checkpoints"] if "hmc" in row]
    axis.errorbar(
        [row["step"] for row in rows], [row["hmc"]["llc"] for row in rows],
        yerr=[row["hmc"]["llc_stderr"] for row in rows], fmt="D", color=ORANGE, mfc="none", ms=9, capsize=5, lw=1.2,
        label="HMC on the same posterior, one on each plateau",
    )  # fmt: skip
    axis.set_ylabel("LLC of the network's own function")
    axis.legend(frameon=False, loc="upper left", fontsize=9)


def _labels(axis: Axes, record: dict) -> None:
    axis.axhline(0, color="0.6", lw=1)
    end, loss = record["plateaus"][-1]["exact"], np.array(record["history"]["loss"])
    axis.plot(
        record["history"]["step"], end - record["settings"]["nbeta"] * loss, color="black", lw=1,
        label=f"{end:g} - nbeta × loss: the chains ran to the true minimum",
    )  # fmt: skip
    _points(axis, record, "labels", GREEN, "true labels")
    axis.set_yscale("symlog", linthresh=100)
    axis.set(ylabel="nbeta × mean loss gap\nwith the true labels", xlabel="training step", ylim=(-4e5, 1e4))
    axis.set_xticks([300, 1000, 3000, 10_000], ["300", "1,000", "3,000", "10,000"])
    axis.legend(frameon=False, loc="upper left", fontsize=9)
