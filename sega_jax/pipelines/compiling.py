"""Shows how long programs have been compiling, in place of a progress bar that does not move meanwhile."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax.monitoring

# JAX reports the start and the end of tracing, lowering and compiling, and of reading a program from the cache on disk.
_EVENTS = "/jax/core/compile/"
# In seconds: the interval at which the time is updated. Shorter compilations are not shown.
_INTERVAL = 1.0

_current: ContextVar["_Notice | None"] = ContextVar("notice", default=None)


@contextmanager
def compiling_shown(bar: Any) -> Iterator[None]:
    """Shows when programs compile in a `with` block: "Compiling (12 s)" in a progress bar, or one line without a bar.

    Compilations in other threads are also shown if these threads run in a copy of this thread's context.

    Args:
        bar: An active tqdm bar. None writes the line "Compiling" to standard error.
    """
    notice = _Notice(bar)
    token = _current.set(notice)
    jax.monitoring.register_scalar_listener(notice.begin)
    jax.monitoring.register_event_duration_secs_listener(notice.end)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(notice.begin)
        jax.monitoring.unregister_event_duration_listener(notice.end)
        _current.reset(token)
        notice.close()


class _Notice:
    """Counts the seconds that programs have been compiling since the bar last moved, and shows them once a second.

    The thread that shows them starts with the first compilation.
    """

    def __init__(self, bar: Any):
        self._bar = bar
        self._condition = threading.Condition()  # protects the following attributes
        self._closed = False
        self._running = 0  # the number of compilations in progress, which may be nested or in several threads
        self._began, self._seconds, self._at = 0.0, 0.0, 0
        self._original: tuple[str, str | None] | None = None  # the bar's description and format while they are replaced
        self._thread: threading.Thread | None = None

    def begin(self, event: str, *_: Any, **__: Any) -> None:
        """Listens to JAX: a compilation begins."""
        if not event.startswith(_EVENTS) or _current.get() is not self:
            return
        with self._condition:
            self._running += 1
            if self._running > 1:
                return
            if self._bar is not None and self._bar.n != self._at:
                self._seconds, self._at = 0.0, self._bar.n
            self._began = time.perf_counter()
            if self._thread is None:
                self._thread = threading.Thread(target=self._show, name="compiling", daemon=True)
                self._thread.start()
            self._condition.notify()

    def end(self, event: str, *_: Any, **__: Any) -> None:
        """Listens to JAX: a compilation has ended."""
        if not event.startswith(_EVENTS) or _current.get() is not self:
            return
        with self._condition:
            if not self._running:  # the compilation began before the block
                return
            self._running -= 1
            if self._running:
                return
            seconds = time.perf_counter() - self._began
            self._seconds += seconds
            if self._bar is not None:
                # The bar measures the time of the steps only.
                self._bar.start_t += seconds
                self._bar.last_print_t += seconds
            self._condition.notify()

    def close(self) -> None:
        """Ends the thread, and restores the bar."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        with self._condition:
            while not self._closed:
                if not self._running:
                    self._restore()
                    self._condition.wait()
                    continue
                seconds = self._seconds + time.perf_counter() - self._began
                if seconds >= _INTERVAL:
                    self._write(f"Compiling ({int(seconds)} s)")
                    if self._bar is None:
                        return
                self._condition.wait(_INTERVAL)
            self._restore()

    def _write(self, text: str) -> None:
        if self._bar is None:
            print("Compiling", file=sys.stderr, flush=True)
            return
        bar = self._bar
        if self._original is None:
            self._original = bar.desc, bar.bar_format
        bar.bar_format = "{desc}" if bar.n == bar.initial else self._original[1]
        before = self._original[0].removesuffix(": ")
        bar.set_description_str(f"{before}: {text}" if before else text)

    def _restore(self) -> None:
        if self._original is not None:
            self._bar.desc, self._bar.bar_format = self._original
            self._original = None
            self._bar.refresh()
