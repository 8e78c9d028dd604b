"""The strongest influences on one example or token, as a table."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Ranking:
    """The units with the most influence on one, the strongest first.

    ``helps``, ``harms``: rows (index, value, stderr). ``labels``: (number of the observable, example, token or -1) of
    each index, and ``names`` those of the observables. Units below twice the noise floor, or twice their own error, are
    left out, so that a list may be shorter than was asked for. Among many units the strongest are also the luckiest:
    compare them with the largest that noise alone gives, about ``noise_floor`` times sqrt(2 log(units)).
    """

    helps: tuple[tuple[int, float, float], ...]
    harms: tuple[tuple[int, float, float], ...]
    labels: Int[np.ndarray, "unit 3"]
    target: str
    quantity: str
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Ranking: {len(self.helps)} units help and {len(self.harms)} harm {self.target}>"

    def __str__(self) -> str:
        lines = [f"Influence on {self.target} ({self.quantity})"]
        for title, rows in (("helps", self.helps), ("harms", self.harms)):
            lines += [f"{title}  {self._place(i):<24}{value:+.3g} +/- {error:.2g}" for i, value, error in rows]
            lines += [f"{title}  nothing above the noise"] if not rows else []
        return "\n".join(lines)

    def _place(self, index: int) -> str:
        number, example, token = self.labels[index]
        place = f"example {example}" + (f", token {token}" if token >= 0 else "")
        return f"{place} of {self.names[number]!r}" if len(self.names) > 1 else place

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self, texts: Sequence[str] | None = None) -> str:
        """A table as HTML.

        Args:
            texts: of every unit that was ranked, in its order; its line shows the text of the unit.
        """
        cell, rows = "padding:.1em .9em .1em 0", []
        for title, color, units in (("helps", "#0072B2", self.helps), ("harms", "#D55E00", self.harms)):
            first = f'<td style="color:{color};font-weight:600;{cell}">{title}</td>'
            for i, value, error in units:
                number = f'<td style="white-space:nowrap;{cell}">{value:+.3g} ± {error:.2g}</td>'
                text = "" if texts is None else _text_cell(str(texts[i]))
                rows.append(f'<tr>{first}<td style="{cell}">{self._place(i)}</td>{number}{text}</tr>')
            if not units:
                rows.append(f'<tr>{first}<td colspan="3">nothing above the noise</td></tr>')
        names = ("", "unit", self.quantity, *(() if texts is None else ("text",)))
        head = "".join(f'<th style="text-align:left;{cell}">{html.escape(name)}</th>' for name in names)
        caption = f'<caption style="text-align:left">Influence on {html.escape(self.target)}</caption>'
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _text_cell(text: str) -> str:
    return f'<td style="text-align:left;white-space:pre-wrap">{html.escape(text)}</td>'
