"""A pipeline whose call computes what its pictures have in common once, as `sega_jax.sweep.sharing` says."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sega_jax.chunks import chunk
from sega_jax.guidance import Predictions
from sega_jax.output import Output
from sega_jax.pipeline import Pipeline
from sega_jax.rows import Rows
from sega_jax.running import Plan
from sega_jax.schedules import Row
from sega_jax.solvers import SOLVERS
from sega_jax.sweep.sharing import Branch, Schedule
from sega_jax.systems import common


class SharedPipeline(Pipeline):
    """To be called with the prompts, edits and settings of all points of a schedule.

    Attributes:
        schedule: of the next call; None for one that shares nothing.
        depth: the most calls that a trunk has: what is compiled for.
        concepts: how many are predicted at some call of some branch: what is compiled for, too.
        shown: told how many pictures were made just now.
        evaluations: rows that went through the UNet so far.
    """

    schedule: Schedule | None = None
    depth: int = 0
    concepts: frozenset[int] = frozenset()
    evaluations: int = 0

    def __init__(self, **components: Any):
        super().__init__(**components)
        self.shown: Callable[[int], Any] = lambda count: None
        self._prepared: dict[Hashable, set[int]] = {}

    def _run(self, plan: Plan) -> Output:
        schedule, method = self.schedule, plan.method
        if schedule is None:
            return super()._run(plan)
        trunks = [members[0] for members in schedule.trunks]
        trunks += trunks[-1:] * (schedule.rows - len(trunks))
        row_of = {i: row for row, members in enumerate(schedule.trunks) for i in members}
        images, finite, flagged = {}, {}, {}
        left = 0
        for start, x, solver, past, concepts in self._trunk(plan, trunks):
            while left < len(schedule.branches) and schedule.branches[left].start == start:
                branch = schedule.branches[left]
                members = [*branch.members, *branch.members[-1:] * (schedule.rows - len(branch.members))]
                at = np.array([row_of[i] for i in members])
                order = [[concepts[row_of[i]].index(edit.concept) for edit in plan.rows.edits[i]] for i in members]
                seen = Predictions(past.uncond[at], past.cond[at], _ordered(past.edits[at], order))
                settings = self.devices.split(_rows(plan.settings, members))
                depart = self.devices.map(common.depart, (0, 0, 0, None, 0), method=method)
                split = self.devices.split((x[at], jax.tree.map(lambda leaf, at=at: leaf[at], solver), seen))
                carry = depart(settings, split[0], split[1], start, split[2])
                made = self._branch(plan, branch, members, carry)
                for k, i in enumerate(branch.members):
                    images[i], finite[i] = made.images[k], made.finite[k]
                    flagged[i] = None if made.flagged is None else made.flagged[k]
                left += 1
                self.shown(len(branch.members))
        total = range(len(plan.rows))
        flags = None if flagged[0] is None else np.array([flagged[i] for i in total])
        return Output(
            np.stack([images[i] for i in total]), np.array([finite[i] for i in total]), plan.rows.seeds, None, flags
        )

    def _trunk(self, plan: Plan, trunks: Sequence[int]) -> Iterator[tuple[int, np.ndarray, Any, Predictions, list]]:
        """Yields every departure with the states [rows, ...] there, the solver's with the rows first, and all that was
        predicted until then, [rows, depth, ...], of these concepts."""
        rows, table, n = _rows(plan.rows, trunks), plan.table, plan.n
        rows = _edited(rows, [tuple(sorted(edits, key=lambda edit: edit.concept)) for edits in rows.edits])
        words = [[edit.concept for edit in edits] for edits in rows.edits]
        settings = _rows(plan.settings, trunks)
        # What is nothing adds nothing.
        idle = settings.edits._replace(scale=np.zeros_like(settings.edits.scale))
        settings, method = settings._replace(edits=idle), plan.method._replace(record=True)
        shared = plan._replace(rows=rows, settings=settings, method=method)
        begun = self._begin(shared, self._text(rows, n))
        shape = (len(trunks), self.depth, *plan.shape)
        past = Predictions(
            np.zeros(shape, self._wide), np.zeros(shape, self._wide), np.zeros((*shape[:2], n, *plan.shape), self._wide)
        )
        done = 0
        for departure in self.schedule.departures:
            way = shared._replace(table=_calls(table, done, departure))
            begun = begun._replace(needed=np.full(departure - done, n))
            before = done
            for called, carry, record in self._advance(way, begun, 0):
                begun = begun._replace(carry=carry)
                for kept, part in zip(past[:3], (record.uncond, record.cond, record.edits), strict=True):
                    kept[:, done : before + called] = part[: len(trunks)]
                done = before + called
            x = self.devices.gather(begun.carry.x, len(trunks))
            yield departure, x, self._solver_rows(begun.carry, plan, len(trunks)), past, words

    def _begin(self, plan: Plan, text: Any) -> Any:
        begun, rows = super()._begin(plan, text), math.prod(text.shape[:-3])

        def call(carry, table, concepts):
            self.evaluations += rows * (2 + concepts) * int(np.sum(table.live))
            return begun.call(carry, table, concepts)

        return begun._replace(call=call)

    def _solver_rows(self, carry: Any, plan: Plan, rows: int) -> Any:
        """The solver's state on the host, with the rows first in every array."""
        devices = int(len(self.devices) > 1)

        def one(leaf, axis):
            leaf = np.moveaxis(np.asarray(leaf), devices + axis, devices)
            return (np.concatenate(leaf) if devices else leaf)[:rows]

        return jax.tree.map(one, carry.solver, common.row_axes(SOLVERS[plan.method.solver](0.0), plan.shape))

    def _branch(self, plan: Plan, branch: Branch, members: Sequence[int], carry: Any) -> Output:
        rows, calls = _rows(plan.rows, members), slice(branch.start, None)
        alone = plan._replace(rows=rows, settings=_rows(plan.settings, members))
        begun = self._begin(alone, self._text(rows, plan.n))
        # Those of later batches, too, which are to compile nothing.
        known = self._prepared.setdefault(begun.situation, set())
        for concepts in sorted({*self.concepts, *branch.concepts} - known):
            begun.call(begun.carry, chunk(plan.table, 0, 0), concepts)
            self._chunks.prepare(begun.situation, concepts)
            known.add(concepts)
        begun = begun._replace(carry=carry, needed=begun.needed[calls])
        rest = alone._replace(table=jax.tree.map(lambda column: column[calls], plan.table))
        for _, now, _ in self._advance(rest, begun, 0):
            carry = now
        return self._finish(carry.x, [None], rows, "uint8")


def _rows(tree: Any, members: Sequence[int]) -> Any:
    """Of arrays and lists of rows, those of the members."""
    if isinstance(tree, Rows):
        return Rows(**{name: _rows(value, members) for name, value in tree._asdict().items()})
    if isinstance(tree, list):
        return [tree[i] for i in members]
    return jax.tree.map(lambda leaf: leaf[np.array(members)], tree)


def _edited(rows: Rows, edits: list) -> Rows:
    # `_replace` minds that their length is that of the rows.
    return Rows(**rows._asdict() | {"edits": edits})


def _calls(table: Row, first: int, last: int) -> Row:
    return jax.tree.map(lambda column: column[first:last], table)


def _ordered(edits: np.ndarray, order: Sequence[Sequence[int]]) -> np.ndarray:
    """Predictions [rows, calls, n, ...] of the concepts in each row's order."""
    return np.stack([row[:, index] for row, index in zip(edits, order, strict=True)])
