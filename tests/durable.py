"""One small run, unbroken and interrupted, for the tests of runs on disk."""

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine.loop import Engine
from tests.small import traces_of

DATA = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
PLAN = {"num_chains": 4, "num_draws": 16, "num_warmup": 8, "batch_size": 8, "chunk_size": 3, "checkpoint_seconds": 0}
TOTAL = 24
TRACES = ("loss_trace", "baseline_trace", "drift_sq", "virial", "warmup_loss")


def loss_fn(params, x):
    return 0.5 * (x @ params["w"] + params["b"]) ** 2


def posterior(**changes):
    given = {"loss_fn": loss_fn, "center": {"w": jnp.zeros(3), "b": jnp.float32(0)}, "num_data": 60, "nbeta": 20.0}
    given["localization"] = 1.0
    return slt.LocalPosterior(**{**given, **changes})


def estimate(directory=None, data=DATA, target=None, **changes):
    target = posterior() if target is None else target
    given = {"sampler": slt.sgld(1e-4), **PLAN, **changes}
    return slt.estimate_llc(target, data, checkpoint_dir=directory, **given)


def assert_equal(result, expected):
    for name in TRACES:
        np.testing.assert_array_equal(traces_of(result)[name], traces_of(expected)[name], err_msg=name)


SLOWLY = """
import sys, time
import jax
jax.config.update("jax_num_cpu_devices", 2)
from slt_jax.engine.loop import Engine
from tests.small import traces_of

advance = Engine.advance
def slowly(self, run, *rest):
    print(run.step, flush=True)
    advance(self, run, *rest)
    time.sleep(0.03)
Engine.advance = slowly
"""


class Child:
    """A script that begins with ``SLOWLY``, in a process of its own: the steps it told, first to last, how it ended."""

    def __init__(self, script, *arguments, kill_after=None):
        command = [sys.executable, str(script), *map(str, arguments)]
        self.errors = script.with_name(f"{script.stem}-{time.monotonic_ns()}.log")
        places = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # a script may use the tests' own modules
        with open(self.errors, "w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=places)
        assert process.stdout is not None
        steps = [process.stdout.readline(), process.stdout.readline()]  # after the restore; after compiling
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        steps += process.stdout.readlines()
        process.stdout.close()
        self.returncode = process.wait()
        self.steps = [int(s) for s in steps if s.strip()]


@contextlib.contextmanager
def watched(stop_at=None, part=0):
    """The steps at which chunks begin; from ``stop_at`` on, a chunk raises KeyboardInterrupt instead.

    ``part``: in that run of several, one after another, or a later one.
    """
    begun, runs, advance = [], [], Engine.advance

    def watching(self, run, *rest, **more):
        if not runs or runs[-1] is not run:
            runs.append(run)
        if stop_at is not None and len(runs) > part and run.step >= stop_at:
            raise KeyboardInterrupt
        begun.append(run.step)
        return advance(self, run, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "advance", watching)
        yield begun


def signalled(number, at, times=1):
    """Sends ``number`` to this process in the chunk that begins at step ``at`` or later."""
    advance, sent = Engine.advance, []

    def sending(self, run, *rest, **more):
        if run.step >= at and not sent:
            sent.append(run.step)
            for _ in range(times):
                os.kill(os.getpid(), number)
        return advance(self, run, *rest, **more)

    patch = pytest.MonkeyPatch()
    patch.setattr(Engine, "advance", sending)
    return patch, sent


def broken_orbax(test):
    """Marks a test after which Orbax's threads complain: of futures never read, of closed event loops."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("collected")(ignored(test))


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def unbroken():
    return estimate()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was interrupted after step 10."""
    directory = tmp_path_factory.mktemp("interrupted") / "run"
    with watched(stop_at=10), pytest.raises(KeyboardInterrupt):
        estimate(directory)
    return directory


@pytest.fixture
def half(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


@pytest.fixture
def collected():
    """What Orbax leaves unfinished after an error is collected, with its complaints, before the next test."""
    yield
    gc.collect()
    time.sleep(0.1)
    gc.collect()
