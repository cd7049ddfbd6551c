"""Running a plan: batch after batch through a pipeline, the pictures of one written while the next is made."""

import datetime
import hashlib
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

import sega_jax
from sega_jax import loading, pictures
from sega_jax.output import Output
from sega_jax.pipeline import Pipeline
from sega_jax.progress import bar
from sega_jax.sweep import records, sharing
from sega_jax.sweep.folder import Folder
from sega_jax.sweep.plan import Batch, Plan, Program
from sega_jax.sweep.points import Point, name
from sega_jax.sweep.shared import SharedPipeline
from sega_jax.sweep.sharing import Schedule


class Status(NamedTuple):
    """How far a sweep is."""

    pictures: int
    done: int
    batches: int
    batches_done: int


def status(folder: str | Path) -> Status:
    """How far the sweep in a folder is.

    Raises:
        ValueError: the folder has no sweep.
    """
    where = Folder(folder)
    plan = where.plan()
    return _status(plan, where.missing(plan))


def keep(plan: Plan, folder: str | Path) -> None:
    """Keeps the plan in a folder, which is then that of the sweep.

    Raises:
        OSError, ValueError: as of `run`.
    """
    Folder(folder).begin(plan)


def run(plan: Plan, folder: str | Path, pipe: Pipeline | None = None, *, progress: bool | None = None) -> Status:
    """Makes what is missing of a plan in a folder, which `sega_jax.sweep.folder` describes.

    Interrupted at any moment, and run again, it ends in the same pictures, to the bit. A batch that the devices' memory
    does not hold is made in halves, as are then all of its program; the records say so.

    Args:
        pipe: to run with, the plan's model, loaded; None loads it.
        progress: whether to show a bar; None is in terminals and notebooks.

    Raises:
        ImportError: pyarrow is not installed.
        OSError: the folder cannot be written to.
        ValueError: the folder has another plan, or the plan is another version's.
        MemoryError: the memory does not hold a single picture.
    """
    records.arrow()
    where = Folder(folder)
    where.begin(plan)
    missing = where.missing(plan)
    if missing:
        if pipe is None:
            model = dict(plan.facts.model)
            pipe = loading.load(model.pop("source", loading.DEMO), **model)
        # A scheduler of its own.
        _Run(plan, where, SharedPipeline(**pipe.components)).all(missing, progress)
    return _status(plan, where.missing(plan))


def _status(plan: Plan, missing: list[int]) -> Status:
    pictures = [len(batch.points) for batch in plan.batches]
    left = sum(pictures[i] for i in missing)
    return Status(sum(pictures), sum(pictures) - left, len(pictures), len(pictures) - len(missing))


