"""Ctrl-C that Python dropped is raised again."""

import _thread
import sys
import threading
from typing import Any

_SOON = 0.05  # seconds


def keep_interrupts() -> None:
    """From now on a KeyboardInterrupt is never lost.

    Python drops an exception of a finalizer or of a callback of its garbage collector, where the signal handler may
    happen to run: JAX has such a callback. The program would go on as if nothing had been pressed.
    """
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        again = threading.Timer(_SOON, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
