"""Several processes: two of two devices each give what one process of four devices gives, on both of them.

This file is also the script that each of the two processes runs.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine import checkpoint
from slt_jax.engine import loop as engine
from slt_jax.engine.mesh import chain_mesh
from slt_jax.posterior.data import HostData
from tests.small import traces_of

ROOT = pathlib.Path(__file__).parents[2]
ROWS = np.random.default_rng(0).normal(size=(400, 5)).astype(np.float32)
TRACES = ("loss_trace", "baseline_trace", "drift_sq", "virial", "warmup_loss")
NUMBERS = ("step_size", "friction", "localization")
DATA = {"x": ROWS, "unused": np.full(len(ROWS), np.nan, np.float32)}
MOST_STEPS = 250
ROUNDING = 2 * MOST_STEPS * 6e-8  # of a quadratic's relative size, one rounding a step; it is bit-equal on a CPU


class Rows(HostData):
    num_data = len(ROWS)

    def fetch(self, indices):
        return {"x": ROWS[indices]}

    def fingerprint(self):
        return "rows"


def loss_fn(params, batch):
    return 0.5 * (batch["x"] @ params["w"]) ** 2 + 0.1 * params["v"] ** 4


def posterior(**more):
    """At a w* that was put on one device; what is called noise is a random key."""
    center = {"w": jnp.zeros(5), "v": jnp.float32(0), "noise": jax.random.key(3)}
    center = jax.device_put(center, jax.local_devices()[0])
    return slt.LocalPosterior(loss_fn, center, len(ROWS), mask=lambda path: path[0] != "noise", **more)


def default(_, **more):
    """Calibrated, and observed."""
    some = {name: rows[:25] for name, rows in DATA.items()}
    observe = {"values": some, "moments": slt.Observable(some, keep="moments")}
    given = {"observe": observe, "num_chains": 4, "budget": 1000, "batch_size": 16, "chunk_size": 16, "progress": True}
    return slt.estimate_llc(posterior(), DATA, **{**given, **more})


def host(_):
    return slt.estimate_llc(
        posterior(), Rows(), num_chains=4, budget=1200, batch_size=16, key=5, control_variate=True, baseline="full"
    )


def hmc(_):
    return slt.estimate_llc(posterior(localization=1.0), DATA, sampler=slt.hmc(1e-3, 8), num_draws=20, num_warmup=20)


def fixed(**more):
    return slt.estimate_llc(
        posterior(localization=1.0), DATA,
        **{
            "sampler": slt.sgld(1e-3), "num_draws": 100, "num_warmup": 40, "batch_size": 16, "chunk_size": 16, **more
        },
    )  # fmt: skip


def clocks(_):
    """To process 1 everything seems to take 1000 times as long."""
    with pytest.MonkeyPatch.context() as patch:
        if jax.process_index() == 1:
            patch.setattr(engine, "time", types.SimpleNamespace(perf_counter=lambda: 1000 * time.perf_counter()))
        return fixed()


def resumed(directory):
    """Interrupted in the middle, then taken up."""
    advance = engine.Engine.advance

    def interrupted(self, run, *rest):
        if run.step > 80:
            raise KeyboardInterrupt
        return advance(self, run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            default(directory, checkpoint_dir=directory / "resumed", checkpoint_seconds=0)
    return default(directory, checkpoint_dir=directory / "resumed", checkpoint_seconds=0)


def on_disk(directory):
    """Values that one process writes and all read."""
    some = {name: rows[:25] for name, rows in DATA.items()}
    return fixed(observe={"values": slt.Observable(some, path=directory / "values")})


CASES = {case.__name__: case for case in (default, host, hmc, clocks, resumed, on_disk)}


def refusals(directory, rank):
    """What every process is told where they do not fit together."""
    own = chain_mesh(4, jax.local_devices())
    calls = {
        "key": {"key": rank},
        "step": {"sampler": slt.sgld(1e-3 * (1 + rank))},
        "chunk": {"chunk_size": 16 + rank},
        "chains": {"num_chains": 3},
        "alone": {"mesh": own, "checkpoint_dir": directory / "alone"},
        "shared": {"checkpoint_dir": directory / f"of-{rank}"},
    }
    told = {}
    for name, changed in calls.items():
        with pytest.raises(ValueError) as refused:  # noqa: PT011  (the text is looked at by the test)
            fixed(**changed)
        told[name] = str(refused.value)
    return told


def numbers(result):
    chosen = [result.llc, result.llc_stderr, *(getattr(result.settings, name) for name in NUMBERS)]
    observed = {}
    for name, one in result.observed.items():
        observed |= {f"m2 of {name}": one.as_moments().m2, f"mean of {name}": one.as_moments().mean}
    traces = {name: np.asarray(traces_of(result)[name]) for name in TRACES}
    return {**traces, **observed, "chosen": np.array(chosen)}


def main(rank, port, directory, what):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    if what == "killed":
        default(directory, checkpoint_dir=directory / "killed", checkpoint_seconds=0)
        return
    found, told = {}, {}
    for name, case in CASES.items():
        result = case(directory)
        found |= {f"{name}.{key}": value for key, value in numbers(result).items()}
        told[name] = [str(result), repr(result.settings)]
    told["few"] = default(directory, num_chains=None, progress=False).settings.num_chains
    alone = fixed(key=rank, mesh=chain_mesh(4, jax.local_devices()))
    found |= {f"alone.{key}": value for key, value in numbers(alone).items()}
    checkpoint.PATIENCE = 0.5
    told["refusals"] = refusals(directory, rank)
    np.savez(directory / f"{rank}.npz", **found)
    (directory / f"{rank}.json").write_text(json.dumps(told))


def started(directory, what="all"):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not (k.startswith("SLURM") or "device_count" in v)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = []
    for rank in range(2):
        command = [sys.executable, "-W", "error", __file__, str(rank), str(port), str(directory), what]
        with (directory / f"{rank}.txt").open("w") as printed:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=printed))
    return processes


def ended(directory, processes):
    """What they printed. When one fails the other may wait for it for ever, and is ended."""
    until = time.monotonic() + 150
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    told = [(directory / f"{rank}.txt").read_text() for rank in range(2)]
    assert [p.returncode for p in processes] == [0, 0], "\n\n".join(text[-3000:] for text in told)
    return told


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes found, were told, and printed."""
    directory = tmp_path_factory.mktemp("two")
    printed = ended(directory, started(directory))
    found = [dict(np.load(directory / f"{rank}.npz")) for rank in range(2)]
    return found, [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)], printed


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(two, tmp_path, name):
    """Kills: keys put on a mesh that spans processes; chunks cut by each process's own clock; a batch on the wrong
    chain; a calibration or a save that each process decides on for itself."""
    found, told, _ = two
    result = CASES[name](tmp_path)
    assert result.settings.devices == "4 x cpu"
    assert result.warmup_loss.shape[1] + result.loss_trace.shape[1] * result.settings.thinning <= MOST_STEPS
    for key, expected in numbers(result).items():
        ours, theirs = (f[f"{name}.{key}"] for f in found)
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{key}: the processes differ")
        scale = float(np.nanmax(np.abs(expected)))
        np.testing.assert_allclose(ours, expected, rtol=ROUNDING, atol=ROUNDING * scale, err_msg=key)
    assert told[0][name] == told[1][name]  # all that a result says, seconds included


