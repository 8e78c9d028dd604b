"""What a grid of estimates says: where the LLC stands, where it ends without a step, how nbeta moves it."""

import itertools
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from slt_jax.results.text import estimate_text

if TYPE_CHECKING:
    import xarray as xr

SETTLED = ("converged", "depends on nbeta or localization")
HEATED = ("biased by the step size", "heated by minibatch noise")  # what an extrapolation in the step size is for
_AGREE_SIGMA, _AGREE_SHARE = 3.0, 0.03  # of a cell from its plateau's mean: in standard errors, or in parts of the mean
_LEAST_CELLS = 3
_CHI_SQUARED = 3.84  # per degree of freedom, up to which a line is taken to fit
_TELLS = 3.0  # standard errors from which a slope is told as one


@dataclass(frozen=True)
class Plateau:
    """A block of neighbouring cells of one nbeta, all settled, that read the same along both axes.

    Each is within 3 standard errors, or 3 %, of their mean weighted by 1 / error^2, ``llc``. ``llc_stderr`` is that of
    this mean, times the root of chi^2 per degree of freedom where the cells scatter more than their errors say (Birge).
    ``step_size``, ``localization``: (smallest, largest).
    """

    step_size: tuple[float, float]
    localization: tuple[float, float]
    llc: float
    llc_stderr: float
    cells: int


@dataclass(frozen=True)
class Extrapolation:
    """Raw estimates of one nbeta and localization on a straight line in the step size, read at 0.

    ``step_size``: (smallest, largest) that lie on it; ``llc``, ``llc_stderr``: at 0; ``slope`` per unit of step size.
    """

    step_size: tuple[float, float]
    llc: float
    llc_stderr: float
    slope: float
    cells: int


@dataclass(frozen=True)
class NbetaLine:
    """LLC = ``limit`` + ``slope`` / log nbeta, by weighted least squares along one localization and step size.

    A free energy of lambda log nbeta - (m - 1) log log nbeta has the slope -(m - 1), m the multiplicity: a hint of it
    where the localization and the range of curvatures leave nbeta to its asymptotics.
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
    """The reading of a sweep; ``str`` tells it. ``recommended``: a value of each axis, None where no cell will do.

    ``plateaus``: by nbeta, where there is one. ``extrapolations``: by (nbeta, localization).
    """

    plateaus: dict[float, Plateau]
    extrapolations: dict[tuple[float, float], Extrapolation]
    nbeta_line: NbetaLine | None
    recommended: dict[str, float] | None
    lines: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return "\n".join(self.lines)

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
    """Read a sweep's data set, see ``Sweep.dataset``: dims nbeta, localization, step_size."""
    plateaus, extrapolations = {}, {}
    for b, nbeta in enumerate(dataset.nbeta.values.tolist()):
        layer = dataset.isel(nbeta=b)
        if (found := _plateau(layer)) is not None:
            plateaus[nbeta] = found
        for g, gamma in enumerate(dataset.localization.values.tolist()):
            if (line := _to_zero_step(layer.isel(localization=g))) is not None:
                extrapolations[nbeta, gamma] = line
    recommended, why = _recommended(dataset, plateaus)
    line = None if recommended is None else _along_nbeta(dataset, recommended)
    lines = _told(dataset, plateaus, extrapolations, line, recommended, why)
    return GridReading(plateaus, extrapolations, line, recommended, tuple(lines))


def _settled(dataset: "xr.Dataset") -> np.ndarray:
    fine = np.isin(dataset.verdict.values.astype(str), SETTLED) & ~dataset.diverged.values
    return fine & np.isfinite(dataset.llc.values) & (dataset.llc_stderr.values > 0)


def _plateau(layer: "xr.Dataset", *, one: bool = False) -> Plateau | None:
    """The largest block of settled cells that agree; of equally large ones that with the least chi^2.

    It has two values at least of each axis that has them; with ``one`` a single localization will do.
    """
    good, llc, error = _settled(layer), layer.llc.values, layer.llc_stderr.values
    best, rank = None, (0, 0.0)
    for rows, columns in itertools.product(*(_runs(n) for n in good.shape)):
        block = (rows, columns)
        count = good[block].size
        wide = [one or len(good[block]) > 1 or len(good) == 1, good[block].shape[1] > 1 or good.shape[1] == 1]
        if not all(wide) or count < _LEAST_CELLS or count < rank[0] or not good[block].all():
            continue
        mean, stderr, chi = weighted_mean(llc[block].ravel(), error[block].ravel())
        allowed = np.maximum(_AGREE_SIGMA * error[block], _AGREE_SHARE * abs(mean))
        if (np.abs(llc[block] - mean) <= allowed).all() and (count, -chi) > rank:
            ends = [values[part][[0, -1]].tolist() for values, part in _axes(layer, block)]
            best, rank = Plateau(tuple(ends[1]), tuple(ends[0]), mean, stderr, count), (count, -chi)
    return best


