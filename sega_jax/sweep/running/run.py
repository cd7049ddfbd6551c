"""Runs a plan batch by batch. The last pictures of a batch are written while the next batch is made."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

from sega_jax.method.checks import check_int
from sega_jax.method.naming import assignment
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.pipelines.adapters import with_adapters
from sega_jax.pipelines.messages import collected, ignored, warn
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.progress import bar
from sega_jax.pipelines.run import PictureWarning
from sega_jax.sweep.description.facts import pictures_of
from sega_jax.sweep.description.fields import adapter_kinds
from sega_jax.sweep.description.points import Point, name
from sega_jax.sweep.planning import sharing
from sega_jax.sweep.planning.outline import check, check_files
from sega_jax.sweep.planning.plan import Batch, Plan, Program
from sega_jax.sweep.planning.sharing import Schedule
from sega_jax.sweep.running import records, stages
from sega_jax.sweep.running.damage import intact, remove_damaged
from sega_jax.sweep.running.folder import PICTURES, RECORDS, Folder, part
from sega_jax.sweep.running.leases import PATIENCE, Leases
from sega_jax.sweep.running.not_shown import NotShown
from sega_jax.sweep.running.prefixes import SharedRun
from sega_jax.sweep.running.status import Status, of_plan
from sega_jax.sweep.running.writer import BatchWriter

_MAX_WORKERS = 2**20


def kept(folder: str | Path) -> Plan | None:
    """Reads the plan in a folder. Returns None if there is no plan.

    Args:
        folder: the folder's path, or an address that fsspec supports.

    Raises:
        ValueError: the plan cannot be read.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.kept("no-folder") is None
        True
    """
    where = Folder(folder)
    return where.plan() if where.store.has("plan.json") else None


def keep(plan: Plan, folder: str | Path) -> None:
    """Writes a plan into a folder, without running it.

    Args:
        plan: the plan.
        folder: the folder's path, or an address that fsspec supports. Missing folders are created.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: the folder contains a different plan.

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
    checked: bool = False,
    on_recorded: Callable[[int], Any] | None = None,
) -> Status:
    """Makes a plan's missing pictures in a folder. `sega_jax.sweep.running.folder` describes the files in the folder.

    A run may be interrupted at any moment. Running the plan again makes the remaining pictures, and all pictures are
    the same bit for bit as without the interruption. Missing files, and damaged files in this worker's share, are made
    again with a warning. If a batch does not fit into the devices' memory, this batch and all later batches of the same
    program are made with half as many rows. The records show the number of rows.

    Several workers may share a folder and communicate only through it. They are separate processes on POSIX systems,
    such as Linux. Each worker makes its share of the batches, then the unfinished shares of workers that ended early,
    and returns when all pictures are made.

    Args:
        plan: the plan.
        folder: the folder's path, or an address that fsspec supports, such as gs://bucket/sweep.
        pipe: the plan's loaded model; None loads it. It must be None for cascades, which load one stage after another.
        worker: this worker's number, counted from 1, and the number of workers: (2, 16) is the second of sixteen. With
            None, both come from JAX (`jax.distributed`), which means one worker unless JAX was initialised for several
            processes.
        patience: how long, in seconds, a worker may go without renewing its lease before it is considered dead. All
            workers must use the same value.
        progress: whether to show a progress bar; None shows it in terminals and notebooks.
        checked: whether `check` has already checked the plan. If not, `run` checks it.
        on_recorded: a function that is called with the number of pictures that this worker has just made and recorded;
            for a cascade, only those of the last stage. It may be called from another thread.

    Returns:
        The progress of the plan; for a cascade, of its last stage.

    Raises:
        ImportError: pyarrow is not installed.
        OSError: the folder cannot be written to.
        FileNotFoundError, CheckpointError: the model or a file that a setting names is missing or broken.
        TypeError, ValueError: there is no such worker, the checkpoint refuses a call, the folder contains a different
            plan, or a different version of sega_jax made the plan.
        MemoryError: a single row does not fit into the devices' memory.

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
        raise TypeError(
            "a cascade loads its stages one after another and cannot use a loaded pipe; remove the argument `pipe`"
        )
    where, loader = Folder(folder), stages.Loader(pipe)
    unfinished = _unfinished(plan, where, number, workers, progress)
    if unfinished:
        check_files(plan)
        if not checked:
            check(plan)
        if workers == 1:  # then a model that cannot be loaded leaves no files
            loader.load_in_advance(unfinished[0].facts)
    where.begin(plan)
    for stage in unfinished:
        stage_folder = where.of(stage, plan)
        if stage is not plan:
            stage_folder.begin(stage)
        earlier = None if stage.earlier is None else where.of(stage.earlier, plan)
        with Leases(stage_folder.store, number, workers, patience) as leases:
            begin = partial(_Run, earlier=earlier, on_recorded=on_recorded if stage is plan else None)
            _run_stage(stage, stage_folder, leases, workers, begin, loader, progress)
    return of_plan(plan, where)


def _unfinished(plan: Plan, where: Folder, worker: int, workers: int, progress: bool | None) -> list[Plan]:
    """Returns the plans of the stages that still have to run. Stages before a finished stage are no longer needed.

    Damaged files in this worker's share are removed, so that they are made again.
    """
    plans: list[Plan] = []
    for stage in reversed(plan.chain):
        folder = where.of(stage, plan)
        if folder.contains(stage):
            remove_damaged(folder, stage, stage.shares(workers)[worker], progress)
        if not folder.missing(stage):
            break
        plans.insert(0, stage)
    return plans


def _run_stage(
    plan: Plan,
    where: Folder,
    leases: Leases,
    workers: int,
    begin: Callable[[Plan, Folder, Pipeline], "_Run"],
    loader: stages.Loader,
    progress: bool | None,
) -> None:
    """Makes this worker's share of one stage, then unfinished shares of other workers, until the stage is done."""
    shares = plan.shares(workers)

    def unfinished() -> set[int]:
        missing = set(where.missing(plan))
        return {share for share, batches in enumerate(shares) if not missing.isdisjoint(batches)}

    with ExitStack() as stack:
        running: _Run | None = None
        for share in leases.shares(unfinished):
            if running is None:
                running = begin(plan, where, stack.enter_context(loader.loaded(plan.facts)))
                stack.callback(running.not_shown.warn)
            running.run_batches(shares[share], leases.holds, progress)
    where.remove_superseded()


