"""Ctrl-C in shell commands."""

import signal
import time
import weakref
from contextlib import suppress

import pytest

from sega_jax.pipelines.interrupts import reliable_interrupts


@pytest.fixture(autouse=True)
def _python_handles_interrupts():
    """Installs Python's handler for Ctrl-C, which a shell's background processes do not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Collected:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


class Kept:
    pass


def in_a_destructor():
    Collected()


def in_a_callback_of_a_weak_reference():
    weakref.finalize(Kept(), signal.raise_signal, signal.SIGINT)


def waits(interrupted):
    with reliable_interrupts():
        interrupted()
        time.sleep(5)


@pytest.mark.parametrize("interrupted", [in_a_destructor, in_a_callback_of_a_weak_reference])
def test_every_interrupt_is_raised(interrupted):
    with pytest.raises(KeyboardInterrupt):
        waits(interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def replaces_an_interrupt():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise SystemError("a result with an exception set") from None


def test_an_interrupt_that_a_library_replaces_is_raised():
    with pytest.raises(KeyboardInterrupt), reliable_interrupts():
        replaces_an_interrupt()


def fails_after_a_handled_interrupt():
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise ValueError("other")


def test_other_errors_are_raised():
    with pytest.raises(ValueError, match="other"), reliable_interrupts():
        fails_after_a_handled_interrupt()
