"""Saves with ``overwrite=True`` that are killed at random moments: the old result or the new one can be read."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import slt_jax as slt
from slt_jax.results.storage import RESULT, write
from tests.small import estimate, refuses

CHILD = """
import sys
import numpy as np
import slt_jax as slt

results = [slt.load_result(path) for path in sys.argv[2:]]
for result in results:
    result.save(sys.argv[1], overwrite=True)
print("begun", flush=True)
while True:
    for result in results:
        result.save(sys.argv[1], overwrite=True)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two results and where they are saved."""
    folder = tmp_path_factory.mktemp("two")
    results = [estimate(key=seed) for seed in (0, 1)]
    return results, [result.save(folder / str(number)) for number, result in enumerate(results)]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_it_replaces_a_result(two, tmp_path, kills):
    """Kills: the old result removed before the new one is in its place; files that killed saves leave behind."""
    results, sources = two
    (tmp_path / "child.py").write_text(CHILD)
    path, pick, found = tmp_path / "result", random.Random(31), []
    for _ in range(kills):
        command = [sys.executable, str(tmp_path / "child.py"), str(path), *map(str, sources)]
        places = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=places)
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        time.sleep(pick.uniform(0.0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        loaded = slt.load_result(path)
        found.append([np.array_equal(loaded.loss_trace, result.loss_trace) for result in results].index(True))
    print("old or new:", found)
    results[0].save(path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child.py", "result"]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.quick
@pytest.mark.parametrize("moment", range(5))
def test_killed_at_every_step_of_it(two, tmp_path, moment):
    """Each renaming or removal in turn, and all after it, are not done. Kills: an order in which both are gone."""
    results, _ = two
    path, calls = results[0].save(tmp_path / "result"), []
    rename, rmtree = Path.rename, shutil.rmtree

    def renamed(self, target):
        calls.append(1)
        if len(calls) > moment:
            raise Killed
        return rename(self, target)

    def removed(path, **more):
        calls.append(1)
        if len(calls) > moment:
            if Path(path, "zarr.json").exists():
                Path(path, "zarr.json").unlink()  # torn
            raise Killed
        rmtree(path, **more)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Path, "rename", renamed)
        patch.setattr(shutil, "rmtree", removed)
        patch.setattr(os, "getpid", lambda: 999_999_999)
        write(results[1].to_xarray(), path, RESULT, overwrite=True)
    assert len(calls) > moment
    loaded = slt.load_result(path)
    assert any(np.array_equal(loaded.loss_trace, result.loss_trace) for result in results)
    assert results[0].save(path, overwrite=True) == path
    np.testing.assert_array_equal(slt.load_result(path).loss_trace, results[0].loss_trace)
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_what_a_killed_save_set_aside_is_kept_by_the_next_one(two, tmp_path):
    """Kills: a save without overwrite over a result that is only set aside."""
    results, _ = two
    path = results[0].save(tmp_path / "result")
    path.rename(tmp_path / ".result.replaced")
    np.testing.assert_array_equal(slt.load_result(path).loss_trace, results[0].loss_trace)
    refuses(FileExistsError, lambda: results[1].save(path), path, "overwrite=True")
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_a_link_stays_one_and_its_target_is_replaced(two, tmp_path):
    results, _ = two
    target = results[0].save(tmp_path / "disk")
    link = tmp_path / "result"
    link.symlink_to(target, target_is_directory=True)
    assert results[1].save(link, overwrite=True) == link
    assert link.is_symlink()
    for path in (link, target):
        np.testing.assert_array_equal(slt.load_result(path).loss_trace, results[1].loss_trace)
    page = tmp_path / "page.html"
    page.symlink_to(tmp_path / "there.html")
    results[0].report(page)
    assert page.is_symlink()
    assert (tmp_path / "there.html").read_text().startswith("<!")


def test_leftovers_of_killed_saves_are_removed(two, tmp_path):
    results, _ = two
    (tmp_path / ".result.999999999.partial").mkdir()
    (tmp_path / ".other.999999999.partial").mkdir()
    results[0].save(tmp_path / "result")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.999999999.partial", "result"]
