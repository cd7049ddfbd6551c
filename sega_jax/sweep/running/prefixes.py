"""Runs batches whose pictures share prefixes. `sega_jax.sweep.planning.sharing` defines the prefixes."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.method.guidance import Predictions
from sega_jax.method.sample import Carry
from sega_jax.pipelines import run
from sega_jax.pipelines.batch import Batch
from sega_jax.pipelines.execution.chunks import chunk
from sega_jax.pipelines.execution.memory import enough_memory
from sega_jax.pipelines.output import Output
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.texts import branch_texts
from sega_jax.sweep.planning.sharing import Fork, Schedule
from sega_jax.systems import programs
from sega_jax.systems.base import Static

# A function that takes a picture's index in the batch, the picture [height, width, 3], whether the picture is finite,
# and whether the safety checker flagged it (None without a checker). The function may be called from a different
# thread.
OnPicture = Callable[[int, np.ndarray, bool, bool | None], Any]


class Trunk(NamedTuple):
    """The common prefixes of a batch's pictures, one per row, on the host."""

    row_of: dict[int, int]  # each picture's row
    states: dict[int, tuple[np.ndarray, Any]]  # {departure: (x [rows, ...], solver's state with rows first)}
    past: Predictions  # the predictions of all calls, [rows, depth, ...]
    concepts: list[list[str]]  # each row's concepts, in the order of `past.edits`


class SharedRun:
    """Runs the batches of a plan with one pipeline.

    While the devices compute one fork, one thread prepares the next fork, and another thread fetches the pictures of
    the previous fork.

    Args:
        pipe: the pipeline.
        depth: the number of calls of the plan's longest trunk, which determines the shapes of compiled programs.

    Attributes:
        evaluations: the number of evaluations so far.
    """

    def __init__(self, pipe: Pipeline, depth: int):
        self.pipe, self.depth, self.evaluations = pipe, depth, 0
        self._prepared: dict[Hashable, set[int]] = {}
        self._chunks = pipe.chunks  # the chunks that `_prepared` refers to

    def make(self, batch: Batch, schedule: Schedule | None, concepts: Iterable[int], on_picture: OnPicture) -> Output:
        """Makes the pictures of a batch, as uint8, or as floats in [0, 1] if the batch's output is "float".

        Args:
            batch: the prepared batch.
            schedule: the schedule of a batch with shared prefixes; None for a batch without them.
            concepts: the distinct numbers of concepts that the forks of the plan predict, so that all programs are
                compiled at once.
            on_picture: a function that is called with each picture as soon as it is fetched.
        """
        # The devices may also run out of memory while the host waits for them.
        with enough_memory((batch.rows, *batch.shape)):
            if schedule is not None:
                return _Shared(self, batch, schedule, frozenset(concepts), on_picture).make()
            begun = run.begin(self.pipe, batch, branch_texts(self.pipe, batch, batch.n))
            run.check_memory(self.pipe, begun)
            out = run.finish(self.pipe, batch, self.last(begun, batch.rows), [None])
            _report_pictures(range(batch.rows), out, on_picture)
            return out

    def last(self, begun: run.Begun, rows: int) -> Any:
        """Returns the states at the end of a batch's schedule."""
        last = begun.carry
        for _, carry, _ in self.advance(begun, rows):
            last = carry
        return last.x

    def advance(self, begun: run.Begun, rows: int) -> Iterable[tuple[int, Carry, Any]]:
        """Advances a batch through its table as `run.advance_in_chunks` does, and counts evaluations."""

        def program(carry, table, concepts):
            self.evaluations += rows * (2 + concepts) * int(np.sum(table.live))
            return run.advance(self.pipe, begun, carry, table, concepts)

        batch = begun.batch
        chunks = self.pipe.chunks.run(program, begun.carry, batch.table, begun.situation, 0, begun.needed, batch.n)
        for done, live, carry, record in chunks:
            # A trunk's semantic guidance is zero, so it is not fetched.
            predictions = None if record is None else record._replace(sem_guidance=None)
            yield done, carry, run.fetch_record(self.pipe, predictions, live)

    def prepare(self, begun: run.Begun, concepts: Iterable[int]) -> None:
        """Compiles the programs for the given numbers of concepts, so that later batches compile nothing."""
        if self.pipe.chunks is not self._chunks:
            # The networks have changed, for example because of a different LoRA, so their programs are not compiled
            # yet.
            self._chunks, self._prepared = self.pipe.chunks, {}
        known = self._prepared.setdefault(begun.situation, set())
        for count in sorted(set(concepts) - known):
            run.advance(self.pipe, begun, begun.carry, chunk(begun.batch.table, 0, 0), count)
            self.pipe.chunks.prepare(begun.situation, count)
            known.add(count)


