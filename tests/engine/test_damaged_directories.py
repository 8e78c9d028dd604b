"""Runs on disk whose directory is foreign, damaged, or out of space."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from slt_jax.engine.checkpoint import MANIFEST, RunStore
from tests import durable, small
from tests.durable import TOTAL, assert_equal, broken_orbax, contents, estimate, watched

unbroken, interrupted, half, collected = durable.unbroken, durable.interrupted, durable.half, durable.collected


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

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
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


@broken_orbax
def test_a_full_disk_at_a_note_costs_the_note_and_not_the_run(tmp_path, monkeypatch):
    """Kills: a run that ends because its calibration cannot be kept; a warning without the path or the reason."""
    store = RunStore(tmp_path, {"a": 1})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    note = re.escape(str(tmp_path / "calibration.json"))
    with pytest.warns(RuntimeWarning, match=rf"{note}: No space left on device; the run goes on"):
        store.write_note("calibration", {"step_size": 1.0})
    store.close()


@broken_orbax
def test_a_failing_disk_logs_no_tracebacks(tmp_path):
    """Kills: hundreds of lines on stderr before the one that matters. Event loops that Orbax closed say a few still."""
    script = tmp_path / "limited.py"
    script.write_text(textwrap.dedent(LIMITED))
    command = [sys.executable, str(script), str(tmp_path / "run")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0
    assert "ERROR:absl" not in ran.stderr
    assert "orbax" not in ran.stderr


def test_a_picture_that_cannot_be_written_names_its_path(tmp_path):
    (tmp_path / "full.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not write .*full\.png: No space left on device"):
        small.estimate().plot(tmp_path / "full.png")
