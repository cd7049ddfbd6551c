"""Running a plan: batch after batch through a pipeline, the pictures of one written while the next is made."""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from sega_jax.method.checks import check_int
from sega_jax.pipelines import png
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.pipelines.adapters import with_adapters
from sega_jax.pipelines.messages import collected, warn
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.progress import bar
from sega_jax.sweep.description.facts import pictures_of
from sega_jax.sweep.description.fields import adapter_kinds
from sega_jax.sweep.description.points import Point, name
from sega_jax.sweep.planning import sharing
from sega_jax.sweep.planning.outline import check, check_files
from sega_jax.sweep.planning.plan import Batch, Plan, Program
from sega_jax.sweep.planning.sharing import Schedule
from sega_jax.sweep.running import metadata, records, stages
from sega_jax.sweep.running.folder import Folder, part
from sega_jax.sweep.running.leases import PATIENCE, Leases
from sega_jax.sweep.running.prefixes import SharedRun
from sega_jax.sweep.running.status import Status, of_plan


def kept(folder: str | Path) -> Plan | None:
    """The plan that is kept in a folder, if there is one.

    Raises:
        ValueError: it cannot be read.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.kept("no-folder") is None
        True
    """
    where = Folder(folder)
    return where.plan() if where.store.has("plan.json") else None


def keep(plan: Plan, folder: str | Path) -> None:
    """Keeps the plan in a folder, which is then that of the sweep.

    Raises:
        OSError, ValueError: as of `run`.

    Example:
        >>> from sega_jax import sweep
        >>> seeds = sweep.Sweep(call={"prompt": "a portrait"}, grid={"seed": [0, 1, 2]})
        >>> sweep.keep(sweep.plan(seeds, sweep.Facts.of(seeds)), "sega-jax-out/seeds")
        >>> sweep.status("sega-jax-out/seeds").done
        0
    """
    Folder(folder).begin(plan)


def run(
    plan: Plan,
    folder: str | Path,
    pipe: Pipeline | None = None,
    *,
    worker: tuple[int, int] | None = None,
    patience: float = PATIENCE,
    progress: bool | None = None,
) -> Status:
    """Makes what is missing of a plan in a folder, which `sega_jax.sweep.running.folder` describes.

    Interrupted at any moment, and run again, it ends in the same pictures, to the bit. A batch that the devices' memory
    does not hold is made in halves, as are then all of its program; the records say so.

    Several workers share a folder, processes that exchange nothing else. Each makes a share of the batches, then those
    of workers that ended before they were done, and returns when all pictures are there.

    Args:
        folder: its path, or an address that fsspec knows, such as gs://bucket/sweep.
        pipe: to run with, the plan's model, loaded; None loads it. A cascade loads its stages one after another.
        worker: (2, 16) is the second of sixteen; None is this process of JAX's, which is alone but where JAX was made
            to know of others.
        patience: the seconds without a sign of life after which a worker has ended; the same for all.
        progress: whether to show a bar; None is in terminals and notebooks.

    Raises:
        ImportError: pyarrow is not installed.
        OSError: the folder cannot be written to.
        TypeError, ValueError: no such worker, a call would be refused, the folder has another plan, or the plan is
            another version's.
        MemoryError: the memory does not hold a single picture.

    Example:
        >>> from sega_jax import sweep
        >>> ablation = sweep.Sweep(
        ...     call={"prompt": "a portrait of a woman", "steps": 2},
        ...     edits={"glasses": {"warmup": 0}},
        ...     grid={"glasses.scale": [0, 8]},
        ... )
        >>> plan = sweep.plan(ablation, sweep.Facts.of(ablation))
        >>> sweep.run(plan, "sega-jax-out/glasses", progress=False).done
        2
    """
    records.arrow()
    number, workers = _worker(worker)
    if pipe is not None and plan.earlier is not None:
        raise TypeError("pipe is given, but a cascade loads its stages one after another; leave it out")
    where, loader = Folder(folder), stages.Loader(pipe)
    unfinished = _unfinished(plan, where)
    if unfinished:
        check_files(plan)
        check(plan)
    where.begin(plan)
    for stage in unfinished:
        own = where.of(stage, plan)
        if stage is not plan:
            own.begin(stage)
        earlier = None if stage.earlier is None else where.of(stage.earlier, plan)
        with Leases(own.store, number, workers, patience) as leases:
            _run_stage(stage, own, leases, workers, partial(_Run, earlier=earlier), loader, progress)
    return of_plan(plan, where)


def _unfinished(plan: Plan, where: Folder) -> list[Plan]:
    """Returns the plans of the stages that are to run. Stages before one that is done are needed no more."""
    found: list[Plan] = []
    for stage in reversed(plan.chain):
        if not where.of(stage, plan).missing(stage):
            break
        found.insert(0, stage)
    return found


