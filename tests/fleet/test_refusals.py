"""What cannot be a fleet, and folders that hold another one: refused, and left as they were."""

import dataclasses
import json
import pathlib
import shutil
import sys
import threading

import numpy as np
import pytest

from slt_jax.fleet.run import run_fleet
from tests.fleet import cluster as played
from tests.fleet.cluster import result
from tests.small import refuses

cluster = played.cluster


@pytest.mark.quick
@pytest.mark.parametrize("name", [3, "", "a/b", "..", ".hidden", "a b", "-x", "é", "x" * 201, "a\n"])
def test_names_that_are_no_file_names(tmp_path, name):
    refuses(ValueError, lambda: run_fleet(result, {"fine": 1, name: 2}, tmp_path / "f"), repr(name), "letters, digits")
    assert not (tmp_path / "f").exists()


def test_what_cannot_be_a_fleet(tmp_path, cluster):
    folder = tmp_path / "f"
    refuses(ValueError, lambda: run_fleet(result, {"A": 1, "a": 2}, folder), "'A'", "'a'", "Rename")
    refuses(TypeError, lambda: run_fleet(result, ["a"], folder), "mapping")
    refuses(TypeError, lambda: run_fleet(result, {}, folder), "one at least")
    refuses(TypeError, lambda: run_fleet(3, {"a": 1}, folder), "callable")
    refuses(ValueError, lambda: run_fleet(result, {"a": 1}, folder, retries=-1), "retries", "-1")
    refuses(ValueError, lambda: run_fleet(result, {"a": 1}, folder, parallel=0), "parallel")
    refuses(TypeError, lambda: run_fleet(result, {"a": 1}, folder, executor="slurm"), "'slurm'")
    assert not folder.exists()
    lock = {"a": 1, "b": threading.Lock()}
    refuses(TypeError, lambda: run_fleet(result, lock, folder, executor=cluster), "'b'", "pickled", "load them")
    assert cluster.arrays == []


@dataclasses.dataclass
class Case:
    step: int
    file: pathlib.Path


@pytest.mark.quick
@pytest.mark.parametrize(
    ("there", "now", "field"),
    [
        (1, 2, "job"), ({"nbeta": 1.0, "x": [1]}, {"nbeta": 1.0, "x": [2]}, "job.x"),
        (Case(1, pathlib.Path("a")), Case(1, pathlib.Path("b")), "job.file"), (np.float32(1), np.float32(2), "job"),
    ],
)  # fmt: skip
def test_another_case_under_a_known_name_is_refused(tmp_path, cluster, there, now, field):
    def any_case(case):
        return result(1)

    folder = tmp_path / "fleet"
    run_fleet(any_case, {"job": there, "more": 1}, folder, executor=cluster)
    run_fleet(any_case, {"job": there}, folder, executor=cluster)
    words = (f"another cases.{field}", folder)
    refuses(ValueError, lambda: run_fleet(any_case, {"new": 3, "job": now}, folder, executor=cluster), *words)
    refuses(ValueError, lambda: run_fleet(result, {"job": there}, folder, executor=cluster), "another function")
    assert cluster.arrays == [["job", "more"]]
    assert json.loads((folder / "fleet.json").read_text())["cases"].keys() == {"job", "more"}


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path, cluster):
    folder = tmp_path / "fleet"
    (folder / "logs").mkdir(parents=True)
    run_fleet(result, {"job": 1}, folder, executor=cluster)  # a folder that an executor made for its logs is no other
    (folder / "fleet.json").write_text("{")
    refuses(ValueError, lambda: run_fleet(result, {"job": 1}, folder, executor=cluster), folder, "another format")
    shutil.rmtree(folder)
    (folder / "logs").mkdir(parents=True)
    (folder / "precious").write_text("mine")
    refuses(ValueError, lambda: run_fleet(result, {"job": 1}, folder, executor=cluster), "precious", "empty or new")
    assert sorted(p.name for p in folder.iterdir()) == ["logs", "precious"]


def test_without_submitit_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    refuses(ImportError, lambda: run_fleet(result, {"job": 1}, tmp_path / "f"), 'pip install "slt-jax[fleet]"')
