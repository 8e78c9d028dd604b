"""Runs on disk: interrupted at any moment and resumed, refused when they differ, damaged, or out of disk."""

import contextlib
import errno
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import slt_jax as slt
from slt_jax.batches import HostData
from slt_jax.checkpoint import MANIFEST, RunStore
from slt_jax.engine import Engine

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
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name), err_msg=name)


@contextlib.contextmanager
def watched(stop_at=None):
    """The steps at which chunks begin; from ``stop_at`` on, a chunk raises KeyboardInterrupt instead."""
    begun, advance = [], Engine.advance

    def watching(self, run, *rest, **more):
        if stop_at is not None and run.step >= stop_at:
            raise KeyboardInterrupt
        begun.append(run.step)
        return advance(self, run, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "advance", watching)
        yield begun


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


# Interrupted and resumed

CHILD = """
import sys, time
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np
import slt_jax as slt
from slt_jax.engine import Engine

advance = Engine.advance
def slowly(self, run, *rest):
    print(run.step, flush=True)
    advance(self, run, *rest)
    time.sleep(0.03)
Engine.advance = slowly

def loss_fn(params, x):
    return 0.5 * jnp.sum(jnp.tanh(x @ params["a"]) @ params["b"], axis=-1) ** 2

draw = np.random.default_rng(0).normal
center = {"a": jnp.asarray(draw(size=(4, 8)), jnp.float32), "b": jnp.asarray(draw(size=(8, 2)), jnp.float32)}
posterior = slt.LocalPosterior(loss_fn, center, 200, localization=1.0)
directory = sys.argv[2] if len(sys.argv) > 2 else None
result = slt.estimate_llc(
    posterior, jnp.asarray(draw(size=(200, 4)), jnp.float32), sampler=slt.sgld(1e-4), num_chains=4, num_draws=40,
    num_warmup=20, thinning=2, batch_size=16, key=5, checkpoint_dir=directory, checkpoint_seconds=0, chunk_size=3,
)
assert not result.notes and not result.stopped
np.savez(sys.argv[1], **{name: getattr(result, name) for name in %r})
"""


class Child:
    """The script above in a process of its own: the step it began at, the last one seen, how it ended."""

    def __init__(self, script, *arguments, kill_after=None):
        command = [sys.executable, str(script), *map(str, arguments)]
        self.errors = script.with_name(f"{script.stem}-{time.monotonic_ns()}.log")
        with open(self.errors, "w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        steps = [process.stdout.readline(), process.stdout.readline()]  # after the restore; after compiling
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        steps += process.stdout.readlines()
        process.stdout.close()
        self.returncode = process.wait()
        self.steps = [int(s) for s in steps if s.strip()]


def test_killed_at_random_moments_and_resumed_is_bit_for_bit_the_unbroken_run(tmp_path):
    """Ten SIGKILLs over two runs. Kills: a state read while the next chunk overwrites it; a trace or a liveness flag
    left out of the save; random numbers that depend on where chunks begin."""
    script = tmp_path / "child.py"
    script.write_text(CHILD % (TRACES,))
    pick = random.Random(20)
    delays = [[pick.uniform(0.0, 0.9) for _ in range(number)] for number in (5, 5)]

    def one_run(number):
        directory, output = tmp_path / f"run{number}", tmp_path / f"{number}.npz"
        killed = [Child(script, output, directory, kill_after=delay) for delay in delays[number]]
        return killed, Child(script, output, directory)

    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(Child, script, tmp_path / "whole.npz")
        runs = list(pool.map(one_run, range(2)))
    assert whole.result().returncode == 0, whole.result().errors.read_text()
    expected = np.load(tmp_path / "whole.npz")
    for number, (_, last) in enumerate(runs):
        assert last.returncode == 0, last.errors.read_text()
        with np.load(tmp_path / f"{number}.npz") as found:
            for name in TRACES:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=f"run {number}, {name}")

    killed = [child for children, _ in runs for child in children]
    mid_run = [child for child in killed if child.returncode == -signal.SIGKILL and child.steps[-1] < 100]
    began = [child.steps[0] for children, last in runs for child in [*children[1:], last] if child.steps]
    assert len(mid_run) >= 5
    assert sum(step > 0 for step in began) >= 3
    assert whole.result().steps[0] == 0


@pytest.mark.quick
@pytest.mark.parametrize("stop_at", [1, 11, 22])
def test_interrupted_by_the_keyboard_and_resumed(tmp_path, unbroken, stop_at):
    """Kills: a writer left running after an exception, so that the newest save is lost or half there."""
    with watched(stop_at=stop_at), pytest.raises(KeyboardInterrupt):
        estimate(tmp_path)
    with watched() as begun:
        assert_equal(estimate(tmp_path, chunk_size=7, checkpoint_seconds=60.0), unbroken)
    assert begun[0] >= stop_at


