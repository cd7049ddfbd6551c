"""Runs batches whose pictures share prefixes: what they have in common is computed once, as
`sega_jax.sweep.planning.sharing` says."""

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
from sega_jax.pipelines.execution.chunks import chunk, enough_memory
from sega_jax.pipelines.output import Output
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.texts import branch_texts
from sega_jax.sweep.planning.sharing import Branch, Schedule
from sega_jax.systems import programs
from sega_jax.systems.base import Static

# Is given a picture's number, the picture [height, width, 3], whether it is finite, and whether it is flagged, or None
# where nothing looked; possibly in another thread.
Made = Callable[[int, np.ndarray, bool, bool | None], Any]


class Trunk(NamedTuple):
    """What pictures have in common, on the host."""

    row_of: dict[int, int]  # of every picture
    states: dict[int, tuple[np.ndarray, Any]]  # [rows, ...] at each departure, and the solver's, the rows first
    past: Predictions  # all that was predicted, [rows, depth, ...], of these concepts
    concepts: list[list[str]]  # of each row


class SharedRun:
    """Runs the batches of a plan with one pipeline.

    While the devices make one branch, the next begins in one thread, and the pictures of the one before are fetched in
    another.

    Args:
        depth: the most calls that a trunk has, for which programs are compiled.

    Attributes:
        evaluations: rows that went through the network so far.
    """

    def __init__(self, pipe: Pipeline, depth: int):
        self.pipe, self.depth, self.evaluations = pipe, depth, 0
        self._prepared: dict[Hashable, set[int]] = {}
        self._chunks = pipe.chunks  # for which programs are prepared

    def make(self, batch: Batch, schedule: Schedule | None, concepts: Iterable[int], made: Made) -> Output:
        """Makes the pictures of a batch, as uint8, or as floats in [0, 1] where these are its output.

        Args:
            schedule: what they share; None for nothing.
            concepts: how many are predicted at some call of some branch of the plan, for which programs are compiled.
            made: told each picture as soon as it is fetched.
        """
        if schedule is None:
            begun = run.begin(self.pipe, batch, branch_texts(self.pipe, batch, batch.n))
            out = run.finish(self.pipe, batch, self.last(begun, batch.rows), [None])
            _tell(range(batch.rows), out, made)
            return out
        return _Shared(self, batch, schedule, frozenset(concepts), made).make()

    def last(self, begun: run.Begun, rows: int) -> Any:
        """Returns the states at the end of a batch's schedule."""
        last = begun.carry
        for _, carry, _ in self.advance(begun, rows):
            last = carry
        return last.x

    def advance(self, begun: run.Begun, rows: int) -> Iterable[tuple[int, Carry, Any]]:
        """Takes a batch through its schedule as `run.advance_in_chunks`, and counts evaluations."""

        def program(carry, table, concepts):
            self.evaluations += rows * (2 + concepts) * int(np.sum(table.live))
            return run.advance(self.pipe, begun, carry, table, concepts)

        batch = begun.batch
        chunks = self.pipe.chunks.run(program, begun.carry, batch.table, begun.situation, 0, begun.needed, batch.n)
        for done, live, carry, record in chunks:
            # What a trunk adds is nothing.
            kept = None if record is None else record._replace(sem_guidance=None)
            yield done, carry, run.fetch_record(self.pipe, kept, live)

    def prepare(self, begun: run.Begun, concepts: Iterable[int]) -> None:
        """Compiles the programs for these numbers of concepts, later batches' too, which are to compile nothing."""
        if self.pipe.chunks is not self._chunks:
            # Other networks, as with another LoRA, have prepared nothing yet.
            self._chunks, self._prepared = self.pipe.chunks, {}
        known = self._prepared.setdefault(begun.situation, set())
        for count in sorted(set(concepts) - known):
            run.advance(self.pipe, begun, begun.carry, chunk(begun.batch.table, 0, 0), count)
            self.pipe.chunks.prepare(begun.situation, count)
            known.add(count)


