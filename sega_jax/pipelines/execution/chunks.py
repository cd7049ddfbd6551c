"""A schedule's table in chunks of one compiled length, between which the host is heard and programs may change."""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from sega_jax.method.schedules import Row

# Rows of the schedule in one call of the program, which compiles for this number.
CHUNK = 64
# Seconds of work handed to the devices at once: how often the progress bar moves and Ctrl-C is heard.
_PATIENCE = 0.5


class Chunks:
    """Runs tables, and learns how long a row of each situation takes, and how few concepts it is prepared for."""

    def __init__(self) -> None:
        self._pace: dict[Hashable, float] = {}
        self._prepared: dict[Hashable, set[int]] = {}

    def prepare(self, situation: Hashable, concepts: int) -> None:
        """From now on `run` may call the program of so many concepts, which is compiled."""
        self._prepared.setdefault(situation, set()).add(concepts)

    def run(
        self,
        program: Callable[[Any, Row, int], tuple[Any, Any]],
        carry: Any,
        table: Row,
        situation: Hashable,
        every: int,
        needed: np.ndarray,
        n: int,
    ) -> Iterator[tuple[int, int, Any, Any]]:
        """Runs the table, some rows at a time.

        Args:
            program: (carry, chunk, concepts) -> the carry and what is kept of the chunk, of arrays [rows, calls, ...].
            situation: what the pace depends on.
            every: 0, or where to stop: after call 0 and every so many after it.
            needed: how many concepts each call has to predict, int [calls]. It predicts as many as some program that
                is prepared, lest a number compile one.
            n: how many there are; their program needs no preparation.

        Yields:
            The calls done so far, how many of them just now, the carry, and what was kept of these, with the filling of
            the chunk.
        """
        calls, done, called = len(table.call), 0, set()
        prepared = np.array(sorted({n, *self._prepared.get(situation, ())}))
        concepts = prepared[np.searchsorted(prepared, needed)]
        while done < calls:
            now = int(concepts[done])
            name = situation, now
            known = name in self._pace
            live = int(_PATIENCE / self._pace[name]) if known else 1
            live = min(max(live, 1), CHUNK, int(np.argmin(np.append(concepts[done:] == now, False))))
            live = min(live, -done % every + 1) if every else live
            began = time.perf_counter()
            carry, kept = program(carry, chunk(table, done, live), now)
            _wait(carry)
            # The first call of a program may have compiled: it says nothing about the pace.
            if known or name in called:
                self._pace[name] = (time.perf_counter() - began) / live
            called.add(name)
            done += live
            yield done, live, carry, kept


def chunk(table: Row, start: int, live: int) -> Row:
    """Rows of the table from `start`, filled up to a chunk by copies of one that are not live."""
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
            " concepts at once, or where a call has them rows_at_once or tiled, for a smaller size, or load with dtype"
            " bfloat16"
        ) from error