def _axes(layer: "xr.Dataset", block: tuple[slice, slice]):
    return zip((layer.localization.values, layer.step_size.values), block, strict=True)


def _runs(count: int) -> list[slice]:
    return [slice(a, b) for a in range(count) for b in range(a + 1, count + 1)]


def weighted_mean(values: Float[np.ndarray, " n"], errors: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """(mean, its standard error, chi^2 per degree of freedom), weighted by 1 / error^2; the error by Birge's ratio."""
    weights = errors**-2.0
    mean = float(np.sum(weights * values) / np.sum(weights))
    chi = float(np.sum(weights * (values - mean) ** 2)) / max(1, len(values) - 1)
    return mean, float(np.sum(weights) ** -0.5) * math.sqrt(max(1.0, chi)), chi


def weighted_line(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], errors: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "2"], float]:
    """((intercept, slope), their standard errors, chi^2 per degree of freedom) of y = intercept + slope x."""
    slope_first, covariance = np.polyfit(x, y, 1, w=1 / errors, cov="unscaled")
    chi = float(np.sum(((y - np.polyval(slope_first, x)) / errors) ** 2)) / max(1, len(x) - 2)
    return slope_first[::-1], np.sqrt(np.diag(covariance))[::-1], chi


def _to_zero_step(row: "xr.Dataset") -> Extrapolation | None:
    """The longest line from the smallest step sizes up: theory has the bias of the raw estimate begin as one."""
    fine = np.isin(row.verdict.values.astype(str), (*SETTLED, *HEATED)) & ~row.diverged.values
    fine &= np.isfinite(row.llc_raw.values) & (row.llc_raw_stderr.values > 0)
    steps, raw, error = (x.values[fine] for x in (row.step_size, row.llc_raw, row.llc_raw_stderr))
    for count in range(len(steps), 2, -1):
        scale = steps[count - 1]
        (end, slope), (end_error, _), chi = weighted_line(steps[:count] / scale, raw[:count], error[:count])
        if chi <= _CHI_SQUARED:
            ends = (float(steps[0]), float(scale))
            return Extrapolation(ends, float(end), float(end_error), float(slope / scale), count)
    return None


def _along_nbeta(dataset: "xr.Dataset", at: dict[str, float]) -> NbetaLine | None:
    place = {name: at[name] for name in ("localization", "step_size")}
    row = dataset.sel(place, method="nearest")
    good = _settled(row) & (row.nbeta.values > 1.5)
    if good.sum() < _LEAST_CELLS:
        return None
    x, y, error = 1 / np.log(row.nbeta.values[good]), row.llc.values[good], row.llc_stderr.values[good]
    (limit, slope), errors, chi = weighted_line(x, y, error)
    limit_stderr, slope_stderr = errors * math.sqrt(max(1.0, chi))
    return NbetaLine(
        localization=place["localization"],
        step_size=place["step_size"],
        limit=float(limit),
        limit_stderr=float(limit_stderr),
        slope=float(slope),
        slope_stderr=float(slope_stderr),
        cells=int(good.sum()),
    )


def _recommended(dataset: "xr.Dataset", plateaus: dict[float, Plateau]) -> tuple[dict[str, float] | None, str]:
    """(a cell, why): on the plateau of the largest nbeta that has one; converged, off its edges, of least error."""
    good = _settled(dataset)
    if not good.any():
        return None, ""
    names = ("nbeta", "localization", "step_size")
    axes = [dataset[name].values for name in names]
    nbeta = max(plateaus) if plateaus else float(axes[0][np.flatnonzero(good.any((1, 2)))[-1]])
    plateau = plateaus.get(nbeta)

    def rank(cell):
        _, g, e = cell
        sure, inside = str(dataset.verdict.values[cell]) == "converged", False
        if plateau is not None:
            (a, z), (low, high) = plateau.localization, plateau.step_size
            inside = a < axes[1][g] < z and low < axes[2][e] < high
        return sure, inside, -dataset.llc_stderr.values[cell]

    def on_it(cell):
        b, g, e = cell
        if axes[0][b] != nbeta:
            return False
        return plateau is None or (
            plateau.localization[0] <= axes[1][g] <= plateau.localization[1]
            and plateau.step_size[0] <= axes[2][e] <= plateau.step_size[1]
        )

    best = max((cell for cell in zip(*np.nonzero(good), strict=True) if on_it(cell)), key=rank)
    found = {name: float(values[i]) for name, values, i in zip(names, axes, best, strict=True)}
    why = "the largest nbeta with a plateau" if plateau is not None else "no plateau, so only the best single cell"
    return found, f"{why}; there it is '{dataset.verdict.values[best]}' with the least error"


