"""Fleets: real processes of this machine once, and everything else on a cluster that is played in this process."""

import math
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import xarray as xr

import slt_jax as slt
from slt_jax.fleet import jobs as fleet_jobs
from slt_jax.fleet.run import run_fleet
from tests.fleet import cluster as played
from tests.fleet.cluster import Cluster, Killed, first_time, result

cluster = played.cluster
cloudpickle = pytest.importorskip("cloudpickle")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # jobs cannot import tests

COLUMNS = {
    "llc", "llc_stderr", "rhat", "ess", "init_loss", "verdict", "attempts", "seconds", "failed", "reason",
}  # fmt: skip


# Processes


def errand(case):
    if case.get("sleeps") and first_time(case["marker"]):
        pathlib.Path(case["pid"]).write_text(str(os.getpid()))
        time.sleep(600)
    if case.get("dies") and first_time(case["marker"]):
        os.kill(os.getpid(), signal.SIGKILL)
    if case.get("wrong"):
        raise ValueError("no weights\nin there")
    return result(case["seed"])


def stopped(call, look):
    """``call`` is interrupted by what ``look`` raises in place of a look at the jobs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet_jobs.JobQueue, "collect", look)
        with pytest.raises(KeyboardInterrupt):
            call()


def gone(pid):
    """Whether no process, or only a dead one that init has not buried, has this number."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_processes_that_are_interrupted_die_raise_and_succeed(tmp_path, capfd):
    """The interrupted one is cancelled, the dead one runs again, the wrong one does not; what is there is kept."""
    pid, folder = tmp_path / "pid", tmp_path / "fleet"
    sleeper = {"sleeps": {"seed": 1, "sleeps": True, "marker": str(tmp_path / "slept"), "pid": str(pid)}}

    def interrupt(self, retries):
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    # as in the background of a shell, which has interrupts ignored
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stopped(lambda: run_fleet(errand, sleeper, folder, progress=True), interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert gone(int(pid.read_text()))
    assert "jobs cancelled: 1, left to the cluster: 0" in capfd.readouterr().err

    cases = {"wrong": {"wrong": True}, "dies": {"seed": 2, "dies": True, "marker": str(tmp_path / "died")}, **sleeper}
    done = run_fleet(errand, cases, folder, parallel=3, progress=True)
    assert list(done.results) == ["dies", "sleeps"]
    for name, seed in {"dies": 2, "sleeps": 1}.items():
        np.testing.assert_array_equal(done.results[name].loss_trace, result(seed).loss_trace)
    (failure,) = done.failures
    assert failure[:4] == ("wrong", 1, "ValueError", "ValueError: no weights in there")
    assert "no weights\nin there" in failure.log.read_text()
    assert done.dataset["attempts"].values.tolist() == [1, 2, 1]
    assert done.dataset["failed"].values.tolist() == [True, False, False]
    told = capfd.readouterr().err
    assert "dies: attempt 1 failed, retrying: ended without a result or an exception: killed" in told
    assert f"dies: LLC {done.results['dies'].llc:.4g} ±" in told
    assert told.count("[3 of 3]") == 1
    for log in (folder / "logs").glob("*.out"):  # no zombies: every process was waited for
        with pytest.raises(ChildProcessError):
            os.waitpid(int(log.name.partition("_")[0]), os.WNOHANG)


# A cluster in this process


@pytest.mark.quick
def test_what_is_there_is_not_run_again_and_what_cannot_be_read_is(tmp_path, cluster):
    folder, cases = tmp_path / "fleet", {"one": 1, "two": 2, "three": 3}
    first = run_fleet(result, cases, folder, executor=cluster)
    assert cluster.arrays == [["one", "two", "three"]]  # one array
    chunk = folder / "two.zarr" / "sample_stats" / "loss_trace" / "c" / "0" / "0"
    chunk.unlink()
    again = run_fleet(result, {**cases, "four": 4}, folder, executor=cluster)
    assert cluster.arrays[1:] == [["two", "four"]]
    assert (folder / "two.unreadable" / "zarr.json").exists()
    for name, seed in cases.items():
        np.testing.assert_array_equal(again.results[name].loss_trace, result(seed).loss_trace)
    assert again.dataset["llc"].values[:3].tolist() == first.dataset["llc"].values.tolist()
    assert again.dataset["attempts"].values.tolist() == [1, 1, 1, 1]
    assert again.dataset["seconds"].values[0] == first.dataset["seconds"].values[0]


def test_the_table_says_what_the_results_say_and_comes_back_from_disk(tmp_path, cluster):
    def some(case):
        return result(case) if case else slt.nothing

    done = run_fleet(some, {"b": 2, "none": 0, "a": 1}, tmp_path / "fleet", executor=cluster)
    table = done.dataset
    assert set(table) == COLUMNS
    assert table["job"].values.tolist() == ["b", "none", "a"]
    for name, seed in {"a": 1, "b": 2}.items():
        row, truth = table.sel(job=name), result(seed)
        for key in ("llc", "llc_stderr", "rhat", "ess", "init_loss", "verdict"):
            assert row[key].item() == getattr(truth, key)
        assert 0 < row["seconds"].item() < 60
    row = table.sel(job="none")
    assert math.isnan(row["llc"].item())
    assert "AttributeError" in row["reason"].item()
    assert table["failed"].values.tolist() == [False, True, False]
    table.to_netcdf(tmp_path / "t.nc")
    table.to_zarr(tmp_path / "t.zarr", consolidated=False)
    for back in (xr.load_dataset(tmp_path / "t.nc"), xr.open_zarr(tmp_path / "t.zarr", consolidated=False).load()):
        xr.testing.assert_equal(back, table)
    assert str(done).splitlines()[0] == "3 jobs, 1 failed."
    assert str(done).splitlines()[1] == f"b: LLC {done.results['b'].estimate_text('±')}, {done.results['b'].verdict}"
    assert str(done).splitlines()[2].startswith("none: failed at attempt 1: AttributeError")


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (ValueError("x"), 1), (FileNotFoundError("x"), 1), (RuntimeError("x"), 1), (MemoryError("x"), 3),
        (SystemExit(1), 3), (Killed("OUT_OF_MEMORY"), 3), (Killed("TIMEOUT"), 3), (Killed("CANCELLED by 7"), 1),
    ],
)  # fmt: skip
def test_only_what_may_go_better_is_tried_again(tmp_path, cluster, error, attempts, capsys):
    def fails(case):
        raise error

    done = run_fleet(fails, {"job": 1}, tmp_path / "fleet", executor=cluster, retries=2, progress=True)
    (failure,) = done.failures
    assert (f"job: failed at attempt {attempts} and is not retried: " in capsys.readouterr().err) is (attempts == 1)
    assert failure.attempts == attempts == len(cluster.arrays) == done.dataset["attempts"].item()
    if isinstance(error, Killed):
        assert failure.error == ""
        assert math.isnan(done.dataset["seconds"].item())
        assert failure.reason == f"ended without a result or an exception: {error.args[0]}; its log ends: last words"
    else:
        assert failure.error == type(error).__name__
        assert failure.reason == f"{type(error).__name__}: {error}"
    assert failure.log.read_text().startswith("first line")
    assert done.dataset["reason"].item() == failure.reason


