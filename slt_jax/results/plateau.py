"""The reading of a grid of estimates: plateaus of the LLC, extrapolation to step size 0, dependence on nbeta."""

import itertools
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from slt_jax.results.text import estimate_text

if TYPE_CHECKING:
    import xarray as xr

Cell = tuple[Any, ...]  # indices of nbeta, localization and step size
SETTLED = ("converged", "depends on nbeta or localization")
HEATED = ("biased by the step size", "heated by minibatch noise")  # an extrapolation in the step size can use these
_AGREE_SIGMA, _AGREE_SHARE = 3.0, 0.03  # largest deviation from a plateau's mean, in standard errors or as a fraction
_MIN_CELLS = 3
_MAX_CHI_SQUARED = 3.84  # per degree of freedom, of a line that fits
_SLOPE_SIGMA = 3.0  # standard errors from which a slope is significant


@dataclass(frozen=True)
class Plateau:
    """A block of neighbouring cells of one nbeta, all settled, whose estimates agree along both axes.

    ``llc``: mean of the cells weighted by 1 / error^2. Each cell is within 3 standard errors, or 3 %, of it.
    ``llc_stderr``: standard error of this mean, times the root of chi^2 per degree of freedom where that is above 1
    (Birge's ratio). ``step_size``, ``localization``: (smallest, largest).
    """

    step_size: tuple[float, float]
    localization: tuple[float, float]
    llc: float
    llc_stderr: float
    cells: int


@dataclass(frozen=True)
class Extrapolation:
    """A straight line through the raw estimates of one nbeta and localization, extrapolated to step size 0.

    ``step_size``: (smallest, largest) of the cells on the line. ``llc``, ``llc_stderr``: the line at 0. ``slope``: per
    unit of step size.
    """

    step_size: tuple[float, float]
    llc: float
    llc_stderr: float
    slope: float
    cells: int


@dataclass(frozen=True)
class NbetaLine:
    """LLC = ``limit`` + ``slope`` / log nbeta, by weighted least squares along one localization and step size.

    A free energy lambda log nbeta - (m - 1) log log nbeta has the slope -(m - 1), with m the multiplicity. The slope
    indicates m only where the asymptotics hold: the localization and the range of curvatures also make the LLC depend
    on nbeta.
    """

    localization: float
    step_size: float
    limit: float
    limit_stderr: float
    slope: float
    slope_stderr: float
    cells: int


@dataclass(frozen=True)
class GridReading:
    """The reading of a sweep; ``str`` gives it as text.

    ``plateaus``: by nbeta, if it has one. ``extrapolations``: by (nbeta, localization). ``recommended``: a value of
    each axis, None if no cell can be recommended.
    """

    plateaus: dict[float, Plateau]
    extrapolations: dict[tuple[float, float], Extrapolation]
    nbeta_line: NbetaLine | None
    recommended: dict[str, float] | None
    lines: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def __repr__(self) -> str:
        best = self.recommended
        take = "no setting" if best is None else ", ".join(f"{name} {value:.4g}" for name, value in best.items())
        return f"<GridReading: {len(self.plateaus)} plateaus; recommends {take}>"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "plateaus": [{"nbeta": nbeta, **asdict(p)} for nbeta, p in self.plateaus.items()],
            "extrapolations": [
                {"nbeta": nbeta, "localization": gamma, **asdict(e)}
                for (nbeta, gamma), e in self.extrapolations.items()
            ],
            "nbeta_line": None if self.nbeta_line is None else asdict(self.nbeta_line),
            "recommended": self.recommended,
            "lines": list(self.lines),
        }


def read_grid(dataset: "xr.Dataset") -> GridReading:
    """The reading of a sweep's data set (``Sweep.dataset``) with dimensions nbeta, localization and step_size."""
    plateaus, extrapolations = {}, {}
    for b, nbeta in enumerate(dataset.nbeta.values.tolist()):
        layer = dataset.isel(nbeta=b)
        if (plateau := _plateau(layer)) is not None:
            plateaus[nbeta] = plateau
        for g, gamma in enumerate(dataset.localization.values.tolist()):
            if (line := _to_zero_step(layer.isel(localization=g))) is not None:
                extrapolations[nbeta, gamma] = line
    recommended, why = _recommended(dataset, plateaus)
    line = None if recommended is None else _along_nbeta(dataset, recommended)
    grid = GridReading(plateaus, extrapolations, line, recommended)
    return replace(grid, lines=tuple(_lines(dataset, grid, why)))


