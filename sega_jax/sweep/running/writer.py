"""Writes the pictures of a batch as soon as they are made, and records them."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Any

import numpy as np
from PIL import Image

from sega_jax.method.naming import name_of
from sega_jax.pipelines import png
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running import metadata, records, stages
from sega_jax.sweep.running.folder import Folder, part, picture, unfinished_part

# The time after which finished pictures are recorded although others of the same call are still being written.
_SECONDS = 1.0


class BatchWriter:
    """Writes the pictures and the records of one batch.

    `add` is called from the threads that make pictures. Other threads encode and write them. Pictures are recorded as
    soon as all pictures that were added so far are written, and at least once a second.

    Args:
        plan: the stage's plan.
        folder: the stage's folder.
        pipe: the pipeline that makes the pictures.
        number: the index of the batch.
        kept: {name: record} of the pictures that are in the folder and are not made again.
        present: the paths of the files of pictures that may already exist.
        pool: the threads that encode and write pictures.
        holds: a function that returns whether this worker still holds the lease of the batch. Without the lease,
            nothing is written.
        on_recorded: a function that is called with the number of pictures that have just been recorded.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Folder,
        pipe: Pipeline,
        number: int,
        *,
        kept: Mapping[str, dict[str, Any]],
        present: set[str],
        pool: ThreadPoolExecutor,
        holds: Callable[[], bool],
        on_recorded: Callable[[int], Any],
    ):
        self._plan, self._folder, self._pipe, self._number = plan, folder, pipe, number
        self._batch, self._pool, self._holds, self._on_recorded = plan.batches[number], pool, holds, on_recorded
        self._present, self._began = present, time.perf_counter()
        self._seconds: float | None = None
        self._recorded, self._recorded_at = len(kept), self._began
        # `_lock` protects the following attributes. `_recording` is held while records are written.
        self._lock, self._recording = threading.Lock(), threading.Lock()
        self._rows, self._new = dict(kept), set[str]()
        self._futures, self._pending = dict[int, Future](), 0

    def needs(self, i: int) -> bool:
        """Returns whether picture i of the batch is neither in the folder nor being written."""
        with self._lock:
            return i not in self._futures and self._batch.names[i] not in self._rows

    def add(self, i: int, image: np.ndarray, finite: bool, flagged: bool | None, rows: int) -> None:
        """Starts writing picture i of the batch, unless the folder has it.

        Args:
            i: the picture's index in the batch.
            image: the picture, [height, width, 3].
            finite: whether the picture is finite.
            flagged: whether the safety checker flagged it; None without a checker.
            rows: the number of rows of the program that made it.

        Raises:
            OSError: an earlier picture could not be written.
        """
        if not self.needs(i):
            return
        with self._lock:
            futures = list(self._futures.values())
            self._pending += 1
            # The thread's messages name the same options as the caller's.
            run = copy_context().run
            self._futures[i] = self._pool.submit(run, self._write, i, image, finite, flagged, rows)
        for future in futures:
            if future.done():
                future.result()

    def made(self) -> None:
        """Ends the measurement of the batch's time, because all its pictures have been made."""
        self._seconds = time.perf_counter() - self._began

    def finish(self) -> None:
        """Waits until all pictures are written, and records the batch as finished.

        Raises:
            OSError: a picture or the records could not be written.
        """
        try:
            for future in list(self._futures.values()):
                future.result()
        except BaseException:
            self.stop()
            raise
        if self._record(part(self._number)):
            self._folder.store.remove(unfinished_part(self._number))

    def stop(self) -> None:
        """Records the pictures that are made so far, after an error or an interruption."""
        wait(list(self._futures.values()))
        with contextlib.suppress(OSError):  # if the folder cannot be written to, the original error says so
            self._record(unfinished_part(self._number))

    def _write(self, i: int, image: np.ndarray, finite: bool, flagged: bool | None, rows: int) -> None:
        name = self._batch.names[i]
        try:
            row = self._written(i, image, finite, flagged, rows)
            with self._lock:
                self._rows[name] = row
                self._new.add(name)
        except MemoryError:
            # The devices' memory is not the reason, so fewer rows would not help.
            raise OSError(
                f"this machine has too little memory to write the picture {name}; use fewer {name_of('rows')}"
            ) from None
        finally:
            with self._lock:
                self._pending -= 1
        complete = len(self._rows) == len(self._batch.names)  # then `finish` records it at once
        if not complete and (not self._pending or time.perf_counter() - self._recorded_at >= _SECONDS):
            self._record(unfinished_part(self._number))

    def _written(self, i: int, image: np.ndarray, finite: bool, flagged: bool | None, rows: int) -> dict[str, Any]:
        """Encodes and writes a picture, and returns its record without the time."""
        name, point, data = self._batch.names[i], self._batch.points[i], None
        if self._plan.format == "npy":
            data = stages.encoded(image if finite else np.full_like(image, np.nan))
        elif finite and not flagged:
            settings = metadata.picture_metadata(self._plan, point, self._pipe)
            data = png.encoded(Image.fromarray(image), self._plan.format, settings)
        file = None
        if data is not None:
            file = picture(self._plan, name)
            # A process that was killed may have written the picture without recording it.
            if file not in self._present or self._folder.store.read(file) != data:
                self._folder.store.write(file, data)
        return metadata.record(self._plan, point, self._pipe) | {
            "name": name,
            "file": file,
            "point": point,
            "finite": finite,
            "flagged": flagged,
            "digest": hashlib.sha256(image.tobytes()).hexdigest(),
            "file_bytes": None if data is None else len(data),
            "file_digest": None if data is None else hashlib.sha256(data).hexdigest(),
            "batch": self._number,
            "rows": rows,
            "calls": self._batch.calls,
        }

    def _record(self, file: str) -> bool:
        """Writes the records of all pictures so far. Returns whether it wrote them."""
        with self._recording:
            seconds = time.perf_counter() - self._began if self._seconds is None else self._seconds
            with self._lock:
                new = {"seconds": seconds / max(len(self._new), 1)}
                rows = {name: row | new if name in self._new else row for name, row in self._rows.items()}
            finished = file == part(self._number)
            if not self._holds() or (not finished and len(rows) == self._recorded):
                return False
            if finished and not self._new and self._folder.store.has(file):
                return True
            table = [rows[name] for name in self._batch.names if name in rows]
            self._folder.store.write(file, records.part(table, self._plan.sweep, self._plan.facts))
            self._on_recorded(len(table) - self._recorded)
            self._recorded, self._recorded_at = len(table), time.perf_counter()
            return True
