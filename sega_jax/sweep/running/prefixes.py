"""A pipeline whose call computes what its pictures have in common once, as `sega_jax.sweep.planning.sharing` says."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.method.guidance import Predictions
from sega_jax.method.schedules import Row
from sega_jax.method.solvers import SOLVERS
from sega_jax.pipelines.batch import Rows
from sega_jax.pipelines.execution.chunks import chunk, enough_memory
from sega_jax.pipelines.output import Output
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.running import Plan, warn
from sega_jax.sweep.planning.sharing import Branch, Schedule
from sega_jax.systems import base


class Trunk(NamedTuple):
    """What pictures have in common, on the host."""

    row_of: dict[int, int]  # of every picture
    states: dict[int, tuple[np.ndarray, Any]]  # [rows, ...] at each departure, and the solver's, the rows first
    past: Predictions  # all that was predicted, [rows, depth, ...], of these concepts
    concepts: list[list[str]]  # of each row


class SharedPipeline(Pipeline):
    """To be called with the prompts, edits and settings of all points of a schedule.

    While the devices make one branch, the next is begun in one thread, and the pictures of the one before are fetched
    in another.

    Attributes:
        schedule: of the next call; None for one that shares nothing.
        depth: the most calls that a trunk has: what is compiled for.
        concepts: how many are predicted at some call of some branch: what is compiled for, too.
        made: told a picture's number, the picture [height, width, 3], and whether it is finite, and flagged or None, as
            soon as it is fetched; possibly in another thread.
        evaluations: rows that went through the UNet so far.
    """

    schedule: Schedule | None = None
    depth: int = 0
    concepts: frozenset[int] = frozenset()
    evaluations: int = 0

    def __init__(self, **components: Any):
        super().__init__(**components)
        self.made: Callable[[int, np.ndarray, bool, bool | None], Any] = lambda *picture: None
        self._prepared: dict[Hashable, set[int]] = {}

    def _run(self, plan: Plan) -> Output:
        if self.schedule is None:
            out = super()._run(plan)
            self._tell(range(len(plan.rows)), out)
            return out
        branches, trunk = self.schedule.branches, self._trunk(plan)
        total, height, width = len(plan.rows), *(self.models.sizes.factor * side for side in plan.shape[:2])
        images, finite = np.zeros((total, height, width, 3), np.uint8), np.zeros(total, bool)
        out = Output(images, finite, plan.rows.seeds, None, None if self.safety is None else np.zeros(total, bool))
        with ThreadPoolExecutor(1, "begins") as begins, ThreadPoolExecutor(1, "fetches") as fetches:
            begun, fetched = _submit(begins, self._depart, plan, branches[0], trunk), None
            for branch, after in zip(branches, [*branches[1:], None], strict=True):
                alone, here = begun.result()
                if after is not None:
                    begun = _submit(begins, self._depart, plan, after, trunk)
                decoded = self._decode(self._branch(alone, branch, here), "uint8")
                # Which says at once what went wrong, and keeps pictures from piling up on the devices.
                if fetched is not None:
                    fetched.result()
                fetched = _submit(fetches, self._place, branch, decoded, out)
            fetched.result()
        warn(out.finite, out.flagged, 4)
        return out

    def _place(self, branch: Branch, decoded: Any, out: Output) -> None:
        """Fetches a branch's pictures into their places."""
        members = list(branch.members)
        # With the rows that fill up, since the safety checker is compiled for all.
        found = self._fetch(decoded, self.schedule.rows)
        for into, part in zip((out.images, out.finite, out.flagged), found, strict=True):
            if part is not None:
                into[members] = part[: len(members)]
        self._tell(members, out)

    def _tell(self, numbers: Iterable[int], out: Output) -> None:
        for i in numbers:
            self.made(i, out.images[i], bool(out.finite[i]), None if out.flagged is None else bool(out.flagged[i]))

    def _trunk(self, plan: Plan) -> Trunk:
        schedule = self.schedule
        first = [members[0] for members in schedule.trunks]
        first += first[-1:] * (schedule.rows - len(first))
        rows, table, n = _rows(plan.rows, first), plan.table, plan.n
        rows = _edited(rows, [tuple(sorted(edits, key=lambda edit: edit.concept)) for edits in rows.edits])
        words = [[edit.concept for edit in edits] for edits in rows.edits]
        settings = _rows(plan.settings, first)
        # What is nothing adds nothing.
        idle = settings.edits._replace(scale=np.zeros_like(settings.edits.scale))
        settings, method = settings._replace(edits=idle), plan.method._replace(record=True)
        shared = plan._replace(rows=rows, settings=settings, method=method)
        begun = self._begin(shared, self._text(rows, n))
        shape = (len(first), self.depth, *plan.shape)
        past = Predictions(
            np.zeros(shape, self._wide), np.zeros(shape, self._wide), np.zeros((*shape[:2], n, *plan.shape), self._wide)
        )
        states, done = {}, 0
        for departure in schedule.departures:
            way = shared._replace(table=_calls(table, done, departure))
            begun = begun._replace(needed=np.full(departure - done, n))
            before = done
            for called, carry, record in self._advance(way, begun, 0):
                begun = begun._replace(carry=carry)
                for kept, part in zip(past[:3], (record.uncond, record.cond, record.edits), strict=True):
                    kept[:, done : before + called] = part[: len(first)]
                done = before + called
            x = self.devices.gather(begun.carry.x, len(first))
            states[departure] = x, self._solver_rows(begun.carry, plan, len(first))
        row_of = {i: row for row, members in enumerate(schedule.trunks) for i in members}
        return Trunk(row_of, states, past, words)

    def _begin(self, plan: Plan, text: Any, start: Any = None) -> Any:
        begun, rows = super()._begin(plan, text, start), math.prod(text.shape[:-3])

        def call(carry, table, concepts):
            self.evaluations += rows * (2 + concepts) * int(np.sum(table.live))
            return begun.call(carry, table, concepts)

        return begun._replace(call=call)

    def _recorded(self, record: Any, live: int) -> Any:
        # What a trunk adds is nothing.
        return super()._recorded(None if record is None else record._replace(sem_guidance=None), live)

    def _solver_rows(self, carry: Any, plan: Plan, rows: int) -> Any:
        """The solver's state on the host, with the rows first in every array."""
        devices = int(len(self.devices) > 1)

        def one(leaf, axis):
            leaf = np.moveaxis(np.asarray(leaf), devices + axis, devices)
            return (np.concatenate(leaf) if devices else leaf)[:rows]

        return jax.tree.map(one, carry.solver, base.row_axes(SOLVERS[plan.method.solver](0.0), plan.shape))

    def _depart(self, plan: Plan, branch: Branch, trunk: Trunk) -> tuple[Plan, Any]:
        """The plan of a branch's rows alone, and what they are begun with: where the trunk has left them."""
        members = [*branch.members, *branch.members[-1:] * (self.schedule.rows - len(branch.members))]
        alone = plan._replace(rows=_rows(plan.rows, members), settings=_rows(plan.settings, members))
        at = np.array([trunk.row_of[i] for i in members])
        order = [
            [trunk.concepts[row].index(edit.concept) for edit in edits]
            for row, edits in zip(at, alone.rows.edits, strict=True)
        ]
        seen = Predictions(trunk.past.uncond[at], trunk.past.cond[at], _ordered(trunk.past.edits, at, order))
        x, solver = jax.tree.map(lambda leaf: leaf[at], trunk.states[branch.start])
        depart = self.devices.map(base.depart, (0, 0, 0, None, 0), method=plan.method)

        def start(_, settings):
            with enough_memory(x.shape):
                split = self.devices.split((x, solver, seen))
                # Waiting, lest the process ends while the devices work.
                return jax.block_until_ready(depart(settings, *split[:2], branch.start, split[2]))

        return alone, self._begin(alone, self._text(alone.rows, plan.n), start)

    def _branch(self, alone: Plan, branch: Branch, begun: Any) -> Any:
        """The states at the end of the rows' way."""
        calls = slice(branch.start, None)
        # Those of later batches, too, which are to compile nothing.
        known = self._prepared.setdefault(begun.situation, set())
        for concepts in sorted({*self.concepts, *branch.concepts} - known):
            begun.call(begun.carry, chunk(alone.table, 0, 0), concepts)
            self._chunks.prepare(begun.situation, concepts)
            known.add(concepts)
        carry, begun = begun.carry, begun._replace(needed=begun.needed[calls])
        rest = alone._replace(table=jax.tree.map(lambda column: column[calls], alone.table))
        for _, now, _ in self._advance(rest, begun, 0):
            carry = now
        return carry.x


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
    """Runs it in a thread as it would run here, where JAX may be set otherwise by `with`."""
    here = {name: getattr(jax.config, name) for name in _SETTINGS}

    def there():
        with ExitStack() as stack:
            for name, value in here.items():
                stack.enter_context(_SETTINGS[name](value))
            return function(*args)

    return pool.submit(there)


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


def _ordered(edits: np.ndarray, at: np.ndarray, order: Sequence[Sequence[int]]) -> np.ndarray:
    """Of predictions [rows, calls, n, ...] these rows, the concepts of each in its order."""
    return np.stack([edits[row][:, index] for row, index in zip(at, order, strict=True)])