def _worker(worker: Any) -> tuple[int, int]:
    """Returns the worker's number, counted from 0, and the number of workers."""
    if worker is None:
        return jax.process_index(), jax.process_count()
    if not isinstance(worker, Sequence) or isinstance(worker, str) or len(worker) != 2:
        raise TypeError(
            f"{assignment('worker', worker)} should be the worker's number and the number of workers, such as (2, 16)"
        )
    workers = check_int("worker: the number of workers", worker[1], 1, _MAX_WORKERS)
    return check_int("worker: its number", worker[0], 1, workers) - 1, workers


class _Run:
    """Runs the batches of one stage's plan with its loaded pipeline."""

    def __init__(
        self,
        plan: Plan,
        folder: Folder,
        pipe: Pipeline,
        earlier: Folder | None = None,
        on_recorded: Callable[[int], Any] | None = None,
    ):
        self.plan, self.folder, self.pipe = plan, folder, pipe
        self._on_recorded = on_recorded or (lambda count: None)
        self.earlier = stages.EarlierPictures(earlier, plan.earlier, pictures_of(plan.facts.declaration))
        self.shared = SharedRun(pipe, plan.depth)
        self._plain = pipe.models, pipe.tokenizer
        self._adapters: tuple[tuple[tuple[str, Pairs], ...], ...] = (), ()
        # The reduced number of rows for programs whose planned rows did not fit into memory.
        self.rows_that_fit: dict[Program, int] = {}
        self._concepts = cache(plan.concepts)
        self.not_shown = NotShown(plan)

    def run_batches(self, batches: Sequence[int], holds: Callable[[], bool], progress: bool | None) -> None:
        """Makes the unfinished batches among `batches`, as long as this worker holds their lease."""
        pictures = {i: len(self.plan.batches[i].points) for i in batches}
        missing = [i for i in self.folder.missing(self.plan) if i in pictures]
        parts = self.folder.store.names(RECORDS)
        recorded = {i: len(self.folder.recorded(self.plan, i, parts).rows) for i in missing}
        done = sum(pictures.values()) - sum(pictures[i] - recorded[i] for i in missing)
        present = {f"{PICTURES}/{name}" for name in self.folder.store.names(PICTURES)}

        def on_recorded(count: int) -> None:
            progress_bar.update(count)
            self._on_recorded(count)

        # Pictures are written as soon as they are made, and one batch is finished while the next is made. Leaving this
        # block, even through Ctrl-C, waits for both.
        with (
            bar(sum(pictures.values()), "picture", progress, initial=done) as progress_bar,
            ThreadPoolExecutor(thread_name_prefix="pictures") as pool,
            ThreadPoolExecutor(1, "batches") as finisher,
        ):
            finishing: Future | None = None
            for i in missing:
                if not holds():
                    break
                # Another worker may have made pictures of the batch in the meantime.
                kept = intact(self.folder, self.plan, self.folder.recorded(self.plan, i)).rows
                progress_bar.update(len(kept) - recorded[i])
                if len(kept) == pictures[i] and self.folder.store.has(part(i)):
                    continue
                writer = BatchWriter(
                    self.plan,
                    self.folder,
                    self.pipe,
                    i,
                    kept=kept,
                    present=present,
                    pool=pool,
                    holds=holds,
                    on_recorded=on_recorded,
                )
                self._batch(self.plan.batches[i], writer)
                before, finishing = finishing, finisher.submit(writer.finish)
                if before is not None:
                    before.result()
            if finishing is not None:
                finishing.result()

    def _batch(self, batch: Batch, writer: BatchWriter) -> None:
        """Makes the pictures of a batch that `writer` needs, and starts writing them."""
        points = self._points(batch)
        self._adapt(batch)
        try:
            self._make(batch, points, writer)
            writer.made()
        except BaseException:
            writer.stop()
            raise

    def _adapt(self, batch: Batch) -> None:
        """Replaces the previous batch's adapters in the pipeline with this batch's adapters."""
        if (batch.adapters, batch.text_adapters) == self._adapters:
            return
        # Drop the previous batch's networks before merging new ones, to save memory.
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
                "a different version of sega_jax made this plan and named its pictures differently; start the sweep in"
                " a new folder"
            )
        return points

    def _make(self, batch: Batch, points: list[Point], writer: BatchWriter) -> None:
        """Makes the points of a batch. Halves the number of rows that are made at a time when memory runs out."""
        rows = self.rows_that_fit.get(batch.program, batch.program.rows)
        try:
            if batch.shares:
                # There is only one part, unless fewer rows than planned fit into memory.
                for indices in sharing.parts(points, rows):
                    members = [points[i] for i in indices]
                    self._call(batch, members, indices, rows, writer, sharing.schedule(members, batch.calls, rows))
            else:
                for first in range(0, len(points), rows):
                    members = points[first : first + rows]
                    numbers = range(first, first + len(members))
                    self._call(batch, members + members[-1:] * (rows - len(members)), numbers, rows, writer)
            return
        except MemoryError:
            if rows == 1:
                raise
        # Retry outside the exception handler, where the failed attempt's arrays have been freed.
        (height, width), concepts = batch.program.size, batch.program.concepts
        pictures = f"{rows} rows of {height}x{width} pixels with {concepts} concepts"
        warn(f"{pictures} do not fit into memory; continuing with {rows // 2}")
        self.rows_that_fit[batch.program] = rows // 2
        self._make(batch, points, writer)

    def _call(
        self,
        batch: Batch,
        points: list[Point],
        numbers: Sequence[int],
        rows: int,
        writer: BatchWriter,
        schedule: Schedule | None = None,
    ) -> None:
        """Makes the pictures of points with one call of the pipeline, unless `writer` needs none of them.

        Args:
            points: the points, padded with copies of the last point.
            numbers: the indices of the points in the batch, without padding.
            rows: the number of rows of the program.
        """
        if not any(map(writer.needs, numbers)):
            return
        if schedule is not None:
            needed = [one for one in schedule.forks if any(writer.needs(numbers[i]) for i in one.members)]
            schedule = schedule._replace(forks=tuple(needed))

        def on_picture(i, image, finite, flagged):
            if i < len(numbers):
                finite = finite and self.earlier.finite(points[i])
                self.not_shown.add(batch.names[numbers[i]], finite, flagged)
                writer.add(numbers[i], image, finite, flagged, rows)

        scheduler = self.plan.facts.scheduler_of(batch.scheduler)
        if scheduler is not None:
            self.pipe.scheduler = scheduler
        shared, calls = dict(points[0].shared), [point.call for point in points]
        own = {name: [call[name] for call in calls] for name in calls[0] if name not in shared}
        edits = [list(point.edits.values()) for point in points]
        # `NotShown` names the pictures of all batches, instead of the rows of each batch.
        with collected(), ignored(PictureWarning):
            own, output = self.earlier.given(own), "float" if self.plan.format == "npy" else "uint8"
            prepared = self.pipe.prepare(**own, **shared, edits=edits, output=output, progress=False)
            self.shared.make(prepared, schedule, self._concepts(batch.program), on_picture)
