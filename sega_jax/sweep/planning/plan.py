"""Planning: the points of a sweep in batches that compiled programs run, on disk before the first of them runs."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

from sega_jax.method.checks import check_int
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.pipelines.messages import warn
from sega_jax.sweep.description.facts import Facts
from sega_jax.sweep.description.fields import call_settings
from sega_jax.sweep.description.points import Point, name, point
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.sweep.planning import sharing
from sega_jax.sweep.planning.lengths import Lengths
from sega_jax.sweep.planning.sharing import Schedule
from sega_jax.systems.base import Sizes

_VERSION = 3


class Program(NamedTuple):
    """What is compiled in: batches that share it compile once."""

    rows: int
    concepts: int
    settings: tuple[tuple[str, Any], ...]  # arguments another value of which is another program
    static: str  # the family's own choices, such as the solver

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        settings = dict(self.settings)
        return settings["height"], settings["width"]


class Batch(NamedTuple):
    """Pictures that are made and recorded together. With fewer of them than the program has rows, the last one fills it
    up; those that share what they have in common are more, and have a schedule."""

    program: Program
    scheduler: str | None
    settings: tuple[tuple[str, Any], ...]  # the other arguments that all of them share
    calls: int
    points: tuple[int, ...]  # by their numbers in the sweep
    names: tuple[str, ...]  # of the pictures
    shares: bool = False
    adapters: tuple[tuple[str, Pairs], ...] = ()  # LoRAs and new words that all of them share
    text_adapters: tuple[tuple[str, Pairs], ...] = ()  # the first stage's LoRAs that change their text

    @property
    def compiled(self) -> Any:
        """What is compiled for it: batches that share take other programs than those that do not."""
        return self.program, self.shares


class Counts(NamedTuple):
    """How much a plan is. Evaluations are rows through the UNet, 2 + n for a call of a picture with n concepts."""

    points: int
    pictures: int  # fewer than points where several mean the same picture
    batches: int
    programs: int
    evaluations: int  # as the batches run, with what fills them up
    alone: int  # of the pictures one by one
    shared: int  # the fewest, if all that pictures have in common were computed once

    @property
    def compared(self) -> str:
        """The evaluations beside those of the pictures one by one."""
        saved = 1 - self.evaluations / self.alone
        if saved >= 0:
            return f"{saved:.1%} fewer UNet evaluations than of the pictures one by one"
        return f"{-saved:.1%} more UNet evaluations than of the pictures one by one, for rows that fill batches up"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pictures a sweep makes, and in which batches: on one machine it makes the same ones to the bit, however
    often it is interrupted.

    Example:
        >>> from sega_jax import sweep
        >>> seeds = sweep.Sweep(call={"prompt": "a portrait"}, grid={"seed": [0, 1, 2]})
        >>> plan = sweep.plan(seeds, sweep.Facts.of(seeds), rows=2)
        >>> [len(batch.points) for batch in plan.batches]
        [2, 1]
    """

    sweep: Sweep
    facts: Facts
    rows: int
    batches: tuple[Batch, ...]
    earlier: "Plan | None" = None  # of the stage before in a cascade
    made_larger: bool = False  # whether a later stage enlarges these pictures

    @property
    def chain(self) -> "list[Plan]":
        """The plans of all stages up to this one, the first stage first; of a model by itself, its plan alone."""
        return [*(self.earlier.chain if self.earlier is not None else []), self]

    @property
    def format(self) -> str:
        """The format of the pictures; those that are made larger are kept as arrays of floats."""
        return "npy" if self.made_larger else self.sweep.format

    def point(self, i: int) -> Point:
        """The picture of point i."""
        return point(self.sweep[i], self.sweep, self.facts)

    def evaluations(self, number: int) -> int:
        """Rows of a batch through the UNet, with those that fill up."""
        batch = self.batches[number]
        if batch.shares:
            return self.schedules[number].evaluations(batch.program.concepts)
        return batch.program.rows * (2 + batch.program.concepts) * batch.calls

    @cached_property
    def schedules(self) -> dict[int, Schedule]:
        """How the batches that share are made, by their numbers."""
        return {
            number: sharing.schedule([self.point(i) for i in batch.points], batch.calls, batch.program.rows)
            for number, batch in enumerate(self.batches)
            if batch.shares
        }

    @cached_property
    def depth(self) -> int:
        """The most calls of a trunk; 1 at least."""
        return max((one.departures[-1] for one in self.schedules.values()), default=1) or 1

    def concepts(self, program: Program) -> frozenset[int]:
        """How many are predicted at some call of some branch of its batches."""
        schedules = (self.schedules[i] for i in self.schedules if self.batches[i].program == program)
        return frozenset(count for one in schedules for branch in one.branches for count in branch.concepts)

    def shares(self, workers: int) -> list[range]:
        """The numbers of the batches of each of several workers: those that follow each other, to compile few programs,
        of about as many evaluations."""
        total, before, ends = self.counts.evaluations, 0, [0] * workers
        for number in range(len(self.batches)):
            # To whom the middle of the batch falls.
            middle = before + self.evaluations(number) / 2
            ends[min(int(middle * workers / total), workers - 1)] = number + 1
            before += self.evaluations(number)
        for worker in range(1, workers):
            ends[worker] = max(ends[worker], ends[worker - 1])
        return [range(first, last) for first, last in zip([0, *ends], ends, strict=False)]

    def pictures(self) -> Iterator[tuple[Point, int]]:
        """All of them, each with its model calls, batch by batch."""
        return ((self.point(i), batch.calls) for batch in self.batches for i in batch.points)

    @cached_property
    def counts(self) -> Counts:
        return Counts(
            points=len(self.sweep),
            pictures=sum(len(batch.points) for batch in self.batches),
            batches=len(self.batches),
            programs=len({batch.compiled for batch in self.batches}),
            evaluations=sum(map(self.evaluations, range(len(self.batches)))),
            alone=sum(len(batch.points) * (2 + batch.program.concepts) * batch.calls for batch in self.batches),
            shared=sharing.evaluations(self.pictures()),
        )

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, "sweep": self.sweep.as_dict(), **self._entries()}, ensure_ascii=False)

    def _entries(self) -> dict[str, Any]:
        programs = list(dict.fromkeys(batch.program for batch in self.batches))
        return {
            "facts": _entries_of(self.facts),
            "rows": self.rows,
            "programs": [program._asdict() for program in programs],
            "batches": [batch._asdict() | {"program": programs.index(batch.program)} for batch in self.batches],
            "earlier": None if self.earlier is None else self.earlier._entries(),
            "made_larger": self.made_larger,
        }

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            ValueError: it is none, or of another version.
        """
        try:
            said = json.loads(text)
            if said["version"] != _VERSION:
                raise ValueError(f"it is of version {said['version']}, not {_VERSION}")
            return cls._from(Sweep(**said["sweep"]), said)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no plan of a sweep ({error}); begin in another folder") from None

    @classmethod
    def _from(cls, sweep: Sweep, entries: dict[str, Any]) -> "Plan":
        programs = [Program(**one | {"settings": _pairs(one["settings"])}) for one in entries["programs"]]
        batches = tuple(_batch(batch, programs) for batch in entries["batches"])
        earlier = None if entries["earlier"] is None else cls._from(sweep, entries["earlier"])
        return cls(sweep, _facts(entries["facts"]), entries["rows"], batches, earlier, entries["made_larger"])


def plan(sweep: Sweep, facts: Facts, rows: int = 8, *, share: bool = True, earlier: Plan | None = None) -> Plan:
    """Groups the points of a sweep into batches.

    All pictures of a batch have the same adapters, size, number of concepts, semantics, support, scheduler and steps.
    Batches of the same adapters follow each other, so that each is merged once, and among these batches of the same
    program; points are in their order. A program has fewer rows where that takes fewer
    evaluations, as there are then fewer to fill up.

    Args:
        facts: of the sweep's model.
        rows: of a batch at most, at least 1; best a multiple of the devices.
        share: whether pictures with the same prompts, seed and numbers of the call share what they have in common,
            where that takes fewer evaluations. They may be other roundings of the pictures that they are without.
        earlier: the plan of the stage before in a cascade; None plans it with the same rows.

    Raises:
        TypeError, ValueError: no such number of rows, or points that do not go with the checkpoint, or not together.

    Example:
        >>> from sega_jax import sweep
        >>> scales = {"hat.scale": [2, 4, 6, 8]}
        >>> hats = sweep.Sweep(call={"prompt": "a portrait", "steps": 50}, edits={"hat": {"warmup": 30}}, grid=scales)
        >>> counts = sweep.plan(hats, sweep.Facts.of(hats), rows=2).counts
        >>> counts.evaluations, counts.alone
        (330, 600)
    """
    check_int("rows", rows, 1)
    if facts.earlier is not None:
        earlier = plan(sweep, facts.earlier, rows, share=share) if earlier is None else earlier
        earlier = dataclasses.replace(earlier, made_larger=True)
    groups, seen, late = defaultdict(list), set(), 0
    lengths = Lengths(facts)
    arguments = call_settings(facts.family.call)
    for i, settings in enumerate(sweep):
        made = point(settings, sweep, facts)
        called = name(made, facts)
        if called in seen:
            continue
        seen.add(called)
        calls = facts.calls(made)
        late += any(edit.warmup >= calls for edit in made.edits.values())
        compiled = tuple((name, value) for name, value in made.shared if arguments[name].varies == "program")
        others = tuple((name, value) for name, value in made.shared if arguments[name].varies != "program")
        program = Program(rows, len(made.edits), compiled, repr(facts.static(made)))
        details = made.scheduler, others, calls, lengths(made)
        groups[(made.adapters, made.text_adapters), program, details].append((i, called, made))
    if late:
        stage = f" of {facts.stage}" if facts.stage else ""
        warn(
            f"in {late} of {len(seen)} pictures{stage} an edit begins after the last model call, and changes nothing;"
            " lower its warmup or take more steps"
        )
    programs = defaultdict(list)
    for (adapters, program, details), members in sorted(groups.items(), key=lambda item: str(item[0][:2])):
        programs[adapters, program].append((details, members))
    batches: list[Batch] = []
    for (adapters, program), some in programs.items():
        options = (_batches(program._replace(rows=few), some, share) for few in _fitting(rows, some))
        best = min(options, key=lambda one: (one[1], -one[0][0].program.rows))[0]
        batches += [batch._replace(adapters=adapters[0], text_adapters=adapters[1]) for batch in best]
    return Plan(sweep, facts, rows, tuple(batches), earlier)


def _fitting(rows: int, groups: list[Any]) -> set[int]:
    """Numbers of rows, none more than there are, that leave few to fill up in the batches of the largest group, of its
    pictures or of what they share."""
    most = max(len(members) for _, members in groups)
    trunks = max(len(sharing.clusters([made for *_, made in members])) for _, members in groups)
    rows = min(rows, most)
    # Far fewer would be slower for each.
    return {rows, *(max(-(-count // -(-count // rows)), -(-rows // 2)) for count in (most, trunks))}


def _batches(program: Program, groups: list[Any], share: bool) -> tuple[list[Batch], int]:
    """The batches of groups that a program makes, and their evaluations."""
    batches, total = [], 0
    for (scheduler, settings, calls, _), members in groups:
        parts, shares = _cut(members, program.rows), False
        evaluations = len(parts) * program.rows * (2 + program.concepts) * calls
        if share and program.concepts:
            points = [made for *_, made in members]
            together = sharing.parts(points, program.rows)
            schedules = (sharing.schedule([points[i] for i in part], calls, program.rows) for part in together)
            fewer = sum(one.evaluations(program.concepts) for one in schedules)
            if fewer < evaluations:
                parts, shares, evaluations = [[members[i] for i in part] for part in together], True, fewer
        total += evaluations
        for part in parts:
            numbers, names, _ = zip(*part, strict=True)
            batches.append(Batch(program, scheduler, settings, calls, numbers, names, shares))
    return batches, total


def _cut(members: list[Any], length: int) -> list[list[Any]]:
    return [members[start : start + length] for start in range(0, len(members), length)]


def _batch(said: dict[str, Any], programs: list[Program]) -> Batch:
    own = {"program": programs[said["program"]], "points": tuple(said["points"]), "names": tuple(said["names"])}
    return Batch(**said | own | {name: _pairs(said[name]) for name in ("settings", "adapters", "text_adapters")})


def _pairs(said: list[list[Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _tuples(value)) for name, value in said)


def _tuples(value: Any) -> Any:
    # JSON has tuples as lists.
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _entries_of(facts: Facts) -> dict[str, Any]:
    entries = {field.name: getattr(facts, field.name) for field in dataclasses.fields(Facts)}
    return entries | {"earlier": None if facts.earlier is None else _entries_of(facts.earlier)}


def _facts(said: dict[str, Any]) -> Facts:
    sizes: list[Any] = [tuple(value) if isinstance(value, list) else value for value in said["sizes"]]
    earlier = None if said["earlier"] is None else _facts(said["earlier"])
    return Facts(**said | {"sizes": Sizes(*sizes), "earlier": earlier})
