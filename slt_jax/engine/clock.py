"""Wall time of a call, by what it was doing."""

import contextlib
import threading
import time

import jax

COMPILATION = "compilation"
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Clock:
    """Seconds of a call in its parts, which add up to the whole; what JAX compiles in any of them is a part of its own.

    A part is entered by its name, and lasts until the next one. To be used as a context: in it, JAX reports what this
    thread compiles. ``began``: when the call did, by ``time.perf_counter``; default now.
    """

    def __init__(self, began: float | None = None) -> None:
        self._thread = threading.get_ident()
        self.restart(began)

    def restart(self, began: float | None = None) -> None:
        """From zero."""
        self._began = self._entered = time.perf_counter() if began is None else began
        self._part, self._parts = "preparation", {}
        self._spans: list[tuple[float, float]] = []  # of the compilations in this part; none lies in another

    def __enter__(self) -> "Clock":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *details) -> None:
        with contextlib.suppress(AssertionError, ValueError):  # somebody has cleared all listeners
            jax.monitoring.unregister_event_duration_listener(self._hear)

    def enter(self, part: str) -> None:
        """What is done from now on."""
        self._parts, self._part = self.parts, part
        self._entered, self._spans = time.perf_counter(), []

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._began

    @property
    def parts(self) -> dict[str, float]:
        """Part -> seconds, until now."""
        took = time.perf_counter() - self._entered
        compiled = min(took, sum(end - start for start, end in self._spans))
        new = {self._part: took - compiled, COMPILATION: compiled}
        names = dict.fromkeys([*self._parts, *new])
        return {name: self._parts.get(name, 0.0) + new.get(name, 0.0) for name in names}

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """A function that is traced inside another is reported first, and then again in the other's time."""
        if event not in _COMPILING or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        start = max(end - duration_secs, self._entered)
        while self._spans and self._spans[-1][0] >= start:
            self._spans.pop()
        self._spans.append((start, end))
