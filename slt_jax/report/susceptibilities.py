"""The pictures of susceptibilities: a heat map, a scatter of the probe, and a page with tables and coloured texts."""

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from slt_jax.report.page import CAUTION, GOOD, Page, Row, Section, Text, loading_section, picture
from slt_jax.report.style import COLORS, MARKERS, figure_of, legend_below
from slt_jax.report.tokens import in_context, limit_of, scale_of, spans_of
from slt_jax.results.susceptibilities import RELIABLE, Susceptibilities

CMAP = LinearSegmentedColormap.from_list("orange to blue", (COLORS[1], "white", COLORS[0]))  # as tokens are coloured
BY = ("group", "token", "example")
_MOST_COLUMNS = 64  # of the heat map, beyond which neighbours are averaged
_NAMED = 24  # columns up to which each is named
_TOP, _TEXTS = 5, 6  # examples of each sign, texts that are coloured


def plot_susceptibilities(found: Susceptibilities, path: str | os.PathLike | None = None, by: str | None = None):
    """See ``Susceptibilities.plot``."""
    has_groups = "group" in found.dataset
    by = by or ("group" if has_groups else "token" if "token" in found.chi.dims else "example")
    known = [name for name in BY if name in found.chi.dims or (name == "group" and has_groups)]
    if by not in known:
        raise ValueError(f"by must be one of {', '.join(map(repr, known))}, got {by!r}.")
    values, names = _across(found, by)
    reliability = list(found.reliability.values())

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        limit = limit_of(values.ravel())
        image = axis.imshow(values, aspect="auto", cmap=CMAP, norm=Normalize(-limit, limit), interpolation="nearest")
        axis.spines[:].set_visible(False)
        labels = [_with_reliability(*pair) for pair in zip(found.components, reliability, strict=True)]
        axis.set_yticks(range(len(labels)), labels)
        if by == "group" or len(names) <= _NAMED:
            slanted = {"rotation": 35, "ha": "right"} if max(map(len, names)) > 4 else {}
            axis.set_xticks(range(len(names)), names, **slanted)
        else:
            places = np.unique(np.linspace(0, len(names) - 1, 6).astype(int))
            axis.set_xticks(places, [names[k] for k in places])
        axis.set_xlabel({"group": "data set", "token": "position of the predicted token", "example": "example"}[by])
        bar = figure.colorbar(image, ax=axis, shrink=0.8, aspect=25)
        bar.set_label("mean, in standard deviations", fontsize=9)
        figure.suptitle("Susceptibility of each component (in brackets: its reliability)", fontsize=10)

    width = 4.2 + min(5.5, max(2.4, 0.42 * values.shape[1]))
    return figure_of((width, 1.9 + 0.24 * max(5, len(found.components))), path, draw)


def _with_reliability(name: str, value: float) -> str:
    return f"{name} (?)" if math.isnan(value) else f"{name} ({value:.2f})"


def _across(found: Susceptibilities, by: str) -> tuple[np.ndarray, list[str]]:
    """(component, column) of the z-scored chi, and the columns' names."""
    scored = found if "zscored" in found.dataset.attrs["transformed"] else found.zscored()
    chi = scored.chi.values.astype(np.float64)
    if by == "group":
        labels = [str(label) for label in found.dataset["group"].values]
        names = list(dict.fromkeys(labels))
        each = [chi[:, [label == name for label in labels]].reshape(len(chi), -1) for name in names]
        return np.stack([_mean(x, 1) for x in each], 1), names
    if chi.ndim == 3:
        chi = _mean(chi, 1 if by == "token" else 2)
    edges = np.unique(np.linspace(0, chi.shape[1], min(_MOST_COLUMNS, chi.shape[1]) + 1).astype(int))
    pairs = list(itertools.pairwise(edges))
    names = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in pairs]
    return np.stack([_mean(chi[:, a:b], 1) for a, b in pairs], 1), names


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis) / np.where(known.any(axis), known.sum(axis), math.nan)


def plot_components(found: Susceptibilities, path: str | os.PathLike | None = None):
    """Scatter of the first two principal coordinates of the examples; each group in its own colour and marker."""
    scored = found if "zscored" in found.dataset.attrs["transformed"] else found.zscored()
    white = scored.whitened()
    places, share = white["coordinate"].values, white["share"].values
    if places.ndim == 3:
        places = _mean(places, 2)
    groups = [str(g) for g in found.dataset["group"].values] if "group" in found.dataset else [""] * places.shape[1]
    kinds = sorted(set(groups), key=lambda name: (-groups.count(name), name))[: len(COLORS)]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        size = float(np.clip(3000 / places.shape[1], 5, 36))
        for name, color, marker in zip(kinds, COLORS, MARKERS, strict=False):
            own = np.array([g == name for g in groups])
            axis.scatter(*places[:2, own], s=size, color=color, marker=marker, alpha=0.7, lw=0)
            axis.plot([], [], marker, color=color, label=name)
        axis.axhline(0, color="0.85", lw=0.8, zorder=0)
        axis.axvline(0, color="0.85", lw=0.8, zorder=0)
        first, second = (f"coordinate {k + 1} ({part:.0%} of the variance)" for k, part in enumerate(share[:2]))
        axis.set(xlabel=first, ylabel=second)
        axis.set_title("Examples by the responses of all components", fontsize=10)
        if kinds != [""]:
            legend_below(figure, (axis,), 4)

    return figure_of((5.6, 5.0), path, draw)


