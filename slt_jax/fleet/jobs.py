"""The jobs of a fleet: the function that runs in their processes, and the queue that submits and collects them."""

import contextlib
import faulthandler
import json
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slt_jax._io import write_file
from slt_jax.engine.checkpoint import PATIENCE
from slt_jax.fleet.retry import may_succeed
from slt_jax.results.llc import LLCResult, load_result

_CANCEL_SECONDS = 10  # that a cancelled job has to end
_MAX_REASON = 300  # characters


class Failure(NamedTuple):
    """A job without a result.

    ``attempts``: how often it ran. ``error``: type of the last exception, "" if there was none. ``log``: of the last
    attempt.
    """

    name: str
    attempts: int
    error: str
    reason: str
    log: Path


def import_submitit() -> Any:
    """The module ``submitit``. Raises ImportError with the command that installs it."""
    try:
        import submitit
    except ImportError as error:
        raise ImportError('a fleet needs submitit: pip install "slt-jax[fleet]".') from error
    return submitit


def work(pickled: bytes, root: Path, name: str, attempt: int) -> None:
    """One attempt at a job: compute the result and save it, or write down the exception.

    ``root/NAME.zarr`` is the result. ``root/jobs/NAME.json`` tells how the attempt ended; a process that is killed
    writes neither.
    """
    faulthandler.enable()
    if import_submitit().JobEnvironment().global_rank:  # of several processes in a job only the first saves
        function, case = pickle.loads(pickled)
        function(case)
        return
    with exclusive(root / "jobs" / f"{name}.lock"):
        target, began = root / f"{name}.zarr", time.monotonic()
        if target.exists():
            return
        outcome = {"attempt": attempt, "error": "", "reason": "", "retry": True}
        try:
            function, case = pickle.loads(pickled)
            result = function(case)
            if not isinstance(result, LLCResult):
                raise TypeError(f"function must return an LLCResult, got a {type(result).__name__}.")
            if result.interrupted:  # a cancelled job has no result, and the next attempt must not find one
                raise KeyboardInterrupt("ended before it had all its draws")
            result.save(target)
        except BaseException as error:
            kind = type(error).__name__
            reason = " ".join(f"{kind}: {error}".split()).removesuffix(":")[:_MAX_REASON]
            outcome |= {"error": kind, "reason": reason, "retry": may_succeed(error)}
            raise
        finally:
            outcome["seconds"] = time.monotonic() - began
            write_file(root / "jobs" / f"{name}.json", json.dumps(outcome))


def _is_slurm(executor: Any) -> bool:
    slurm = import_submitit().SlurmExecutor
    return isinstance(executor, slurm) or getattr(executor, "cluster", "") == "slurm"


