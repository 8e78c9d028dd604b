"""Texts whose tokens are coloured by a number: as a section of a page, and as a page of its own."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from slt_jax._io import write_file
from slt_jax.report.page import UNMEASURED, Page, Section, Span, Text, checked_target, render

_POSITIVE, _NEGATIVE = "0, 114, 178", "213, 94, 0"  # the first two of style.COLORS
_STRONGEST = 0.62  # opacity, at which text stays readable on a light and on a dark page
_STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
_SIGNIFICANT = 2.0
_AROUND = 28  # characters of context on each side of a token


def token_page(
    path: str | os.PathLike, tokens: Sequence[Sequence[str]], values: Sequence[Sequence[float]] | np.ndarray, *,
    errors: Sequence[Sequence[float]] | np.ndarray | None = None, title: str = "Tokens", quantity: str = "value",
    titles: Sequence[str] | None = None, note: str = "", overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write texts as one self-contained HTML page, each token coloured by its value; a tooltip shows value and error.

    Blue is positive and orange negative, stronger with the size up to the 99 % quantile of the absolute values. Values
    within two standard errors of 0 have no colour.

    Args:
        tokens: the strings of each text's tokens. values: a number for each of them; NaN where there is none.
        errors: standard errors, likewise. quantity: what a value is, for the legend. titles: of the texts.
        note: a sentence below the title. overwrite: replace ``path``, if it is a page of slt-jax.

    Returns:
        The path of the page.

    Raises:
        ValueError: texts, values and errors of different lengths. FileExistsError, FileNotFoundError: as for reports.
    """
    target = checked_target(path, overwrite)
    names = [f"text {k}" for k in range(len(tokens))] if titles is None else list(titles)
    _check_lengths(tokens, values, errors, names)
    flat = np.concatenate([np.asarray(row, np.float64) for row in values] or [np.zeros(0)])
    limit, missing = limit_of(flat), [None] * len(tokens)
    texts = tuple(
        Text(name, tuple(spans_of(words, row, error, limit)))
        for name, words, row, error in zip(names, tokens, values, missing if errors is None else errors, strict=True)
    )
    count = int(np.isfinite(flat).sum())
    section = Section("Texts", scale=scale_of(limit, quantity, errors is not None), texts=texts)
    text = (note,) if note else ()
    page = Page(quantity, title, UNMEASURED, f"{len(tokens):,} texts, {count:,} values", text, (section,))
    return write_file(target, render(page))


def limit_of(values: np.ndarray) -> float:
    """The absolute value at which the colour is strongest."""
    known = np.abs(values[np.isfinite(values)])
    return (float(np.quantile(known, 0.99)) if known.size else 0.0) or 1.0


def spans_of(
    words: Sequence[str], values: Sequence[float] | np.ndarray, errors: Sequence[float] | np.ndarray | None,
    limit: float, aim: int = -1,
) -> Iterator[Span]:  # fmt: skip
    """The tokens of a text with their colours and tooltips; ``aim``: the token that is framed."""
    for k, (word, value) in enumerate(zip(words, values, strict=True)):
        error = float("nan") if errors is None else float(errors[k])
        tip = "" if not np.isfinite(value) else f"{value:+.3g}"
        tip += f" ± {error:.2g}" if tip and np.isfinite(error) else ""
        bare = word.lstrip(" ")
        if bare and bare != word:
            yield Span(word[: -len(bare)])
        yield Span(_shown(bare or word), tip, color_of(float(value), error, limit), k == aim)


def color_of(value: float, error: float, limit: float) -> str:
    """CSS for the background of a value; none where it is within two errors of 0, or not known."""
    if not np.isfinite(value) or abs(value) <= _SIGNIFICANT * (error if np.isfinite(error) else 0.0):
        return ""
    strength = _STRONGEST * min(1.0, abs(value) / limit)
    return f"rgba({_POSITIVE if value > 0 else _NEGATIVE}, {strength:.2f})"


def scale_of(limit: float, quantity: str, errors: bool = True) -> tuple[Span, ...]:
    """The legend of the colours; ``errors``: whether values have errors."""
    steps = [Span(f"{step * limit:+.2g}" if step else "0", "", color_of(step, 0.0, 1.0)) for step in _STEPS]
    rest = (Span("no colour: within two standard errors of 0"),) if errors else ()
    return (Span(f"{quantity}:"), *steps, *rest)


def in_context(words: Sequence[str], place: int) -> str:
    """A token in brackets, with some of the text on both sides."""
    word = words[place]
    space = word[: len(word) - len(word.lstrip(" "))] if word.strip(" ") else ""
    before, after = "".join(words[:place])[-_AROUND:], "".join(words[place + 1 :])[:_AROUND]
    return f"{before}{space}⟦{word[len(space) :].replace(' ', '␣')}⟧{after}"


def _shown(word: str) -> str:
    return word.replace("\n", "↵\n")


def _check_lengths(tokens, values, errors, names) -> None:
    given = {"values": values, "titles": names} | ({} if errors is None else {"errors": errors})
    for name, rows in given.items():
        if len(rows) != len(tokens):
            raise ValueError(f"there are {len(tokens)} texts and {len(rows)} {name}. Give one for each text.")
        if name == "titles":
            continue
        for k, (words, row) in enumerate(zip(tokens, rows, strict=True)):
            if len(words) != len(row):
                raise ValueError(f"text {k} has {len(words)} tokens and {len(row)} {name}. Give one for each token.")
