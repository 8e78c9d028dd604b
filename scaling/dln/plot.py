"""Pictures and Markdown tables of the results of ``run``.

    python -m scaling.dln.plot RESULTS.jsonl [MORE.jsonl ...] --out scaling/dln/results

Pictures: ``truth.png`` (estimate against truth), ``errors.png`` (relative error by class and type), ``order.png``
(couples of teachers that the estimates rank right), ``protocols.png`` (the published protocol's error beside ours,
teacher by teacher), and ``curve.png`` (type A along nbeta) where there are rows of the exact sampler, which the others
leave out. The tables go to standard output.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from scaling.dln.curve import curve_picture, curve_rows, curve_table
from scaling.dln.records import ranked_right, read_rows, relative_errors
from scaling.dln.tables import Group, Row, against_local, grouped, table

# Okabe and Ito's colours, apart for the colour-blind; markers and greys keep them apart in print
STYLE = {
    "A": ("#D55E00", "o", "A: every layer of the same low rank"),
    "B": ("#0072B2", "s", "B: full rank"),
    "C": ("#009E73", "^", "C: one reduced layer"),
    "published": ("#CC79A7", "D", "published recipe, where the truth is known"),
}
PUBLISHED = "published"
LOOK = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200}


def known(rows: Sequence[Row]) -> list[Row]:
    """The rows whose local learning coefficient is known and whose estimate is finite."""
    return [r for r in rows if r["bounds"][0] == r["bounds"][1] and r["llc"] is not None and math.isfinite(r["llc"])]


def by_method(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Whatever else differs in their settings."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.method.split(" (")[0], []).append(group)
    return found


def _scatter(axis: plt.Axes, groups: Sequence[Group]) -> None:
    for group in groups:
        rows = [r for r in known(group.rows) if r["llc"] > 0]
        color, marker, _ = STYLE[group.kind]
        truth, llc = [r["bounds"][0] for r in rows], [r["llc"] for r in rows]
        error = [2 * (r["llc_stderr"] or 0.0) for r in rows]
        axis.errorbar(truth, llc, error, color=color, marker=marker, ms=4, mfc="none", ls="", lw=0.8)


def truth_picture(groups: Sequence[Group]) -> Figure:
    """Estimate against truth, a panel for each method."""
    panels = by_method(groups)
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1 + 4 * len(panels), 4.2),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    truths = [r["truth"] for g in groups for r in known(g.rows)] or [1.0]
    ends = [min(truths) / 1.5, max(truths) * 1.5]
    for axis, (method, mine) in zip(axes[0], panels.items(), strict=True):
        axis.plot(ends, ends, color="0.6", lw=1, zorder=0)
        _scatter(axis, mine)
        axis.set(xscale="log", yscale="log", title=method, xlabel="exact local learning coefficient (dimensionless)")
    axes[0, 0].set_ylabel("estimate ± 2 standard errors (dimensionless)")
    _legend(axes[0, 0], groups)
    return figure


def _legend(axis: plt.Axes, groups: Sequence[Group], where: str | tuple[float, float] = "best") -> None:
    for kind in dict.fromkeys(g.kind for g in groups):
        color, marker, text = STYLE[kind]
        axis.plot([], [], color=color, marker=marker, mfc="none", ls="", label=text)
    axis.legend(frameon=False, fontsize=8, loc=where)


def _places(groups: Sequence[Group]) -> tuple[list[str], dict[str, int]]:
    sizes = list(dict.fromkeys(g.size for g in groups))
    return sizes, {size: i for i, size in enumerate(sizes)}


def _by_class(groups: Sequence[Group], label: str) -> tuple[Figure, np.ndarray, dict[str, int]]:
    """A panel for each method, classes along the bottom."""
    panels, (sizes, place) = by_method(groups), _places(groups)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1 + 3.6 * len(panels), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, method in zip(axes[0], panels, strict=True):
        axis.set(title=method, xlabel="class (weights)", xlim=(-0.6, len(sizes) - 0.4))
        axis.set_xticks(range(len(sizes)), sizes)
    axes[0, 0].set_ylabel(label)
    return figure, axes[0], place


def _offset(kind: str) -> float:
    return 0.2 * (list(STYLE).index(kind) - 1.5)


def error_picture(groups: Sequence[Group]) -> Figure:
    """Relative error of every teacher, and each group's median."""
    figure, axes, place = _by_class(groups, "|estimate / truth - 1| (%)")
    for axis, mine in zip(axes, by_method(groups).values(), strict=True):
        for group in mine:
            sizes = 100 * np.abs(relative_errors(against_local(group.rows)))
            if not sizes.size:
                continue
            color, marker, _ = STYLE[group.kind]
            x = place[group.size] + _offset(group.kind)
            axis.plot([x] * len(sizes), sizes, color=color, marker=marker, mfc="none", ms=3.5, ls="", alpha=0.7)
            axis.plot([x - 0.09, x + 0.09], [np.median(sizes)] * 2, color="black", lw=2)
        axis.set_yscale("log")
    _legend(axes[0], groups, (0.3, 0.12))
    return figure