def _run_stage(
    plan: Plan,
    where: Folder,
    leases: Leases,
    workers: int,
    begin: Callable[[Plan, Folder, Pipeline], "_Run"],
    loader: stages.Loader,
    progress: bool | None,
) -> None:
    """Makes this worker's share of one plan, and then what others have left, until all of it is done."""
    shares = plan.shares(workers)

    def unfinished() -> set[int]:
        missing = set(where.missing(plan))
        return {share for share, batches in enumerate(shares) if not missing.isdisjoint(batches)}

    with ExitStack() as stack:
        running = None
        for share in leases.shares(unfinished):
            if running is None:
                running = begin(plan, where, stack.enter_context(loader.loaded(plan.facts)))
            running.all(shares[share], leases.holds, progress)


def _worker(worker: Any) -> tuple[int, int]:
    """Its number, from 0, and how many there are."""
    if worker is None:
        return jax.process_index(), jax.process_count()
    if not isinstance(worker, Sequence) or isinstance(worker, str) or len(worker) != 2:
        raise TypeError(f"worker={worker!r} should be its number and how many there are, as (2, 16)")
    workers = check_int("worker: how many", worker[1], 1)
    return check_int("worker: its number", worker[0], 1, workers) - 1, workers


class _Picture(NamedTuple):
    """As it is written and recorded."""

    data: bytes | None  # None of one that is not shown
    finite: bool
    flagged: bool | None
    digest: str


class _Made(NamedTuple):
    """A batch that is made, and whose pictures are being encoded."""

    points: list[Point]
    pictures: list[Future[_Picture]]
    rows: int  # made at once
    seconds: float  # a picture


# Told the number of a point of the batch, the picture [height, width, 3], and whether it is finite, and flagged.
_Tell = Callable[[int, np.ndarray, bool, bool | None], Any]


