"""Runs a schedule's table in chunks of the fixed length for which the program is compiled.

Between chunks, the host updates the progress bar, calls callbacks, handles Ctrl-C and may switch to another program.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import numpy as np

from sega_jax.method.schedules import Row

# The number of table lines (model calls) for which the program is compiled.
CHUNK = 64
# The target duration of a chunk in seconds. It determines how often the progress bar moves and how soon Ctrl-C takes
# effect.
_SECONDS = 0.5


class Chunks:
    """Runs tables in chunks, measures the seconds per model call, and keeps track of which programs are compiled."""

    def __init__(self) -> None:
        self._seconds_per_call: dict[Hashable, float] = {}
        self._prepared: dict[Hashable, set[int]] = {}
        self.fits: set[Hashable] = set()  # the situations whose programs are known to fit in memory

    def prepare(self, situation: Hashable, concepts: int) -> None:
        """Records that the program for this number of concepts has been compiled, so that `run` may use it."""
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
        """Runs the table chunk by chunk.

        Args:
            program: A function (carry, chunk, number of concepts) -> (new carry, the chunk's records as arrays [rows,
                calls, ...]).
            carry: The initial carry.
            table: The schedule, with one line for each model call.
            situation: The key under which speed measurements and prepared programs are stored.
            every: If positive, a chunk also ends after calls 0, `every`, 2 `every`, and so on.
            needed: The number of concepts that each call must predict, int [calls]. Each call uses the prepared program
                for the smallest sufficient number of concepts, so that no other program is compiled.
            n: The total number of concepts. The program that predicts all concepts may be used without `prepare`.

        Yields:
            The number of calls completed so far, the number of calls in this chunk, the carry, and the chunk's records,
            including their padding.
        """
        calls, done, called = len(table.call), 0, set()
        prepared = np.array(sorted({n, *self._prepared.get(situation, ())}))
        concepts = prepared[np.searchsorted(prepared, needed)]
        while done < calls:
            active = int(concepts[done])
            name = situation, active
            is_measured = name in self._seconds_per_call
            live = int(_SECONDS / self._seconds_per_call[name]) if is_measured else 1
            live = min(max(live, 1), CHUNK, int(np.argmin(np.append(concepts[done:] == active, False))))
            live = min(live, -done % every + 1) if every else live
            start = time.perf_counter()
            carry, records = program(carry, chunk(table, done, live), active)
            _wait(carry)
            # The first run of a program may include its compilation, so its duration is not used.
            if is_measured or name in called:
                self._seconds_per_call[name] = (time.perf_counter() - start) / live
            called.add(name)
            done += live
            yield done, live, carry, records


def chunk(table: Row, start: int, live: int) -> Row:
    """Returns `live` table lines, starting at `start`, padded to a chunk's length with lines that are not live."""
    index = np.minimum(start + np.arange(CHUNK), start + live - 1)
    return jax.tree.map(lambda column: column[index], table)._replace(live=np.arange(CHUNK) < live)


def _wait(arrays: Any) -> None:
    """Waits for the devices, even after Ctrl-C, because exiting during a computation would crash the process."""
    try:
        jax.block_until_ready(arrays)
    except KeyboardInterrupt:
        jax.block_until_ready(arrays)
        raise