class Rows(HostData):
    """DATA read by the host; the ``fail_at``-th chunk cannot be read."""

    num_data = len(DATA)

    def __init__(self, fail_at=None):
        self.fail_at, self.chunks = fail_at, 0

    def fetch(self, indices):
        if np.ndim(indices) == 3:  # (chains, steps, batch): a chunk
            self.chunks += 1
            if self.chunks == self.fail_at:
                raise OSError("the network drive is gone")
        return DATA[indices]

    def fingerprint(self):
        return "rows"


def test_interrupted_by_a_failing_data_source_and_resumed(tmp_path, unbroken):
    """Kills: the prefetched batch of the failed run used at the wrong step after the resume."""
    with watched() as before, pytest.raises(OSError, match="network drive"):
        estimate(tmp_path, Rows(fail_at=5))
    with watched() as after:
        resumed = estimate(tmp_path, Rows())
    assert (before[-1], after[0]) == (9, 12)
    assert_equal(resumed, estimate(data=Rows()))
    np.testing.assert_array_equal(resumed.loss_trace[:, 0], unbroken.loss_trace[:, 0])


def test_resumed_with_a_stopped_chain(tmp_path):
    """Kills: ``alive`` not restored, so that a chain that went non-finite is advanced again."""
    data = np.where(np.arange(60)[:, None] == 7, np.nan, DATA)
    with watched(stop_at=15), pytest.raises(KeyboardInterrupt):
        estimate(tmp_path, data, key=3, batch_size=2)
    broken, whole = estimate(tmp_path, data, key=3, batch_size=2), estimate(data=data, key=3, batch_size=2)
    assert_equal(broken, whole)
    assert broken.stopped == whole.stopped
    assert any(step < 15 for step in whole.stopped.values())
    assert len(whole.stopped) < 4


@pytest.mark.parametrize("baseline", ["paired", "full"])
def test_a_finished_run_is_read_and_not_repeated(tmp_path, baseline):
    """Kills: the last steps saved only when a save happens to be due."""
    first = estimate(tmp_path, baseline=baseline, checkpoint_seconds=1e6)
    before = contents(tmp_path)
    with watched() as begun:
        again = estimate(tmp_path, baseline=baseline)
    assert begun == []
    assert_equal(again, first)
    assert (again.llc, again.llc_stderr, again.stopped) == (first.llc, first.llc_stderr, first.stopped)
    assert contents(tmp_path) == before


def test_saves_of_a_killed_writer_are_ignored(half, unbroken):
    """Directories that a writer left before its last rename: of a later step, and of every step to come."""
    newest = max((half / "steps").iterdir(), key=lambda p: int(p.name))
    for step in [*range(TOTAL + 1), 99]:
        partial = shutil.copytree(newest, half / "steps" / f"{step}.orbax-checkpoint-tmp")
        shutil.rmtree(partial / "state")
    (half / f"{MANIFEST}.12345").write_text('{"form')
    with watched() as begun:
        assert_equal(estimate(half), unbroken)
    assert begun[0] == int(newest.name)


def test_killed_before_the_first_save_starts_anew(tmp_path, unbroken):
    tmp_path.joinpath(f"{MANIFEST}.12345").write_text('{"form')
    with watched(stop_at=0), pytest.raises(KeyboardInterrupt):
        estimate(tmp_path)
    assert_equal(estimate(tmp_path), unbroken)


# Refused when anything differs