def _settled(dataset: "xr.Dataset") -> Bool[np.ndarray, " *cell"]:
    settled = np.isin(dataset.verdict.values.astype(str), SETTLED) & ~dataset.diverged.values
    return settled & np.isfinite(dataset.llc.values) & (dataset.llc_stderr.values > 0)


def _plateau(layer: "xr.Dataset", *, single_localization: bool = False) -> Plateau | None:
    """The largest block of settled cells that agree; of equally large blocks the one with the smallest chi^2.

    It has at least two values of each axis that has more than one. With ``single_localization``, one localization is
    enough.
    """
    settled, llc, error = _settled(layer), layer.llc.values, layer.llc_stderr.values
    best, best_rank = None, (0, 0.0)
    for rows, columns in itertools.product(*(_ranges(n) for n in settled.shape)):
        block = (rows, columns)
        height, width = settled[block].shape
        count = height * width
        high_enough = single_localization or height > 1 or settled.shape[0] == 1
        wide_enough = width > 1 or settled.shape[1] == 1
        if not (high_enough and wide_enough) or count < max(_MIN_CELLS, best_rank[0]) or not settled[block].all():
            continue
        mean, stderr, chi = weighted_mean(llc[block].ravel(), error[block].ravel())
        allowed = np.maximum(_AGREE_SIGMA * error[block], _AGREE_SHARE * abs(mean))
        if (np.abs(llc[block] - mean) <= allowed).all() and (count, -chi) > best_rank:
            ends = _ends(layer.step_size.values[columns]), _ends(layer.localization.values[rows])
            best, best_rank = Plateau(*ends, llc=mean, llc_stderr=stderr, cells=count), (count, -chi)
    return best


def _ends(values: Float[np.ndarray, " value"]) -> tuple[float, float]:
    return float(values[0]), float(values[-1])


def _ranges(count: int) -> list[slice]:
    """All ranges of neighbouring indices below ``count``."""
    return [slice(a, b) for a in range(count) for b in range(a + 1, count + 1)]


def weighted_mean(
    values: Float[np.ndarray, " value"], errors: Float[np.ndarray, " value"]
) -> tuple[float, float, float]:
    """(mean, its standard error, chi^2 per degree of freedom), weighted by 1 / error^2.

    The standard error is multiplied by the root of chi^2 per degree of freedom where that is above 1 (Birge's ratio).
    """
    weights = errors**-2.0
    mean = float(np.sum(weights * values) / np.sum(weights))
    chi = float(np.sum(weights * (values - mean) ** 2)) / max(1, len(values) - 1)
    return mean, float(np.sum(weights) ** -0.5) * math.sqrt(max(1.0, chi)), chi


def weighted_line(
    x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"], errors: Float[np.ndarray, " point"]
) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "2"], float]:
    """((intercept, slope), their standard errors, chi^2 per degree of freedom) of y = intercept + slope x."""
    coefficients, covariance = np.polyfit(x, y, 1, w=1 / errors, cov="unscaled")  # the slope comes first
    chi = float(np.sum(((y - np.polyval(coefficients, x)) / errors) ** 2)) / max(1, len(x) - 2)
    return coefficients[::-1], np.sqrt(np.diag(covariance))[::-1], chi


def _to_zero_step(row: "xr.Dataset") -> Extrapolation | None:
    """The line through the most cells from the smallest step size on: to first order the bias is linear in the step."""
    usable = np.isin(row.verdict.values.astype(str), (*SETTLED, *HEATED)) & ~row.diverged.values
    usable &= np.isfinite(row.llc_raw.values) & (row.llc_raw_stderr.values > 0)
    steps, raw, error = (x.values[usable] for x in (row.step_size, row.llc_raw, row.llc_raw_stderr))
    for count in range(len(steps), 2, -1):
        scale = steps[count - 1]
        (end, slope), (end_error, _), chi = weighted_line(steps[:count] / scale, raw[:count], error[:count])
        if chi <= _MAX_CHI_SQUARED:
            ends = (float(steps[0]), float(scale))
            return Extrapolation(ends, float(end), float(end_error), float(slope / scale), count)
    return None


