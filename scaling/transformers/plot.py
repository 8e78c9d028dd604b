"""Pictures of the rows of ``run``.

    python -m scaling.transformers.plot scaling/transformers/results/rows.jsonl --out scaling/transformers/results

``resolved.png``: the share of the truth that the quadratic posterior holds, along the ratio of nbeta to localization.
``order.png``: couples of teachers that it ranks right. ``estimates.png``: estimates of the samplers against the truth.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from scaling.dln.records import ranked_right, read_rows
from scaling.transformers.spectrum import RATIOS
from scaling.transformers.tables import Row, by, name_of, sampled, spectra

LOOK = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 160}
SETTINGS = {"nβ 30,\nlocalization 300": 0.1, "n / log n,\nlocalization 1": 82.0}


def _axis(label: str) -> tuple[Figure, plt.Axes]:
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axis.set(xscale="log", xlabel="nβ / localization (weight²)", ylabel=label, xlim=(1e-3, 1e16))
    return figure, axis


def resolved_picture(rows: Sequence[Row]) -> Figure:
    """Medians over the teachers of each layout, and the range over all teachers."""
    figure, axis = _axis("value of the quadratic posterior / truth (%)")
    every = 100 * np.array([np.asarray(r["values"]) / r["truth"] for r in rows])
    axis.fill_between(RATIOS, every.min(0), every.max(0), color="0.9", lw=0)
    lines = plt.get_cmap("tab10").colors
    for i, (layout, mine) in enumerate(by(rows, lambda r: r["layout"]).items()):
        middle = 100 * np.median([np.asarray(r["values"]) / r["truth"] for r in mine], axis=0)
        axis.plot(RATIOS, middle, color=lines[i % 10], ls="-" if i % 2 else "--", lw=1.4, label=layout)
    for name, ratio in SETTINGS.items():
        axis.axvline(ratio, color="0.4", lw=0.8, ls=":")
        axis.text(ratio * 1.3, 101, name, fontsize=7, color="0.3", va="bottom")
    axis.axhline(95, color="0.6", lw=0.8)
    axis.legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def order_picture(rows: Sequence[Row]) -> Figure:
    figure, axis = _axis("couples of teachers ranked right (%)")
    values = np.array([r["values"] for r in rows])
    truths = [r["truth"] for r in rows]
    axis.plot(
        RATIOS, [100 * ranked_right(list(zip(truths, v, strict=True))) for v in values.T], "k-", label="all layouts"
    )
    lines = plt.get_cmap("tab10").colors
    for i, (layout, mine) in enumerate(by(rows, lambda r: r["layout"]).items()):
        own = np.array([r["values"] for r in mine])
        shares = [100 * ranked_right([(r["truth"], x) for r, x in zip(mine, v, strict=True)]) for v in own.T]
        axis.plot(RATIOS, shares, color=lines[i % 10], ls="-" if i % 2 else "--", lw=0.9, label=layout)
    axis.axhline(50, color="0.6", lw=0.8, ls=":")
    axis.legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def estimates_picture(rows: Sequence[Row]) -> Figure:
    figure, axis = plt.subplots(figsize=(6.4, 5), layout="constrained")
    truths = [r["truth"] for r in rows]
    axis.plot([min(truths), max(truths)], [min(truths), max(truths)], color="0.6", lw=1)
    for i, (name, mine) in enumerate(by(rows, name_of).items()):
        axis.errorbar([r["truth"] for r in mine], [r["llc"] for r in mine], [2 * (r["llc_stderr"] or 0) for r in mine],
                      ls="", marker="osD^vPX*"[i % 8], ms=4, mfc="none", lw=0.8, label=name)  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel="exact local learning coefficient", ylabel="estimate ± 2 standard errors"
    )
    axis.legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="1K")
    args = parser.parse_args()
    rows = [row for file in args.files for row in read_rows(file)[0] if row["size"] == args.size]
    pictures = {"resolved": resolved_picture, "order": order_picture}
    with matplotlib.rc_context(LOOK):
        for name, draw in pictures.items() if spectra(rows) else ():
            _save(draw(spectra(rows)), args.out / f"{name}.png")
        if found := [r for r in sampled(rows) if r["llc"] is not None and r["llc"] > 0]:
            _save(estimates_picture(found), args.out / "estimates.png")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
