"""SIGINT and SIGTERM that wait until a run has been saved, or has been cut where it is."""

import os
import signal
import threading
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within this block the first of ``signals`` is noted, for the run to save and then to ``deliver`` it.

    ``waits``: whether there is anything to wait for now; if not, a signal is delivered at once. ``told``: what is then
    written to stderr.

    ``deliver`` does what the signal would have done: it calls the handler that was there, or ends the process. A second
    signal is delivered at once. The handlers are put back at the end of the block, and a signal that is still pending
    is delivered then. Outside the main thread, and for signals that are ignored, nothing changes.
    """

    def __init__(self, signals: Collection[int], waits: Callable[[], bool] = lambda: True, told: str = ""):
        here = threading.current_thread() is threading.main_thread()
        self._signals, self._waits, self._told = signals if here else (), waits, told
        self._before: dict[int, Any] = {}
        self.pending: int | None = None

    def __enter__(self) -> "Interrupts":
        for number in self._signals:
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):  # None: of a program that embeds Python, and cannot be put back
                self._before[number] = before
                signal.signal(number, self._note)
        return self

    def __exit__(self, *details) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self.deliver()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None or not self._waits():
            self.pending = number
            self.deliver(frame)
            return
        self.pending = number
        os.write(2, f"  {self._told}; a second signal ends it at once\n".encode())

    @property
    def is_keyboard(self) -> bool:
        """Whether what is pending is Ctrl-C, which would have raised KeyboardInterrupt."""
        return self.pending == signal.SIGINT and self._before[signal.SIGINT] is signal.default_int_handler

    def dismiss(self) -> None:
        """Forget the signal that is pending."""
        self.pending = None

    def deliver(self, frame: FrameType | None = None) -> None:
        """What the pending signal does, if there is one. Returns where the handler that was there does."""
        number, self.pending = self.pending, None
        if number is None:
            return
        before = self._before[number]
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, before)
            signal.raise_signal(number)