def watch_without_accounting() -> None:
    """Where SLURM keeps no accounting, take the states of its jobs from its queue."""
    if shutil.which("squeue") is None:
        return
    from slt_jax.fleet.slurm import has_accounting, watch_by_queue

    if not has_accounting():
        watch_by_queue()


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process is in this block with the same ``path``, if the file system supports locks."""
    import fcntl

    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _interruptible_children() -> Iterator[None]:
    """Processes started in this block react to an interrupt, by which they are cancelled.

    A shell starts background processes with interrupts ignored, and their children inherit that.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    ignored = main_thread and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class JobQueue:
    """The state of a fleet: jobs to be submitted, jobs that run, results and failures.

    ``waiting``: name -> number of the next attempt. ``running``: name -> (attempt, job), submitted and not ended.
    """

    def __init__(self, root: Path, function: Callable, cases: Mapping[str, Any], executor: Any, progress: bool):
        self.root, self.function, self.cases, self.executor = root, function, cases, executor
        self._progress, self._local = progress, import_submitit().LocalJob
        if _is_slurm(executor) or any(self._file(name, "job").exists() for name in cases):
            watch_without_accounting()
        self.results = {name: result for name in cases if (result := self._load(name)) is not None}
        self.failures: dict[str, Failure] = {}
        self.waiting = {name: 1 for name in cases if name not in self.results}
        self.running: dict[str, tuple[int, Any]] = {}
        self._ended: dict[str, float] = {}
        self._preempted: dict[str, float] = {}
        if self.results:
            self._print(f"{len(self.results)} results are already in the folder")
        self._find_earlier_jobs()

    def _find_earlier_jobs(self) -> None:
        """Take over jobs of an earlier call that a cluster still runs or queues."""
        jobs = {}
        for name in self.waiting:
            with contextlib.suppress(Exception):
                jobs[name] = pickle.loads(self._file(name, "job").read_bytes())
        for name, (attempt, job) in jobs.items():  # submitit knows all of them now, so that it asks the cluster once
            if not job.done():
                self._print(f"{name}: waiting for job {job.job_id} of an earlier call ({job.state})")
                self.running[name] = (attempt, job)
                del self.waiting[name]

    def submit(self, parallel: int | None) -> None:
        """Submit waiting jobs until ``parallel`` run. Raises TypeError for a case that cannot be pickled."""
        free = len(self.waiting) if parallel is None else parallel - len(self.running)
        if not (names := list(self.waiting)[: max(free, 0)]):
            return
        attempts, pickled = [self.waiting[name] for name in names], [self._pickled(name) for name in names]
        for name in names:
            self._clear(name)
        with _interruptible_children():
            jobs = self.executor.map_array(work, pickled, [self.root] * len(names), names, attempts)
        for name, attempt, job in zip(names, attempts, jobs, strict=True):
            self.running[name] = (attempt, job)
            del self.waiting[name]
            if not isinstance(job, self._local):
                write_file(self._file(name, "job"), pickle.dumps((attempt, job)))

    def collect(self, retries: int) -> None:
        """Take the results of jobs that have ended. A failed job waits again, or is recorded as a failure."""
        for name, (attempt, job) in list(self.running.items()):
            if not self._has_ended(job):
                continue
            result, outcome = self._load(name), self.outcome(name)
            if result is None and not outcome.get("error") and self._files_may_be_late(job):
                continue
            del self.running[name]
            self._file(name, "job").unlink(missing_ok=True)
            if result is not None:
                self.results[name] = result
                self._print(f"{name}: {result_line(result)}")
                continue
            state = "" if isinstance(job, self._local) else job.state
            reason = outcome.get("reason") or self._reason_without_exception(name, job, state)
            retry = outcome.get("retry", True) and not state.startswith("CANCELLED")
            if retry and attempt <= retries:
                self.waiting[name] = attempt + 1
                self._print(f"{name}: attempt {attempt} failed, retrying: {reason}")
            else:
                self.failures[name] = Failure(name, attempt, outcome.get("error", ""), reason, _log(job))
                final = "" if retry else " and is not retried"
                self._print(f"{name}: failed at attempt {attempt}{final}: {reason} (log: {_log(job)})")

    def cancel(self) -> None:
        """Cancel jobs of this machine and wait until they have ended; those of a cluster continue."""
        jobs = [job for _, job in self.running.values() if isinstance(job, self._local)]
        self._print(f"stopped: jobs cancelled: {len(jobs)}, left to the cluster: {len(self.running) - len(jobs)}")
        for job in jobs:
            job.cancel()
        until = time.monotonic() + _CANCEL_SECONDS
        while not all([job.done() for job in jobs]) and time.monotonic() < until:
            time.sleep(0.05)

    def outcome(self, name: str) -> dict[str, Any]:
        """What the last attempt wrote about its end; empty if it wrote nothing."""
        return read_json(self._file(name, "json"))

    def _file(self, name: str, kind: str) -> Path:
        return self.root / "jobs" / f"{name}.{kind}"

    def _load(self, name: str) -> LLCResult | None:
        try:
            return load_result(self.root / f"{name}.zarr")
        except (FileNotFoundError, ValueError):
            return None

    def _clear(self, name: str) -> None:
        """Prepare for an attempt: remove the outcome of an earlier one, and move an unreadable result away."""
        self._file(name, "json").unlink(missing_ok=True)
        if (target := self.root / f"{name}.zarr").exists():
            aside = self.root / f"{name}.unreadable"
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
            self._print(f"{name}: the result in the folder cannot be read; it is now {aside}")

    def _pickled(self, name: str) -> bytes:
        import cloudpickle

        try:
            return cloudpickle.dumps((self.function, self.cases[name]))
        except Exception as error:
            raise TypeError(
                f"the function and case {name!r} cannot be pickled ({type(error).__name__}: {error}). Pass paths or "
                "names in the case, and let the function load them."
            ) from error

    def _has_ended(self, job: Any) -> bool:
        """Also of a job that was preempted and that SLURM does not start again, for which submitit would wait."""
        if job.done():
            return True
        if isinstance(job, self._local) or job.state != "PREEMPTED":
            return False
        since = self._preempted.setdefault(job.job_id, time.monotonic())
        if time.monotonic() - since < PATIENCE:
            return False
        job.done(force_check=True)
        return job.state == "PREEMPTED"

    def _files_may_be_late(self, job: Any) -> bool:
        """Whether files that another machine wrote may still appear on a shared disk."""
        if isinstance(job, self._local):
            return False
        return time.monotonic() - self._ended.setdefault(job.job_id, time.monotonic()) < PATIENCE

    def _reason_without_exception(self, name: str, job: Any, state: str) -> str:
        if (target := self.root / f"{name}.zarr").exists():
            return f"its result {target} cannot be read"
        lines = _log(job).read_text(errors="replace").split("\n") if _log(job).exists() else []
        last = next((f"; its log ends: {line.strip()}" for line in reversed(lines) if line.strip()), "")
        cause = state or "killed, perhaps out of memory"
        return f"ended without a result or an exception: {cause}{last}"[:_MAX_REASON]

    def _print(self, line: str) -> None:
        if self._progress:
            done = len(self.results) + len(self.failures)
            print(f"  [{done} of {len(self.cases)}] {line}", file=sys.stderr, flush=True)


def _log(job: Any) -> Path:
    return job.paths.stderr if job.paths.stderr.exists() else job.paths.stdout


def result_line(result: LLCResult) -> str:
    """Estimate and verdict in one line."""
    return f"LLC {result.estimate_text('±')}, {result.verdict}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