class _Run:
    def __init__(self, plan: Plan, folder: Folder, pipe: Pipeline, earlier: Folder | None = None):
        self.plan, self.folder, self.pipe = plan, folder, pipe
        self.earlier = stages.EarlierPictures(earlier, pictures_of(plan.facts.declaration))
        self.shared = SharedRun(pipe, plan.depth)
        self._plain = pipe.models, pipe.tokenizer
        self._adapters: tuple[tuple[tuple[str, Pairs], ...], ...] = (), ()
        self.fits: dict[Program, int] = {}  # rows, where the memory holds fewer than planned
        self._concepts = cache(plan.concepts)

    def all(self, batches: Sequence[int], mine: Callable[[], bool], progress: bool | None) -> None:
        """Makes what is missing of some batches, as long as they are this worker's."""
        pictures = {i: len(self.plan.batches[i].points) for i in batches}
        missing = [i for i in self.folder.missing(self.plan) if i in pictures]
        # Some of which are there without all of their pictures.
        recorded = {i for i in missing if self.folder.store.has(part(i))}

        def wanted(i):
            return i in recorded or not self.folder.store.has(part(i))

        done = sum(pictures.values()) - sum(pictures[i] for i in missing)
        # Pictures are encoded as soon as they are made, and one batch is written while the next is made; leaving waits
        # for it, also on Ctrl-C.
        with (
            bar(sum(pictures.values()), "picture", progress, initial=done) as shown,
            ThreadPoolExecutor(thread_name_prefix="pictures") as pool,
            ThreadPoolExecutor(1, "batches") as writer,
        ):
            writing: Future | None = None
            for i in missing:
                if not mine():
                    break
                before = shown.n
                if wanted(i):
                    made = self._batch(self.plan.batches[i], pool, shown.update)
                    if writing is not None:
                        writing.result()
                    # Another worker may have made it meanwhile, on a device that rounds otherwise.
                    if wanted(i):
                        writing = writer.submit(self._write, i, made, pool)
                shown.update(before + pictures[i] - shown.n)
            if writing is not None:
                writing.result()

    def _batch(self, batch: Batch, pool: ThreadPoolExecutor, shown: Callable[[int], Any]) -> _Made:
        points = self._points(batch)
        self._adapt(batch)
        pictures: dict[int, Future] = {}

        def tell(i, *picture):
            if i in pictures:
                # Of an attempt that the memory did not hold.
                pictures[i].cancel()
            else:
                shown(1)
            pictures[i] = pool.submit(self._encoded, batch.points[i], points[i], *picture)

        began = time.perf_counter()
        try:
            rows = self._make(batch, points, tell)
        except BaseException:
            # No record will name them, and leaving waits for all.
            for picture in pictures.values():
                picture.cancel()
            raise
        seconds = (time.perf_counter() - began) / len(points)
        return _Made(points, [pictures[i] for i in range(len(points))], rows, seconds)

    def _adapt(self, batch: Batch) -> None:
        """Adds a batch's LoRAs and new words to the pipeline, in place of those of the batch before."""
        if (batch.adapters, batch.text_adapters) == self._adapters:
            return
        # First the networks of the batch before are dropped.
        self.pipe.models, self.pipe.tokenizer = self._plain
        if batch.adapters:
            given = {name: adapter_kinds()[name].given(pairs) for name, pairs in batch.adapters}
            added = with_adapters(*self._plain, given.get("lora"), given.get("textual_inversion"))
            self.pipe.models, self.pipe.tokenizer = added
        if batch.text_adapters:
            models = stages.with_text_adapters(self.pipe.models, self.plan.facts, batch.text_adapters)
            self.pipe.models = models
        self._adapters = batch.adapters, batch.text_adapters

    def _points(self, batch: Batch) -> list[Point]:
        points = [self.plan.point(i) for i in batch.points]
        if tuple(name(point, self.plan.facts) for point in points) != batch.names:
            raise ValueError(
                "the plan is of another version of sega_jax, which named pictures otherwise; begin in another folder"
            )
        return points

    def _make(self, batch: Batch, points: list[Point], tell: _Tell) -> int:
        """Makes the points, so many rows at a time."""
        rows = self.fits.get(batch.program, batch.program.rows)
        try:
            if batch.shares:
                # One, unless the memory holds fewer rows than planned.
                for part in sharing.parts(points, rows):
                    some = [points[i] for i in part]
                    self._call(batch, some, part, tell, sharing.schedule(some, batch.calls, rows))
            else:
                for first in range(0, len(points), rows):
                    some = points[first : first + rows]
                    numbers = range(first, first + len(some))
                    self._call(batch, some + some[-1:] * (rows - len(some)), numbers, tell)
            return rows
        except MemoryError:
            if rows == 1:
                raise
        # Out here, where what was made until then is forgotten.
        warn(f"the memory does not hold {rows} rows of {batch.program}; going on with half")
        self.fits[batch.program] = rows // 2
        return self._make(batch, points, tell)

    def _call(
        self,
        batch: Batch,
        points: list[Point],
        numbers: Sequence[int],
        tell: _Tell,
        schedule: Schedule | None = None,
    ) -> None:
        """One call of the pipeline for points of these numbers in the batch, and for some that fill up."""

        def made(i, *picture):
            if i < len(numbers):
                tell(numbers[i], *picture)

        scheduler = self.plan.facts.scheduler_of(batch.scheduler)
        if scheduler is not None:
            self.pipe.scheduler = scheduler
        shared, calls = dict(points[0].shared), [point.call for point in points]
        own = {name: [call[name] for call in calls] for name in calls[0] if name not in shared}
        edits = [list(point.edits.values()) for point in points]
        with collected():
            own, output = self.earlier.given(own), "float" if self.plan.format == "npy" else "uint8"
            prepared = self.pipe.prepare(**own, **shared, edits=edits, output=output, progress=False)
            self.shared.make(prepared, schedule, self._concepts(batch.program), made)

    def _encoded(self, i: int, point: Point, image: np.ndarray, finite: bool, flagged: bool | None) -> _Picture:
        """Returns the picture of point i as it is written."""
        finite, data = finite and self.earlier.finite(point), None
        if self.plan.format == "npy":
            data = stages.encoded(image if finite else np.full_like(image, np.nan))
        elif finite and not flagged:
            data = png.encoded(Image.fromarray(image), self.plan.format, metadata.said(self.plan, i, self.pipe))
        return _Picture(data, finite, flagged, hashlib.sha256(image.tobytes()).hexdigest())

    def _write(self, number: int, made: _Made, pool: ThreadPoolExecutor) -> None:
        batch, table = self.plan.batches[number], []
        common = {"batch": number, "rows": made.rows, "calls": batch.calls, "seconds": made.seconds}

        def write(name: str, picture: Future[_Picture]) -> str | None:
            file, data = f"pictures/{name}.{self.plan.format}", picture.result().data
            if data is None:
                return None
            self.folder.store.write(file, data)
            return file

        # Before the record, which says that they are there.
        files = list(pool.map(write, batch.names, made.pictures))
        for k, future in enumerate(made.pictures):
            _, finite, flagged, digest = future.result()
            own = {"name": batch.names[k], "file": files[k], "point": batch.points[k]}
            own |= {"finite": finite, "flagged": flagged, "digest": digest}
            table.append(metadata.record(self.plan, batch.points[k], self.pipe) | common | own)
        self.folder.store.write(part(number), records.part(table, self.plan.sweep, self.plan.facts))
