"""The data of the command line: token files, text, and Hugging Face data sets."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slt_jax.cli.documents import Documents, Examples, Tokenizer, arranged, packed
from slt_jax.posterior.data import Source, as_source
from slt_jax.posterior.files import columns_of, token_file

Read = tuple[Source, int]  # (the data set, tokens in one example)


@dataclass(frozen=True)
class Reader:
    """Reads data for one model.

    ``folder``: of the checkpoint, for its tokenizer. ``seq_len``: tokens in an example, if given; ``context_length``
    and ``vocab_size``: of the model, None if unknown. ``dtype``: of ``.bin`` files.
    """

    folder: Callable[[], Path]
    seq_len: int | None
    context_length: int | None
    vocab_size: int | None
    dtype: str | None = None
    documents: Documents | None = None
    column: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if self.seq_len is not None and self.context_length is not None and self.seq_len > self.context_length:
            raise ValueError(f"--seq-len {self.seq_len} is more than the model's context of {self.context_length}.")

    def length(self, available: int | None) -> int:
        """Tokens in an example; ``available``: the most that the data have for one."""
        if self.seq_len is not None:
            return self.seq_len
        limits = [limit for limit in (self.context_length, available) if limit is not None]
        if not limits:
            raise ValueError("the model's config.json names no context length. Give one with --seq-len.")
        return max(min(limits), 2)

    def tokens(self, file: Path) -> Read:
        """A token file; the rows of a two-dimensional one are cut into examples each for itself."""
        length = self.length(columns_of(file))
        return token_file(file, length, dtype=self.dtype, vocab_size=self.vocab_size), length

    def text(self, files: Sequence[Path]) -> Read:
        """Text files: one as a stream without special tokens, several as documents."""
        tokenizer, named = Tokenizer(self.folder()), ", ".join(map(str, files))
        if len(files) == 1 and self.documents is None:
            length = self.length(None)
            return as_source(packed(tokenizer.plain(files[0].read_text()), length, named)), length
        return self._arranged([file.read_text() for file in files], self.documents or "pack", named)

    def dataset(self, name: str) -> Read:
        """A column of a Hugging Face data set: text, or token ids."""
        table = _table(name, self.split)
        column = _column(table.column_names, self.column, name)
        values = table[column]
        values = list(values)
        rows = bool(values) and not isinstance(values[0], str) and len({len(value) for value in values}) == 1
        return self._arranged(values, self.documents or ("split" if rows else "pack"), f"column '{column}' of {name}")

    def any_file(self, file: Path) -> Read:
        """A token file or a text, by its name."""
        return self.tokens(file) if file.suffix in (".npy", ".bin") else self.text([file])

    def _arranged(self, documents: Sequence[Any], how: Documents, where: str) -> Read:
        if documents and isinstance(documents[0], str):
            tokenizer = Tokenizer(self.folder())
            documents = [tokenizer.document(text, ended=how == "pack") for text in documents]
        longest = 0 if how == "pack" else max(map(len, documents), default=0)
        length = self.length(longest or None)
        examples = arranged(documents, how, length, where)
        self._check_ids(examples, where)
        return as_source(examples), length

    def _check_ids(self, examples: Examples, where: str) -> None:
        ids = examples["tokens"] if isinstance(examples, dict) else examples
        limit = np.iinfo(np.int32).max if self.vocab_size is None else self.vocab_size
        if ids.min() < 0 or ids.max() >= limit:
            raise ValueError(
                f"{where} has token ids from {ids.min()} to {ids.max()}; the vocabulary has {limit}. Is this the right "
                "tokenizer?"
            )


@functools.lru_cache(maxsize=1)
def _table(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("--dataset needs the package datasets: pip install 'slt-jax[hf]'.") from error
    try:
        saved = Path(name).expanduser()
        table = datasets.load_from_disk(str(saved)) if saved.is_dir() else datasets.load_dataset(name, split=split)
    except Exception as error:  # of many types: no such name, no network, no such split
        raise ValueError(f"--dataset {name} cannot be loaded: {type(error).__name__}: {str(error)[:300]}") from error
    if isinstance(table, dict):
        if split not in table:
            raise ValueError(f"--dataset {name} has the splits {sorted(table)}. Name one with --split.")
        table = table[split]
    if not len(table):
        raise ValueError(f"--dataset {name} has no rows.")
    return table


def _column(names: list[str], asked: str | None, name: str) -> str:
    usual = [column for column in ("input_ids", "tokens", "text") if column in names]
    column = asked or (names[0] if len(names) == 1 else next(iter(usual), None))
    if column not in names:
        raise ValueError(f"--dataset {name} has the columns {names}. Name one of text or token ids with --column.")
    return column
