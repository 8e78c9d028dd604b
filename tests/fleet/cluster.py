"""A cluster that is played in this process, for the tests of fleets."""

import pathlib
import sys

import numpy as np
import pytest

from slt_jax.fleet import jobs as fleet_jobs
from slt_jax.fleet import run as fleet
from tests import small
from tests.small import made_result

submitit = pytest.importorskip("submitit")
cloudpickle = pytest.importorskip("cloudpickle")
for module in (sys.modules[__name__], small):  # jobs cannot import tests
    cloudpickle.register_pickle_by_value(module)

SETTINGS = {
    "num_chains": 2, "num_draws": 40, "num_warmup": 5, "thinning": 1, "batch_size": 8, "nbeta": 10.0, "step_size": 1e-3,
    "localization": 2.0, "num_data": 100, "num_free": 6, "sampler": "sgld", "family": "euler", "devices": "1 x cpu",
    "versions": {}, "cost": {},
}  # fmt: skip


def result(seed):
    """A result without a run: losses around 1 + seed."""
    loss = np.random.default_rng(seed).normal(1 + seed, 0.1, size=(2, 40)).astype(np.float32)
    same = dict.fromkeys(("distance_sq", "kinetic", "acceptance", "pull"), 1.0)
    return made_result(loss, loss[:, :5], SETTINGS, baseline=0.25, tilt=0.0, virial=6.0, **same)


def first_time(marker):
    """Whether nobody has asked for this file before."""
    try:
        pathlib.Path(marker).open("x").close()
    except FileExistsError:
        return False
    return True


class Job(submitit.Job):
    """Ends when the cluster lets it; then the cluster has run it."""

    def done(self, force_check=False):
        return Cluster.state[self.job_id] not in ("PENDING", "UNKNOWN")

    @property
    def state(self):
        return Cluster.state[self.job_id]


class Cluster(submitit.Executor):
    """Runs what it is given at once, or leaves it ``PENDING``; ``arrays`` holds the names of each submission."""

    state: dict = {}  # noqa: RUF012

    def __init__(self, folder, held=False):
        super().__init__(folder)
        self.arrays, self.waiting, self.held, self.at_once = [], [], held, 0

    def _internal_process_submissions(self, delayed_submissions):
        self.arrays.append([delayed.args[2] for delayed in delayed_submissions])
        jobs = [Job(self.folder, str(len(Cluster.state) + i)) for i in range(len(delayed_submissions))]
        for job, delayed in zip(jobs, delayed_submissions, strict=True):
            Cluster.state[job.job_id] = "PENDING"
            self.waiting.append((job, delayed))
        self.at_once = max(self.at_once, sum(state == "PENDING" for state in Cluster.state.values()))
        if not self.held:
            self.run()
        return jobs

    def run(self):
        for job, delayed in self.waiting:
            job.paths.folder.mkdir(parents=True, exist_ok=True)
            job.paths.stderr.write_text("first line\nlast words\n\n")
            try:
                delayed.result()
                Cluster.state[job.job_id] = "COMPLETED"
            except BaseException as error:
                Cluster.state[job.job_id] = error.args[0] if isinstance(error, Killed) else "FAILED"
        self.waiting = []


class Killed(BaseException):
    """Of a process by the cluster: it can write nothing down."""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """In this process, the jobs' variables and short waits."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_GLOBALID", "0")
    monkeypatch.setattr(fleet, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(fleet_jobs, "PATIENCE", 0.05)
    monkeypatch.setattr(fleet_jobs.faulthandler, "enable", lambda: None)  # pytest has it
    monkeypatch.setattr(fleet_jobs, "write_file", kept_if_alive)
    monkeypatch.setattr(Cluster, "state", {})
    return Cluster(tmp_path / "fleet" / "logs")


WRITE = fleet_jobs.write_file


def kept_if_alive(path, value):
    if not isinstance(sys.exception(), Killed):
        WRITE(path, value)
