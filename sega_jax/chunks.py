"""A schedule's table in chunks of one compiled length, between which the host is heard."""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from sega_jax.schedules import Row

# Rows of the schedule in one call of the program, which compiles for this number.
CHUNK = 64
# Seconds of work handed to the devices at once: how often the progress bar moves and Ctrl-C is heard.
_PATIENCE = 0.5


class Chunks:
    """Runs tables, and learns how long a row of each situation takes."""

    def __init__(self) -> None:
        self._pace: dict[Hashable, float] = {}

    def run(
        self, program: Callable[[Any, Row], tuple[Any, Any]], carry: Any, table: Row, situation: Hashable, every: int
    ) -> Iterator[tuple[int, int, Any, Any]]:
        """Runs the table, some rows at a time.

        Args:
            program: (carry, chunk) -> the carry and what is kept of the chunk, of arrays [rows, calls, ...].
            situation: what the pace depends on.
            every: 0, or where to stop: after call 0 and every so many after it.

        Yields:
            The calls done so far, how many of them just now, the carry, and what was kept of these, with the filling of
            the chunk.
        """
        calls, done = len(table.call), 0
        while done < calls:
            known = situation in self._pace
            live = int(_PATIENCE / self._pace[situation]) if known else 1
            live = min(max(live, 1), CHUNK, calls - done)
            live = min(live, -done % every + 1) if every else live
            began = time.perf_counter()
            carry, kept = program(carry, _chunk(table, done, live))
            _wait(carry)
            # The first call of a program may have compiled: it says nothing about the pace.
            if known or done:
                self._pace[situation] = (time.perf_counter() - began) / live
            done += live
            yield done, live, carry, kept


def _chunk(table: Row, start: int, live: int) -> Row:
    """Rows of the table from `start`, filled up to a chunk by copies of the last that are not live."""
    index = np.minimum(start + np.arange(CHUNK), start + live - 1)
    return jax.tree.map(lambda column: column[index], table)._replace(live=np.arange(CHUNK) < live)


def _wait(arrays: Any) -> None:
    """Until the devices are done, also when interrupted: to end the process while they work is to crash."""
    try:
        jax.block_until_ready(arrays)
    except KeyboardInterrupt:
        jax.block_until_ready(arrays)
        raise


@contextmanager
def enough_memory(shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"the device's memory does not hold this batch, {shape} (rows first); ask for fewer pictures or"
            " concepts at once, a smaller size, or load with dtype bfloat16"
        ) from error