class _Run:
    def __init__(self, plan: Plan, folder: Folder, pipe: SharedPipeline):
        self.plan, self.folder, self.pipe = plan, folder, pipe
        self.fits: dict[Program, int] = {}  # rows, where the memory holds fewer than planned
        self._concepts = cache(plan.concepts)

    def all(self, missing: list[int], progress: bool | None) -> None:
        how_far = _status(self.plan, missing)
        # One batch is written while the next is made; leaving waits for it, also on Ctrl-C.
        with (
            bar(how_far.pictures, "picture", progress, initial=how_far.done) as shown,
            ThreadPoolExecutor(1, "pictures") as writer,
            warnings.catch_warnings(),
        ):
            # Planning has said so.
            warnings.filterwarnings("ignore", "the edit .* begins at warmup")
            writing: Future | None = None
            for i in missing:
                batch = self.plan.batches[i]
                points = self._points(batch)
                began = time.perf_counter()
                outputs, rows = self._made(batch, points)
                seconds = (time.perf_counter() - began) / len(points)
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._write, i, points, outputs, rows, seconds)
                shown.update(len(points))
            if writing is not None:
                writing.result()

    def _points(self, batch: Batch) -> list[Point]:
        points = [self.plan.point(i) for i in batch.points]
        if tuple(name(point, self.plan.facts) for point in points) != batch.names:
            raise ValueError("the plan is of another version of sega_jax, which named pictures otherwise; begin anew")
        return points

    def _made(self, batch: Batch, points: list[Point]) -> tuple[list[Output], int]:
        """What was made of the points, so many rows at a time."""
        rows = self.fits.get(batch.program, batch.program.rows)
        try:
            if batch.shares:
                # One, unless the memory holds fewer rows than planned.
                parts = [[points[i] for i in part] for part in sharing.parts(points, rows)]
                plans = [sharing.schedule(part, batch.calls, rows) for part in parts]
                return [self._call(batch, *one) for one in zip(parts, plans, strict=True)], rows
            parts = [points[i : i + rows] for i in range(0, len(points), rows)]
            return [self._call(batch, part + part[-1:] * (rows - len(part))) for part in parts], rows
        except MemoryError:
            if rows == 1:
                raise
            warnings.warn(f"the memory does not hold {rows} rows of {batch.program}; going on with half", stacklevel=4)
            self.fits[batch.program] = rows // 2
            return self._made(batch, points)

    def _call(self, batch: Batch, points: list[Point], schedule: Schedule | None = None) -> Output:
        self.pipe.schedule, self.pipe.depth = schedule, self.plan.depth
        self.pipe.concepts = self._concepts(batch.program)
        self.pipe.scheduler = self.plan.facts.scheduler_of(batch.scheduler)
        shared = {key: getattr(points[0], key) for key in ("height", "width", "semantics", "support")}
        return self.pipe(
            [point.prompt for point in points],
            [list(point.edits.values()) for point in points],
            negative_prompt=[point.negative_prompt for point in points],
            seed=[point.seed for point in points],
            guidance_scale=[point.guidance_scale for point in points],
            eta=[point.eta for point in points],
            steps=batch.steps,
            **shared,
            output="uint8",
            progress=False,
        )

    def _write(self, number: int, points: list[Point], outputs: list[Output], rows: int, seconds: float) -> None:
        batch, table = self.plan.batches[number], []
        images = np.concatenate([out.images for out in outputs])
        finite = np.concatenate([out.finite for out in outputs])
        flagged = None if outputs[0].flagged is None else np.concatenate([out.flagged for out in outputs])
        common = self._common() | {"batch": number, "rows": rows, "calls": batch.calls, "seconds": seconds}
        scheduler = self.plan.facts.scheduler_of(batch.scheduler).name
        for k, point in enumerate(points):
            known = records.settings(point, scheduler) | common
            shown = bool(finite[k]) and not (flagged is not None and flagged[k])
            file = f"pictures/{batch.names[k]}.{self.plan.sweep.format}" if shown else None
            if file is not None:
                data = pictures.encoded(
                    Image.fromarray(images[k]), self.plan.sweep.format, self._said(point, scheduler)
                )
                self.folder.write(self.folder.path / file, data)
            own = {"name": batch.names[k], "file": file, "point": batch.points[k], "finite": bool(finite[k])}
            own |= {"flagged": None if flagged is None else bool(flagged[k])}
            table.append(known | own | {"digest": hashlib.sha256(images[k].tobytes()).hexdigest()})
        self.folder.write(self.folder.part(number), records.part(table, self.plan.sweep))

    def _common(self) -> dict[str, Any]:
        model = self.plan.facts.model
        return {
            "made": datetime.datetime.now(datetime.UTC),
            "device": self.pipe.devices.devices[0].device_kind,
            "devices": len(self.pipe.devices),
            "model": model.get("source"),
            "revision": model.get("revision"),
            "dtype": self.pipe.dtype.name,
            "sega_jax": sega_jax.__version__,
            "jax": jax.__version__,
        }

    def _said(self, point: Point, solver: str) -> dict[str, Any]:
        """What `sega-jax info` reads in a picture."""
        model = self.plan.facts.model
        said = {"picture": "edited" if point.edits else "original", "model": model.get("source")}
        said |= {"revision": model.get("revision")} | point._asdict()
        said |= {"edits": [vars(edit) for edit in point.edits.values()], "dtype": self.pipe.dtype.name}
        said |= {"variant": model.get("variant"), "solver": solver}
        said |= {"safety_checker": model.get("safety_checker", True)}
        return said | {key: self._common()[key] for key in ("device", "sega_jax", "jax")}