def test_a_death_is_told_after_an_error(tmp_path, cluster):
    """Kills: what attempt 1 wrote down read after attempt 2 was killed."""

    def fails(marker):
        raise MemoryError("first") if first_time(marker) else Killed("NODE_FAIL")

    (failure,) = run_fleet(fails, {"job": tmp_path / "marker"}, tmp_path / "fleet", executor=cluster).failures
    assert failure[:3] == ("job", 2, "")
    assert "NODE_FAIL" in failure.reason


def test_a_failure_of_an_earlier_call_is_run_again(tmp_path, cluster):
    def fails_once(marker):
        if first_time(marker):
            raise ValueError("x")
        return result(1)

    cases = {"job": tmp_path / "marker"}
    assert run_fleet(fails_once, cases, tmp_path / "fleet", executor=cluster).failures
    assert list(run_fleet(fails_once, cases, tmp_path / "fleet", executor=cluster).results) == ["job"]


def interrupt(self, retries):
    raise KeyboardInterrupt


def test_jobs_that_a_cluster_still_has_are_waited_for(tmp_path, cluster, monkeypatch, capsys):
    """Kills: a second submission of what is in the queue; a job that ended meanwhile waited for."""
    folder, cases, cluster.held = tmp_path / "fleet", {"one": 1, "two": 2, "three": 3}, True
    stopped(lambda: run_fleet(result, cases, folder, executor=cluster), interrupt)
    lost, kept = cluster.waiting[0], cluster.waiting[1:]
    Cluster.state[lost[0].job_id] = "NODE_FAIL"
    cluster.waiting, looks, look = kept, [], fleet_jobs.JobQueue.collect

    def later(self, retries):
        looks.append(sorted(self.running))
        cluster.run()
        look(self, retries)

    monkeypatch.setattr(fleet_jobs.JobQueue, "collect", later)
    done = run_fleet(result, cases, folder, executor=cluster, progress=True)
    assert list(done.results) == ["one", "two", "three"]
    assert cluster.arrays == [["one", "two", "three"], ["one"]]
    assert looks[0] == ["one", "three", "two"]
    assert done.dataset["attempts"].values.tolist() == [1, 1, 1]
    assert "two: waiting for job 1 of an earlier call (PENDING)" in capsys.readouterr().err
    assert not list((folder / "jobs").glob("*.job"))


