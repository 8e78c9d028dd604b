"""A real SLURM of one node: a fleet as an array job, and an estimate of two tasks. Skipped where SLURM is missing."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from scaling.launch import one_node
from slt_jax.fleet.run import run_fleet
from tests.small import refuses, traces_of

submitit = pytest.importorskip("submitit")
cloudpickle = pytest.importorskip("cloudpickle")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # jobs cannot import tests

ROOT = pathlib.Path(__file__).parents[2]
DATA = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
MISSING = one_node.missing()
needs_slurm = pytest.mark.skipif(
    bool(MISSING), reason=f"SLURM is not installed: {', '.join(MISSING)} not found. On Debian: {one_node.INSTALL}"
)


def loss_fn(w, x):
    return 0.5 * (x @ w) ** 2


def errand(case):
    """In the job: an estimate, or what makes it fail."""
    if case.get("file"):
        np.load(case["file"])
    if case.get("cancelled"):
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        subprocess.run(["scancel", job], check=True)
        time.sleep(60)

    def kill(step, partial):
        marker = pathlib.Path(case["marker"])
        if step > 500 and not marker.exists():
            marker.write_text(str(step))
            os.kill(os.getpid(), signal.SIGKILL)

    posterior = slt.LocalPosterior(loss_fn, jnp.zeros(3), 100, nbeta=20.0, localization=1.0)
    return slt.estimate_llc(
        posterior, DATA, sampler=slt.sgld(1e-3), num_chains=2, num_draws=4000, num_warmup=100, batch_size=10, key=1,
        checkpoint_dir=case["folder"], checkpoint_seconds=0, callback=kill if "marker" in case else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The cluster, whose variables this process has."""
    folder = tmp_path_factory.mktemp("node")
    with pytest.MonkeyPatch.context() as patch:
        with one_node.one_node(folder, cpus=4) as own:
            patch.setenv("SLURM_CONF", own["SLURM_CONF"])
            patch.setenv("PATH", own["PATH"])
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
            yield own
    pids = [(folder / f"{name}.pid") for name in one_node.DAEMONS]
    assert not [pid for pid in pids if pid.exists() and pathlib.Path("/proc", pid.read_text().strip()).exists()]


@pytest.mark.slow
@needs_slurm
def test_a_fleet_is_an_array_whose_killed_job_resumes(slurm, tmp_path, capfd):
    """Kills: a death that is never seen without accounting, a warning at each look, a second try at what fails again.

    The killed job gives the bits of one that ran through.
    """
    cases = {name: {"folder": tmp_path / f"{name}.run"} for name in ("whole", "killed", "missing", "cancelled")}
    cases["killed"]["marker"] = tmp_path / "marker"
    cases["missing"]["file"], cases["cancelled"]["cancelled"] = tmp_path / "nothing.npz", True
    executor = submitit.AutoExecutor(tmp_path / "fleet" / "logs", cluster="slurm")
    executor.update_parameters(timeout_min=10, cpus_per_task=1)
    done = run_fleet(errand, cases, tmp_path / "fleet", executor=executor, retries=2, progress=True)
    told = capfd.readouterr()
    assert list(done.results) == ["whole", "killed"]
    for name, values in traces_of(done.results["whole"]).items():
        np.testing.assert_array_equal(traces_of(done.results["killed"])[name], values, err_msg=name)
    assert int((tmp_path / "marker").read_text()) > 500
    table = done.dataset.to_dataframe()
    assert table["attempts"].to_dict() == {"whole": 1, "killed": 2, "missing": 1, "cancelled": 1}
    assert "killed: attempt 1 failed, retrying: ended without a result or an exception: FAILED" in told.err
    assert "missing: failed at attempt 1 and is not retried: FileNotFoundError" in told.err
    assert "cancelled: failed at attempt 1 and is not retried: ended without a result or an exception: CANC" in told.err
    assert "sacct" not in told.out + told.err
    assert "WARNING" not in told.out + told.err
    logs = [path.name for path in (tmp_path / "fleet" / "logs").glob("*_log.out")]
    array = [name for name in logs if re.fullmatch(r"\d+_[0-3]_0_log\.out", name)]
    assert len({name.partition("_")[0] for name in array}) == 1  # one array; the second try is a job of its own
    assert len(array) == 4
    assert len(logs) == 5


@pytest.mark.slow
@needs_slurm
def test_a_cluster_ends_with_its_jobs_and_starts_again(tmp_path):
    """Kills: daemons or jobs that outlive it; a folder that can be used only once."""
    for _ in range(2):
        own = one_node.start(tmp_path / "node")
        refuses(FileExistsError, lambda: one_node.start(tmp_path / "node"), "Stop it first")
        pids = [int((tmp_path / "node" / f"{name}.pid").read_text()) for name in one_node.DAEMONS]
        mark = f"sleep 300.{pids[0]}"
        subprocess.run(["sbatch", f"--wrap={mark}", "--output=/dev/null"], env=own, check=True)
        until = time.monotonic() + 60
        while not running(mark) and time.monotonic() < until:
            time.sleep(0.1)
        one_node.stop(tmp_path / "node")
        assert not running(mark)
        assert not [pid for pid in pids if command_of(pid)]


def command_of(pid):
    """As it was started; empty if there is no such process, or a dead one."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def running(mark):
    return [path for path in pathlib.Path("/proc").glob("[0-9]*") if command_of(path.name).startswith(mark)]


@pytest.mark.slow
@needs_slurm
def test_two_tasks_give_the_bits_of_one_process(slurm, tmp_path):
    """Kills: tasks that sample each for themselves; chains that depend on the process that moves them."""
    run = [sys.executable, "-m", "scaling.launch.one_estimate", "--out"]
    own = {**os.environ, "XLA_FLAGS": ""}
    told = {}
    for name, launch in {"one": [], "two": ["srun", "--ntasks=2", "--cpus-per-task=1"]}.items():
        done = subprocess.run(
            [*launch, *run, str(tmp_path / name)], cwd=ROOT, env=own, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        told[name] = done.stdout
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    np.testing.assert_array_equal(one["loss"], two["loss"])
    assert one["llc"] == two["llc"]
    assert told["two"].count("LLC") == 1
    assert "1 process, 1 x cpu" in told["one"]
    assert "2 processes, 2 x cpu" in told["two"]


def test_a_cluster_is_not_started_where_it_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.setattr(one_node, "missing", lambda: [])
    refuses(FileExistsError, lambda: one_node.start(tmp_path / "full"), "not empty, and no cluster")
    refuses(ValueError, lambda: one_node.start(tmp_path / ("x" * 90)), "too long for a socket")
    monkeypatch.setattr(one_node, "missing", lambda: ["slurmd"])
    refuses(FileNotFoundError, lambda: one_node.start(tmp_path / "new"), "slurmd not found", one_node.INSTALL)
    assert not (tmp_path / "new").exists()
