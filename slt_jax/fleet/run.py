"""A fleet: one function over many cases, a job for each, on a cluster or on this machine. Submitit runs the jobs."""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax._checks import check_count
from slt_jax._io import write_file
from slt_jax.engine.checkpoint import first_difference
from slt_jax.fleet.jobs import Desk, Failure, line, read, the_submitit
from slt_jax.results.llc import LLCResult

if TYPE_CHECKING:
    import xarray as xr

_MANIFEST = "fleet.json"
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+,-]{0,199}")
_NUMBERS = ("llc", "llc_stderr", "rhat", "ess", "init_loss")
_POLL = 0.5  # seconds between two looks at the jobs
_MONTH = 30 * 24 * 60  # minutes


@dataclass(frozen=True)
class Fleet:
    """What ``run_fleet`` collected.

    ``dataset``: over ``job``, in the order of the cases: ``llc``, ``llc_stderr``, ``rhat``, ``ess``, ``init_loss``,
    ``verdict``, ``attempts``, ``seconds`` (of the last attempt), ``failed`` and ``reason``. A failed job has NaN for
    numbers; ``attempts`` is 0 and ``seconds`` NaN where the folder says nothing about them.
    """

    results: dict[str, LLCResult]
    failures: tuple[Failure, ...]
    dataset: "xr.Dataset"

    def __str__(self) -> str:
        told = {name: line(result) for name, result in self.results.items()}
        told |= {f.name: f"failed at attempt {f.attempts}: {f.reason} (log: {f.log})" for f in self.failures}
        names = self.dataset["job"].values.tolist()
        return "\n".join(
            [f"{len(names)} jobs, {len(self.failures)} failed.", *(f"{name}: {told[name]}" for name in names)]
        )


def run_fleet(
    function: Callable[[Any], LLCResult],
    cases: Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    executor: Any = None,
    retries: int = 1,
    parallel: int | None = None,
    progress: bool = False,
) -> Fleet:
    """Run ``function(case)`` for every case as a job of its own, and collect the results.

    A job saves its result as ``folder/NAME.zarr`` itself, so that nothing computed is lost when this process ends. The
    same call with the same folder takes what is there and runs the rest; cases may be added to it. What changes inside
    ``function`` is not seen: then take another folder.

    A job that raises or dies is submitted again, ``retries`` times at most: let ``function`` give ``estimate_llc`` a
    ``checkpoint_dir``, and it goes on where it was. Errors of input and program (ValueError, TypeError, KeyError,
    FloatingPointError and the like) would come again and are not retried.

    Ctrl-C, or an error here, cancels jobs of this machine; jobs of a cluster run on, and the same call waits for them.
    If this process is killed, jobs of this machine run on too, and those of the next call wait until they have ended.

    Args:
        function: loads what the case names and returns ``estimate_llc(...)``. It is pickled; what lives in a module is
            imported by the job, in the same working directory.
        cases: name -> anything that can be pickled: a path, a dict of numbers. Names become file names.
        folder: created if missing; on a cluster, on a disk that all machines share.
        executor: a configured ``submitit`` executor, e.g. ``submitit.AutoExecutor("fleet/logs")`` after
            ``update_parameters(timeout_min=600, slurm_partition="gpu", gpus_per_node=1)``. Past its time limit a job
            has failed. Default: processes of this machine, on the CPU, without a limit.
        retries: further attempts for a job that failed.
        parallel: most jobs in the queue at a time. Default: half the cores here; with an executor all at once, as an
            array where it has arrays.
        progress: a line on stderr for each job that ends.

    Raises:
        ImportError: submitit is not installed.
        TypeError, ValueError: an argument that cannot be used, or the folder holds something else.
    """
    submitit = the_submitit()
    if not callable(function):
        raise TypeError(f"function must be callable with one case, got {function!r}.")
    _check_cases(cases)
    check_count("retries", retries, 0, "0 runs every job once.")
    if parallel is not None:
        check_count("parallel", parallel, 1)
    if executor is not None and not isinstance(executor, submitit.Executor):
        raise TypeError(f"executor must be an executor of submitit or None, got {executor!r}.")
    root = Path(folder).absolute()
    _open(root, executor, function, cases)
    if executor is None:
        executor = submitit.LocalExecutor(root / "logs")
        executor.update_parameters(timeout_min=_MONTH)
        parallel = max(1, (os.cpu_count() or 1) // 2) if parallel is None else parallel
    desk = Desk(root, function, cases, executor, progress)
    try:
        while desk.queue or desk.running:
            desk.submit(parallel)
            time.sleep(_POLL)
            desk.look(retries)
    except BaseException:
        desk.abandon()
        raise
    return _collected(desk)


def _check_cases(cases: Mapping[str, Any]) -> None:
    if not isinstance(cases, Mapping) or not cases:
        raise TypeError(f"cases must be a mapping from names to cases, with one at least, got {cases!r}.")
    seen: dict[str, str] = {}
    for name in cases:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"the name {name!r} is no file name everywhere. Take a string of at most 200 letters, digits and "
                "._=+,- that begins with a letter or a digit."
            )
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise ValueError(f"{other!r} and {name!r} are one file name on some disks. Rename one of them.")


