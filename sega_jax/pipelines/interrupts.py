"""Makes Ctrl-C reliable in shell commands."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Python ignores exceptions in these functions, which the garbage collector calls.
_CALLBACKS = ("__del__", "_xla_gc_callback")
_FILES = ("weakref.py", "_weakrefset.py")
_PAUSE = 0.05  # in seconds


@contextmanager
def reliable_interrupts() -> Iterator[None]:
    """Raises KeyboardInterrupt for every Ctrl-C in a `with` block.

    If a callback of the garbage collector runs, the exception is raised a moment later, because Python would ignore it
    there. If a library replaces the exception with another one, as NumPy does when it looks up a dtype, the block
    raises KeyboardInterrupt instead.

    The function has no effect outside the main thread, or if the program has its own handler for Ctrl-C.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def interrupt(number, frame):
        nonlocal interrupted
        if _ignores_exceptions(frame):
            timer = threading.Timer(_PAUSE, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
        else:
            interrupted = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if interrupted and (isinstance(error, SystemError) or _follows_interrupt(error)):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _follows_interrupt(error: BaseException | None) -> bool:
    """Returns whether a KeyboardInterrupt is the cause or the context of an error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _ignores_exceptions(frame: FrameType | None) -> bool:
    """Returns whether Python ignores exceptions in a frame, because a callback of the garbage collector runs in it."""
    while frame is not None:
        if frame.f_code.co_name in _CALLBACKS or os.path.basename(frame.f_code.co_filename) in _FILES:
            return True
        frame = frame.f_back
    return False
