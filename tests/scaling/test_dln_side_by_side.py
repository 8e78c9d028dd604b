"""Many teachers on one accelerator: which runs when, and what is left of those that fail or are stopped."""

import json
import subprocess
import sys

import pytest

from scaling.dln.launch import side_by_side
from scaling.dln.launch.side_by_side import Job, in_order, main, next_of
from scaling.dln.methods import ours

# Stands for scaling.dln.run: writes the row that was asked for, unless the seed is bad, or waits.
STAND_IN = """
import json, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seed = int(given["--seed-start"])
print("begun")
if seed == 7:
    sys.exit("no memory")
if seed == 9:
    time.sleep(600)
row = {"class": given["--class"], "kind": given["--type"], "seed": seed, "request": json.loads(given["--budget"])}
open(given["--out"], "w").write(json.dumps(row) + chr(10))
print("read")
"""


@pytest.fixture
def stand_in(monkeypatch):
    real = side_by_side.command
    monkeypatch.setattr(side_by_side, "command", lambda *args: [sys.executable, "-c", STAND_IN, *real(*args)[3:]])


def arguments(out, count, *, start=0):
    sizes = ["--class", "10K", "1K", "--type", "B", "--count", str(count), "--seed-start", str(start)]
    return ["--together", "3", *sizes, "--budget", "1500", "--out", str(out)]


def rows_of(out):
    return [(row["class"], row["seed"]) for row in map(json.loads, out.read_text().splitlines())]


def test_class_by_class_and_small_networks_first():
    todo = [(size, "B", seed, ours(size, "B", {})) for seed in range(4) for size in ("1K", "10K")]
    jobs = in_order(todo, ["10K", "1K"])
    assert [job.size for job in jobs] == ["10K"] * 4 + ["1K"] * 4
    weights = [job.weights for job in jobs]
    assert weights == sorted(weights[:4]) + sorted(weights[4:])
    assert all(job.bytes > 2**29 + 4 * job.weights for job in jobs)


def test_those_side_by_side_fit_together():
    small, large, huge = (Job("1M", "B", seed, 1, size) for seed, size in enumerate((1.0, 5.0, 50.0)))
    assert next_of([large, small], [], 2, 6.0) is large
    assert next_of([large, small], [large], 2, 6.0) is small  # one that does not fit yet holds up nobody
    assert next_of([large], [large], 2, 6.0) is None
    assert next_of([small], [small, small], 2, 60.0) is None
    assert next_of([huge], [small], 2, 6.0) is None
    assert next_of([huge], [], 2, 6.0) is huge  # alone, and its own refusal tells why
    assert next_of([], [], 2, 6.0) is None


def test_rows_come_as_they_are_done_and_are_not_run_again(tmp_path, stand_in, capfd, monkeypatch):
    """Kills: a failure that stops the others, a failed one that counts as done."""
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(side_by_side, "KEY", ("class", "kind", "seed"))
    assert main(arguments(out, 2, start=6)) == 1
    told = capfd.readouterr().out
    assert told.count("failed: no memory") == 2
    assert told.count("read") == 2
    assert sorted(rows_of(out)) == [("10K", 6), ("1K", 6)]
    assert main(arguments(out, 1, start=5)) == 0
    assert main(arguments(out, 2, start=5)) == 0
    assert sorted(rows_of(out)) == [("10K", 5), ("10K", 6), ("1K", 5), ("1K", 6)]


def test_stopped_it_takes_its_processes_with_it(tmp_path, stand_in, monkeypatch):
    def stop(_seconds):
        raise KeyboardInterrupt

    begun = []
    popen = subprocess.Popen

    def noted(*args, **kwargs):
        begun.append(popen(*args, **kwargs))
        return begun[-1]

    monkeypatch.setattr(side_by_side.subprocess, "Popen", noted)
    monkeypatch.setattr(side_by_side.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(tmp_path / "rows.jsonl", 1, start=9))
    assert len(begun) == 2
    assert all(child.returncode is not None for child in begun)


def test_arguments_that_cannot_be_used_are_refused(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["--together", "0", "--class", "1K", "--type", "B", "--out", str(out)]) == 2
    assert "--together must be at least 1, got 0." in capsys.readouterr().err
    assert main(["--class", "1K", "--type", "B", "--out", str(out), "--sampler", "sgld", "--friction", "1"]) == 2
    assert "sgld has no friction" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_teacher(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "scaling.dln.launch.side_by_side", "--class", "1K", "--type", "C", "--count", "1"]
    subprocess.run([*command, "--budget", "1500", "--out", str(out)], check=True)
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["llc"] == pytest.approx(row["truth"], rel=0.1)
