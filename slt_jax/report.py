"""One page that holds a whole result: estimate, verdict, pictures, health, settings. HTML without scripts or loads."""

import base64
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from slt_jax import diagnostics
from slt_jax.corrections import LARGEST
from slt_jax.grid import Sweep, load_sweep
from slt_jax.plots import plot_result
from slt_jax.reading import estimate_text
from slt_jax.results import LLCResult, load_result
from slt_jax.samplers.base import NO_MOMENTUM
from slt_jax.storage import SWEEP, TRAJECTORY, kind_of, write_file
from slt_jax.training import Trajectory, load_trajectory

GOOD, CAUTION, BAD, UNMEASURED = "good", "caution", "bad", "none"
_SYMBOLS = {GOOD: "✓", CAUTION: "!", BAD: "✗", UNMEASURED: "–"}
_UNKNOWN = "not known"
_GENERATOR = 'content="slt-jax report"'


class Picture(NamedTuple):
    """An image as a data URI, what it shows in words, and its width in inches."""

    source: str
    alt: str
    width: float


class Row(NamedTuple):
    """A table's row; with a ``tone`` its symbol stands before the first cell."""

    cells: tuple[str, ...]
    tone: str = ""


class Item(NamedTuple):
    """A point of a list, and where it leads."""

    text: str
    link: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page; what is empty is left out. ``folded``: the code is shown on demand."""

    title: str
    text: tuple[str, ...] = ()
    picture: Picture | None = None
    header: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    items: tuple[Item, ...] = ()
    code: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """What a page says first, and its sections. ``kind``: what it is about; ``tone``: one of the four above."""

    kind: str
    title: str
    tone: str
    verdict: str
    text: tuple[str, ...]
    sections: tuple[Section, ...]


def report(source: Any, out: str | os.PathLike, *, overwrite: bool = False, **shown: Any) -> Path:
    """Write a result as one self-contained page.

    Args:
        source: an ``LLCResult``, a ``Sweep``, a ``Trajectory``, or a path that ``save`` of one of them wrote.
        out: the HTML file.
        overwrite: replace ``out``, if it is such a page.
        shown: ``unit`` and ``drift`` of a trajectory, as its ``plot`` takes them.

    Raises:
        FileExistsError, FileNotFoundError: of ``out`` or its folder. What ``load_result`` raises for a bad source.
        TypeError: something else, or ``shown`` of what is no trajectory.
    """
    target = Path(out)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Pass overwrite=True to replace it, or another path.")
    if target.exists() and not (target.is_file() and _GENERATOR in target.read_text(errors="replace")[:2000]):
        raise FileExistsError(f"{target} exists and is not a report of slt-jax, so it is kept. Give another path.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to. Make it first.")
    path = str(source) if isinstance(source, (str, os.PathLike)) else None
    text = render(page_of(source if path is None else _opened(path), path, **shown))
    return write_file(target, text)


def _opened(path: str) -> Any:
    return {SWEEP: load_sweep, TRAJECTORY: load_trajectory}.get(kind_of(Path(path)), load_result)(path)


def page_of(thing: Any, path: str | None = None, **shown: Any) -> Page:
    """The page about a result, a sweep or a trajectory, by its kind. ``path``: where it is saved."""
    from slt_jax.report_many import sweep_page, trajectory_page

    if isinstance(thing, Trajectory):
        return trajectory_page(thing, path, **shown)
    if isinstance(thing, (LLCResult, Sweep)):
        if shown:
            what = "a sweep" if isinstance(thing, Sweep) else "a result"
            raise TypeError(f"{' and '.join(shown)} are of a trajectory's page, and this is {what}'s. Leave them out.")
        return sweep_page(thing, path) if isinstance(thing, Sweep) else _result_page(thing, path)
    raise TypeError(f"a report is of a result, a sweep or a trajectory, or of a saved one, got {type(thing).__name__}.")


def render(page: Page) -> str:
    """HTML, with every text escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    rules = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = Environment(loader=PackageLoader("slt_jax"), **rules).get_template("report.html.j2")
    return template.render(page=page, symbols=_SYMBOLS)


