"""Documents as examples of a language model: tokenized, then packed, split or padded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

Documents = Literal["pack", "split", "pad"]
Examples = Int32[np.ndarray, "example length"] | dict[str, np.ndarray]


class Tokenizer:
    """The ``tokenizer.json`` of a checkpoint, with the end-of-text token that ``tokenizer_config.json`` names.

    Raises:
        FileNotFoundError: the checkpoint has no tokenizer.json.
        ImportError: ``tokenizers`` is not installed.
    """

    def __init__(self, folder: Path):
        file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json. Give token ids with --tokens FILE.")
        try:
            from tokenizers import Tokenizer as Rules
        except ImportError as error:
            raise ImportError("--text needs the package tokenizers: pip install 'slt-jax[hf]'.") from error
        self.rules: Any = Rules.from_file(str(file))
        record = json.loads(settings.read_text()) if settings.is_file() else {}
        end = record.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        self.end: int | None = self.rules.token_to_id(end) if isinstance(end, str) else None

    def plain(self, text: str) -> list[int]:
        """The ids of a text that is no document: without tokens for beginning and end."""
        return self.rules.encode(text, add_special_tokens=False).ids

    def document(self, text: str, ended: bool) -> list[int]:
        """The ids of a document, with the tokens that the tokenizer puts at its beginning and end.

        ``ended``: the end-of-text token is appended in any case, where there is one.
        """
        ids = self.rules.encode(text, add_special_tokens=True).ids
        return [*ids, self.end] if ended and self.end is not None and ids[-1:] != [self.end] else ids


def shorter(tokens: int) -> str:
    """What to give for shorter examples of so many tokens: a batch of the default size if they suffice, or two."""
    count = 32 if tokens >= 32 * 16 else 2
    return f", or examples that are shorter: --seq-len {tokens // count} makes {count}" if tokens >= 2 * count else ""


def packed(ids: Sequence[int] | np.ndarray, length: int, where: str) -> Int32[np.ndarray, "example {length}"]:
    """One stream of tokens cut into examples; a shorter remainder is dropped."""
    rows = len(ids) // length
    if rows < 2:
        found = f"{len(ids):,} tokens, fewer than two examples of {length:,}"
        raise ValueError(f"{where} has {found}. Give more{shorter(len(ids))}.")
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


def arranged(documents: Sequence[Sequence[int]], how: Documents, length: int, where: str) -> Examples:
    """Documents as examples of ``length`` tokens.

    Args:
        how: ``pack``: one after the other, so that an example may hold several, and tokens attend to the ones before.
            ``split``: every example is from one document; what is left of it is dropped. ``pad``: what is left is an
            example too, filled up with zeros, and its loss is the mean over its own tokens.

    Returns:
        ``pack``, ``split``: an array. ``pad``: ``{"tokens": array, "count": number of tokens in each row}``.
    """
    if how == "pack":
        stream = np.concatenate([np.asarray(document, np.int32) for document in documents] or [np.zeros(0, np.int32)])
        return packed(stream, length, where)
    cuts = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    rows = [cut for cut in cuts if len(cut) == length or (how == "pad" and len(cut) > 1)]
    if len(rows) < 2:
        found = f"{len(rows)} examples of {length} tokens"
        total = sum(len(document) for document in documents)
        raise ValueError(f"{where} gives {found}. Give more, or --documents pad{shorter(total)}.")
    if how == "split":
        return np.asarray(rows, np.int32)
    filled = np.zeros((len(rows), length), np.int32)
    for row, cut in zip(filled, rows, strict=True):
        row[: len(cut)] = cut
    return {"tokens": filled, "count": np.asarray([len(cut) for cut in rows], np.int32)}
