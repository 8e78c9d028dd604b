"""Size, fonts, colours, markers and legend of all pictures. Markers keep lines distinct without colours."""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")  # Okabe and Ito
MARKERS = "osD^vP*X"


class Picture(Figure):
    """A figure that a notebook shows by itself, without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()


def figure_of(size: tuple[float, float], path: str | os.PathLike | None, draw: Callable[[Figure], None]) -> Figure:
    """A figure of ``size`` (inches) with what ``draw`` puts on it, written to ``path`` if that is given."""
    with matplotlib.rc_context(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.8}
    ):
        figure = Picture(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        if path is not None:
            try:
                figure.savefig(path, dpi=150)
            except OSError as error:
                text = f"could not write {os.fspath(path)}: {error.strerror or error}"
                raise (OSError(text) if error.errno is None else OSError(error.errno, text)) from error
    return figure


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int, more: Sequence[Any] = ()) -> None:
    """One legend below the picture, with each label of ``axes`` and of the handles ``more`` once."""
    handles: dict[Any, Any] = {text: h for a in axes for h, text in zip(*a.get_legend_handles_labels(), strict=True)}
    handles |= {h.get_label(): h for h in more}
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": 9, "handlelength": 1.8}
    figure.legend(handles.values(), handles.keys(), frameon=False, **place)
