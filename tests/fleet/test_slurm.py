"""SLURM without accounting, as its commands answer; tests/scaling/test_launch.py has a real one."""

import errno
import os

import jax
import pytest

from slt_jax.fleet import jobs as fleet_jobs
from slt_jax.fleet.retry import may_succeed
from slt_jax.fleet.run import run_fleet
from tests.fleet import cluster as played
from tests.fleet.cluster import Cluster, result

submitit = pytest.importorskip("submitit")
from submitit.slurm.slurm import SlurmInfoWatcher  # noqa: E402

from slt_jax.fleet import slurm  # noqa: E402

cluster = played.cluster
QUEUE = """\
7_0|RUNNING
7_1|FAILED
7_2|PENDING
7_3|CONFIGURING
7_4|PREEMPTED
7_5|SUSPENDED
8|TIMEOUT
9|RUNNING
"""


@pytest.mark.quick
def test_jobs_are_in_the_states_of_the_queue():
    """Kills: the states that only the queue has taken for an end; a job that is gone waited for for ever."""
    watcher = slurm.QueueWatcher()
    jobs = [*(f"7_{i}" for i in range(7)), "8"]
    for job in jobs:
        watcher.register_job(job)
    states = {job: info["State"] for job, info in watcher.read_info(QUEUE).items()}
    assert states == {
        "7_0": "RUNNING", "7_1": "FAILED", "7_2": "PENDING", "7_3": "PENDING", "7_4": "PREEMPTED", "7_5": "RUNNING",
        "7_6": slurm.GONE, "8": "TIMEOUT",
    }  # fmt: skip
    watcher._info_dict = watcher.read_info(QUEUE)
    assert [job for job in jobs if watcher.is_done(job, mode="cache")] == ["7_1", "7_6", "8"]


def command(folder, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("accounting", [True, False])
def test_the_queue_is_asked_only_without_accounting(tmp_path, monkeypatch, capfd, accounting):
    """Kills: a warning at each look; an answer of the accounting that is not used."""
    command(tmp_path, "sacct", "echo asked >> $0.log; " + (
        "echo 'JobID|State|NodeList'; echo '5|FAILED|a'" if accounting else "echo 'storage is disabled' >&2; exit 1"
    ))  # fmt: skip
    command(tmp_path, "squeue", "echo '5|TIMEOUT'")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(submitit.SlurmJob, "watcher", SlurmInfoWatcher(delay_s=600))
    fleet_jobs.watch_without_accounting()
    job = submitit.SlurmJob(tmp_path, "5")
    for _ in range(3):
        assert job.done(force_check=True)
    assert job.state == ("FAILED" if accounting else "TIMEOUT")
    told = capfd.readouterr()
    assert told.out + told.err == ""
    assert (tmp_path / "sacct.log").read_text().count("asked") == (2 if accounting else 1)


def test_a_job_that_was_preempted_and_is_not_started_again_is_retried(tmp_path, cluster, monkeypatch):
    """Kills: a wait without an end, as submitit expects SLURM to start it again."""
    monkeypatch.setattr(played.Job, "done", lambda self, force_check=False: self.state == "COMPLETED")
    looks, look = [], fleet_jobs.JobQueue.collect

    def preempted_first(self, retries):
        if not looks:
            Cluster.state["0"] = "PREEMPTED"
            (tmp_path / "fleet" / "jobs" / "job.json").unlink()
            for part in (tmp_path / "fleet").glob("job.zarr"):
                part.rename(tmp_path / "aside")
        looks.append(1)
        assert len(looks) < 2000
        look(self, retries)

    monkeypatch.setattr(fleet_jobs.JobQueue, "collect", preempted_first)
    done = run_fleet(result, {"job": 1}, tmp_path / "fleet", executor=cluster)
    assert done.dataset["attempts"].item() == 2
    assert len(looks) > 3  # it was given time to come back


def oserror(number):
    return OSError(number, os.strerror(number))


class OutOfMemoryError(RuntimeError):
    """As PyTorch's."""


@pytest.mark.quick
@pytest.mark.parametrize(
    ("error", "again"),
    [
        (MemoryError(), True), (SystemExit(1), True), (KeyboardInterrupt(), True), (ConnectionResetError(), True),
        (oserror(errno.ENOSPC), True), (oserror(errno.ESTALE), True), (OutOfMemoryError(), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), True),
        (RuntimeError("Unable to initialize backend 'cuda': no device"), True),
        (submitit.core.utils.UncompletedJobError("Job not requeued because: timed-out"), True),
        (oserror(errno.ENOENT), False), (oserror(errno.EACCES), False), (FileNotFoundError("x"), False),
        (OSError("gpt2 is not a model"), False), (RuntimeError("shapes"), False), (ValueError("x"), False),
        (FloatingPointError("x"), False), (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), False),
    ],
)  # fmt: skip
def test_only_what_a_scheduler_or_a_machine_did_may_go_better(error, again):
    """Kills: a missing input tried twice; a job that ran out of time or memory given up."""
    assert may_succeed(error) is again
