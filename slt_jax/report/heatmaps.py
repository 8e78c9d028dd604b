"""Heat maps: the LLC over a sweep's grid, and refined LLCs over layers and heads."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from slt_jax.report.style import figure_of, legend_below
from slt_jax.results.plateau import GridReading
from slt_jax.results.text import MARK, MARKED

if TYPE_CHECKING:
    import xarray as xr

CMAP = matplotlib.colormaps["cividis"]
_CELL = (0.66, 0.5)  # inches
_HATCH = {"fc": "white", "ec": "0.55", "hatch": "////", "lw": 0}
_RING = {"ec": "#D55E00", "lw": 3.0, "joinstyle": "round"}
_DASHES = {"ec": "black", "lw": 1.8, "ls": (0, (4, 2))}
_PLATEAU = "plateau: estimates agree"
_HEAD = re.compile(r"layer (\d+) head (\d+)")


class _Cells(NamedTuple):
    """Estimates on a grid, NaN where they are not finite. ``warned``: not converged. ``absent``: not run."""

    values: Float[np.ndarray, "row column"]
    errors: Float[np.ndarray, "row column"]
    warned: Bool[np.ndarray, "row column"]
    absent: Bool[np.ndarray, "row column"]


def colour_range(values: Float[np.ndarray, "*cells"]) -> tuple[Normalize, str, bool]:
    """(norm, which of its limits values exceed, whether it is logarithmic).

    The range is robust against outliers: it extends from the 5th to the 95th percentile, and on to the smallest or
    largest value if that is no further away than the width of this interval.
    """
    finite = np.sort(values[np.isfinite(values)])
    if not finite.size:
        return Normalize(0, 1), "neither", False
    log = bool(finite[0] > 0 and np.quantile(finite, 0.9) > 10 * np.quantile(finite, 0.1))
    x = np.log(finite) if log else finite
    low, high = (x[0], x[-1]) if x.size < 4 else (x[math.ceil(0.05 * (x.size - 1))], x[int(0.95 * (x.size - 1))])
    width = high - low or 0.02 * abs(high) or 1.0
    low, high = (x[0] if x[0] >= low - width else low), (x[-1] if x[-1] <= high + width else high)
    if high == low:
        low, high = low - width / 2, high + width / 2
    extend = [["neither", "max"], ["min", "both"]][int(x[0] < low)][int(x[-1] > high)]
    return (LogNorm(math.exp(low), math.exp(high)) if log else Normalize(low, high)), extend, log


def _draw_cells(axis: Axes, cells: _Cells, norm: Normalize, up: int = 1) -> None:
    """Coloured cells with their estimate, and below it the error if there is room; hatched if it is not finite.

    ``up``: 1 if rows are drawn upwards, -1 if downwards.
    """
    rows, columns = cells.values.shape
    x, y = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
    axis.pcolormesh(x, y, np.ma.masked_invalid(cells.values), cmap=CMAP, norm=norm, edgecolors="white", lw=1)
    for row, column in np.argwhere(~cells.absent):
        value, error = float(cells.values[row, column]), float(cells.errors[row, column])
        if not math.isfinite(value):
            axis.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, **_HATCH))
            continue
        with_error = columns <= 12 and math.isfinite(error)
        middle: dict[str, Any] = {"color": text_colour(CMAP(float(norm(value)))), "ha": "center", "va": "center"}
        number = f"{short_number(value)}{MARK * bool(cells.warned[row, column])}"
        axis.text(column, row + up * 0.13 * with_error, number, fontsize=9, **middle)
        if with_error:
            axis.text(column, row - up * 0.24, f"±{short_number(error, 2)}", fontsize=7, **middle)
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(-0.5, rows - 0.5)[::up])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def short_number(x: float, digits: int = 3) -> str:
    """A number in few characters: 1e-5, 0.25, 1234."""
    if x and not 1e-3 < abs(x) < 1e5:
        first, power = f"{x:.{digits - 1}e}".split("e")
        return f"{float(first):g}e{int(power)}"
    return f"{x:.0f}" if abs(x) >= 10**digits else f"{x:.{digits}g}"


def text_colour(rgba: tuple[float, ...]) -> str:
    """Black or white, whichever has the higher contrast (WCAG 2) on ``rgba``."""
    luminance = float(np.dot(np.asarray(rgba[:3]) ** 2.2, (0.2126, 0.7152, 0.0722)))
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def _legend_entries(cells: Sequence[_Cells]) -> list[Any]:
    """Legend entries for the hatch and the mark of what has not converged, if they occur."""
    mark = Line2D([], [], color="black", marker=f"${MARK}$", ms=6, ls="", label=MARKED.removeprefix(f"{MARK} "))
    hatched = any((~np.isfinite(c.values) & ~c.absent).any() for c in cells)
    some = any((c.warned & np.isfinite(c.values)).any() for c in cells)
    return [Patch(**_HATCH, label="diverged")] * hatched + [mark] * some


def _outline(axis: Axes, columns: tuple[int, int], rows: tuple[int, int], inset: float, **style: Any) -> None:
    """A rectangle around the cells between first and last ``columns`` and ``rows``, with a white edge."""
    wide, high = (last - first + 1 - 2 * inset for first, last in (columns, rows))
    white = [withStroke(linewidth=style["lw"] + 2, foreground="white")]
    more = {"fill": False, "clip_on": False, "zorder": 5, "path_effects": white, **style}
    axis.add_patch(Rectangle((columns[0] - 0.5 + inset, rows[0] - 0.5 + inset), wide, high, **more))


def plot_sweep(
    dataset: "xr.Dataset", reading: GridReading | None = None, path: str | os.PathLike | None = None
) -> Figure:
    """Heat maps of a sweep: step size across, localization upwards, a panel for each nbeta, one colour bar for all.

    Args:
        dataset: dimensions (nbeta, localization, step_size), variables llc, llc_stderr, verdict, diverged.
        reading: its recommended cell and its plateaus are outlined.
        path: the picture is written there if it is given.
    """
    data = dataset.transpose("nbeta", "localization", "step_size")
    values = np.where(np.asarray(data["diverged"], bool), np.nan, np.asarray(data["llc"], float))
    warned = np.asarray(data["verdict"], str) != "converged"
    errors = np.asarray(data["llc_stderr"], float)
    panels = [_Cells(*layers, np.zeros_like(layers[2])) for layers in zip(values, errors, warned, strict=True)]
    norm, extend, log = colour_range(values)
    _, rows, columns = values.shape
    width, height = max(2.2, columns * _CELL[0]) + 0.2, rows * _CELL[1] + 1.0
    across = max(1, min(len(panels), int(10 / width)))
    down = math.ceil(len(panels) / across)

    def draw(figure: Figure) -> None:
        axes = np.ravel(figure.subplots(down, across, squeeze=False, sharey=True))
        drawn = set()
        for nbeta, cells, axis in zip(data["nbeta"].values, panels, axes, strict=False):
            _draw_cells(axis, cells, norm)
            drawn |= _draw_reading(axis, reading, float(nbeta), data)
            steps, pulls = ([short_number(x) for x in data[name].values] for name in ("step_size", "localization"))
            axis.set_xticks(range(columns), steps, rotation=35, ha="right")
            axis.set_yticks(range(rows), pulls)
            axis.set_xlabel("step size")
        for axis in axes[::across]:
            axis.set_ylabel("localization")
        for axis in axes[len(panels) :]:
            axis.remove()
        styles = {"recommended": _RING, _PLATEAU: _DASHES}
        marks = [Patch(fc="white", label=name, **style) for name, style in styles.items() if name in drawn]
        legend_below(figure, (), 4 if across * width > 5 else 2, [*marks, *_legend_entries(panels)])
        figure.suptitle("LLC ± standard error over a sweep", fontweight="bold")
        if np.isfinite(values).any():
            _colour_bar(figure, axes[: len(panels)], norm, extend, log)

    return figure_of((across * width + 1.6, max(3.0, down * height + 0.8)), path, draw)


def _colour_bar(figure: Figure, axes: Any, norm: Normalize, extend: str, log: bool) -> None:
    label = "LLC (log scale)" if log else "LLC"
    bar = figure.colorbar(ScalarMappable(norm, CMAP), ax=list(axes), extend=extend, label=label, pad=0.02)
    if log:
        ticks = np.outer(10.0 ** np.arange(-12, 13), (1, 2, 5)).ravel()
        ticks = ticks[(norm(ticks) >= 0) & (norm(ticks) <= 1)]
        bar.set_ticks(ticks.tolist(), labels=[short_number(x) for x in ticks])
        bar.minorticks_off()
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _draw_reading(axis: Axes, reading: GridReading | None, nbeta: float, data: "xr.Dataset") -> set[str]:
    """Draw title, plateau and recommended cell of one panel. Returns which of the latter two it has."""
    drawn, title = set(), f"nbeta {nbeta:.4g}"
    index = lambda name, value: int(np.abs(data[name].values - value).argmin())  # noqa: E731
    plateaus = {} if reading is None else reading.plateaus
    plateau = next((p for key, p in plateaus.items() if math.isclose(key, nbeta)), None)
    if plateau is not None:
        title += f": plateau {plateau.llc:.4g} ± {plateau.llc_stderr:.2g}"
        columns = [index("step_size", x) for x in plateau.step_size]
        rows = [index("localization", x) for x in plateau.localization]
        _outline(axis, (min(columns), max(columns)), (min(rows), max(rows)), 0.0, **_DASHES)
        drawn.add(_PLATEAU)
    best = None if reading is None else reading.recommended
    if best is not None and math.isclose(best["nbeta"], nbeta):
        column, row = index("step_size", best["step_size"]), index("localization", best["localization"])
        _outline(axis, (column, column), (row, row), 0.07, **_RING)
        drawn.add("recommended")
    axis.set_title(title, fontsize=10)
    return drawn


def plot_heads(results: Mapping[str, Any], path: str | os.PathLike | None = None) -> Figure:
    """Refined LLCs as a map of layers (downwards) by heads (across). Heads without a result stay empty.

    Args:
        results: ``layer L head H`` -> result, as ``slt_jax.cli.language.refined`` returns them.
        path: the picture is written there if it is given.

    Raises:
        ValueError: no results, or a name that is not that of one head.
    """
    if wrong := [name for name in results if not _HEAD.fullmatch(name)]:
        raise ValueError(f"{wrong[0]!r} is not one head. Names are 'layer 3 head 5'; leave other parts out.")
    if not results:
        raise ValueError(
            "there are no heads to draw: results is empty. Pass what slt_jax.cli.language.refined returns."
        )
    places = {name: tuple(map(int, _HEAD.findall(name)[0])) for name in results}
    shape = tuple(max(place[k] for place in places.values()) + 1 for k in (0, 1))
    blank = np.full(shape, math.nan)
    cells = _Cells(blank, blank.copy(), np.zeros(shape, bool), np.ones(shape, bool))
    for name, result in results.items():
        numbers = (result.llc, result.llc_stderr, result.verdict != "converged", False)
        for layer, number in zip(cells, numbers, strict=True):
            layer[places[name]] = number
    norm, extend, log = colour_range(cells.values)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        _draw_cells(axis, cells, norm, -1)
        axis.set(xticks=range(shape[1]), yticks=range(shape[0]), xlabel="head", ylabel="layer")
        axis.set_title("Refined LLC ± standard error", fontweight="bold")
        legend_below(figure, (), 2, _legend_entries([cells]))
        if np.isfinite(cells.values).any():
            _colour_bar(figure, [axis], norm, extend, log)

    return figure_of((max(4.2, shape[1] * _CELL[0] + 1.6), max(2.8, shape[0] * _CELL[1] + 1.2)), path, draw)
