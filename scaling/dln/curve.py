"""Type A along nbeta: the posterior's own value by the exact sampler, and the rank that nbeta resolves.

``plot`` draws ``curve.png`` and prints the table from the rows of ``run --sampler gibbs``.
"""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from scaling.dln.records import errors_of
from scaling.dln.teachers import SIZES

Row = dict
HEAD = (
    "| class | nbeta | teachers | median error | 90th percentile | pairs right | all of W*'s rank resolved "
    "| median distance to the resolved rank's coefficient | converged |\n|---|---|---|---|---|---|---|---|---|"
)
SHADES = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#CC79A7", "#D55E00")
MARKS = "o^sDvP"


def curve_rows(rows: Iterable[Row]) -> list[Row]:
    """Estimates of the exact sampler at teachers of type A."""
    return [r for r in rows if r["request"]["sampler"] == "gibbs" and r["kind"] == "A" and r["llc"] is not None]


def levels(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """(class, nbeta) that occur, classes in order and nbeta rising."""
    return sorted({(r["class"], r["nbeta"]) for r in rows}, key=lambda x: (list(SIZES).index(x[0]), x[1]))


def at(rows: Sequence[Row], size: str, nbeta: float | None = None) -> list[Row]:
    return [r for r in rows if r["class"] == size and nbeta in (None, r["nbeta"])]


def curve_table(rows: Sequence[Row]) -> str:
    """One line for each class and nbeta. An error is |estimate / truth - 1|."""
    lines = [HEAD]
    for size, nbeta in levels(rows):
        mine = at(rows, size, nbeta)
        found = errors_of([(r["truth"], r["llc"]) for r in mine])
        away = np.median([abs(r["llc"] / r["resolved"] - 1) for r in mine])
        whole = sum(r["resolved_rank"] == r["rank"] for r in mine)
        said = sum(r["verdict"] == "converged" for r in mine)
        lines.append(
            f"| {size} | {nbeta:.0e} | {found.count} | {found.median:.1%} | {found.ninetieth:.1%} | {found.ranked:.1%} "
            f"| {whole} | {away:.1%} | {said} |"
        )
    return "\n".join(lines)


def _curves(axis: plt.Axes, rows: Sequence[Row], size: str) -> None:
    for seed in sorted({r["seed"] for r in at(rows, size)}):
        mine = sorted((r["nbeta"], r["llc"] / r["truth"]) for r in at(rows, size) if r["seed"] == seed)
        axis.plot(*zip(*mine, strict=True), color="#D55E00", lw=0.7, marker="o", ms=2.5, alpha=0.6)
    steps = [nbeta for s, nbeta in levels(rows) if s == size]
    for name, style in (("llc", "-"), ("resolved", ":")):
        middle = [np.median([r[name] / r["truth"] for r in at(rows, size, nbeta)]) for nbeta in steps]
        axis.plot(steps, middle, color="black", lw=2, ls=style)
    axis.axhline(1, color="0.6", lw=1, zorder=0)
    axis.set(xscale="log", xlabel="nβ (dimensionless)", title=f"class {size}, type A", ylim=(0, 1.15))


def _against_resolved(axis: plt.Axes, rows: Sequence[Row]) -> None:
    for i, nbeta in enumerate(sorted({r["nbeta"] for r in rows})):
        mine = [r for r in rows if r["nbeta"] == nbeta]
        axis.plot(
            [r["resolved"] / r["truth"] for r in mine], [r["llc"] / r["truth"] for r in mine], MARKS[i % len(MARKS)],
            color=SHADES[i % len(SHADES)], mfc="none", ms=4.5, label=f"nβ = {nbeta:.0e}",
        )  # fmt: skip
    axis.axline((0, 0), slope=1, color="0.6", lw=1, zorder=0)
    axis.set(
        xlabel="coefficient of the rank that nβ resolves / exact", title="what nβ resolves", xlim=(0, 1.15),
        ylim=(0, 1.15), aspect="equal",
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def curve_picture(rows: Sequence[Row]) -> Figure:
    """Estimate over exact value along nbeta, a panel a class; and against the coefficient of the resolved rank."""
    sizes = list(dict.fromkeys(size for size, _ in levels(rows)))
    columns, lines = min(3, len(sizes) + 1), -(-(len(sizes) + 1) // 3)
    figure = plt.figure(figsize=(1 + 3.4 * columns, 3.8 * lines), layout="constrained")
    axes = [figure.add_subplot(lines, columns, i + 1) for i in range(len(sizes) + 1)]
    for axis, size in zip(axes, sizes, strict=False):
        _curves(axis, rows, size)
    for axis in axes[::columns]:
        axis.set_ylabel("estimate / exact coefficient")
    axes[0].plot([], [], color="#D55E00", lw=0.7, marker="o", ms=2.5, label="a teacher")
    axes[0].plot([], [], color="black", lw=2, label="median")
    axes[0].plot([], [], color="black", lw=2, ls=":", label="median of the resolved rank's coefficient")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    _against_resolved(axes[-1], rows)
    return figure
