"""The pictures of an influence: a scatter of its embedding, and a page on what influences one example or token."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from slt_jax._io import write_file
from slt_jax.report.page import CAUTION, GOOD, Page, Row, Section, Text, checked_target, picture, render
from slt_jax.report.style import COLORS, MARKERS, figure_of, legend_below
from slt_jax.report.tokens import in_context, limit_of, scale_of, spans_of


def plot_embedding(influence: Any, path: str | os.PathLike | None = None, groups: Sequence[str] | None = None):
    """Scatter of the first two coordinates; units of each group in their own colour and marker."""
    if groups is not None and len(groups) != influence.of.size:
        raise ValueError(f"groups must name each of the {influence.of.size} units, got {len(groups)} names.")
    places, shares = influence.embedding(2), influence.spectrum(2)
    names = np.array([""] * len(places) if groups is None else [str(g) for g in groups])
    kinds = sorted(set(names), key=lambda name: (-int((names == name).sum()), name))[: len(COLORS)]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        size = float(np.clip(4000 / len(places), 4, 40))
        others = ~np.isin(names, kinds)
        if others.any():
            axis.scatter(*places[others].T, s=size, color="0.8", lw=0)
        for name, color, marker in zip(kinds, COLORS, MARKERS, strict=False):
            axis.scatter(*places[names == name].T, s=size, color=color, marker=marker, alpha=0.7, lw=0)
            axis.plot([], [], marker, color=color, label=name)
        if others.any():
            axis.plot([], [], "o", color="0.8", label="others")
        axis.axhline(0, color="0.85", lw=0.8, zorder=0)
        axis.axvline(0, color="0.85", lw=0.8, zorder=0)
        first, second = (f"coordinate {k + 1} ({share:.0%} of the variance)" for k, share in enumerate(shares))
        axis.set(xlabel=first, ylabel=second, aspect="equal")
        unit = "token" if influence.of.level == "token" else "example"
        what = "correlations" if influence.normalized else "covariances"
        axis.set_title(f"{influence.of.size:,} {unit}s by the {what} of their losses", fontsize=10)
        if groups is not None:
            legend_below(figure, (axis,), 4)

    return figure_of((5.6, 5.2), path, draw)


def write_influence_page(
    influence: Any, out: str | os.PathLike, j: int, texts: Sequence[Any], on_texts: Sequence[Any], k: int,
    groups: Sequence[str] | None, overwrite: bool,
) -> Path:  # fmt: skip
    """See ``Influence.report``."""
    target = checked_target(out, overwrite)
    _check_texts(influence.of, texts, "texts")
    _check_texts(influence.on, on_texts, "on_texts")
    ranking = influence.top(j, k)
    sections = (
        *_target_sections(influence, j, on_texts),
        _table(influence, ranking, texts),
        *(_token_sections(influence, ranking, j, texts) if influence.of.level == "token" else ()),
        _map_section(influence, groups),
    )
    known = influence.of.num_chains > 1
    good = known and influence.reliability >= 0.5
    verdict = "one chain: reliability not known"
    if known:
        verdict = f"{'more signal than noise' if good else 'mostly noise'}: reliability {influence.reliability:.2f}"
    text = (
        f"Each value is the {'correlation' if influence.normalized else 'negative covariance (nats squared)'} of two "
        f"losses over {influence.of.num_draws:,} draws of {influence.of.num_chains} chains around the trained weights, "
        f"worth {influence.effective_draws:,.0f} independent draws. To train on more of what helps lowers the loss on "
        f"the target, to train on more of what harms raises it.",
        f"Reliability is the correlation that the values of two such runs would have. A correlation that is 0 has the "
        f"standard error {influence.noise_floor:.2g}; what is below twice that is not shown.",
    )  # fmt: skip
    words, place = _words(influence.on, on_texts, j)
    aim = f"“{words[place].strip() or '↵'}”, " if place >= 0 else ""
    page = Page("Influence", f"Influence on {aim}{ranking.target}", GOOD if good else CAUTION, verdict, text, sections)
    return write_file(target, render(page))


def _example(labels: np.ndarray, number: int, example: int, parts: tuple) -> int:
    """The place of an example among those of all data sets."""
    return sum(len(part.center) for part in parts[:number]) + example


def _words(traces: Any, texts: Sequence[Any], unit: int) -> tuple[list[str], int]:
    """The tokens of the unit's text and the unit's place among them; -1 for a whole example."""
    number, example, token = traces.labels[unit]
    text = texts[_example(traces.labels, number, example, traces.parts)]
    return ([str(text)], -1) if token < 0 else ([str(word) for word in text], int(token))


def _target_sections(influence: Any, j: int, on_texts: Sequence[Any]) -> tuple[Section, ...]:
    words, place = _words(influence.on, on_texts, j)
    spans = spans_of(words, [math.nan] * len(words), None, 1.0, place)
    what = "The loss of the framed token" if place >= 0 else "The loss of this example"
    return (
        Section("Target", (f"{what} is what is influenced.",), texts=(Text(_name(influence.on, j), tuple(spans)),)),
    )


def _name(traces: Any, unit: int) -> str:
    number, example, token = traces.labels[unit]
    where = f" of '{traces.parts[number].name}'" if len(traces.parts) > 1 else ""
    return f"example {example}{where}" + (f", token {token}" if token >= 0 else "")


def _table(influence: Any, ranking: Any, texts: Sequence[Any]) -> Section:
    rows = []
    for kind, units in (("helps", ranking.helps), ("harms", ranking.harms)):
        for unit, value, error in units:
            words, place = _words(influence.of, texts, unit)
            if place >= 0:
                shown = in_context(words, place)
            else:
                shown = words[0] if len(words[0]) <= 240 else f"{words[0][:237]}..."
            value_text = f"{value:+.3g}\u00a0±\u00a0{error:.2g}"
            rows.append(Row((kind, value_text, _name(influence.of, unit), shown.replace("\n", "↵"))))
        if not units:
            rows.append(Row((kind, "nothing above the noise", "", "")))
    unit = "token" if influence.of.level == "token" else "example"
    return Section(f"The strongest {unit}s", header=("effect", "value", "where", "text"), rows=tuple(rows))


def _token_sections(influence: Any, ranking: Any, j: int, texts: Sequence[Any]) -> tuple[Section, ...]:
    """The texts of the strongest tokens, each token coloured."""
    strongest = sorted((*ranking.helps, *ranking.harms), key=lambda row: -abs(row[1]))
    examples = list(dict.fromkeys(tuple(influence.of.labels[unit][:2].tolist()) for unit, *_ in strongest))
    if not examples:
        return ()
    column, labels = influence.column(j), influence.of.labels
    good = column if influence.normalized else -column
    limit, shown = limit_of(good), []
    for number, example in examples:
        units = np.flatnonzero((labels[:, 0] == number) & (labels[:, 1] == example))
        words, _ = _words(influence.of, texts, int(units[0]))
        values, errors = np.full(len(words), np.nan), np.full(len(words), np.nan)
        values[labels[units, 2]], errors[labels[units, 2]] = good[units], influence.stderr(units, [j])[:, 0]
        own = influence.on is influence.of and labels[j][:2].tolist() == [number, example]
        spans = spans_of(words, values, errors, limit, int(labels[j][2]) if own else -1)
        shown.append(Text(_name(influence.of, int(units[0])).rsplit(",", 1)[0], tuple(spans)))
    what = (
        "correlation with the loss of the target" if influence.normalized else "covariance with the loss of the target"
    )
    how = "The texts of these tokens. Blue tokens help, orange ones harm. Point at a token for its value."
    return (Section("In their texts", (how,), scale=scale_of(limit, what), texts=tuple(shown)),)


def _map_section(influence: Any, groups: Sequence[str] | None) -> Section:
    text = (
        "All of them in the plane in which their losses vary most together: what lies in one direction from the middle "
        "helps each other, what lies in opposite directions harms each other."
    )
    alt = "Scatter of the first two coordinates of the correlations of the losses."
    return Section("Map", (text,), picture(plot_embedding(influence, None, groups), alt))


def _check_texts(traces: Any, texts: Sequence[Any], argument: str) -> None:
    count = sum(len(part.center) for part in traces.parts)
    if len(texts) != count:
        raise ValueError(f"{argument} must have a text for each of the {count} examples, got {len(texts)}.")
    if traces.level != "token":
        return
    for place, (text, width) in enumerate(zip(texts, _widths(traces), strict=True)):
        if isinstance(text, str) or len(text) < width:
            raise ValueError(
                f"{argument}[{place}] must be a list with the string of each predicted token, {width} of them, got "
                + (f"the string {text[:20]!r}." if isinstance(text, str) else f"{len(text)}.")
            )


def _widths(traces: Any) -> list[int]:
    """Tokens up to the last that counts, of each example."""
    found = np.zeros(sum(len(part.center) for part in traces.parts), int)
    starts = np.cumsum([0, *(len(part.center) for part in traces.parts)])
    for number, example, token in traces.labels:
        place = starts[number] + example
        found[place] = max(found[place], token + 1)
    return found.tolist()