def test_a_mesh_of_its_own_devices_leaves_a_process_alone(two, tmp_path):
    for rank, found in enumerate(two[0]):
        expected = fixed(key=rank)
        np.testing.assert_allclose(found["alone.loss_trace"], expected.loss_trace, rtol=ROUNDING, atol=ROUNDING)


def test_a_small_budget_leaves_chains_for_all_processes(two):
    assert [told["few"] for told in two[1]] == [4, 4]


def test_only_the_first_process_speaks(two):
    assert ["largest curvature" in text for text in two[2]] == [True, False]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("key", "process 1 samples with another key than process 0: [0, 1] there, [0, 0] here"),
        ("step", "process 1 samples with another sampler.step_size than process 0: 0.002 there, 0.001 here"),
        ("chunk", "process 1 samples with another chunk_size than process 0: 17 there, 16 here"),
        ("chains", "num_chains = 3 cannot be shared out equally among 2 processes. Take 4 chains"),
        ("alone", "needs all 2 processes to sample together"),
        ("shared", "process 1 does not see what process 0 writes there. Give a directory on a disk that they share"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused_on_all(two, name, sentence):
    for told in two[1]:
        assert sentence in told["refusals"][name]


@pytest.mark.slow
def test_two_killed_processes_are_resumed(tmp_path):
    """SIGKILL after the first save, at a moment of the machine's choosing."""
    processes, saves = started(tmp_path, "killed"), tmp_path / "killed" / "steps"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (saves.is_dir() and any(p.name.isdigit() for p in saves.iterdir())):
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    ended(tmp_path, started(tmp_path, "killed"))
    kept = default(tmp_path, checkpoint_dir=tmp_path / "killed")  # what they finished is read by one process
    expected = default(tmp_path)
    for name in TRACES:
        values, wanted = traces_of(kept)[name], traces_of(expected)[name]
        scale = float(np.nanmax(np.abs(wanted)))
        np.testing.assert_allclose(values, wanted, rtol=ROUNDING, atol=ROUNDING * scale)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), sys.argv[4])
