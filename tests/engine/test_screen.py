"""What is shown during a call: its phases, the time that has passed, and the time to go."""

import io
import re
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine import progress as progress_module
from slt_jax.engine import screen as screen_module
from slt_jax.engine.clock import Clock
from slt_jax.engine.plan import Schedule
from slt_jax.engine.progress import Progress
from slt_jax.engine.screen import Screen, shows_progress
from tests.small import estimate

LENGTHS = {"num_chains": 4, "num_draws": 2000, "num_warmup": 4000, "thinning": 4, "batch_size": 8, "micro_batches": 1}


EMPTY = SimpleNamespace(loss=np.zeros((1, 0)), baseline=np.zeros((1, 0)))


def schedule(**changes):
    return Schedule(**{**LENGTHS, "baseline": "paired", "chain_batch": 1, "chunk_size": 512, **changes})


def simulated(monkeypatch, plan, of_step, of_chunk, of_draw=0.0, full=512, compile_seconds=3.0):
    """(seconds to go as told, as they were) after each chunk, with the chunk sizes of the engine's loop."""
    clock, step, size, told = [100.0], 0, 1, []
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock[0])
    found = Progress(plan, full=full)

    def cost(begin, end):
        draws = np.arange(begin, end) >= plan.num_warmup
        return of_step * (end - begin) + of_draw * draws.sum() / plan.thinning

    while step < plan.total_steps:
        count = min(size, plan.total_steps - step)
        took = cost(step, step + count) + of_chunk
        clock[0] += took + compile_seconds * (step == 0)
        step += count
        found.update(SimpleNamespace(step=step, trace=EMPTY))
        if count == size:
            size = min(full, max(1, min(size * 4, int(size / took))) if size > 1 else 4)
        left = cost(step, plan.total_steps) + of_chunk * (plan.total_steps - step) / full
        told.append((found.left, left))
    return told


CASES = {
    "steps of a microsecond": {"of_step": 1e-6, "of_chunk": 1e-3},
    "steps of a millisecond": {"of_step": 1e-3, "of_chunk": 1e-3},
    "steps of a second": {"of_step": 1.0, "of_chunk": 1e-3},
    "draws that cost a forward pass": {"of_step": 1e-3, "of_chunk": 1e-3, "of_draw": 1e-3 / 3},
}


@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_the_time_to_go_is_right_within_half(monkeypatch, case):
    """Kills: a speed taken from the first chunks, most of whose time is their start, and never renewed."""
    told = simulated(monkeypatch, schedule(), **CASES[case])
    known = [(said, true) for said, true in told if said is not None and true > 0]
    assert len(known) > 0.5 * len(told)
    assert all(2 / 3 < said / true < 1.5 for said, true in known)
    assert known[0][1] > 0.6 * sum(told[0][1:])  # said early


def test_the_time_to_go_follows_a_machine_that_slows_down(monkeypatch):
    """Kills: a mean over all that was done."""
    clock = [0.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock[0])
    found, step = Progress(schedule(num_warmup=10**6), full=512), 0
    for seconds in [0.1] * 300 + [1.0] * 15:
        clock[0], step = clock[0] + seconds, step + 512
        found.update(SimpleNamespace(step=step, trace=EMPTY))
    true = (schedule(num_warmup=10**6).total_steps - step) / 512
    assert found.left == pytest.approx(true, rel=0.1)


@pytest.mark.quick
def test_the_parts_of_a_call_add_up_to_its_wall_time():
    """Kills: a function that is traced inside another counted twice; compilation hidden in the sampling."""
    inner = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))
    began = time.perf_counter()
    with Clock() as clock:
        time.sleep(0.2)
        clock.enter("sampling")
        jax.jit(lambda x: inner(x) + inner(2 * x) @ jnp.linalg.inv(x))(np.eye(7)).block_until_ready()
        clock.enter("final checks")
        parts, seconds = clock.parts, clock.seconds
    wall = time.perf_counter() - began
    assert sum(parts.values()) == pytest.approx(seconds, abs=0.01)
    assert seconds == pytest.approx(wall, abs=0.05)
    assert parts["preparation"] >= 0.2
    assert 0 < parts["compilation"] < seconds - 0.2
    assert set(parts) == {"preparation", "compilation", "sampling", "final checks"}


@pytest.mark.quick
def test_took_is_the_wall_time_of_the_call_and_has_its_parts():
    """Kills: the time of the sampling alone, without calibration and final checks, said to be what it took."""
    began = time.perf_counter()
    result = estimate(sampler=slt.sgld(), num_draws=20)
    wall = time.perf_counter() - began
    cost = result.settings.cost
    assert 0.9 * wall - 0.1 < cost["seconds"] < wall
    assert {"preparation", "compilation", "calibration", "sampling", "final checks"} == set(cost["parts"])
    assert sum(cost["parts"].values()) == pytest.approx(cost["seconds"], rel=0.02)
    assert re.search(r"Took [\d.]+ s \(.*compilation [\d.]+ s.*\), .* steps/s over all chains", str(result))


@pytest.mark.quick
def test_a_log_hears_of_each_phase_and_is_not_left_silent(monkeypatch, capfd):
    """Kills: a minute of compiling with nothing on the screen."""
    monkeypatch.setattr(screen_module, "_EVERY", 0.01)
    monkeypatch.setattr(screen_module, "_SILENCE", (0.15, 0.15))
    with Screen(enabled=True) as screen:
        screen.phase("compiling the steps", "sampling")
        time.sleep(0.5)
        screen.phase("final checks", "final checks")
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "  0 s: checking the loss and the data"
    assert sum("compiling the steps" in line for line in lines) >= 3
    assert lines[-1].endswith(": final checks")


@pytest.mark.quick
def test_an_estimate_tells_its_phases_and_its_time(capfd):
    estimate(sampler=slt.sgld(), num_draws=3000, progress=True)
    told = capfd.readouterr().err
    phases = ["checking the loss", "calibrating step size", "largest curvature", "compiling the steps"]
    phases += ["sampling: 3,002 steps", "final checks"]
    places = [told.find(phase) for phase in phases]
    assert -1 not in places
    assert places == sorted(places)
    assert re.search(r"sampling: 3,002 steps of 4 chains, about \d+ s to go", told)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.quick
def test_progress_is_shown_in_a_terminal_and_not_in_a_log(monkeypatch, capfd):
    """Kills: a bar in every log; a silent hour in a terminal."""
    assert not shows_progress(None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert shows_progress(None)
    assert not shows_progress(False)
    estimate(num_draws=3000)
    shown = sys.stderr.getvalue()
    assert "compiling the steps" in shown
    assert "sampling: 3,002 steps of 4 chains" in shown
    monkeypatch.setattr(sys, "stderr", Terminal())
    estimate(progress=False)
    assert sys.stderr.getvalue() == ""


def test_a_picture_that_fails_costs_nobody_a_run(monkeypatch):
    def fail(*args):
        raise RuntimeError

    monkeypatch.setattr(screen_module._Log, "draw", fail)
    assert np.isfinite(estimate(progress=True).llc)