def _along_nbeta(dataset: "xr.Dataset", cell: dict[str, float]) -> NbetaLine | None:
    """The line through the settled cells that have the localization and step size of ``cell``."""
    place = {name: cell[name] for name in ("localization", "step_size")}
    row = dataset.sel(place, method="nearest")
    usable = _settled(row) & (row.nbeta.values > 1.5)
    if usable.sum() < _MIN_CELLS:
        return None
    x, y, error = 1 / np.log(row.nbeta.values[usable]), row.llc.values[usable], row.llc_stderr.values[usable]
    (limit, slope), errors, chi = weighted_line(x, y, error)
    limit_stderr, slope_stderr = errors * math.sqrt(max(1.0, chi))
    return NbetaLine(
        localization=place["localization"],
        step_size=place["step_size"],
        limit=float(limit),
        limit_stderr=float(limit_stderr),
        slope=float(slope),
        slope_stderr=float(slope_stderr),
        cells=int(usable.sum()),
    )


def _recommended(dataset: "xr.Dataset", plateaus: dict[float, Plateau]) -> tuple[dict[str, float] | None, str]:
    """(a cell, why): of the largest nbeta with a plateau, the cell on it that ranks highest.

    Cells rank by whether they are converged, then whether they are inside the plateau, then by standard error.
    """
    settled = _settled(dataset)
    if not settled.any():
        return None, ""
    names = ("nbeta", "localization", "step_size")
    axes = [dataset[name].values for name in names]
    nbeta = max(plateaus) if plateaus else float(axes[0][np.flatnonzero(settled.any((1, 2)))[-1]])
    plateau = plateaus.get(nbeta)

    def is_candidate(cell: Cell) -> bool:
        b, g, e = cell
        if axes[0][b] != nbeta:
            return False
        return plateau is None or bool(
            plateau.localization[0] <= axes[1][g] <= plateau.localization[1]
            and plateau.step_size[0] <= axes[2][e] <= plateau.step_size[1]
        )

    def rank(cell: Cell) -> tuple[bool, bool, float]:
        _, g, e = cell
        converged, inside = str(dataset.verdict.values[cell]) == "converged", False
        if plateau is not None:
            (weakest, strongest), (smallest, largest) = plateau.localization, plateau.step_size
            inside = bool(weakest < axes[1][g] < strongest and smallest < axes[2][e] < largest)
        return converged, inside, -float(dataset.llc_stderr.values[cell])

    best = max((cell for cell in zip(*np.nonzero(settled), strict=True) if is_candidate(cell)), key=rank)
    recommended = {name: float(values[i]) for name, values, i in zip(names, axes, best, strict=True)}
    why = "the largest nbeta with a plateau" if plateau is not None else "no plateau, so only the best single cell"
    return recommended, f"{why}; there it is '{dataset.verdict.values[best]}' with the least error"


def _lines(dataset: "xr.Dataset", grid: GridReading, why: str) -> list[str]:
    """The reading as text; ``why``: the reason for the recommended cell."""
    lines = []
    for nbeta, p in grid.plateaus.items():
        lines.append(
            f"nbeta {nbeta:.4g}: LLC {estimate_text(p.llc, p.llc_stderr, '±')} on a plateau of {p.cells} cells, "
            f"{_range_text('step_size', p.step_size)}, {_range_text('localization', p.localization)}"
            f"{_grid_limits(dataset, p)}."
        )
    for nbeta in dataset.nbeta.values.tolist():
        if nbeta not in grid.plateaus:
            lines.append(f"nbeta {nbeta:.4g}: no plateau; {_why_no_plateau(dataset.sel(nbeta=nbeta))}.")
    if grid.recommended is None:
        return [*lines, "No cell can be recommended as a setting."]
    lines += _recommendation_lines(dataset, grid, grid.recommended, why)
    return lines if grid.nbeta_line is None else [*lines, _nbeta_text(grid.nbeta_line)]


