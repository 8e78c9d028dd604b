"""The parts of a page and its HTML, which has no scripts and loads nothing."""

import base64
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from slt_jax._io import user_path
from slt_jax.results.record import RunRecord
from slt_jax.results.text import MARKED
from slt_jax.samplers import theory_of

GOOD, CAUTION, BAD, UNMEASURED = "good", "caution", "bad", "none"
_SYMBOLS = {GOOD: "✓", CAUTION: "!", BAD: "✗", UNMEASURED: "–"}
UNKNOWN = "not known"
_GENERATOR = 'content="slt-jax report"'


class Picture(NamedTuple):
    """An image as a data URI, what it shows in words, and its width in inches."""

    source: str
    alt: str
    width: float


class Row(NamedTuple):
    """A row of a table. If it has a ``tone``, the symbol of the tone is put before the first cell."""

    cells: tuple[str, ...]
    tone: str = ""


class Item(NamedTuple):
    """An item of a list, with an optional link."""

    text: str
    link: str = ""


class Span(NamedTuple):
    """A piece of text with what a tooltip says of it and its background. ``aim``: it is framed."""

    text: str
    tip: str = ""
    color: str = ""
    aim: bool = False


class Text(NamedTuple):
    """A text in pieces, shown as it is, under a title."""

    title: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Section:
    """A section of a page; empty parts are not shown. ``folded``: the code is shown on demand.

    ``scale``: what the colours of the ``texts`` mean.
    """

    title: str
    text: tuple[str, ...] = ()
    picture: Picture | None = None
    header: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    items: tuple[Item, ...] = ()
    code: str = ""
    folded: bool = False
    scale: tuple[Span, ...] = ()
    texts: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Page:
    """The head of a page and its sections. ``kind``: what the page is about. ``tone``: one of the four above."""

    kind: str
    title: str
    tone: str
    verdict: str
    text: tuple[str, ...]
    sections: tuple[Section, ...]


def render(page: Page) -> str:
    """The page as HTML, with every text escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    rules = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    template = Environment(loader=PackageLoader("slt_jax.report"), **rules).get_template("report.html.j2")
    return template.render(page=page, symbols=_SYMBOLS)


def checked_target(out: str | os.PathLike, overwrite: bool) -> Path:
    """The file to write a page to.

    Raises:
        FileExistsError: it exists and ``overwrite`` is false, or it is no such page. FileNotFoundError: no such folder.
    """
    target = user_path(out)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Pass overwrite=True to replace it, or another path.")
    if target.exists() and not (target.is_file() and _GENERATOR in target.read_text(errors="replace")[:2000]):
        raise FileExistsError(f"{target} exists and is not a report of slt-jax, so it is kept. Give another path.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to. Make it first.")
    return target


def picture(figure: Figure, alt: str) -> Picture:
    """A figure as SVG in a data URI. Equal figures give equal bytes."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "slt-jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(source, alt, float(figure.get_size_inches()[0]))


def tone_of(verdict: str) -> str:
    """The tone of a result with this verdict."""
    return {"converged": GOOD, "depends on nbeta or localization": CAUTION}.get(verdict, BAD)


def table_note(rows: Iterable[Row]) -> tuple[str, ...]:
    """What the symbols before rows mean, and the mark of estimates."""
    tones = {row.tone for row in rows}
    note = "✓ converged, ! depends on nbeta or localization, ✗ any other verdict."
    return (note if tones <= {GOOD} else f"{note} {MARKED}.",)


_MEANINGS = {
    "sampler": "transition rule of a step", "step_size": "epsilon: drift -(epsilon/2) G, noise of variance epsilon",
    "friction": "fraction of the momentum that a step loses",
    "mean_time": "mean length of the draws' steps, as a fraction of a full step: some were shortened",
    "nbeta": "n times the inverse temperature",
    "localization": "gamma, the pull to w*", "num_chains": "independent chains",
    "num_draws": "losses recorded in each chain",
    "interrupted": "draws that were asked for, before the run was interrupted",
    "num_warmup": "steps before the first draw",
    "thinning": "steps from one draw to the next", "batch_size": "examples in the batch of a step",
    "num_data": "examples in the data set", "num_free": "weights that move",
    "chance_loss": "loss of a model that has learned nothing, nats per example",
    "baseline": "loss at w*: on the same batch (paired) or over all data (full)",
    "control_variate": "gradients minus their noise at w*", "hot": "factor by which every other chain started hotter",
}  # fmt: skip


def settings_sections(settings: RunRecord, without: tuple[str, ...] = ()) -> Iterable[Section]:
    """What was given and what the calibration chose, without the settings of these names."""
    forms = {float: lambda x: f"{x:.4g}", int: lambda x: f"{x:,}", bool: lambda x: "yes" if x else "no"}
    without += () if theory_of(settings.family).has_momentum else ("friction",)
    without += ("mean_time",) if settings.mean_time == 1 else ()
    without += () if settings.interrupted else ("interrupted",)
    values = {name: getattr(settings, name) for name in _MEANINGS if name not in without}
    known = {name: value for name, value in values.items() if value is not None}
    rows = tuple(Row((name, forms.get(type(value), str)(value), _MEANINGS[name])) for name, value in known.items())
    if rows:
        yield Section("Settings", header=("setting", "value", "meaning"), rows=rows)
    if lines := settings.calibration.get("lines"):
        text = ("Settings that were not given were measured on this model and data:",)
        yield Section("Choices of the calibration", text, items=tuple(Item(line) for line in lines))


def citation_section(settings: RunRecord, wbic: bool) -> Section:
    """What to cite; with ``wbic`` also the sources of the WBIC."""
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
    """The code that loads a saved ``result``, ``sweep`` or ``trajectory``, or saves one that has no path yet."""
    if path is None:
        return Section("Load it again", code=f'{what}.save("{what}.zarr")  # this page was made before it was saved')
    code = f"import slt_jax as slt\n\n{what} = slt.load_{what}({path!r})\nprint({what})"
    return Section("Load it again", code=code)