def order_picture(groups: Sequence[Group]) -> Figure:
    """Share of the couples of teachers of a group that the estimates put in the right order."""
    figure, axes, place = _by_class(groups, "couples of teachers ranked right (%)")
    shares = {(g.size, g.kind, g.method): 100 * ranked_right(against_local(g.rows)) for g in groups}
    lowest = min([50.0, *(x for x in shares.values() if math.isfinite(x))])
    for axis, mine in zip(axes, by_method(groups).values(), strict=True):
        for group in mine:
            color, marker, _ = STYLE[group.kind]
            x = place[group.size] + _offset(group.kind)
            axis.plot(x, shares[group[:3]], color=color, marker=marker, ms=7, ls="")
        axis.axhline(50, color="0.6", lw=1, ls=":")
        axis.set_ylim(lowest - 5, 102)
    axes[0].text(0.02, 51, "chance", transform=axes[0].get_yaxis_transform(), color="0.4", fontsize=8)
    _legend(axes[0], groups, (0.3, 0.12))
    return figure


def protocol_pairs(groups: Sequence[Group], ours: str) -> dict[str, list[tuple[float, float]]]:
    """By type: (our error, the published protocol's) of the teachers that both have, the truth being known."""
    errors: dict[str, dict[tuple, float]] = {PUBLISHED: {}, ours: {}}
    for group in groups:
        if group.method in errors:
            for row in known(group.rows):
                errors[group.method][group.size, group.kind, row["seed"]] = abs(row["llc"] / row["bounds"][0] - 1)
    found: dict[str, list[tuple[float, float]]] = {}
    for teacher in errors[PUBLISHED].keys() & errors[ours].keys():
        found.setdefault(teacher[1], []).append((errors[ours][teacher], errors[PUBLISHED][teacher]))
    return found


def protocol_picture(groups: Sequence[Group], ours: str) -> Figure:
    """The published protocol's relative error against ours; above the line ours is nearer."""
    figure, axis = plt.subplots(figsize=(4.8, 4.4), layout="constrained")
    for kind, pairs in sorted(protocol_pairs(groups, ours).items()):
        color, marker, text = STYLE[kind]
        x, y = 100 * np.array(pairs).T
        axis.plot(x, y, color=color, marker=marker, mfc="none", ms=4.5, ls="", label=text)
    axis.axline((1, 1), slope=1, color="0.6", lw=1, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel=f"error of {ours} (%)", ylabel="error of the published protocol (%)")
    axis.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder for the pictures; without it only the tables")
    parser.add_argument("--ours", default="default", help="the method that stands beside the published protocol")
    args = parser.parse_args()
    rows = [row for file in args.files for row in read_rows(file)[0]]
    curve = curve_rows(rows)
    groups = grouped(row for row in rows if (row["request"]["sampler"], row["kind"]) != ("gibbs", "A"))
    if groups:
        print(table(groups))
    if curve:
        print(f"\n{curve_table(curve)}")
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(LOOK):
        draw([g for g in groups if g.rows[0]["request"]["sampler"] != "gibbs"], args.out, args.ours)
        if curve:
            save(curve_picture(curve), args.out / "curve.png")


def draw(groups: Sequence[Group], folder: Path, ours: str) -> None:
    """All pictures, as PNG files."""
    if not groups:
        return
    pictures = {"truth": truth_picture(groups), "errors": error_picture(groups), "order": order_picture(groups)}
    if protocol_pairs(groups, ours):
        pictures["protocols"] = protocol_picture(groups, ours)
    for name, figure in pictures.items():
        save(figure, folder / f"{name}.png")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