def _recommendation_lines(
    dataset: "xr.Dataset", grid: GridReading, recommended: dict[str, float], why: str
) -> list[str]:
    numbers = ", ".join(f"{name} {recommended[name]:.4g}" for name in ("nbeta", "localization", "step_size"))
    cell = dataset.sel(recommended)
    lines = [f"Take {numbers}: {why} (LLC {estimate_text(float(cell.llc), float(cell.llc_stderr), '±')})."]
    if (end := grid.extrapolations.get((recommended["nbeta"], recommended["localization"]))) is not None:
        lines.append(
            f"Raw estimates there extrapolate to {estimate_text(end.llc, end.llc_stderr, '±')} at step size 0 (a line "
            f"through {end.cells} of them)."
        )
    lines.append(
        f"At nbeta = 0 the loss would rise by {float(cell.control):.4g} nats per example; at this setting it rises by "
        f"{1 - float(cell.held):.1%} of that{_localization_warning(float(cell.held))}."
    )
    return lines


def _localization_warning(prevented: float) -> str:
    """``prevented``: fraction of the rise in loss at nbeta = 0 that the data prevent."""
    if prevented > 0.5:
        return ""
    return ": the localization restricts the chains as much as the data do, so raise nbeta"


def _range_text(name: str, ends: tuple[float, float]) -> str:
    return f"{name} {ends[0]:.3g} to {ends[1]:.3g}" if ends[0] < ends[1] else f"the only {name} {ends[0]:.3g}"


def _grid_limits(dataset: "xr.Dataset", p: Plateau) -> str:
    """The limits of the grid that the plateau reaches."""
    limits = []
    for name, (low, high) in (("step_size", p.step_size), ("localization", p.localization)):
        values = dataset[name].values
        if len(values) > 1:
            limits += [f"smallest {name}"] * bool(low == values[0]) + [f"largest {name}"] * bool(high == values[-1])
    return f" (it may extend past the {' and the '.join(limits)} of the grid)" if limits else ""


_REMEDIES = {
    "diverged": "use smaller step sizes", "biased by the step size": "use smaller step sizes",
    "still rising": "raise num_warmup, or use larger step sizes or localizations",
    "still falling": "raise num_warmup", "too few draws": "raise num_draws",
    "chains disagree": "raise num_warmup and num_draws",
    "heated by minibatch noise": "use smaller step sizes or a larger batch_size",
    "not a minimum": "train further, or use larger localizations",
    "no better than chance": "larger values of localization or nbeta, or smaller step sizes",
    "not resolved in float32": "drop constants from the loss, or use smaller values of nbeta",
}  # fmt: skip


def _why_no_plateau(layer: "xr.Dataset") -> str:
    settled = _settled(layer)
    if (p := _plateau(layer, single_localization=True)) is not None:
        value = estimate_text(p.llc, p.llc_stderr, "±")
        return (
            f"the LLC is constant along step_size ({value} at localization {p.localization[0]:.3g}), but not along "
            "localization"
        )
    if settled.sum() >= _MIN_CELLS:
        return "its usable estimates disagree or are not neighbours: the LLC depends on step_size and localization here"
    if settled.all():
        return f"its {settled.size} cells are too few to show one: use at least three along step_size or localization"
    verdicts = Counter(layer.verdict.values.astype(str)[~settled].tolist())
    verdict, count = verdicts.most_common(1)[0]
    return f"{count} of {settled.size} cells are '{verdict}': {_REMEDIES.get(verdict, 'see the reasons of the cells')}"


def _nbeta_text(line: NbetaLine) -> str:
    z = line.slope / line.slope_stderr if line.slope_stderr > 0 else math.inf
    text = f"Along nbeta the LLC follows {line.limit:.4g} {line.slope:+.3g} / log nbeta ({line.cells} cells), "
    if abs(z) < _SLOPE_SIGMA:
        return text + f"whose slope is 0 within its error of {line.slope_stderr:.2g}: it does not depend on nbeta."
    limit = estimate_text(line.limit, line.limit_stderr, "±")
    multiplicity = f", as with a multiplicity near {1 - line.slope:.2g}" if -6 < line.slope < -0.3 else ""
    distance = f"slope {z:+.1f} standard errors from 0{multiplicity}"
    return f"{text}{distance}: towards {limit} at infinite nbeta, if that law holds."