class _Shared:
    """Makes one batch with shared prefixes."""

    def __init__(
        self, shared: SharedRun, batch: Batch, schedule: Schedule, concepts: frozenset[int], on_picture: OnPicture
    ):
        self.shared, self.pipe, self.batch, self.schedule = shared, shared.pipe, batch, schedule
        self.concepts, self.on_picture = concepts, on_picture

    def make(self) -> Output:
        """Makes the pictures: first it computes all trunks, then one fork after another."""
        forks, trunk, batch = self.schedule.forks, self._trunk(), self.batch
        factor = self.pipe.system.sampler.sizes(self.pipe.models).factor
        height, width = (factor * side for side in batch.shape[:2])
        dtype = np.uint8 if batch.output == "uint8" else np.float32
        # Pictures whose forks are not in the schedule stay black and count as finite, so that no warning names them.
        images, finite = np.zeros((batch.rows, height, width, 3), dtype), np.ones(batch.rows, bool)
        flagged = None if self.pipe.safety is None else np.zeros(batch.rows, bool)
        out = Output(images, finite, batch.seeds, None, flagged)
        with ThreadPoolExecutor(1, "begins") as begins, ThreadPoolExecutor(1, "fetches") as fetches:
            begun, fetched = _submit(begins, self._begin, forks[0], trunk), None
            for fork, after in zip(forks, [*forks[1:], None], strict=True):
                here = begun.result()
                if after is not None:
                    begun = _submit(begins, self._begin, after, trunk)
                decoded = run.decode(self.pipe, here.batch, self._finish(here, fork))
                # Waiting here raises errors early, and prevents pictures from piling up on the devices.
                if fetched is not None:
                    fetched.result()
                fetched = _submit(fetches, self._place, fork, decoded, out)
            assert fetched is not None
            fetched.result()
        run.warn_of_pictures(out.finite, out.flagged)
        return out

    def _place(self, fork: Fork, decoded: run.Decoded, out: Output) -> None:
        """Fetches a fork's pictures into the arrays of the output."""
        members = list(fork.members)
        # Padding rows are also fetched, because the safety checker is compiled for all rows.
        parts = run.fetch(self.pipe, decoded, self.schedule.rows)
        arrays: tuple[Any, ...] = (out.images, out.finite, out.flagged)
        for into, part in zip(arrays, parts, strict=True):
            if part is not None:
                into[members] = part[: len(members)]
        _report_pictures(members, out, self.on_picture)

    def _trunk(self) -> Trunk:
        """Computes the trunks of all pictures as rows of one batch."""
        schedule, n, wide = self.schedule, self.batch.n, self.pipe.wide
        first = [members[0] for members in schedule.trunks]
        first += first[-1:] * (schedule.rows - len(first))
        batch = self.batch.select(first)
        edits = [tuple(sorted(row, key=lambda edit: edit.concept)) for row in batch.edits]
        stacked = batch.settings.edits
        assert stacked is not None
        # With scale 0, concepts are predicted but add nothing.
        idle = stacked._replace(scale=np.zeros_like(stacked.scale))
        batch = dataclasses.replace(
            batch,
            edits=edits,
            settings=batch.settings._replace(edits=idle),
            static=batch.static._replace(record=True),
        )
        begun = run.begin(self.pipe, batch, branch_texts(self.pipe, batch, n))
        shape = (len(first), self.shared.depth, *batch.shape)
        # Each call's predictions are written into these arrays on the host.
        uncond: Any = np.zeros(shape, wide)
        cond: Any = np.zeros(shape, wide)
        concepts: Any = np.zeros((*shape[:2], n, *batch.shape), wide)
        past = Predictions(uncond, cond, concepts)
        states: dict[int, tuple[np.ndarray, Any]] = {}
        done = 0
        for departure in schedule.departures:
            part = dataclasses.replace(batch, table=_calls(batch.table, done, departure))
            begun = begun._replace(batch=part, needed=np.full(departure - done, n))
            before = done
            for called, carry, record in self.shared.advance(begun, len(first)):
                begun = begun._replace(carry=carry)
                predicted = (record.uncond, record.cond, record.edits)
                for array, new in zip((uncond, cond, concepts), predicted, strict=True):
                    array[:, done : before + called] = new[: len(first)]
                done = before + called
            x = self.pipe.devices.gather(begun.carry.x, len(first))
            states[departure] = x, self._solver_rows(begun.carry, x, batch.static)
        row_of = {i: row for row, members in enumerate(schedule.trunks) for i in members}
        return Trunk(row_of, states, past, [[edit.concept for edit in row] for row in edits])

    def _solver_rows(self, carry: Carry, x: np.ndarray, static: Static) -> Any:
        """Returns the solver's state on the host, with rows as the first axis of every array."""
        devices = int(len(self.pipe.devices) > 1)

        def one(leaf, axis):
            leaf = np.moveaxis(np.asarray(leaf), devices + axis, devices)
            return (np.concatenate(leaf) if devices else leaf)[: len(x)]

        solver = self.pipe.system.sampler.solver(None, self.batch.settings, static.own)
        return jax.tree.map(one, carry.solver, programs.row_axes(solver, x))

    def _begin(self, fork: Fork, trunk: Trunk) -> run.Begun:
        """Prepares the rows of a fork from the states at which they leave their trunks."""
        members = [*fork.members, *fork.members[-1:] * (self.schedule.rows - len(fork.members))]
        rows = self.batch.select(members)
        at = np.array([trunk.row_of[i] for i in members])
        order = [
            [trunk.concepts[row].index(edit.concept) for edit in edits]
            for row, edits in zip(at, rows.edits, strict=True)
        ]
        past = Predictions(trunk.past.uncond[at], trunk.past.cond[at], _ordered(trunk.past.edits, at, order))
        x, solver = jax.tree.map(lambda leaf: leaf[at], trunk.states[fork.start])
        start = partial(_forked, x=x, solver=solver, calls=fork.start, past=past)
        return run.begin(self.pipe, rows, branch_texts(self.pipe, rows, self.batch.n), start)

    def _finish(self, begun: run.Begun, fork: Fork) -> Any:
        """Computes the remaining calls of a fork, and returns its final states."""
        self.shared.prepare(begun, {*self.concepts, *fork.concepts})
        rest = _calls(begun.batch.table, fork.start, None)
        part = dataclasses.replace(begun.batch, table=rest)
        return self.shared.last(begun._replace(batch=part, needed=begun.needed[fork.start :]), self.schedule.rows)


