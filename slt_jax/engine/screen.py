"""What a person sees during a call: in a terminal and in a notebook a line that is renewed, in a log lines."""

import contextlib
import contextvars
import html
import sys
import threading
from typing import Any

from slt_jax.engine.clock import Clock
from slt_jax.engine.progress import Progress, span

_EVERY = 0.25  # seconds from one drawing to the next
_SILENCE = (4.0, 30.0)  # seconds after which a log has another line: at first, and at most
_PATIENCE = 0.25  # of the time that has passed, after which there is another line between these


class Screen:
    """Shows what a call is doing, for how long already, and how far it is. Also its ``clock``.

    A context: what it shows is renewed by a thread of its own, also while a program is compiled. ``began``: when the
    call did.
    """

    def __init__(self, *, enabled: bool, began: float | None = None):
        self.clock = Clock(began)
        self._view = _view() if enabled else None
        self._text, self._progress = "checking the loss and the data", None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._tick,), daemon=True)

    def __enter__(self) -> "Screen":
        self.clock.__enter__()
        if self._view is not None:
            self._view.open()
            self._draw()
            self._thread.start()
        return self

    def __exit__(self, *details) -> None:
        self.clock.__exit__()
        if self._view is not None:
            self._ended.set()
            self._thread.join()
            with contextlib.suppress(Exception):
                self._view.close(f"took {span(self.clock.seconds)}" if details[0] is None else "ended")

    def phase(self, text: str, part: str) -> None:
        """What is done from now on, in words, and the part of the ``clock`` it belongs to."""
        self.clock.enter(part)
        self._text, self._progress = text, None
        self._draw(new=True)

    def follow(self, progress: Progress) -> None:
        """Show how far a run is."""
        self._progress = progress

    def say(self, *lines: str) -> None:
        """Lines that stay."""
        if self._view is not None:
            self._view.say([f"  {line}" for line in lines])

    def _draw(self, new: bool = False) -> None:
        if self._view is not None:
            progress = self._progress
            text, share = (self._text, None) if progress is None else (progress.text, progress.share)
            with contextlib.suppress(Exception):  # a picture that fails costs nobody a run
                self._view.draw(text, self.clock.seconds, share, new)

    def _tick(self) -> None:
        while not self._ended.wait(_EVERY):
            self._draw()


def shows_progress(progress: bool | None) -> bool:
    """Whether a call shows how far it is: as asked, else in a terminal or a notebook."""
    return _in_notebook() or _in_terminal() if progress is None else bool(progress)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _in_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


class _Log:
    """Lines on stderr: what begins, and now and then how far it is."""

    def __init__(self) -> None:
        self._told = 0.0

    def open(self) -> None:
        pass

    def say(self, lines: list[str]) -> None:
        print(*lines, sep="\n", file=sys.stderr, flush=True)

    def draw(self, text: str, seconds: float, share: float | None, new: bool) -> None:
        least, most = _SILENCE
        if new or self._told == 0 or seconds - self._told > min(most, max(least, _PATIENCE * seconds)):
            self._told = max(seconds, 1e-9)
            self.say([f"  {span(seconds)}: {text}"])

    def close(self, text: str) -> None:
        pass


class _Terminal(_Log):
    """The last line of the terminal, by rich, which moves it below what else is printed."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def open(self) -> None:
        self._live.start()

    def say(self, lines: list[str]) -> None:
        self._console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)

    def draw(self, text: str, seconds: float, share: float | None, new: bool) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, 1))
        bar = () if share is None else (ProgressBar(total=1.0, completed=share, width=24),)
        line.add_row(Text(f" {span(seconds):>6}"), *bar, Text(text, no_wrap=True, overflow="ellipsis"))
        self._live.update(line, refresh=True)

    def close(self, text: str) -> None:
        self._live.stop()


class _Notebook(_Log):
    """An output of the cell that is renewed in place. It needs IPython alone, no widgets."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._handle: Any = None
        self._shown = ""

    def open(self) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def say(self, lines: list[str]) -> None:
        self._lines += lines

    def draw(self, text: str, seconds: float, share: float | None, new: bool) -> None:
        bar = "" if share is None else f'<progress value="{share:.3f}" max="1"></progress> '
        self._show(f"{span(seconds)}: {text}", bar)

    def close(self, text: str) -> None:
        self._show(text, "")

    def _show(self, text: str, bar: str) -> None:
        plain = "\n".join([*self._lines, f"  {text}"])
        page = f'<pre style="margin:0">{html.escape(plain)}</pre>{bar}'
        if page != self._shown:
            self._shown = page
            self._handle.update({"text/plain": plain, "text/html": page}, raw=True)


def _view() -> _Log:
    return _Notebook() if _in_notebook() else _Terminal() if _in_terminal() else _Log()
