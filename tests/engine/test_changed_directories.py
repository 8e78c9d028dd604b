"""Runs on disk of which a byte was changed: resumed as if it had not been, or refused; and directories of before."""

import json
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine.checkpoint import DIGEST, MANIFEST, RunStore
from tests import durable, small
from tests.durable import assert_equal, broken_orbax, contents, estimate, watched
from tests.results.test_damaged_files import flipped, results_of

unbroken, interrupted, half, collected = durable.unbroken, durable.interrupted, durable.half, durable.collected


def calibrated(directory=None):
    target = slt.LocalPosterior(small.square, jnp.zeros(3), 40)
    return slt.estimate_llc(target, small.DATA, budget=600, batch_size=8, chunk_size=60, checkpoint_dir=directory,
                            checkpoint_seconds=0)  # fmt: skip


def swept(directory=None):
    return slt.sweep(
        small.posterior(), small.DATA, localization=[1.0, 2.0], checkpoint_dir=directory, **small.PLAN
    )  # fmt: skip


def followed(directory=None):
    centers = {0: jnp.zeros(3), 5: jnp.ones(3)}
    return slt.trajectory(
        small.posterior(), centers, small.DATA, thinning=1, checkpoint_dir=directory, **small.PLAN
    )  # fmt: skip


CALLS = {"estimate": calibrated, "sweep": swept, "trajectory": followed}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """kind -> (what the call gives, its directory: of the estimate interrupted, else finished)."""
    folder = tmp_path_factory.mktemp("written")
    with watched(stop_at=100), pytest.raises(KeyboardInterrupt):
        calibrated(folder / "estimate")
    return {
        kind: (call() if kind == "estimate" else call(folder / kind), folder / kind) for kind, call in CALLS.items()
    }


def equal(one, other):
    return all(
        np.array_equal(x, y, equal_nan=True)
        for a, b in zip(results_of(one), results_of(other), strict=True)
        for x, y in zip(small.traces_of(a).values(), small.traces_of(b).values(), strict=True)
    )


@broken_orbax
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("number", [8, pytest.param(70, marks=pytest.mark.slow)])
def test_a_changed_byte_is_refused_or_changes_nothing(written, tmp_path, kind, number):
    """Kills: a calibration of other numbers; state or traces that came back as others from their compressed files."""
    pick, counts = random.Random(31), {"refused": 0, "the same": 0, "different": 0}
    whole, origin = written[kind]
    files = [p.relative_to(origin) for p in sorted(origin.rglob("*")) if p.is_file() and p.stat().st_size]
    notes = [file for file in files if file.suffix == ".json" and "steps" not in file.parts]
    for i in range(number):
        directory = shutil.copytree(origin, tmp_path / str(i))
        file = directory / (pick.choice(files) if i % 3 else notes[i // 3 % len(notes)])
        file.write_bytes(flipped(file.read_bytes(), pick))
        try:
            counts["the same" if equal(CALLS[kind](directory), whole) else "different"] += 1
        except ValueError as error:
            counts["refused" if str(directory) in str(error) else "different"] += 1
        shutil.rmtree(directory)
    print(kind, counts)
    assert counts["different"] == 0
    assert counts["refused"] >= number / 4


@pytest.mark.quick
def test_a_changed_calibration_is_refused_with_a_remedy_that_works(written, tmp_path):
    whole, origin = written["estimate"]
    directory = shutil.copytree(origin, tmp_path / "run")
    note = directory / "calibration.json"
    text = note.read_text()
    number = json.loads(text)["step_size"]
    note.write_text(text.replace(str(number), str(2 * number)))
    small.refuses(ValueError, lambda: calibrated(directory), f"{note} was changed or damaged", "Remove it to have it")
    note.unlink()
    assert equal(calibrated(directory), whole)


@pytest.mark.parametrize("lost", [DIGEST, "note_format", "step_size"])
def test_a_note_that_lost_a_name_is_refused(written, tmp_path, lost):
    directory = shutil.copytree(written["estimate"][1], tmp_path / "run")
    note = directory / "calibration.json"
    values = json.loads(note.read_text())
    note.write_text(json.dumps({name: value for name, value in values.items() if name != lost}))
    small.refuses(ValueError, lambda: calibrated(directory), note, "Remove it to have it computed again")


def test_a_changed_manifest_says_so(half):
    text = (half / MANIFEST).read_text()
    (half / MANIFEST).write_text(text.replace('"nbeta": 20.0', '"nbeta": 21.0'))
    words = ("another posterior.nbeta: 21.0 there, 20.0 now", f"{MANIFEST} there was changed or damaged")
    small.refuses(ValueError, lambda: estimate(half), half, *words)


def test_directories_of_before_are_resumed(written, tmp_path):
    """Of a version that wrote no digests."""
    whole, origin = written["estimate"]
    directory = shutil.copytree(origin, tmp_path / "run")
    for name in (MANIFEST, "calibration.json"):
        values = json.loads((directory / name).read_text())
        assert values.pop(DIGEST)
        values.pop("note_format", None)
        (directory / name).write_text(json.dumps(values))
    for step in (directory / "steps").iterdir():
        shutil.rmtree(step / DIGEST)
    with watched() as begun:
        assert equal(calibrated(directory), whole)
    assert begun[0] > 0


@broken_orbax
@pytest.mark.parametrize("element", [0, 5, 15])
def test_another_state_than_the_one_saved_is_refused(tmp_path, element):
    """Kills: a checksum that misses an element, a swap of two, or a bit. The files are sound, the numbers are not."""
    store = RunStore(tmp_path, {"a": 1})
    state, host = {"w": jnp.arange(16.0), "on": jnp.ones(3, bool), "h": jnp.ones(4, jnp.bfloat16)}, {"t": np.zeros(2)}
    store.save(1, state, host)
    store.wait()
    other = {**state, "w": state["w"].at[element].multiply(1 + 2**-23).at[element - 1].set(3.5)}
    store.save(2, other, host)
    store.wait()
    store.close()
    for name in ("state", "host"):
        shutil.rmtree(tmp_path / "steps" / "1" / name)
        shutil.copytree(tmp_path / "steps" / "2" / name, tmp_path / "steps" / "1" / name)
    shutil.rmtree(tmp_path / "steps" / "2")
    store = RunStore(tmp_path, {"a": 1})
    small.refuses(ValueError, lambda: store.restore(state, host), "do not have the digest", "Remove")


# What killed runs leave


def test_what_killed_runs_had_begun_is_removed(half, unbroken):
    newest = max((half / "steps").iterdir(), key=lambda p: int(p.name))
    for name in ("99.orbax-checkpoint-tmp", "7.orbax-checkpoint-tmp-1700000000"):
        shutil.copytree(newest, half / "steps" / name)
    for name in (f".{MANIFEST}.999999999.partial", ".calibration.json.999999999.partial"):
        (half / name).write_text("{")
    kept = half / ".mine.partial"
    kept.write_text("not written by this library")
    assert_equal(estimate(half), unbroken)
    assert [name for name in contents(half) if "tmp" in name or "partial" in name] == [kept.name]


def test_a_partial_file_of_a_process_that_lives_is_kept(half, unbroken):
    other = half / f".{MANIFEST}.1.partial"
    other.write_text("{")
    assert_equal(estimate(half), unbroken)
    assert other.exists()