def _forked(
    pipe: Pipeline, batch: Batch, settings: Any, *, x: np.ndarray, solver: Any, calls: int, past: Predictions
) -> Carry:
    """Returns the carry of rows that leave a trunk. `sega_jax.systems.programs.fork` computes it."""
    fork = pipe.devices.map(programs.fork, (0, 0, 0, None, 0), sampler=pipe.system.sampler, static=batch.static)
    with enough_memory(x.shape):
        x, solver, past = pipe.devices.split((x, solver, past))
        # Wait, so that the process does not end while the devices are working.
        return jax.block_until_ready(fork(settings, x, solver, calls, past))


def _report_pictures(numbers: Iterable[int], out: Output, on_picture: OnPicture) -> None:
    assert isinstance(out.images, np.ndarray)
    for i in numbers:
        on_picture(i, out.images[i], bool(out.finite[i]), None if out.flagged is None else bool(out.flagged[i]))


# {option: context manager that sets it for one thread} for JAX's thread-local settings.
_SETTINGS = {
    "jax_enable_x64": jax.enable_x64,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_numpy_rank_promotion": jax.numpy_rank_promotion,
    "jax_debug_nans": jax.debug_nans,
    "jax_debug_infs": jax.debug_infs,
}


def _submit(pool: ThreadPoolExecutor, function: Callable, *args: Any) -> Future:
    """Runs a function in a thread with the caller's JAX settings and context variables, so that the caller's `with`
    blocks also apply in the thread and the thread's warnings reach the caller."""
    settings = {name: getattr(jax.config, name) for name in _SETTINGS}

    def call():
        with ExitStack() as stack:
            for name, value in settings.items():
                stack.enter_context(_SETTINGS[name](value))
            return function(*args)

    return pool.submit(copy_context().run, call)


def _calls(table: Any, first: int, last: int | None) -> Any:
    return jax.tree.map(lambda column: column[first:last], table)


def _ordered(edits: Any, at: np.ndarray, order: Sequence[Sequence[int]]) -> Any:
    """Selects rows of predictions [rows, calls, n, ...], and reorders each row's concepts."""
    return np.stack([edits[row][:, index] for row, index in zip(at, order, strict=True)])
