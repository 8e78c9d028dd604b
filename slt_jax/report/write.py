"""Write the page about a result, a sweep, a trajectory or susceptibilities."""

import os
from pathlib import Path
from typing import Any

from slt_jax._io import user_path, write_file
from slt_jax.report.page import Page, checked_target, render
from slt_jax.report.result import result_page
from slt_jax.report.susceptibilities import susceptibilities_page
from slt_jax.report.sweep import sweep_page
from slt_jax.report.trajectory import trajectory_page
from slt_jax.results.llc import LLCResult, load_result
from slt_jax.results.storage import SUSCEPTIBILITIES, SWEEP, TRAJECTORY, kind_of
from slt_jax.results.susceptibilities import Susceptibilities, load_susceptibilities
from slt_jax.results.sweep import Sweep, load_sweep
from slt_jax.results.trajectory import Trajectory, load_trajectory


def write_report(source: Any, out: str | os.PathLike, *, overwrite: bool = False, **options: Any) -> Path:
    """Write a result, a sweep, a trajectory or susceptibilities as one self-contained HTML page.

    Args:
        source: an ``LLCResult``, a ``Sweep``, a ``Trajectory``, ``Susceptibilities``, or a path that ``save`` of one of
            them wrote.
        out: the HTML file.
        overwrite: replace ``out``, if it is such a page.
        options: ``unit`` and ``drift`` of a trajectory, as in its ``plot``; ``texts`` and ``show`` of susceptibilities,
            as in their ``report``.

    Returns:
        The path of the page.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is false, or it is not such a page.
        FileNotFoundError: the folder of ``out`` or the source does not exist.
        ValueError: the source is foreign or truncated.
        TypeError: a source of another type, or ``options`` that it does not have.
    """
    target = checked_target(out, overwrite)
    path = str(source) if isinstance(source, (str, os.PathLike)) else None
    return write_file(target, render(page_of(source if path is None else _loaded(path), path, **options)))


def _loaded(path: str) -> Any:
    loaders = {SWEEP: load_sweep, TRAJECTORY: load_trajectory, SUSCEPTIBILITIES: load_susceptibilities}
    return loaders.get(kind_of(user_path(path)) or "", load_result)(path)


def page_of(subject: Any, path: str | None = None, **options: Any) -> Page:
    """The page about a result, a sweep, a trajectory or susceptibilities.

    Args:
        path: where the subject is saved.
        options: as in ``write_report``.

    Raises:
        TypeError: as ``write_report``.
    """
    if isinstance(subject, Trajectory):
        return trajectory_page(subject, path, **options)
    if isinstance(subject, Susceptibilities):
        return susceptibilities_page(subject, path, **options)
    if isinstance(subject, (LLCResult, Sweep)):
        if options:
            kind = "a sweep" if isinstance(subject, Sweep) else "a result"
            raise TypeError(
                f"{' and '.join(options)} are of a trajectory's page, and this is {kind}'s. Leave them out."
            )
        return sweep_page(subject, path) if isinstance(subject, Sweep) else result_page(subject, path)
    raise TypeError(
        "a report is of a result, a sweep, a trajectory or susceptibilities, or of saved ones, got "
        f"{type(subject).__name__}."
    )