class _Shared:
    """One batch and what its pictures share."""

    def __init__(self, shared: SharedRun, batch: Batch, schedule: Schedule, concepts: frozenset[int], made: Made):
        self.shared, self.pipe, self.batch, self.schedule = shared, shared.pipe, batch, schedule
        self.concepts, self.made = concepts, made

    def make(self) -> Output:
        branches, trunk, batch = self.schedule.branches, self._trunk(), self.batch
        factor = self.pipe.system.sampler.sizes(self.pipe.models).factor
        height, width = (factor * side for side in batch.shape[:2])
        dtype = np.uint8 if batch.output == "uint8" else np.float32
        images, finite = np.zeros((batch.rows, height, width, 3), dtype), np.zeros(batch.rows, bool)
        flagged = None if self.pipe.safety is None else np.zeros(batch.rows, bool)
        out = Output(images, finite, batch.seeds, None, flagged)
        with ThreadPoolExecutor(1, "begins") as begins, ThreadPoolExecutor(1, "fetches") as fetches:
            begun, fetched = _submit(begins, self._fork, branches[0], trunk), None
            for branch, after in zip(branches, [*branches[1:], None], strict=True):
                here = begun.result()
                if after is not None:
                    begun = _submit(begins, self._fork, after, trunk)
                decoded = run.decode(self.pipe, here.batch, self._branch(here, branch))
                # Which says at once what went wrong, and keeps pictures from piling up on the devices.
                if fetched is not None:
                    fetched.result()
                fetched = _submit(fetches, self._place, branch, decoded, out)
            assert fetched is not None
            fetched.result()
        run.warn_of_pictures(out.finite, out.flagged)
        return out

    def _place(self, branch: Branch, decoded: run.Decoded, out: Output) -> None:
        """Fetches a branch's pictures into their places."""
        members = list(branch.members)
        # With the rows that pad the batch, since the safety checker is compiled for all.
        found = run.fetch(self.pipe, decoded, self.schedule.rows)
        arrays: tuple[Any, ...] = (out.images, out.finite, out.flagged)
        for into, part in zip(arrays, found, strict=True):
            if part is not None:
                into[members] = part[: len(members)]
        _tell(members, out, self.made)

    def _trunk(self) -> Trunk:
        schedule, n, wide = self.schedule, self.batch.n, self.pipe.wide
        first = [members[0] for members in schedule.trunks]
        first += first[-1:] * (schedule.rows - len(first))
        batch = self.batch.select(first)
        edits = [tuple(sorted(row, key=lambda edit: edit.concept)) for row in batch.edits]
        known = batch.settings.edits
        assert known is not None
        # Concepts of scale 0 add nothing.
        idle = known._replace(scale=np.zeros_like(known.scale))
        batch = dataclasses.replace(
            batch,
            edits=edits,
            settings=batch.settings._replace(edits=idle),
            static=batch.static._replace(record=True),
        )
        begun = run.begin(self.pipe, batch, branch_texts(self.pipe, batch, n))
        shape = (len(first), self.shared.depth, *batch.shape)
        # The calls are written into these arrays of the host.
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
                for kept, new in zip(past[:3], (record.uncond, record.cond, record.edits), strict=True):
                    kept[:, done : before + called] = new[: len(first)]
                done = before + called
            x = self.pipe.devices.gather(begun.carry.x, len(first))
            states[departure] = x, self._solver_rows(begun.carry, x, batch.static)
        row_of = {i: row for row, members in enumerate(schedule.trunks) for i in members}
        return Trunk(row_of, states, past, [[edit.concept for edit in row] for row in edits])

    def _solver_rows(self, carry: Carry, x: np.ndarray, static: Static) -> Any:
        """Returns the solver's state on the host, with the rows first in every array."""
        devices = int(len(self.pipe.devices) > 1)

        def one(leaf, axis):
            leaf = np.moveaxis(np.asarray(leaf), devices + axis, devices)
            return (np.concatenate(leaf) if devices else leaf)[: len(x)]

        solver = self.pipe.system.sampler.solver(None, self.batch.settings, static.own)
        return jax.tree.map(one, carry.solver, programs.row_axes(solver, x))

    def _fork(self, branch: Branch, trunk: Trunk) -> run.Begun:
        """Begins a branch's rows where the trunk has left them."""
        members = [*branch.members, *branch.members[-1:] * (self.schedule.rows - len(branch.members))]
        alone = self.batch.select(members)
        at = np.array([trunk.row_of[i] for i in members])
        order = [
            [trunk.concepts[row].index(edit.concept) for edit in edits]
            for row, edits in zip(at, alone.edits, strict=True)
        ]
        seen = Predictions(trunk.past.uncond[at], trunk.past.cond[at], _ordered(trunk.past.edits, at, order))
        x, solver = jax.tree.map(lambda leaf: leaf[at], trunk.states[branch.start])
        start = partial(_forked, x=x, solver=solver, calls=branch.start, past=seen)
        return run.begin(self.pipe, alone, branch_texts(self.pipe, alone, self.batch.n), start)

    def _branch(self, begun: run.Begun, branch: Branch) -> Any:
        """Returns the states at the end of a branch."""
        self.shared.prepare(begun, {*self.concepts, *branch.concepts})
        rest = _calls(begun.batch.table, branch.start, None)
        part = dataclasses.replace(begun.batch, table=rest)
        return self.shared.last(begun._replace(batch=part, needed=begun.needed[branch.start :]), self.schedule.rows)


