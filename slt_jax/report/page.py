"""What a page is made of, and its HTML: without scripts, and without anything that it would have to load."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from slt_jax.results.record import RunRecord
from slt_jax.samplers import theory_of

GOOD, CAUTION, BAD, UNMEASURED = "good", "caution", "bad", "none"
_SYMBOLS = {GOOD: "✓", CAUTION: "!", BAD: "✗", UNMEASURED: "–"}
UNKNOWN = "not known"


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


def render(page: Page) -> str:
    """HTML, with every text escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    rules = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = Environment(loader=PackageLoader("slt_jax.report"), **rules).get_template("report.html.j2")
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


def settings_sections(settings: RunRecord, without: tuple[str, ...] = ()) -> Iterable[Section]:
    """What was given and what the calibration chose, without the settings of these names."""
    forms = {float: lambda x: f"{x:.4g}", int: lambda x: f"{x:,}", bool: lambda x: "yes" if x else "no"}
    without += () if theory_of(settings.family).has_momentum else ("friction",)
    without += ("mean_time",) if settings.mean_time == 1 else ()
    values = {name: getattr(settings, name) for name in _MEANINGS if name not in without}
    known = {name: value for name, value in values.items() if value is not None}
    rows = tuple(Row((name, forms.get(type(value), str)(value), _MEANINGS[name])) for name, value in known.items())
    if rows:
        yield Section("Settings", header=("setting", "value", "meaning"), rows=rows)
    if lines := settings.calibration.get("lines"):
        text = ("What was not given was measured on this model and data:",)
        yield Section("What the calibration chose, and why", text, items=tuple(Item(line) for line in lines))


def citation_section(settings: RunRecord, wbic: bool) -> Section:
    items = [
        Item(f"slt-jax {settings.versions.get('slt-jax', '')}".strip() + ", which computed this estimate."),
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