CHANGES = {
    "posterior.nbeta": ({"target": posterior(nbeta=21.0)}, 21.0),
    "posterior.localization": ({"target": posterior(localization=2.0)}, 2.0),
    "posterior.num_data": ({"target": posterior(num_data=61)}, 61),
    "posterior.forward_dtype": ({"target": posterior(forward_dtype=jnp.bfloat16)}, "bfloat16"),
    "posterior.mask": ({"target": posterior(mask=lambda path: path == ("w",))}, None),
    "posterior.center": ({"target": posterior(center={"w": jnp.zeros(3), "b": jnp.float32(1e-7)})}, None),
    "posterior.loss_fn": ({"target": posterior(loss_fn=lambda p, x: 2.0 * loss_fn(p, x))}, None),
    "sampler.step_size": ({"sampler": slt.sgld(2e-4)}, 2e-4),
    "sampler.name": ({"sampler": slt.sgld()._replace(name="mine")}, "mine"),
    "schedule.num_chains": ({"num_chains": 8, "mesh": jax.make_mesh((4,), ("chain",))}, 8),
    "schedule.num_draws": ({"num_draws": 17}, 17),
    "schedule.num_warmup": ({"num_warmup": 9}, 9),
    "schedule.thinning": ({"thinning": 2}, 2),
    "schedule.batch_size": ({"batch_size": 16}, 16),
    "schedule.micro_batches": ({"micro_batches": 2}, 2),
    "schedule.baseline": ({"baseline": "full"}, "full"),
    "key": ({"key": 1}, [0, 1]),
    "mesh.chain": ({"mesh": jax.make_mesh((2,), ("chain",))}, 2),
    "data.fingerprint": ({"data": DATA + (np.arange(180).reshape(60, 3) == 100) * np.float32(1e-3)}, None),
    "data.examples": ({"data": DATA[:59]}, 59),
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_run_is_refused_by_the_name_of_what_differs(half, unbroken, field):
    """Kills: a field left out of the manifest; a consequence named instead of its cause; a directory touched."""
    changes, now = CHANGES[field]
    before = contents(half)
    there = json.loads(before[MANIFEST])
    for name in field.split("."):
        there = there[name]
    with pytest.raises(ValueError, match=re.escape(f"another {field}: {there!r} there, ")) as error:
        estimate(half, **changes)
    text = str(error.value)
    assert str(half) in text
    assert "Give the same value to resume it, or another directory" in text
    value = re.search(r"there, (.*) now", text)
    assert value is not None
    assert value[1] == repr(now) if now is not None else value[1] != repr(there)
    assert contents(half) == before
    assert_equal(estimate(half), unbroken)


@pytest.mark.parametrize("package", ["jax", "jaxlib", "slt-jax", "python"])
def test_other_versions_are_refused(half, package):
    manifest = json.loads((half / MANIFEST).read_text())
    now, manifest["versions"][package] = manifest["versions"][package], "0.0.1"
    (half / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=re.escape(f"another versions.{package}: '0.0.1' there, '{now}' now")):
        estimate(half)


def test_a_manifest_of_another_format_is_refused(half):
    """Kills: fields that only the directory has, passed over."""
    manifest = json.loads((half / MANIFEST).read_text())
    (half / MANIFEST).write_text(json.dumps({**manifest, "friction": 3}))
    with pytest.raises(ValueError, match="another friction: 3 there, None now"):
        estimate(half)


def test_an_array_inside_a_jitted_loss_is_part_of_the_loss(tmp_path):
    """Kills: a fingerprint of the program's text, which abbreviates arrays."""

    def weighted(weights):
        return posterior(loss_fn=jax.jit(lambda p, x: loss_fn(p, x) * jnp.asarray(weights).mean()))

    ones = np.ones(3000, np.float32)
    estimate(tmp_path, target=weighted(ones))
    estimate(tmp_path, target=weighted(ones.copy()))
    ones[1500] = 2.0
    with pytest.raises(ValueError, match=r"another posterior\.loss_fn"):
        estimate(tmp_path, target=weighted(ones))


# Foreign and damaged directories


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=rf"{MANIFEST}, so it is not a run .*thesis\.tex.* Give an empty or new"):
        estimate(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


@pytest.mark.parametrize("text", ["", '{"format": 1, "key', "[1, 2]", '{"name": "npm"}', b"\xff\xfe\x00"])
def test_a_bad_manifest_is_refused(half, text, unbroken):
    (half / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(half)
    with pytest.raises(ValueError, match=rf"{re.escape(str(half / MANIFEST))} is .*Give another directory"):
        estimate(half)
    assert contents(half) == before


@broken_orbax
def test_any_truncated_file_is_harmless_or_refused_with_a_remedy_that_works(interrupted, tmp_path, unbroken):
    """Each file of the newest save cut in half, in turn. Kills: numbers restored from a damaged file."""
    steps = sorted(int(p.name) for p in (interrupted / "steps").iterdir())
    newest = interrupted / "steps" / str(steps[-1])
    refused = 0
    for number, file in enumerate(sorted(p for p in newest.rglob("*") if p.is_file())):
        directory = shutil.copytree(interrupted, tmp_path / str(number))
        damaged = directory / file.relative_to(interrupted)
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
        try:
            result = estimate(directory)
        except ValueError as error:
            remedy = re.search(
                r"truncated or foreign .* Remove (\S+) to go back to the save before it", str(error), re.S
            )
            if remedy is None or remedy[1] != str(directory / "steps" / newest.name):
                raise
            shutil.rmtree(remedy[1])
            with watched() as begun:
                result = estimate(directory)
            assert begun[0] == steps[-2]
            refused += 1
        assert_equal(result, unbroken)
        shutil.rmtree(directory)
    assert refused >= 4  # at least the arrays and the metadata of both items


def test_without_any_save_left_the_run_starts_anew(half, unbroken):
    shutil.rmtree(half / "steps")
    assert_equal(estimate(half), unbroken)


def unusable(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "run").mkdir()
    return {"a file": tmp_path / "file", "beneath a file": tmp_path / "file" / "run", "no device": "/proc/slt-jax/run"}


@pytest.mark.parametrize("kind", ["a file", "beneath a file", "no device"])
def test_a_path_that_is_no_writable_directory_is_refused(tmp_path, kind):
    path = unusable(tmp_path)[kind]
    with pytest.raises(OSError, match=rf"checkpoint_dir {path} cannot be written to .*Give another directory"):
        estimate(path)


def test_a_full_disk_at_the_manifest_is_refused(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device.*leave checkpoint_dir out") as error:
        estimate(tmp_path / "run")
    assert error.value.errno == errno.ENOSPC


def test_a_file_in_place_of_the_saves_is_refused(half):
    shutil.rmtree(half / "steps")
    (half / "steps").write_text("x")
    with pytest.raises(OSError, match="steps is a file: remove it"):
        estimate(half)


@pytest.mark.parametrize("bad", [3, True, b"run", ["run"]])
def test_checkpoint_dir_of_a_wrong_kind_is_refused(bad):
    with pytest.raises(TypeError, match=re.escape(f"checkpoint_dir must be a path, got {bad!r}")):
        estimate(bad)


# A disk that fills up while the chains run: the estimate is worth more than its checkpoints


@broken_orbax
@pytest.mark.quick
@pytest.mark.parametrize("first_good", [0, 2])
@pytest.mark.parametrize("method", ["save", "wait_until_finished"])
def test_a_full_disk_costs_the_checkpoints_and_not_the_estimate(tmp_path, monkeypatch, unbroken, method, first_good):
    """Kills: an estimate lost to a full disk; a disk that failed passed over in silence."""
    original, calls = getattr(ocp.CheckpointManager, method), []

    def full(self, *arguments, **more):
        calls.append(1)
        if len(calls) > first_good:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments, **more)

    monkeypatch.setattr(ocp.CheckpointManager, method, full)
    with pytest.warns(RuntimeWarning, match="No space left on device.* the estimate is complete"):
        result = estimate(tmp_path / "run")
    assert_equal(result, unbroken)
    assert len(result.notes) == 1
    assert f"checkpoints in {tmp_path / 'run'} stopped" in result.notes[0]
    assert "Note: checkpoints in" in str(result)
    monkeypatch.undo()
    assert_equal(estimate(tmp_path / "run"), unbroken)  # what was saved still serves


@broken_orbax
def test_a_last_save_that_fails_is_told(tmp_path, monkeypatch, unbroken):
    """Kills: the error of the last background write passed over."""

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunStore, "wait", full)
    with pytest.warns(RuntimeWarning, match=f"stopped at or before step {TOTAL} .*No space left on device"):
        result = estimate(tmp_path)
    assert_equal(result, unbroken)
    assert len(result.notes) == 1


LIMITED = """
import json, resource, sys, warnings
import numpy as np
import slt_jax as slt

data = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
posterior = slt.LocalPosterior(lambda p, x: 0.5 * (x @ p) ** 2, np.zeros(3, np.float32), 60, localization=1.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ: a write fails
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    result = slt.estimate_llc(
        posterior, data, sampler=slt.sgld(1e-4), num_chains=4, num_draws=500, num_warmup=0, batch_size=8,
        checkpoint_dir=sys.argv[1], checkpoint_seconds=0, chunk_size=100,
    )
told = [str(w.message) for w in caught if w.category is RuntimeWarning]
print(json.dumps({"llc": result.llc, "notes": result.notes, "told": told}))
"""


def test_files_that_the_system_refuses_to_grow(tmp_path):
    """A real failing disk: the kernel refuses writes past 4000 bytes. Kills: an error lost in the writer's thread."""
    script = tmp_path / "limited.py"
    script.write_text(textwrap.dedent(LIMITED))
    command = [sys.executable, str(script), str(tmp_path / "run")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert np.isfinite(told["llc"])
    assert len(told["notes"]) == len(told["told"]) == 1
    assert os.strerror(errno.EFBIG) in told["notes"][0]


def test_the_caller_may_change_arrays_as_soon_as_save_returns(tmp_path):
    """Kills: the background writer reading buffers that the next chunk overwrites."""
    store = RunStore(tmp_path, {"a": 1})
    overwrite = jax.jit(lambda w: -jnp.ones_like(w), donate_argnums=0)
    numbers = np.arange(2.0**22, dtype=np.float32)
    state, host = {"w": jnp.array(numbers)}, {"t": numbers.copy()}
    store.save(1, state, host)
    state = {"w": overwrite(state["w"]).block_until_ready()}
    host["t"][:] = -1.0
    store.wait()
    found = store.restore(state, host)
    store.close()
    assert found is not None
    assert found[0] == 1
    np.testing.assert_array_equal(found[1]["w"], numbers)
    np.testing.assert_array_equal(found[2]["t"], numbers)
