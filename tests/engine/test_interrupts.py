"""SIGINT and SIGTERM during a run: Ctrl-C gives the result so far, and a run with a directory is saved first."""

import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import slt_jax as slt
from slt_jax.engine.interrupts import SIGNALS, Interrupts
from tests import durable
from tests.durable import DATA, PLAN, assert_equal, estimate, posterior, signalled, watched

unbroken, collected = durable.unbroken, durable.collected


@pytest.mark.quick
@pytest.mark.parametrize("at", [0, 9, 21])
def test_an_interrupted_run_has_saved_what_it_did(tmp_path, unbroken, at):
    """With an hour between saves. Kills: up to an hour of work lost; a handler that is left behind."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    patch, sent = signalled(signal.SIGINT, at)
    with patch.context():
        if at < PLAN["num_warmup"]:
            with pytest.raises(KeyboardInterrupt):
                estimate(tmp_path, checkpoint_seconds=3600)
        else:
            assert estimate(tmp_path, checkpoint_seconds=3600).interrupted == (at < 21)  # at 21, the last chunk
    patch.undo()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with watched() as begun:
        assert_equal(estimate(tmp_path), unbroken)
    done = sent[0] + (3 if sent[0] else 1)  # the first chunk has one step
    assert begun[:1] == [done][: len(begun)]


def test_a_second_interrupt_does_not_wait(tmp_path, unbroken):
    patch, _ = signalled(signal.SIGINT, 9, times=2)
    with pytest.raises(KeyboardInterrupt):
        estimate(tmp_path, checkpoint_seconds=3600)
    patch.undo()
    with watched() as begun:
        assert_equal(estimate(tmp_path), unbroken)
    assert begun[0] == 0


def test_a_handler_that_returns_lets_the_run_go_on(tmp_path, unbroken):
    """Kills: handlers of the caller that are replaced, or not put back."""
    heard = []
    handler = lambda number, frame: heard.append(number)  # noqa: E731
    before = signal.signal(signal.SIGTERM, handler)
    try:
        patch, _ = signalled(signal.SIGTERM, 9)
        assert_equal(estimate(tmp_path, checkpoint_seconds=3600), unbroken)
        patch.undo()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_before_the_first_draw_nothing_waits():
    """Kills: Ctrl-C that waits for a program to be compiled, or for the warm-up, with nothing to show for it."""
    patch, sent = signalled(signal.SIGINT, 2)
    with watched() as begun, pytest.raises(KeyboardInterrupt):
        estimate()
    patch.undo()
    assert begun[-1] <= sent[0]


@pytest.mark.quick
def test_ctrl_c_gives_the_result_so_far(unbroken, capfd):
    """Kills: nothing for an hour of sampling; draws that were never taken counted as such; no word of it."""
    patch, sent = signalled(signal.SIGINT, 11)
    result = estimate()
    patch.undo()
    done = sent[0] + 3 - PLAN["num_warmup"]
    assert "ending this run with the draws so far; a second signal ends it at once" in capfd.readouterr().err
    assert result.interrupted
    assert not unbroken.interrupted
    assert (result.settings.num_draws, result.settings.interrupted) == (done, PLAN["num_draws"])
    np.testing.assert_array_equal(result.loss_trace, unbroken.loss_trace[:, :done])
    assert math.isfinite(result.llc)
    assert f"Interrupted after {done} of 16 draws: the estimate and its verdict are of these." in str(result)
    assert f"interrupted (of {PLAN['num_draws']} draws)" in repr(result)
    assert result.to_dict()["interrupted"]
    assert f"interrupted, of {PLAN['num_draws']} draws" in result.plot().axes[0].get_title()


def test_one_that_was_interrupted_says_so_when_it_is_read_again(tmp_path):
    patch, _ = signalled(signal.SIGINT, 11)
    result = estimate()
    patch.undo()
    result.save(tmp_path / "run.zarr")
    assert slt.load_result(tmp_path / "run.zarr").interrupted
    assert "Interrupted after" in result.report(tmp_path / "run.html").read_text()


def test_a_second_ctrl_c_ends_it_at_once():
    patch, _ = signalled(signal.SIGINT, 11, times=2)
    with pytest.raises(KeyboardInterrupt):
        estimate()
    patch.undo()


def test_ctrl_c_after_the_last_chunk_loses_nothing(monkeypatch, unbroken):
    """Kills: a finished run that is thrown away while the last save is waited for."""
    monkeypatch.setattr("slt_jax.engine.run._explain_stops", lambda *given: os.kill(os.getpid(), signal.SIGINT))
    result = estimate()
    assert not result.interrupted
    assert_equal(result, unbroken)


def test_a_handler_of_the_caller_gets_its_signal(monkeypatch):
    """Kills: Ctrl-C taken away from a program that has its own use for it."""
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        patch, _ = signalled(signal.SIGINT, 11)
        assert not estimate().interrupted
        patch.undo()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


def test_ctrl_c_while_the_ends_are_measured_costs_the_measurement_alone(monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("slt_jax.estimators.ends._at_chains_ends", stop)
    result = estimate()
    assert math.isfinite(result.llc_raw)
    assert "measuring gradient noise and acceptance at the end was interrupted" in str(result)


def test_a_sweep_that_was_interrupted_is_one_of_fewer_draws(tmp_path):
    given = {"step_size": [1e-4, 2e-4], "localization": [1.0], "num_chains": 2, "num_draws": 16, "num_warmup": 8}
    given |= {"batch_size": 8, "chunk_size": 3, "sampler": slt.sgld()}
    patch, _ = signalled(signal.SIGINT, 11)
    found = slt.sweep(posterior(), DATA, **given)
    patch.undo()
    assert [cell.interrupted for cell in found.results] == [True, True]
    assert "Interrupted after" in str(found)
    found.save(tmp_path / "sweep.zarr")
    assert all(cell.interrupted for cell in slt.load_sweep(tmp_path / "sweep.zarr").results)


def test_outside_the_main_thread_and_for_ignored_signals_nothing_changes(tmp_path, unbroken):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts(SIGNALS):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    found = []
    with ThreadPoolExecutor(1) as pool:
        assert_equal(pool.submit(estimate, tmp_path).result(), unbroken)
    thread = threading.Thread(target=lambda: found.append(Interrupts(SIGNALS).__enter__()._before))
    thread.start()
    thread.join()
    assert found == [{}]


CHILD = (
    durable.SLOWLY
    + """
from tests.durable import estimate
estimate(sys.argv[1], checkpoint_seconds=3600)
"""
)


def test_a_terminated_process_has_saved_and_ends_by_the_signal(tmp_path, unbroken):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    places = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=places
    )
    assert child.stdout is not None
    steps = [int(child.stdout.readline()) for _ in range(4)]
    child.send_signal(signal.SIGTERM)
    steps += [int(line) for line in child.communicate()[0].split()]
    assert child.returncode == -signal.SIGTERM
    assert [p.name for p in (tmp_path / "run" / "steps").iterdir()] == [str(steps[-1] + 3)]
