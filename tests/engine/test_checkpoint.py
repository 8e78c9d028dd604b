"""Runs on disk: interrupted at any moment and resumed, refused when they differ."""

import json
import random
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine.checkpoint import MANIFEST
from slt_jax.posterior.data import HostData
from tests import durable
from tests.durable import DATA, TOTAL, TRACES, Child, assert_equal, contents, estimate, loss_fn, posterior, watched

unbroken, interrupted, half, collected = durable.unbroken, durable.interrupted, durable.half, durable.collected


# Interrupted and resumed

CHILD = (
    durable.SLOWLY
    + """
import jax.numpy as jnp, numpy as np
import slt_jax as slt
from tests.small import traces_of

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
np.savez(sys.argv[1], **traces_of(result))
"""
)


@pytest.mark.parametrize("runs", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_is_bit_for_bit_the_unbroken_run(tmp_path, runs):
    """Five SIGKILLs for each run. Kills: a state read while the next chunk overwrites it; a trace or a liveness flag
    left out of the save; random numbers that depend on where chunks begin."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    pick = random.Random(20)
    delays = [[pick.uniform(0.0, 0.9) for _ in range(5)] for _ in range(runs)]

    def one_run(number):
        directory, output = tmp_path / f"run{number}", tmp_path / f"{number}.npz"
        killed = [Child(script, output, directory, kill_after=delay) for delay in delays[number]]
        return killed, Child(script, output, directory)

    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(Child, script, tmp_path / "whole.npz")
        ended = list(pool.map(one_run, range(runs)))
    assert whole.result().returncode == 0, whole.result().errors.read_text()
    expected = np.load(tmp_path / "whole.npz")
    for number, (_, last) in enumerate(ended):
        assert last.returncode == 0, last.errors.read_text()
        with np.load(tmp_path / f"{number}.npz") as found:
            for name in TRACES:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=f"run {number}, {name}")

    killed = [child for children, _ in ended for child in children]
    mid_run = [child for child in killed if child.returncode == -signal.SIGKILL and child.steps[-1] < 100]
    began = [child.steps[0] for children, last in ended for child in [*children[1:], last] if child.steps]
    print(f"killed {len(killed)}, of these in the middle {len(mid_run)}")
    assert len(mid_run) >= 2.5 * runs
    assert sum(step > 0 for step in began) >= 1.5 * runs
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
    (half / f".{MANIFEST}.12345.partial").write_text('{"form')
    with watched() as begun:
        assert_equal(estimate(half), unbroken)
    assert begun[0] == int(newest.name)


def test_killed_before_the_first_save_starts_anew(tmp_path, unbroken):
    tmp_path.joinpath(f".{MANIFEST}.12345.partial").write_text('{"form')
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
