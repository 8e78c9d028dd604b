"""The [source] link beside a name of the reference: its lines in the repository."""

import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

from repository_links import REPOSITORY

ROOT = Path(__file__).resolve().parents[2]


def source_of(domain: str, info: dict[str, Any]) -> str | None:
    """For ``sphinx.ext.linkcode``; None where there is no such file in the repository."""
    if domain != "py":
        return None
    thing = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        thing = getattr(thing, name, None)
    if isinstance(thing, functools.cached_property):
        thing = thing.func
    thing = thing.fget if isinstance(thing, property) else inspect.unwrap(thing) if callable(thing) else thing
    try:
        file = Path(inspect.getsourcefile(thing) or "").resolve().relative_to(ROOT)
        lines, first = inspect.getsourcelines(thing)
    except (TypeError, ValueError, OSError):
        return None
    return f"{REPOSITORY}/blob/main/{file}#L{first}-L{first + len(lines) - 1}"