def _told(dataset, plateaus, extrapolations, line, recommended, why) -> list[str]:
    lines = []
    for nbeta, p in plateaus.items():
        lines.append(
            f"nbeta {nbeta:.4g}: LLC {estimate_text(p.llc, p.llc_stderr, '±')} on a plateau of {p.cells} cells, "
            f"{_span('step_size', p.step_size)}, {_span('localization', p.localization)}{_edges(dataset, p)}."
        )
    for nbeta in dataset.nbeta.values.tolist():
        if nbeta not in plateaus:
            lines.append(f"nbeta {nbeta:.4g}: no plateau; {_why_none(dataset.sel(nbeta=nbeta))}.")
    if recommended is None:
        lines.append("No cell will do as a setting.")
        return lines
    numbers = ", ".join(f"{name} {recommended[name]:.4g}" for name in ("nbeta", "localization", "step_size"))
    cell = dataset.sel(recommended)
    lines.append(f"Take {numbers}: {why} (LLC {estimate_text(float(cell.llc), float(cell.llc_stderr), '±')}).")
    if (end := extrapolations.get((recommended["nbeta"], recommended["localization"]))) is not None:
        lines.append(
            f"Raw estimates there go to {estimate_text(end.llc, end.llc_stderr, '±')} at step size 0 (a line through "
            f"{end.cells} of them)."
        )
    lines.append(
        f"At nbeta = 0 the loss would rise by {float(cell.control):.4g} nats per example, there it rises by "
        f"{1 - float(cell.held):.1%} of that{_warned(float(cell.held))}."
    )
    if line is not None:
        lines.append(_of_nbeta(line))
    return lines


def _warned(held: float) -> str:
    return "" if held > 0.5 else ": the localization does as much as the data, so raise nbeta or lower localization"


def _span(name: str, ends: tuple[float, float]) -> str:
    return f"{name} {ends[0]:.3g} to {ends[1]:.3g}" if ends[0] < ends[1] else f"the one {name} {ends[0]:.3g}"


def _edges(dataset: "xr.Dataset", p: Plateau) -> str:
    """Where the plateau ends only because the grid does."""
    found = []
    for name, (low, high) in (("step_size", p.step_size), ("localization", p.localization)):
        values = dataset[name].values
        if len(values) > 1:
            found += [f"smallest {name}"] * bool(low == values[0]) + [f"largest {name}"] * bool(high == values[-1])
    return f" (it may go on past the {' and the '.join(found)} of the grid)" if found else ""


def _why_none(layer: "xr.Dataset") -> str:
    good = _settled(layer)
    if (p := _plateau(layer, one=True)) is not None:
        value = estimate_text(p.llc, p.llc_stderr, "±")
        where = f"{value} at localization {p.localization[0]:.3g}"
        return f"the LLC stands along step_size ({where}), not along localization"
    if good.sum() >= _LEAST_CELLS:
        return "its settled cells disagree, or are no neighbours: the LLC depends on step_size and localization here"
    if good.all():
        return f"its {good.size} cells are too few to see one: give at least three along step_size or localization"
    verdicts = Counter(layer.verdict.values.astype(str)[~good].tolist())
    common, count = verdicts.most_common(1)[0]
    remedy = {
        "diverged": "take smaller step sizes", "biased by the step size": "take smaller step sizes",
        "still rising": "raise num_warmup, or take larger step sizes or localizations",
        "still falling": "raise num_warmup", "too few draws": "raise num_draws",
        "chains disagree": "raise num_warmup and num_draws",
        "heated by minibatch noise": "take smaller step sizes or a larger batch_size",
        "not a minimum": "train further, or take larger localizations",
    }.get(common, "look at the cells' reasons")  # fmt: skip
    return f"{count} of {good.size} cells are '{common}': {remedy}"


def _of_nbeta(line: NbetaLine) -> str:
    z = line.slope / line.slope_stderr if line.slope_stderr > 0 else math.inf
    text = f"Along nbeta the LLC follows {line.limit:.4g} {line.slope:+.3g} / log nbeta ({line.cells} cells), "
    if abs(z) < _TELLS:
        return text + f"whose slope is 0 within its error of {line.slope_stderr:.2g}: it does not depend on nbeta."
    end = estimate_text(line.limit, line.limit_stderr, "±")
    hint = f", as with a multiplicity near {1 - line.slope:.2g}" if -6 < line.slope < -0.3 else ""
    return text + f"slope {z:+.1f} standard errors from 0{hint}: towards {end} at infinite nbeta, if that law holds."
