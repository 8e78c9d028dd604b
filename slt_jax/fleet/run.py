"""A fleet: one function applied to many cases as independent jobs, by submitit on a cluster or on this machine."""

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slt_jax._checks import check_count, shown
from slt_jax._io import user_path, write_file
from slt_jax.engine.checkpoint import first_difference
from slt_jax.engine.screen import shows_progress
from slt_jax.fleet.jobs import Failure, JobQueue, import_submitit, read_json, result_line
from slt_jax.results.llc import LLCResult

if TYPE_CHECKING:
    import xarray as xr

_MANIFEST = "fleet.json"
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+,-]{0,199}")
_NUMBERS = ("llc", "llc_stderr", "rhat", "ess", "init_loss")
POLL_SECONDS = 0.5
_MONTH = 30 * 24 * 60  # minutes


@dataclass(frozen=True)
class Fleet:
    """The results of ``run_fleet``, and the jobs without one.

    ``dataset``: over ``job``, in the order of the cases: ``llc``, ``llc_stderr``, ``rhat``, ``ess``, ``init_loss``,
    ``verdict``, ``attempts``, ``seconds`` (of the last attempt), ``failed`` and ``reason``. The numbers of a failed job
    are NaN. If the folder has no record of them, ``attempts`` is 0 and ``seconds`` NaN.
    """

    results: dict[str, LLCResult]
    failures: tuple[Failure, ...]
    dataset: "xr.Dataset"

    def __repr__(self) -> str:
        names = self.dataset["job"].values.tolist()
        return f"<Fleet: {len(names)} jobs, {len(self.failures)} failed>"

    def __str__(self) -> str:
        lines = {name: result_line(result) for name, result in self.results.items()}
        lines |= {f.name: f"failed at attempt {f.attempts}: {f.reason} (log: {f.log})" for f in self.failures}
        names = self.dataset["job"].values.tolist()
        return "\n".join(
            [f"{len(names)} jobs, {len(self.failures)} failed.", *(f"{name}: {lines[name]}" for name in names)]
        )


def run_fleet(
    function: Callable[[Any], LLCResult],
    cases: Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    executor: Any = None,
    retries: int = 1,
    parallel: int | None = None,
    progress: bool | None = None,
) -> Fleet:
    """Run ``function(case)`` for every case as a separate job, and collect the results.

    A job saves its own result as ``folder/NAME.zarr``, so that no result is lost if this process ends. The same call
    with the same folder loads these results and runs the other jobs; cases may be added. A change inside ``function``
    is not detected: use another folder then.

    A job that the scheduler or the machine ended is submitted again, at most ``retries`` times: one that was killed or
    preempted, ran out of memory or time, or met a failing disk, network or device. It resumes where it stopped if
    ``function`` gives ``estimate_llc`` a ``checkpoint_dir``. Any other exception of ``function`` would occur again and
    is not retried: a wrong value, a missing file, a loss that is not finite. A job that you cancel is not retried.

    Ctrl-C, or an error here, cancels jobs of this machine; jobs of a cluster continue, and the same call waits for
    them. If this process is killed, its jobs on this machine continue; the same call waits until they have ended.

    The function, the cases and the jobs of a cluster are kept in the folder with pickle, and unpickling runs code: use
    a folder that only people you trust can write to. The results are plain arrays, which ``load_result`` reads.

    Args:
        function: loads what the case names and returns ``estimate_llc(...)``. It is pickled; a function of a module is
            imported by the job, in the same working directory.
        cases: name -> anything that can be pickled: a path, a dict of numbers. Names become file names.
        folder: created if missing; for a cluster, on a disk that all machines share.
        executor: a configured ``submitit`` executor, e.g. ``submitit.AutoExecutor("fleet/logs")`` after
            ``update_parameters(timeout_min=600, slurm_partition="gpu", gpus_per_node=1)``. A job that exceeds its time
            limit has failed. Default: processes of this machine, on the CPU, without a limit.
        retries: further attempts for a job that failed.
        parallel: largest number of jobs that are submitted at a time. Default: half the cores of this machine; with an
            executor all at once, as a job array if it supports them.
        progress: print a line to stderr for each job that ends. Default: in a terminal and in a notebook.

    Raises:
        ImportError: submitit is not installed.
        TypeError, ValueError: an argument that cannot be used, or a folder with other content.
    """
    submitit = import_submitit()
    if not callable(function):
        raise TypeError(f"function must be callable with one case, got {shown(function)}.")
    _check_cases(cases)
    check_count("retries", retries, 0, "0 runs every job once.")
    if parallel is not None:
        check_count("parallel", parallel, 1)
    if executor is not None and not isinstance(executor, submitit.Executor):
        raise TypeError(f"executor must be an executor of submitit or None, got {shown(executor)}.")
    root = user_path(folder).absolute()
    _open_folder(root, executor, function, cases)
    if executor is None:
        executor = _local_executor(root)
        parallel = max(1, (os.cpu_count() or 1) // 2) if parallel is None else parallel
    jobs = JobQueue(root, function, cases, executor, shows_progress(progress))
    _run_all(jobs, retries, parallel)
    return _fleet_of(jobs)


def _local_executor(root: Path) -> Any:
    executor = import_submitit().LocalExecutor(root / "logs")
    executor.update_parameters(timeout_min=_MONTH)
    return executor


def _run_all(jobs: JobQueue, retries: int, parallel: int | None) -> None:
    try:
        while jobs.waiting or jobs.running:
            jobs.submit(parallel)
            time.sleep(POLL_SECONDS)
            jobs.collect(retries)
    except BaseException:
        jobs.cancel()
        raise


def _check_cases(cases: Mapping[str, Any]) -> None:
    if not isinstance(cases, Mapping) or not cases:
        raise TypeError(f"cases must be a mapping from names to cases, with one at least, got {shown(cases)}.")
    seen: dict[str, str] = {}
    for name in cases:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"the name {name!r} is not a file name on every system. Use a string of at most 200 letters, digits "
                "and ._=+,- that begins with a letter or a digit."
            )
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise ValueError(f"{other!r} and {name!r} are the same file name on some disks. Rename one of them.")