def picture(figure: Figure, alt: str) -> Picture:
    """A figure as SVG in a data URI, the same bytes every time."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "slt-jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(source, alt, float(figure.get_size_inches()[0]))


def tone_of(verdict: str) -> str:
    return {"converged": GOOD, "depends on nbeta or localization": CAUTION}.get(verdict, BAD)


def _result_page(result: LLCResult, path: str | None) -> Page:
    found = result.estimate_text("±")
    reason, chains = result.health.reason, len(result.loss_trace)
    text = [reason[:1].upper() + reason[1:]]
    if result.stopped:
        where = ", ".join(f"chain {c} at step {t}" for c, t in sorted(result.stopped.items()))
        text.append(f"Went non-finite and left out: {where} ({len(result.stopped)} of {chains}).")
    text += [f"Note: {note}" for note in result.notes]
    alt = f"Loss of each chain over the steps, and the running estimate of the LLC: {found}, {result.verdict}."
    how = (
        "Above, the loss of each chain: settled chains look alike and do not climb or fall. Below, what the estimate "
        "would have been, had the run ended at that step: it should come to rest in the band."
    )
    sections = (
        Section("Traces", (how,), picture(plot_result(result), alt)),
        _estimate_section(result),
        _health_section(result),
        *_also_sections(result),
        *settings_sections(result.settings),
        _cost_section(result.settings),
        citation_section(result.settings, math.isfinite(result.wbic)),
        loading_section("result", path),
        Section("All numbers", code=json.dumps(result.to_dict(), indent=1), folded=True),
    )
    return Page(
        "Local learning coefficient", f"LLC {found}", tone_of(result.verdict), result.verdict, tuple(text), sections
    )


def _num(x: float, form: str = ".4g") -> str:
    return format(x, form) if math.isfinite(x) else _UNKNOWN


def _estimate_section(result: LLCResult) -> Section:
    bias, kept, free = result.bias, result.kept_chains, result.settings["num_free"]
    around = float(result.loss_trace[kept].mean(dtype=np.float64)) if kept.size else math.nan
    taken = f"{_num(bias.applied)} taken off" if bias.applied else "nothing taken off"
    rows = [
        ("LLC", result.estimate_text("±"), "Estimate and one standard error, which counts sampling noise only."),
        ("Raw estimate", _num(result.llc_raw), "nbeta times the rise of the loss around w*, before any correction."),
        ("Bias of the step size", _num(bias.step_size, "+.3g"), "What steps of this length add, to first order."),
        ("Bias of minibatch noise", _num(bias.noise, "+.3g"), "What the noise of the gradients adds, to first order."),
        ("Raw to corrected", f"{_num(result.llc_raw)} → {_num(result.llc)}", f"{taken}: {bias.why}."),
        ("Half the weights", f"{free / 2:,.10g}", f"What a regular minimum with {free:,} free weights would read."),
        ("Loss at w*", _num(result.init_loss, ".5g"), "Of the trained weights, nats per example."),
        ("Loss around w*", _num(around, ".5g"), "Mean over the draws, nats per example."),
    ]
    if math.isfinite(result.wbic):
        rows.append(("WBIC", _num(result.wbic, ".6g"), "n times the mean loss at nbeta = n / log n, nats."))
    text = (
        "The local learning coefficient says how degenerate the loss is around the trained weights w*: half the number "
        "of weights where the minimum is regular, and less where the loss is flat in some directions.",
    )
    return Section("The estimate", text, header=("quantity", "value", "meaning"), rows=tuple(Row(row) for row in rows))


def _within(value: float, low: float, high: float) -> str:
    return UNMEASURED if math.isnan(value) else GOOD if low <= value <= high else BAD


def _health_section(result: LLCResult) -> Section:
    """Every number of the verdict beside what is accepted. The limits are the verdict's own."""
    d, h, e, raw = diagnostics, result.health, result.health.evidence, abs(result.llc_raw)
    error = d.standard_error(result.llc_draws, h.ess) / raw if raw and result.llc_draws.size else math.nan
    enough = GOOD if h.ess >= 30 or error <= 0.02 else UNMEASURED if math.isnan(h.ess) else BAD
    still = abs(h.trend_z) <= d.TREND_SIGMA or abs(h.trend) <= 0.02 * raw
    gap = abs(h.bracket[1] - h.bracket[0]) / raw if raw else math.nan
    met = UNMEASURED if math.isnan(gap) else BAD if gap > 0.05 and "chains disagree" in h.flags else GOOD
    hot = 1 + (2 * result.bias.noise / e.num_free if math.isfinite(result.bias.noise) else 0.0)
    room = d.KINETIC_LIMIT_METRIC if e.metric else d.KINETIC_LIMIT
    most = d.HELD_DEGREE_LIMIT if e.held > 0.5 else d.DEGREE_LIMIT
    up, down = e.nbeta_slope, e.localization_slope
    stands = UNMEASURED if not up.stderr > 0 < down.stderr else BAD if d.is_dependent(e, raw) else GOOD
    bias, both = d.BIAS_LIMIT, f"under {d.SLOPE_SIGMA:g} standard errors, or {d.SLOPE_LIMIT:.0%} of the LLC"
    parts = [x / raw if raw else math.nan for x in (result.bias.step_size, result.bias.noise)]
    owed = e.owed / raw if raw else math.nan
    slope = lambda s: f"{_num(s.value, '+.3g')} ± {_num(s.stderr, '.2g')}" if s.stderr > 0 else _UNKNOWN  # noqa: E731
    trend = f"{_num(h.trend, '+.2g')} ({_num(h.trend_z, '+.1f')} standard errors)"
    pair = " and ".join(_num(x) for x in h.bracket)
    rise = e.rise
    rises = rise.mean > d.TREND_SIGMA * rise.stderr and rise.next > d.RISE_LIMIT * raw
    tilted = UNMEASURED if math.isnan(e.tilt.stderr) else BAD if d.is_tilted(e.tilt, raw) else GOOD
    rose = f"{_num(rise.next, '+.2g')}, after {_num(rise.before, '+.2g')} and {_num(rise.value, '+.2g')}"
    rows = (
        ("R-hat", _num(h.rhat, ".3f"), f"at most {d.RHAT_LIMIT}", _within(h.rhat, 0, d.RHAT_LIMIT),
         "Compares the chains, and the halves of each, with one another: 1 when they tell the same."),
        ("Effective draws (ESS)", _num(h.ess, ".0f"), "30 or more, unless the error is under 2 %", enough,
         f"How many independent draws the {result.llc_draws.size:,} correlated ones are worth."),
        ("Error of the mean", _num(error, ".1%"), f"at most {d.ERROR_LIMIT:.1%}", _within(error, 0, d.ERROR_LIMIT),
         "Standard error over the raw estimate."),
        ("Trend", _UNKNOWN if math.isnan(h.trend) else trend,
         f"within {d.TREND_SIGMA:g} standard errors, or 2 % of the LLC",
         UNMEASURED if math.isnan(h.trend) else GOOD if still else BAD,
         "Second half of the draws less the first: 0 once the chains have settled."),
        ("Rise in one more doubling of the run", _UNKNOWN if math.isnan(rise.stderr) else rose,
         f"at most {d.RISE_LIMIT:.0%} of the LLC, or not sure",
         UNMEASURED if math.isnan(rise.stderr) else BAD if rises else GOOD,
         "Chains that start at w* spread into ever softer directions; this is what more steps would add."),
        ("From w*, from hot starts", _UNKNOWN if math.isnan(gap) else pair, "within 5 %, or 4 standard errors", met,
         "Chains started cold and hot come to the answer from both sides, and should meet."),
        ("Virial ratio", _num(h.virial, ".3f"), f"at least {d.VIRIAL_LIMIT}",
         _within(h.virial, d.VIRIAL_LIMIT, math.inf),
         "Share of the directions that have come to rest: 1 when the chains have explored all they can."),
        ("Owed by soft directions", _num(owed, ".1%"), f"at most {d.OWED_LIMIT:.0%} of the LLC",
         _within(owed, 0, d.OWED_LIMIT), "What chains of this length lack in directions that are slow at w*."),
        ("Kinetic temperature", _num(e.kinetic, ".3f"), f"{hot - room:.2f} to {hot + room:.2f}",
         _within(e.kinetic, hot - room, hot + room), "1 when the sampler keeps the right temperature."),
        ("Acceptance of a step", _num(e.acceptance, ".2f"), "no limit", "",
         "Share of such steps that an exact sampler would accept: near 1 where steps are short."),
        ("Bias of the step size", _num(parts[0], "+.1%"), f"within {bias:.0%} of the LLC",
         _within(abs(parts[0]), 0, bias), "What the step size adds. Halve step_size when it is too much."),
        ("Bias of minibatch noise", _num(parts[1], "+.1%"), f"within {bias:.0%} of the LLC",
         _within(abs(parts[1]), 0, bias), f"What noisy gradients add. Up to {LARGEST:.0%} in all is taken off."),
        ("Slope in log nbeta", slope(up), both, stands, "How far the estimate rises when nbeta grows by a factor e."),
        ("Slope in log localization", slope(down), "weighed with the one above", stands,
         "The same for the localization, which pulls the estimate down where it holds flat directions."),
        ("Slope at w*", slope(e.tilt), f"under {d.TILT_LIMIT:.0%} of the LLC, or {d.TILT_SIGMA:g} standard errors",
         tilted,
         "What the chains gain by going down from w*, which the estimate lacks: 0 at a minimum."),
        ("Degree of the loss", slope(e.degree).lstrip("+"), f"at most {most:g}",
         _within(e.degree.value - d.SLOPE_SIGMA * e.degree.stderr, -math.inf, most),
         "Power with which the loss grows with the distance from w*: 2 at a regular minimum."),
    )  # fmt: skip
    table = tuple(Row((name, value, accepted, why), tone) for name, value, accepted, tone, why in rows)
    legend = "✓ within what is accepted, ✗ outside of it, – not measured in this run."
    return Section("Health", (legend,), header=("check", "value", "accepted", "meaning"), rows=table)