def _forked(
    pipe: Pipeline, batch: Batch, settings: Any, *, x: np.ndarray, solver: Any, calls: int, past: Predictions
) -> Carry:
    """Returns the carry of rows that leave a trunk; see `sega_jax.systems.programs.fork`."""
    fork = pipe.devices.map(programs.fork, (0, 0, 0, None, 0), sampler=pipe.system.sampler, static=batch.static)
    with enough_memory(x.shape):
        x, solver, past = pipe.devices.split((x, solver, past))
        # Waiting, so that the process does not end while the devices work.
        return jax.block_until_ready(fork(settings, x, solver, calls, past))


def _tell(numbers: Iterable[int], out: Output, made: Made) -> None:
    assert isinstance(out.images, np.ndarray)
    for i in numbers:
        made(i, out.images[i], bool(out.finite[i]), None if out.flagged is None else bool(out.flagged[i]))


# What JAX knows of one thread only, and the name of what is set for all.
_SETTINGS = {
    "jax_enable_x64": jax.enable_x64,
    "jax_default_matmul_precision": jax.default_matmul_precision,
    "jax_numpy_dtype_promotion": jax.numpy_dtype_promotion,
    "jax_numpy_rank_promotion": jax.numpy_rank_promotion,
    "jax_debug_nans": jax.debug_nans,
    "jax_debug_infs": jax.debug_infs,
}


def _submit(pool: ThreadPoolExecutor, function: Callable, *args: Any) -> Future:
    """Runs a function in a thread as it would run here: with JAX's settings, which `with` may have changed, and adding
    its warnings to those that are collected here."""
    here = {name: getattr(jax.config, name) for name in _SETTINGS}

    def there():
        with ExitStack() as stack:
            for name, value in here.items():
                stack.enter_context(_SETTINGS[name](value))
            return function(*args)

    return pool.submit(copy_context().run, there)


def _calls(table: Any, first: int, last: int | None) -> Any:
    return jax.tree.map(lambda column: column[first:last], table)


def _ordered(edits: Any, at: np.ndarray, order: Sequence[Sequence[int]]) -> Any:
    """Returns predictions [rows, calls, n, ...] of these rows, the concepts of each in its order."""
    return np.stack([edits[row][:, index] for row, index in zip(at, order, strict=True)])