def susceptibilities_page(
    found: Susceptibilities, path: str | None, *, texts: Sequence[Any] | None = None, show: str | None = None
) -> Page:
    """See ``Susceptibilities.report``."""
    _check_texts(found, texts)
    known = {name: value for name, value in found.reliability.items() if math.isfinite(value)}
    good = sum(value >= RELIABLE for value in known.values())
    shown = _shown_component(found, known, show)
    verdict = (
        f"{good} of {len(known)} {'is' if len(known) == 1 else 'are'} more signal than noise"
        if known
        else "reliability is not known"
    )
    attributes, chi = found.dataset.attrs, found.chi
    units = f"{chi.sizes['example']:,} examples" + (f" of {chi.sizes['token']:,} tokens" if "token" in chi.dims else "")
    text = [
        f"Each component was sampled by itself, with all other weights at the checkpoint: {attributes['num_chains']} "
        f"chains of {attributes['num_draws']} draws, nbeta {attributes['nbeta']:g}, localization "
        f"{attributes['localization']:g}. Its susceptibility to a part of the probe ({units}) is minus the covariance "
        "of its loss with the loss there, less the mean over the probe.",
        "Negative: what lowers the loss there lowers the component's loss; the component serves this part of the data "
        "more than the average. Positive: it serves it less. Reliability is the correlation that the values of two "
        "such runs would have; below 0.5 most of what is seen is noise. It needs two chains.",
    ]  # fmt: skip
    if attributes["nbeta"] == 0:
        text.append("nbeta is 0: this is a control, in which the draws do not know the data.")
    if found.interrupted:
        text.append(f"Interrupted after {len(found.components)} of {found.interrupted} components.")
    sections = [
        Section("Components", header=("component", "weights", "LLC", "its verdict", "reliability", "values"),
                rows=tuple(Row(row) for row in found.rows())),
        Section("Heat map", picture=picture(plot_susceptibilities(found), "Components against parts of the probe.")),
    ]  # fmt: skip
    if len(found.components) > 1:
        alt = "Scatter of the first two principal coordinates of the probe."
        what = "Examples that the components respond to alike are near each other."
        what += " Of each, the mean over its tokens is taken." if "token" in found.chi.dims else ""
        sections.append(Section("Map", (what,), picture(plot_components(found), alt)))
    sections += _strongest(found, shown, texts)
    sections.append(loading_section("susceptibilities", path))
    title = f"{len(found.components)} component{'s' * (len(found.components) > 1)}, {units}"
    return Page("Susceptibilities", title, GOOD if known and good == len(known) else CAUTION, verdict, tuple(text),
                tuple(sections))  # fmt: skip


def _check_texts(found: Susceptibilities, texts: Sequence[Any] | None) -> None:
    count = found.chi.sizes["example"]
    if texts is not None and len(texts) != count:
        raise ValueError(f"texts must have a text for each of the {count} examples, got {len(texts)}.")
    if texts is None or "token" not in found.chi.dims:
        return
    width = found.chi.sizes["token"]
    for place, text in enumerate(texts):
        if isinstance(text, str) or len(text) != width:
            raise ValueError(
                f"texts[{place}] must be a list with the string of each predicted token, {width} of them, got "
                + (f"the string {text[:20]!r}." if isinstance(text, str) else f"{len(text)}.")
            )


def _shown_component(found: Susceptibilities, known: dict[str, float], show: str | None) -> str:
    if show is not None and show not in found.components:
        raise ValueError(f"show names {show!r}. The components are {', '.join(found.components)}.")
    return show or max(known, key=lambda name: known[name], default=found.components[0])


def _strongest(found: Susceptibilities, name: str, texts: Sequence[Any] | None) -> list[Section]:
    """The strongest responses of a component, and the texts that they are in."""
    row = found.components.index(name)
    chi, error = found.chi.values[row].astype(np.float64), found.stderr.values[row].astype(np.float64)
    flat, floor = chi.reshape(-1), 2 * error.reshape(-1)
    order = np.argsort(flat)
    order = order[np.isfinite(flat[order]) & (np.abs(flat[order]) > floor[order])]
    chosen = [*order[:_TOP], *(k for k in order[::-1][:_TOP] if k not in order[:_TOP])]
    rows = [Row((f"{flat[k]:+.3g}\u00a0±\u00a0{error.reshape(-1)[k]:.2g}", *_place(found, k, texts))) for k in chosen]
    intro = "Values beyond two standard errors, in nats squared." if rows else "No value is beyond two standard errors."
    sections = [
        Section(f"Strongest responses of {name}", (intro,), header=("value", "where", "text"), rows=tuple(rows))
    ]
    if texts is not None and chi.ndim == 2:
        examples = list(dict.fromkeys(int(k) // chi.shape[1] for k in chosen))[:_TEXTS] or list(
            range(min(_TEXTS, len(chi)))
        )
        limit = limit_of(flat)
        shown = tuple(Text(_named(found, k), tuple(spans_of(texts[k], chi[k], error[k], limit))) for k in examples)
        how = f"The tokens by the susceptibility of {name}. Point at a token for its value."
        sections.append(Section("In their texts", (how,), scale=scale_of(limit, "susceptibility"), texts=shown))
    return sections


def _place(found: Susceptibilities, unit: int, texts: Sequence[Any] | None) -> tuple[str, str]:
    """Where a unit is, and its text with what is around it."""
    shape = found.chi.shape[1:]
    example, token = divmod(int(unit), shape[1]) if len(shape) == 2 else (int(unit), -1)
    where = _named(found, example) + (f", token {token}" if token >= 0 else "")
    if texts is None or token < 0:
        return where, "" if texts is None else str(texts[example])[:240]
    words = [str(word) for word in texts[example]]
    return where, in_context(words, token).replace("\n", "↵")


def _named(found: Susceptibilities, example: int) -> str:
    group = f"{found.dataset['group'].values[example]}: " if "group" in found.dataset else ""
    return f"{group}example {example}"
