"""The picture of ``invariance``: estimate over coefficient against the scale, a row a network, a column a method."""

import math
from pathlib import Path

import matplotlib
import matplotlib.lines
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "0.5"  # Okabe and Ito
TOP = 1.45  # of every panel; what lies above is drawn at the edge
OFF = 0.1  # from the exact coefficient: a verdict "converged" then misleads, and is marked
NAMES = {"linear": "linear 6-4-5", "relu": "ReLU 5-5-3"}


def draw(record: dict, path: Path) -> Figure:
    """Written to ``path``."""
    networks, methods = (list(dict.fromkeys(row[name] for row in record["rows"])) for name in ("network", "method"))
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2.7 * len(methods), 2.6 * len(networks) + 1.2), layout="constrained")
        axes = figure.subplots(len(networks), len(methods), sharex=True, sharey=True, squeeze=False)
        for i, network in enumerate(networks):
            for j, method in enumerate(methods):
                rows = [r for r in record["rows"] if (r["network"], r["method"]) == (network, method)]
                _panel(axes[i, j], rows)
                axes[0, j].set_title(method, fontsize=10)
                axes[-1, j].set_xlabel("s (layer 1 × s, layer 2 / s)")
            axes[i, 0].set_ylabel(f"{NAMES.get(network, network)}\nLLC estimate / exact value")
        figure.legend(*_key(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        figure.savefig(path, dpi=150)
    return figure


def _panel(axis: Axes, rows: list[dict]) -> None:
    scales = [10.0 ** row["exponent"] for row in rows]
    axis.axhline(1, color="black", lw=1, zorder=0)
    axis.plot(scales, [row["posterior_value"] / row["coefficient"] for row in rows], "--", color=GREY, lw=1.5)
    for row, s in zip(rows, scales, strict=True):
        _point(axis, row, s)
    axis.set(xscale="log", ylim=(0, TOP), xticks=[1e-4, 1e-2, 1, 1e2, 1e4])
    axis.minorticks_off()


def _point(axis: Axes, row: dict, s: float) -> None:
    """One estimate, or a mark at the top where there is no number, or one beyond the panel; see ``_key``."""
    if row["llc"] is None or not 0 <= row["llc"] / row["coefficient"] <= TOP:
        axis.plot(s, 0.97 * TOP, "x" if row["llc"] is None else "^", color=ORANGE, ms=7, mew=1.8, mfc="white")
        return
    value, error = (row["llc"] / row["coefficient"], (row["llc_stderr"] or math.nan) / row["coefficient"])
    look = {"fmt": "s", "color": ORANGE, "mfc": "white", "ms": 6}
    if row["verdict"] == "converged":
        far = abs(value - 1) > OFF
        look = {"fmt": "D" if far else "o", "color": PURPLE if far else BLUE, "ms": 6}
        look |= {"mec": "black"} if far else {}
    axis.errorbar(s, value, yerr=error, **look)


def _key() -> tuple[list, list[str]]:
    """Handles and labels of everything a panel can hold."""
    line = matplotlib.lines.Line2D
    found = {
        "exact: the same for every s": line([], [], color="black", lw=1),
        "what a perfect sampler would read": line([], [], color=GREY, ls="--", lw=1.5),
        "converged": line([], [], color=BLUE, marker="o", ls=""),
        f"converged, yet over {OFF:.0%} from exact": line([], [], color=PURPLE, marker="D", mec="black", ls=""),
        "another verdict": line([], [], color=ORANGE, marker="s", mfc="white", ls=""),
        "another verdict, beyond the panel": line([], [], color=ORANGE, marker="^", mfc="white", mew=1.8, ls=""),
        "every chain diverged": line([], [], color=ORANGE, marker="x", mew=1.8, ls=""),
    }
    return list(found.values()), list(found)
