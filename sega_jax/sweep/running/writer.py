"""Writes the pictures of a batch as soon as they are made, and records them."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from PIL import Image

from sega_jax.pipelines import png
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.sweep.planning.plan import Plan
from sega_jax.sweep.running import metadata, records, stages
from sega_jax.sweep.running.folder import PICTURES, Folder, part, unfinished_part

# The minimum time between two versions of the records of an unfinished batch, in seconds.
_SECONDS = 1.0


class BatchWriter:
    """Writes the pictures and the records of one batch.

    Args:
        plan: the stage's plan.
        folder: the stage's folder.
        pipe: the pipeline that makes the pictures.
        number: the index of the batch.
        kept: {name: record} of the pictures that are in the folder and are not made again.
        pool: the threads that encode and write pictures.
        on_recorded: a function that is called with the number of pictures that have just been recorded.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Folder,
        pipe: Pipeline,
        number: int,
        kept: Mapping[str, dict[str, Any]],
        pool: ThreadPoolExecutor,
        on_recorded: Callable[[int], Any],
    ):
        self._plan, self._folder, self._pipe, self._number = plan, folder, pipe, number
        self._batch, self._pool, self._on_recorded = plan.batches[number], pool, on_recorded
        self._rows, self._new = dict(kept), dict[int, Future]()
        self._began, self._recorded_at = time.perf_counter(), time.monotonic()
        self._recorded, self._lock = len(kept), threading.Lock()

    def needs(self, i: int) -> bool:
        """Returns whether picture i of the batch is neither in the folder nor being written."""
        return i not in self._new and self._batch.names[i] not in self._rows

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
        for future in list(self._new.values()):
            if future.done():
                future.result()
        if self.needs(i):
            self._new[i] = self._pool.submit(self._write, i, image, finite, flagged, rows)

    def finish(self) -> None:
        """Waits until all pictures are written, and records the batch as finished.

        Raises:
            OSError: a picture or the records could not be written.
        """
        for future in self._new.values():
            future.result()
        self._record(part(self._number))
        self._folder.store.remove(unfinished_part(self._number))

    def stop(self) -> None:
        """Records the pictures that are made so far, after an error or an interruption."""
        wait(self._new.values())
        with contextlib.suppress(OSError):  # if the folder cannot be written to, the original error says so
            if len(self._rows) > self._recorded:
                self._record(unfinished_part(self._number))

    def _write(self, i: int, image: np.ndarray, finite: bool, flagged: bool | None, rows: int) -> None:
        name, point, data = self._batch.names[i], self._batch.points[i], None
        if self._plan.format == "npy":
            data = stages.encoded(image if finite else np.full_like(image, np.nan))
        elif finite and not flagged:
            settings = metadata.picture_metadata(self._plan, point, self._pipe)
            data = png.encoded(Image.fromarray(image), self._plan.format, settings)
        file = None if data is None else f"{PICTURES}/{name}.{self._plan.format}"
        # A process that was killed may have written the picture without recording it.
        if data is not None and file is not None and self._folder.store.read(file) != data:
            self._folder.store.write(file, data)
        row = {
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
        row = metadata.record(self._plan, point, self._pipe) | row
        with self._lock:
            self._rows[name] = row
            if time.monotonic() - self._recorded_at >= _SECONDS:
                self._record(unfinished_part(self._number))

    def _record(self, file: str) -> None:
        """Writes the records of all pictures so far."""
        new = [self._batch.names[i] for i in self._new if self._batch.names[i] in self._rows]
        seconds = (time.perf_counter() - self._began) / max(len(new), 1)
        for name in new:
            self._rows[name]["seconds"] = seconds
        table = [self._rows[name] for name in self._batch.names if name in self._rows]
        self._folder.store.write(file, records.part(table, self._plan.sweep, self._plan.facts))
        self._on_recorded(len(table) - self._recorded)
        self._recorded, self._recorded_at = len(table), time.monotonic()