def _open(root: Path, executor: Any, function: Callable, cases: Mapping[str, Any]) -> None:
    """Raise ValueError unless the folder is new, or holds these cases or others besides them."""
    manifest, known = root / _MANIFEST, {}
    name = getattr(function, "__qualname__", type(function).__name__)
    wanted = {"format": _FORMAT, "function": name, "cases": {name: _plain(case) for name, case in cases.items()}}
    if manifest.exists():
        found = read(manifest)
        known = found.get("cases", {})
        found, same = ({**x, "cases": {k: v for k, v in x.get("cases", {}).items() if k in known and k in cases}}
                       for x in (found, wanted))  # fmt: skip
        if (other := first_difference(found, same)) is not None:
            field, there, here = other
            raise ValueError(
                f"folder {root} holds a fleet with another {field}: {there!r} there, {here!r} now. Give the same to "
                "go on with it, or another folder."
            )
    elif root.exists():
        logs = () if executor is None else (Path(executor.folder), *Path(executor.folder).parents)
        if foreign := [p.name for p in root.iterdir() if p not in logs]:
            raise ValueError(
                f"folder {root} is not empty and holds no {_MANIFEST}, so it is not a fleet (it has {foreign[0]}). "
                "Give an empty or new folder."
            )
    (root / "jobs").mkdir(parents=True, exist_ok=True)
    write_file(manifest, json.dumps({**wanted, "cases": {**known, **wanted["cases"]}}, indent=1))


def _plain(case: Any) -> Any:
    """The case in JSON; what JSON cannot say is told by its type alone."""

    def plain(x: Any) -> Any:
        if isinstance(x, np.generic):
            return x.item()
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return str(x) if isinstance(x, os.PathLike) else f"<{type(x).__name__}>"

    try:
        return json.loads(json.dumps(case, default=plain))
    except (TypeError, ValueError):  # keys that are no strings, circles
        return f"<{type(case).__name__}>"


def _collected(desk: Desk) -> Fleet:
    import xarray as xr

    cases, failed = desk.cases, desk.failures
    told = {name: desk.told(name) for name in cases}
    columns = {key: [getattr(desk.results.get(name), key, math.nan) for name in cases] for key in _NUMBERS}
    columns["verdict"] = [getattr(desk.results.get(name), "verdict", "") for name in cases]
    columns["attempts"] = [failed[n].attempts if n in failed else told[n].get("attempt", 0) for n in cases]
    columns["seconds"] = [told[name].get("seconds", math.nan) for name in cases]
    columns["failed"] = [name in failed for name in cases]
    columns["reason"] = [failed[name].reason if name in failed else "" for name in cases]
    words = {key: np.array(columns[key], dtype=object) for key in ("verdict", "reason")}  # zarr has no fixed widths
    table = {key: ("job", value) for key, value in {**columns, **words}.items()}
    dataset = xr.Dataset(table, {"job": np.array(list(cases), dtype=object)})
    results = {name: desk.results[name] for name in cases if name in desk.results}
    return Fleet(results, tuple(failed[name] for name in cases if name in failed), dataset)
