"""Relative links that leave the folder of the pages become links into the repository.

So a page may say ``[the script](../scaling/accuracy.py)``, which works where its source is read, and on the site leads
to the same file in the repository.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

REPOSITORY = "https://github.com/slt-jax/slt-jax"
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.[^)\s#]*)(#[^)\s]*)?\)")


def in_repository(text: str, folder: Path, docs: Path) -> str:
    """``text`` of a page in ``folder``, with the links that lead out of ``docs`` turned into addresses."""

    def replaced(match: re.Match[str]) -> str:
        label, link, anchor = match.groups()
        target = (folder / link).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return match.group()
        kind = "tree" if target.is_dir() else "blob"
        return f"[{label}]({REPOSITORY}/{kind}/main/{target.relative_to(docs.parent)}{anchor or ''})"

    return _LINK.sub(replaced, text)


def _on_read(app: "Sphinx", name: str, content: list[str]) -> None:
    docs = Path(app.srcdir).resolve()
    content[0] = in_repository(content[0], Path(app.env.doc2path(name)).resolve().parent, docs)


def _on_include(app: "Sphinx", relative: Path, name: str, content: list[str]) -> None:
    docs = Path(app.srcdir).resolve()
    content[0] = in_repository(content[0], (docs / relative).resolve().parent, docs)


def setup(app: "Sphinx") -> dict:
    app.connect("source-read", _on_read)
    app.connect("include-read", _on_include)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
