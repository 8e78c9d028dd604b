"""SIGINT and SIGTERM during a run with a directory: saved first, then what they would have done."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slt_jax.engine.interrupts import Interrupts
from slt_jax.engine.loop import Engine
from tests import durable
from tests.durable import assert_equal, estimate, watched

unbroken, collected = durable.unbroken, durable.collected


def signalled(number, at, times=1):
    """Sends ``number`` to this process in the chunk that begins at step ``at`` or later."""
    advance, sent = Engine.advance, []

    def sending(self, run, *rest, **more):
        if run.step >= at and not sent:
            sent.append(run.step)
            for _ in range(times):
                os.kill(os.getpid(), number)
        return advance(self, run, *rest, **more)

    patch = pytest.MonkeyPatch()
    patch.setattr(Engine, "advance", sending)
    return patch, sent


@pytest.mark.quick
@pytest.mark.parametrize("at", [0, 9, 21])
def test_an_interrupted_run_has_saved_what_it_did(tmp_path, unbroken, at):
    """With an hour between saves. Kills: up to an hour of work lost; a handler that is left behind."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    patch, sent = signalled(signal.SIGINT, at)
    with patch.context(), pytest.raises(KeyboardInterrupt):
        estimate(tmp_path, checkpoint_seconds=3600)
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


def test_without_a_directory_nothing_waits():
    patch, sent = signalled(signal.SIGINT, 9)
    with watched() as begun, pytest.raises(KeyboardInterrupt):
        estimate()
    patch.undo()
    assert begun[-1] <= sent[0]


def test_outside_the_main_thread_and_for_ignored_signals_nothing_changes(tmp_path, unbroken):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts(True):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    found = []
    with ThreadPoolExecutor(1) as pool:
        assert_equal(pool.submit(estimate, tmp_path).result(), unbroken)
    thread = threading.Thread(target=lambda: found.append(Interrupts(True).__enter__()._before))
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
