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


def write_report(source: Any, out: str | os.PathLike, *, overwrite: bool = False, **options: Any) -> Path:
    """Write a result, a sweep or a trajectory as one self-contained HTML page.

    Args:
        source: an ``LLCResult``, a ``Sweep``, a ``Trajectory``, or a path that ``save`` of one of them wrote.
        out: the HTML file.
        overwrite: replace ``out``, if it is such a page.
        options: ``unit`` and ``drift`` of a trajectory, as in its ``plot``.

    Returns:
        The path of the page.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is false, or it is not such a page.
        FileNotFoundError: the folder of ``out`` or the source does not exist.
        ValueError: the source is foreign or truncated.
        TypeError: a source of another type, or ``options`` for something that is not a trajectory.
    """
    target = user_path(out)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Pass overwrite=True to replace it, or another path.")
    if target.exists() and not (target.is_file() and _GENERATOR in target.read_text(errors="replace")[:2000]):
        raise FileExistsError(f"{target} exists and is not a report of slt-jax, so it is kept. Give another path.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to. Make it first.")
    path = str(source) if isinstance(source, (str, os.PathLike)) else None
    text = render(page_of(source if path is None else _loaded(path), path, **options))
    return write_file(target, text)


def _loaded(path: str) -> Any:
    kind = kind_of(user_path(path))
    return load_sweep(path) if kind == SWEEP else load_trajectory(path) if kind == TRAJECTORY else load_result(path)


def page_of(subject: Any, path: str | None = None, **options: Any) -> Page:
    """The page about a result, a sweep or a trajectory.

    Args:
        path: where the subject is saved.
        options: as in ``write_report``.

    Raises:
        TypeError: as ``write_report``.
    """
    if isinstance(subject, Trajectory):
        return trajectory_page(subject, path, **options)
    if isinstance(subject, (LLCResult, Sweep)):
        if options:
            kind = "a sweep" if isinstance(subject, Sweep) else "a result"
            raise TypeError(
                f"{' and '.join(options)} are of a trajectory's page, and this is {kind}'s. Leave them out."
            )
        return sweep_page(subject, path) if isinstance(subject, Sweep) else result_page(subject, path)
    raise TypeError(
        f"a report is of a result, a sweep or a trajectory, or of a saved one, got {type(subject).__name__}."
    )