def _also_sections(result: LLCResult) -> Iterable[Section]:
    if not result.also:
        return
    rows = []
    for name, r in result.also.items():
        health = _num(r.rhat, ".3f"), _num(r.ess, ".0f")
        rows.append(Row((name, estimate_text(r.llc, r.llc_stderr, "±"), *health, _num(r.init_loss, ".5g"))))
    text = f"The loss of other data at the same draws. Compare with the raw estimate, {_num(result.llc_raw)}."
    yield Section("Other data", (text,), header=("data", "LLC, raw", "R-hat", "ESS", "loss at w*"), rows=tuple(rows))


_MEANINGS = {
    "sampler": "how a step moves", "step_size": "epsilon: drift -(epsilon/2) G, noise of variance epsilon",
    "friction": "share of the momentum that a step loses",
    "mean_time": "that draws' steps took, as a share of a full one's: the others were shortened",
    "nbeta": "n times the inverse temperature",
    "localization": "gamma, the pull to w*", "num_chains": "independent chains",
    "num_draws": "losses kept in each chain", "num_warmup": "steps before the first draw",
    "thinning": "steps from one draw to the next", "batch_size": "examples in a step's batch",
    "num_data": "examples of the data", "num_free": "weights that move",
    "baseline": "loss at w*: on the same batch (paired) or over all data (full)",
    "control_variate": "gradients less their noise at w*", "hot": "factor by which every other chain started hotter",
}  # fmt: skip


