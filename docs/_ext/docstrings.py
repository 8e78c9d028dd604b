"""Two habits of this project's docstrings, for napoleon.

- A property's sentence may have a colon, which napoleon would take for the end of its type.
- A record lists its fields in one paragraph, "``a``: what it is. ``b``, ``c``: what they are." It becomes a list.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_NAMES = re.compile(r"(?:^|(?<=[.;] ))(?:and )?((?:``\w+``(?:, (?:and )?| and )?)+):")


def listed(paragraph: str) -> list[str]:
    """A paragraph that consists of two or more described names, as items of a list; otherwise as it is."""
    found = list(_NAMES.finditer(paragraph))
    if len(found) < 2 or found[0].start() != 0:
        return [paragraph]
    ends = [match.start() for match in found[1:]] + [len(paragraph)]
    return [f"* {paragraph[m.start(1) : end].strip().rstrip(';')}" for m, end in zip(found, ends, strict=True)]


def with_lists(lines: list[str]) -> list[str]:
    """The lines of a docstring with each such paragraph as a list."""
    result: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        if paragraph.startswith("``"):
            result += listed(" ".join(paragraph.split("\n")))
        else:
            result += paragraph.split("\n")
        result.append("")
    return result


def _process(app: "Sphinx", what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if what in ("property", "attribute"):
        lines.insert(0, "")
    if what in ("class", "exception"):
        lines[:] = with_lists(lines)


def setup(app: "Sphinx") -> dict:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
