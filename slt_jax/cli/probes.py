"""Probes on the command line: examples of token files or texts whose losses are observed, with their words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slt_jax.cli.documents import Tokenizer
from slt_jax.posterior.data import Source

_BYTES = 256  # a vocabulary of this size, without a tokenizer, is that of bytes


class Probe(NamedTuple):
    """``data``: the examples. ``groups``: of each the name of its data set. ``rows``: its number in that data set."""

    data: Any
    groups: list[str]
    rows: list[int]

    @property
    def tokens(self) -> np.ndarray:
        """Ids, (example, token)."""
        return np.asarray(self.data["tokens"] if isinstance(self.data, dict) else self.data)


def probe_of(sources: dict[str, Source], examples: int) -> Probe:
    """At most so many examples of each data set, evenly spaced over it.

    Raises ValueError for fewer than one, or data sets of different kinds (padded and not).
    """
    parts, groups, rows = [], [], []
    for name, source in sources.items():
        count = min(examples, source.num_data)
        chosen = np.unique(np.linspace(0, source.num_data - 1, count).astype(np.int64))
        parts.append(source.fetch(chosen))
        groups += [name] * len(chosen)
        rows += chosen.tolist()
    if len({jax.tree.structure(part) for part in parts}) > 1:
        raise ValueError(f"the data sets {', '.join(sources)} are not of one kind: one of them is padded. Use pack.")
    return Probe(jax.tree.map(lambda *x: np.concatenate(x), *parts), groups, rows)


def words_of(tokens: np.ndarray, folder: Path | None, vocab_size: int | None) -> list[list[str]]:
    """The string of each predicted token of each example: all but the first.

    By the tokenizer of the checkpoint where it has one, as bytes where the vocabulary is of that size, else the ids.
    """
    ids = np.asarray(tokens)[:, 1:].tolist()
    decode = _decoder(folder, vocab_size)
    return [[decode(token) for token in row] for row in ids]


def _decoder(folder: Path | None, vocab_size: int | None) -> Any:
    if folder is not None and (folder / "tokenizer.json").is_file():
        try:
            rules = Tokenizer(folder).rules
        except ImportError:
            return _numbered
        marks = {"Ġ": " ", "Ċ": "\n", "ĉ": "\t", "▁": " "}

        def word(token: int) -> str:
            piece = rules.id_to_token(token)
            if piece is None:
                return _numbered(token)
            for mark, text in marks.items():
                piece = piece.replace(mark, text)
            return piece

        return word
    return _byte if vocab_size == _BYTES else _numbered


def _byte(token: int) -> str:
    text = chr(token)
    return text if text.isprintable() or text in "\n\t" else f"⟨{token}⟩"


def _numbered(token: int) -> str:
    return f" {token}"


def texts_of(words: Sequence[Sequence[str]], joined: bool) -> list[Any]:
    """Of each example its words, or one string of them."""
    return ["".join(row) for row in words] if joined else [list(row) for row in words]