def settings_sections(settings: dict[str, Any]) -> Iterable[Section]:
    forms = {float: lambda x: f"{x:.4g}", int: lambda x: f"{x:,}", bool: lambda x: "yes" if x else "no"}
    still = ("friction",) if settings.get("family") in NO_MOMENTUM else ()
    still += ("mean_time",) if settings.get("mean_time") == 1 else ()
    known = {name: settings[name] for name in _MEANINGS if settings.get(name) is not None and name not in still}
    rows = tuple(Row((name, forms.get(type(value), str)(value), _MEANINGS[name])) for name, value in known.items())
    if rows:
        yield Section("Settings", header=("setting", "value", "meaning"), rows=rows)
    if lines := settings.get("calibration", {}).get("lines"):
        text = ("What was not given was measured on this model and data:",)
        yield Section("What the calibration chose, and why", text, items=tuple(Item(line) for line in lines))


def _cost_section(settings: dict[str, Any]) -> Section:
    cost, spent = settings.get("cost", {}), settings.get("gradients", {})
    rows = []
    if cost.get("seconds") is not None:
        rows.append(("time", f"{cost['seconds']:.3g} s"))
    if cost.get("steps_per_s") is not None:
        rows.append(("speed", f"{cost['steps_per_s']:,.4g} steps/s over all chains"))
    if spent:
        parts = ", ".join(f"{name} {count:,.0f}" for name, count in spent.items())
        rows.append(("minibatch gradients", f"{sum(spent.values()):,.0f} ({parts})"))
    peaks = {"device_peak_mib": "peak memory of a device", "process_peak_mib": "peak memory of the process"}
    rows += [(name, f"{cost[key]:,} MiB") for key, name in peaks.items() if cost.get(key)]
    if (predicted := settings.get("memory", {}).get("total_mib")) is not None:
        rows.append(("memory predicted", f"{predicted:,} MiB"))
    versions = ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items())
    rows += [("devices", settings.get("devices", _UNKNOWN)), ("versions", versions or _UNKNOWN)]
    return Section("Cost, device, versions", header=("", "value"), rows=tuple(Row(row) for row in rows))


def citation_section(settings: dict[str, Any], wbic: bool) -> Section:
    items = [
        Item(f"slt-jax {settings.get('versions', {}).get('slt-jax', '')}".strip() + ", which computed this estimate."),
        Item("The estimator: E. Lau, Z. Furman, G. Wang, D. Murfet, S. Wei, The Local Learning Coefficient: A "
             "Singularity-Aware Complexity Measure, AISTATS 2025.", "https://arxiv.org/abs/2308.12108"),
    ]  # fmt: skip
    if wbic:
        items += [
            Item("WBIC: S. Watanabe, A Widely Applicable Bayesian Information Criterion, Journal of Machine Learning "
                 "Research 14 (2013), 867-897.", "https://www.jmlr.org/papers/v14/watanabe13a.html"),
            Item("The theory: S. Watanabe, Algebraic Geometry and Statistical Learning Theory, Cambridge University "
                 "Press, 2009."),
        ]  # fmt: skip
    return Section("How to cite", items=tuple(items))


def loading_section(what: str, path: str | None) -> Section:
    if path is None:
        return Section("Load it again", code=f'{what}.save("{what}.zarr")  # this page was made before it was saved')
    code = f"import slt_jax as slt\n\n{what} = slt.load_{what}({path!r})\nprint({what})"
    return Section("Load it again", code=code)
