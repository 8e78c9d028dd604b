"""Write the page about a result, a sweep or a trajectory."""

import os
from pathlib import Path
from typing import Any

from slt_jax._io import user_path, write_file
from slt_jax.report.page import Page, render
from slt_jax.report.result import result_page
from slt_jax.report.sweep import sweep_page
from slt_jax.report.trajectory import trajectory_page
from slt_jax.results.llc import LLCResult, load_result
from slt_jax.results.storage import SWEEP, TRAJECTORY, kind_of
from slt_jax.results.sweep import Sweep, load_sweep
from slt_jax.results.trajectory import Trajectory, load_trajectory

_GENERATOR = 'content="slt-jax report"'


def write_report(source: Any, out: str | os.PathLike, *, overwrite: bool = False, **shown: Any) -> Path:
    """Write a result as one self-contained page.

    Args:
        source: an ``LLCResult``, a ``Sweep``, a ``Trajectory``, or a path that ``save`` of one of them wrote.
        out: the HTML file.
        overwrite: replace ``out``, if it is such a page.
        shown: ``unit`` and ``drift`` of a trajectory, as its ``plot`` takes them.

    Raises:
        FileExistsError, FileNotFoundError: of ``out`` or its folder. What ``load_result`` raises for a bad source.
        TypeError: something else, or ``shown`` of what is no trajectory.
    """
    target = user_path(out)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Pass overwrite=True to replace it, or another path.")
    if target.exists() and not (target.is_file() and _GENERATOR in target.read_text(errors="replace")[:2000]):
        raise FileExistsError(f"{target} exists and is not a report of slt-jax, so it is kept. Give another path.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to. Make it first.")
    path = str(source) if isinstance(source, (str, os.PathLike)) else None
    text = render(page_of(source if path is None else _opened(path), path, **shown))
    return write_file(target, text)


def _opened(path: str) -> Any:
    kind = kind_of(user_path(path))
    return load_sweep(path) if kind == SWEEP else load_trajectory(path) if kind == TRAJECTORY else load_result(path)


def page_of(thing: Any, path: str | None = None, **shown: Any) -> Page:
    """The page about a result, a sweep or a trajectory, by its kind. ``path``: where it is saved."""
    if isinstance(thing, Trajectory):
        return trajectory_page(thing, path, **shown)
    if isinstance(thing, (LLCResult, Sweep)):
        if shown:
            what = "a sweep" if isinstance(thing, Sweep) else "a result"
            raise TypeError(f"{' and '.join(shown)} are of a trajectory's page, and this is {what}'s. Leave them out.")
        return sweep_page(thing, path) if isinstance(thing, Sweep) else result_page(thing, path)
    raise TypeError(f"a report is of a result, a sweep or a trajectory, or of a saved one, got {type(thing).__name__}.")
