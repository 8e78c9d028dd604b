"""Results on disk: paths that cannot be saved to, files that are no result, damaged ones."""

import shutil

import numpy as np
import pytest

import slt_jax as slt
from tests.small import estimate, refuses

# Results on disk


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    result = estimate()
    return result, result.save(tmp_path_factory.mktemp("saved") / "result")


def test_paths_that_cannot_be_saved_to(saved, tmp_path):
    result, path = saved
    refuses(FileExistsError, lambda: result.save(path), path, "overwrite=True", "another path")
    np.testing.assert_array_equal(slt.load_result(path).loss_trace, result.loss_trace)
    (tmp_path / "file").write_text("precious")
    refuses(FileExistsError, lambda: result.save(tmp_path / "file"), tmp_path / "file", "overwrite=True")
    words = (f"could not write {tmp_path / 'file' / 'result'}", "still in memory: save it elsewhere")
    refuses(OSError, lambda: result.save(tmp_path / "file" / "result"), *words)
    refuses(OSError, lambda: result.save("/proc/slt-jax/result"), "could not write /proc/slt-jax/result", "elsewhere")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.quick
def test_paths_that_hold_no_result(saved, tmp_path):
    refuses(FileNotFoundError, lambda: slt.load_result(tmp_path / "no"), "no result at", tmp_path / "no")
    (tmp_path / "file").write_text("not a result")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file", tmp_path / "folder"):
        refuses(ValueError, lambda path=path: slt.load_result(path), path, "not a result written by slt-jax")


def test_every_truncated_file_of_a_result_is_refused(saved, tmp_path):
    _, path = saved
    files = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    assert len(files) >= 10
    for number, file in enumerate(files):
        copy = shutil.copytree(path, tmp_path / str(number))
        (copy / file).write_bytes((copy / file).read_bytes()[: (copy / file).stat().st_size // 2])
        refuses(
            ValueError, lambda copy=copy: slt.load_result(copy), copy, "not a result written by slt-jax, or it is trunc"
        )


def test_a_result_with_a_missing_chunk_is_refused(saved, tmp_path):
    """What a save killed halfway leaves. Kills: a trace filled with zeros."""
    copy = shutil.copytree(saved[1], tmp_path / "copy")
    (copy / "sample_stats" / "loss_trace" / "c" / "0" / "0").unlink()
    refuses(ValueError, lambda: slt.load_result(copy), copy, "not a result written by slt-jax, or it is trunc")