def test_files_of_another_machine_may_come_late(tmp_path, cluster, monkeypatch):
    """Kills: a result that a shared disk shows a moment after the job has ended counted as a death."""
    monkeypatch.setattr(fleet_jobs, "PATIENCE", 30)
    folder, aside, looks, look = tmp_path / "fleet", tmp_path / "aside", [], fleet_jobs.JobQueue.collect

    def late(self, retries):
        looks.append(len(self.running))
        if len(looks) == 1:
            shutil.move(folder, aside)
        if len(looks) == 3:
            shutil.move(aside, folder)
        look(self, retries)

    monkeypatch.setattr(fleet_jobs.JobQueue, "collect", late)
    assert list(run_fleet(result, {"job": 1}, tmp_path / "fleet", executor=cluster, retries=0).results) == ["job"]
    assert looks == [1, 1, 1]


def test_no_more_than_parallel_are_in_the_queue(tmp_path, cluster, monkeypatch):
    cluster.held, look = True, fleet_jobs.JobQueue.collect

    def one_ends(self, retries):
        cluster.waiting, rest = cluster.waiting[:1], cluster.waiting[1:]
        cluster.run()
        cluster.waiting = rest
        look(self, retries)

    monkeypatch.setattr(fleet_jobs.JobQueue, "collect", one_ends)
    done = run_fleet(result, {str(i): i for i in range(5)}, tmp_path / "fleet", executor=cluster, parallel=2)
    assert len(done.results) == 5
    assert cluster.arrays == [["0", "1"], ["2"], ["3"], ["4"]]
    assert cluster.at_once == 2


# One job


def test_of_two_processes_with_one_job_the_second_waits_and_takes_what_is_there(tmp_path, cluster):
    """What a killed collector leaves running. Kills: two runs in one checkpoint_dir."""
    (tmp_path / "jobs").mkdir()
    ran = tmp_path / "ran"

    def never(_):
        ran.write_text("")
        return result(2)

    second = threading.Thread(target=fleet_jobs.work, args=(cloudpickle.dumps((never, 0)), tmp_path, "job", 1))
    with fleet_jobs.exclusive(tmp_path / "jobs" / "job.lock"):
        second.start()
        second.join(0.2)
        assert second.is_alive()
        result(1).save(tmp_path / "job.zarr")
    second.join(20)
    assert not second.is_alive()
    assert not ran.exists()
    assert slt.load_result(tmp_path / "job.zarr").llc == result(1).llc


def test_only_the_first_process_of_a_job_saves(tmp_path, cluster, monkeypatch):
    (tmp_path / "jobs").mkdir()
    pickled = cloudpickle.dumps((lambda marker: marker.write_text(""), tmp_path / "ran"))
    monkeypatch.setenv("SUBMITIT_LOCAL_GLOBALID", "1")
    fleet_jobs.work(pickled, tmp_path, "job", 1)
    assert (tmp_path / "ran").exists()
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_function_must_return_a_result(tmp_path, cluster):
    (failure,) = run_fleet(lambda case: case, {"job": 1}, tmp_path / "fleet", executor=cluster).failures
    assert failure.reason == "TypeError: function must return an LLCResult, got a int."