def _open_folder(root: Path, executor: Any, function: Callable, cases: Mapping[str, Any]) -> None:
    """Create the folder or add the cases to it.

    Raises:
        ValueError: the folder contains something else, or a fleet with another function or other cases of these names.
    """
    manifest, saved_cases = root / _MANIFEST, {}
    function_name = getattr(function, "__qualname__", type(function).__name__)
    record = {
        "format": _FORMAT,
        "function": function_name,
        "cases": {name: _json_value(case) for name, case in cases.items()},
    }
    if manifest.exists():
        saved = read_json(manifest)
        saved_cases = saved.get("cases", {})
        common = saved_cases.keys() & cases.keys()
        difference = first_difference(_with_cases(saved, common), _with_cases(record, common))
        if difference is not None:
            field, saved_value, value = difference
            raise ValueError(
                f"folder {root} has a fleet with another {field}: {saved_value!r} there, {value!r} now. Pass the same "
                "to continue it, or another folder."
            )
    elif root.exists():
        logs = () if executor is None else (Path(executor.folder), *Path(executor.folder).parents)
        if foreign := [p.name for p in root.iterdir() if p not in logs]:
            raise ValueError(
                f"folder {root} is not empty and has no {_MANIFEST}, so it is not a fleet (it has {foreign[0]}). "
                "Pass an empty or new folder."
            )
    (root / "jobs").mkdir(parents=True, exist_ok=True)
    write_file(manifest, json.dumps({**record, "cases": {**saved_cases, **record["cases"]}}, indent=1))


def _with_cases(record: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {**record, "cases": {name: case for name, case in record.get("cases", {}).items() if name in names}}


def _json_value(case: Any) -> Any:
    """The case as JSON. A value that JSON cannot represent is replaced by the name of its type."""

    def default(x: Any) -> Any:
        if isinstance(x, np.generic):
            return x.item()
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return str(x) if isinstance(x, os.PathLike) else f"<{type(x).__name__}>"

    try:
        return json.loads(json.dumps(case, default=default))
    except (TypeError, ValueError):  # keys that are not strings, circular references
        return f"<{type(case).__name__}>"


def _fleet_of(jobs: JobQueue) -> Fleet:
    import xarray as xr

    cases, failed = jobs.cases, jobs.failures
    outcomes = {name: jobs.outcome(name) for name in cases}
    columns = {key: [getattr(jobs.results.get(name), key, math.nan) for name in cases] for key in _NUMBERS}
    columns["verdict"] = [getattr(jobs.results.get(name), "verdict", "") for name in cases]
    columns["attempts"] = [failed[n].attempts if n in failed else outcomes[n].get("attempt", 0) for n in cases]
    columns["seconds"] = [outcomes[name].get("seconds", math.nan) for name in cases]
    columns["failed"] = [name in failed for name in cases]
    columns["reason"] = [failed[name].reason if name in failed else "" for name in cases]
    texts = {key: np.array(columns[key], dtype=object) for key in ("verdict", "reason")}  # zarr has no fixed widths
    table = {key: ("job", value) for key, value in {**columns, **texts}.items()}
    dataset = xr.Dataset(table, {"job": np.array(list(cases), dtype=object)})
    results = {name: jobs.results[name] for name in cases if name in jobs.results}
    return Fleet(results, tuple(failed[name] for name in cases if name in failed), dataset)
