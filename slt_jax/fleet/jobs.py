"""The jobs of a fleet: what runs in their processes, and the desk that submits, watches and collects them."""

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
from slt_jax.results.llc import LLCResult, load_result

_GRACE = 10  # seconds for a cancelled job to go
_WORDS = 300  # letters of a reason
# raised again by the same program on the same input
_CERTAIN = (
    ValueError, TypeError, LookupError, AttributeError, NameError, ImportError, AssertionError, ArithmeticError,
    NotImplementedError,
)  # fmt: skip


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """A process started meanwhile can be interrupted, which is how it is cancelled.

    A shell starts what it runs in the background with interrupts ignored, and processes inherit that.
    """
    deaf = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if deaf:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class Failure(NamedTuple):
    """A job without a result: how often it ran, the last exception's type ("" for none), why, and its last log."""

    name: str
    attempts: int
    error: str
    reason: str
    log: Path


def the_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ImportError('a fleet needs submitit: pip install "slt-jax[fleet]".') from error
    return submitit


def work(pickled: bytes, root: Path, name: str, attempt: int) -> None:
    """A job: compute and save, or write down why not.

    ``root/NAME.zarr`` is the result, ``root/jobs/NAME.json`` says how the attempt ended; a process that is killed
    leaves neither.
    """
    faulthandler.enable()
    if the_submitit().JobEnvironment().global_rank:  # of several processes in one job the first one saves
        function, case = pickle.loads(pickled)
        function(case)
        return
    with _alone(root / "jobs" / f"{name}.lock"):
        target, began = root / f"{name}.zarr", time.monotonic()
        if target.exists():
            return
        told = {"attempt": attempt, "error": "", "reason": "", "retry": True}
        try:
            function, case = pickle.loads(pickled)
            result = function(case)
            if not isinstance(result, LLCResult):
                raise TypeError(f"function must return an LLCResult, got a {type(result).__name__}.")
            result.save(target)
        except BaseException as error:
            kind = type(error).__name__
            reason = " ".join(f"{kind}: {error}".split()).removesuffix(":")[:_WORDS]
            told |= {"error": kind, "reason": reason, "retry": not isinstance(error, _CERTAIN)}
            raise
        finally:
            told["seconds"] = time.monotonic() - began
            write_file(root / "jobs" / f"{name}.json", json.dumps(told))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Once no other process is in here, as far as the file system can tell."""
    import fcntl

    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Desk:
    """What waits, what runs, and what has come of it.

    ``queue``: name -> attempt to be made. ``running``: name -> (attempt, job), submitted and not ended.
    """

    def __init__(self, root: Path, function: Callable, cases: Mapping[str, Any], executor: Any, progress: bool):
        self.root, self.function, self.cases, self.executor = root, function, cases, executor
        self._progress, self._local = progress, the_submitit().LocalJob
        self.results = {name: result for name in cases if (result := self._load(name)) is not None}
        self.failures: dict[str, Failure] = {}
        self.queue = {name: 1 for name in cases if name not in self.results}
        self.running: dict[str, tuple[int, Any]] = {}
        self._ended: dict[str, float] = {}
        if self.results:
            self._say("results that were there are taken")
        self._find_again()

    def _find_again(self) -> None:
        """Jobs of an earlier call that a cluster still has."""
        found = {}
        for name in self.queue:
            with contextlib.suppress(Exception):
                found[name] = pickle.loads(self._file(name, "job").read_bytes())
        for name, (attempt, job) in found.items():  # all are known to submitit before it asks the cluster, once
            if not job.done():
                self._say(f"{name}: waiting for job {job.job_id} of an earlier call ({job.state})")
                self.running[name] = (attempt, job)
                del self.queue[name]

    def submit(self, parallel: int | None) -> None:
        """Fill the free places from the queue. Raises TypeError for what cannot be pickled."""
        free = len(self.queue) if parallel is None else parallel - len(self.running)
        if not (names := list(self.queue)[: max(free, 0)]):
            return
        attempts, pickled = [self.queue[name] for name in names], [self._pickled(name) for name in names]
        for name in names:
            self._clear(name)
        with _heard():
            jobs = self.executor.map_array(work, pickled, [self.root] * len(names), names, attempts)
        for name, attempt, job in zip(names, attempts, jobs, strict=True):
            self.running[name] = (attempt, job)
            del self.queue[name]
            if not isinstance(job, self._local):
                write_file(self._file(name, "job"), pickle.dumps((attempt, job)))

    def look(self, retries: int) -> None:
        """Take what has ended: a result, or a failure to be tried again or kept."""
        for name, (attempt, job) in list(self.running.items()):
            if not job.done():
                continue
            result, told = self._load(name), self.told(name)
            if result is None and not told.get("error") and self._may_be_late(job):
                continue
            del self.running[name]
            self._file(name, "job").unlink(missing_ok=True)
            if result is not None:
                self.results[name] = result
                self._say(f"{name}: {line(result)}")
                continue
            state = "" if isinstance(job, self._local) else job.state
            reason = told.get("reason") or self._death(name, job, state)
            if told.get("retry", not state.startswith("CANCELLED")) and attempt <= retries:
                self.queue[name] = attempt + 1
                self._say(f"{name}: attempt {attempt} failed, another follows: {reason}")
            else:
                self.failures[name] = Failure(name, attempt, told.get("error", ""), reason, _log(job))
                self._say(f"{name}: failed at attempt {attempt}: {reason} (log: {_log(job)})")

    def abandon(self) -> None:
        """Cancel jobs of this machine and wait until they are gone; those of a cluster run on."""
        jobs = [job for _, job in self.running.values() if isinstance(job, self._local)]
        self._say(f"stopped: jobs cancelled: {len(jobs)}, left to the cluster: {len(self.running) - len(jobs)}")
        for job in jobs:
            job.cancel()
        until = time.monotonic() + _GRACE
        while not all([job.done() for job in jobs]) and time.monotonic() < until:
            time.sleep(0.05)

    def told(self, name: str) -> dict[str, Any]:
        """How the last attempt said that it ended."""
        return read(self._file(name, "json"))

    def _file(self, name: str, kind: str) -> Path:
        return self.root / "jobs" / f"{name}.{kind}"

    def _load(self, name: str) -> LLCResult | None:
        try:
            return load_result(self.root / f"{name}.zarr")
        except (FileNotFoundError, ValueError):
            return None

    def _clear(self, name: str) -> None:
        """Room for an attempt: what an earlier one said goes, a result that cannot be read is put aside."""
        self._file(name, "json").unlink(missing_ok=True)
        if (target := self.root / f"{name}.zarr").exists():
            aside = self.root / f"{name}.unreadable"
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
            self._say(f"{name}: the result that was there cannot be read, and is {aside} now")

    def _pickled(self, name: str) -> bytes:
        import cloudpickle

        try:
            return cloudpickle.dumps((self.function, self.cases[name]))
        except Exception as error:
            raise TypeError(
                f"the function and case {name!r} cannot be pickled ({type(error).__name__}: {error}). Let the case say "
                "where things are, and let the function load them."
            ) from error

    def _may_be_late(self, job: Any) -> bool:
        """Whether files that another machine wrote may still come into sight."""
        if isinstance(job, self._local):
            return False
        return time.monotonic() - self._ended.setdefault(job.job_id, time.monotonic()) < PATIENCE

    def _death(self, name: str, job: Any, state: str) -> str:
        if (target := self.root / f"{name}.zarr").exists():
            return f"its result {target} cannot be read"
        lines = _log(job).read_text(errors="replace").split("\n") if _log(job).exists() else []
        last = next((f"; its log ends: {x.strip()}" for x in reversed(lines) if x.strip()), "")
        how = state or "killed, perhaps out of memory"
        return f"ended without a result or an exception: {how}{last}"[:_WORDS]

    def _say(self, line: str) -> None:
        if self._progress:
            done = len(self.results) + len(self.failures)
            print(f"  [{done} of {len(self.cases)}] {line}", file=sys.stderr, flush=True)


def _log(job: Any) -> Path:
    return job.paths.stderr if job.paths.stderr.exists() else job.paths.stdout


def line(result: LLCResult) -> str:
    """Estimate and verdict."""
    return f"LLC {result.estimate_text('±')}, {result.verdict}"


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
