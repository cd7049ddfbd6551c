"""Plans sweeps: groups the points of a sweep into batches, each for one compiled program. A plan is stored before it
runs."""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

from sega_jax.method.checks import brief, check_int
from sega_jax.method.guidance.edits import warmup_of
from sega_jax.pipelines.adapter_options import Pairs
from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.progress import counted
from sega_jax.pipelines.recommended import Recommended
from sega_jax.sweep.description.facts import Facts
from sega_jax.sweep.description.fields import call_settings
from sega_jax.sweep.description.points import Point, name, point
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.sweep.planning import sharing
from sega_jax.sweep.planning.file_names import FileNames
from sega_jax.sweep.planning.lengths import Lengths
from sega_jax.sweep.planning.sharing import Schedule
from sega_jax.systems.base import Sizes

_VERSION = 5


class Program(NamedTuple):
    """Everything that is compiled into a program. Batches whose programs are equal share one compiled program."""

    rows: int
    concepts: int
    settings: tuple[tuple[str, Any], ...]  # the arguments whose values are compiled into the program
    static: str  # the family's static settings, such as the solver

    @property
    def size(self) -> tuple[int, int]:
        """The height and width of the pictures, in pixels."""
        settings = dict(self.settings)
        return settings["height"], settings["width"]


class Batch(NamedTuple):
    """Pictures that are made and recorded together.

    A program predicts all its rows at the same time, and each row is one picture. A batch without shared prefixes has
    at most as many pictures as its program has rows; any remaining rows are filled with copies of the last picture. A
    batch with shared prefixes may have up to 16 times as many pictures, which are made in the order of a `Schedule`.
    """

    program: Program
    scheduler: str | None
    settings: tuple[tuple[str, Any], ...]  # the other arguments that the pictures share
    calls: int  # model calls of each picture
    points: tuple[int, ...]  # the indices of the points in the sweep
    names: tuple[str, ...]  # the names of the pictures
    shares: bool = False  # whether the pictures share prefixes
    adapters: tuple[tuple[str, Pairs], ...] = ()  # the LoRAs and textual inversions that all its pictures share
    text_adapters: tuple[tuple[str, Pairs], ...] = ()  # the LoRAs of the first stage that change the batch's texts

    @property
    def compiled(self) -> Any:
        """A key for the batch's compiled programs. Batches with and without shared prefixes use different programs."""
        return self.program, self.shares


class Counts(NamedTuple):
    """The size of a plan. An evaluation runs the UNet on one row. A model call for a picture with n concepts needs
    2 + n evaluations.
    """

    points: int
    pictures: int  # fewer than `points` if several points describe the same picture
    batches: int
    programs: int
    evaluations: int  # as planned, including padding
    alone: int  # the evaluations if each picture were made separately
    shared: int  # the minimum, if every common prefix were computed once and nothing were padded

    @property
    def compared(self) -> str:
        """A phrase that compares the planned evaluations with those needed to make each picture separately."""
        saved = 1 - self.evaluations / self.alone
        if saved == 0:
            return "as many UNet evaluations as making each picture separately"
        if saved > 0:
            return f"{saved:.1%} fewer UNet evaluations than making each picture separately"
        return f"{-saved:.1%} more UNet evaluations than making each picture separately, because batches are padded"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The pictures of a sweep, grouped into batches.

    On one machine, a plan always gives bit-identical pictures, even if its run is interrupted and resumed. `plan` makes
    a plan, and `run` runs it.

    Attributes:
        sweep: the sweep.
        facts: the facts about its model; for a cascade, the facts about the stage that this plan is for.
        rows: the maximum number of rows in a batch (the pictures that the model predicts at the same time).
        batches: the batches, in the order in which they run.
        earlier: in a cascade, the plan of the previous stage.
        made_larger: whether a later stage enlarges these pictures.

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
    earlier: "Plan | None" = None
    made_larger: bool = False

    @property
    def chain(self) -> "list[Plan]":
        """The plans of all stages up to this one, starting with the first stage; for a single model, only this plan."""
        return [*(self.earlier.chain if self.earlier is not None else []), self]

    @property
    def format(self) -> str:
        """The pictures' file format. Pictures that a later stage enlarges are stored as arrays of floats ("npy")."""
        return "npy" if self.made_larger else self.sweep.format

    @cached_property
    def files(self) -> dict[str, str]:
        """The names of the pictures' files, {picture name: file name}."""
        names = FileNames(self.sweep, {"", *(one.facts.stage or "" for one in self.chain)})
        return {
            name: f"{names.of(i)}.{self.format}"
            for batch in self.batches
            for i, name in zip(batch.points, batch.names, strict=True)
        }

    def point(self, i: int) -> Point:
        """Returns the complete settings of point i."""
        return point(self.sweep[i], self.sweep, self.facts)

    def evaluations(self, number: int) -> int:
        """Returns the number of evaluations for a batch, including padding."""
        batch = self.batches[number]
        if batch.shares:
            return self.schedules[number].evaluations(batch.program.concepts)
        return batch.program.rows * (2 + batch.program.concepts) * batch.calls

    @cached_property
    def schedules(self) -> dict[int, Schedule]:
        """{batch index: schedule} for the batches with shared prefixes."""
        return {
            number: sharing.schedule([self.point(i) for i in batch.points], batch.calls, batch.program.rows)
            for number, batch in enumerate(self.batches)
            if batch.shares
        }

    @cached_property
    def depth(self) -> int:
        """The number of calls in the longest trunk, at least 1."""
        return max((one.departures[-1] for one in self.schedules.values()), default=1) or 1

    def concepts(self, program: Program) -> frozenset[int]:
        """Returns the distinct numbers of concepts that are predicted per call in the forks of the program's
        batches."""
        schedules = (self.schedules[i] for i in self.schedules if self.batches[i].program == program)
        return frozenset(count for one in schedules for fork in one.forks for count in fork.concepts)

    def shares(self, workers: int) -> list[range]:
        """Divides the batches among several workers and returns each worker's batch indices.

        A worker's share consists of consecutive batches, so that the worker compiles few programs. All shares have
        about the same number of evaluations.
        """
        total, before, ends = self.counts.evaluations, 0, [0] * workers
        for number in range(len(self.batches)):
            # All evaluations are divided evenly among the workers. A batch goes to the worker whose part contains the
            # middle of the batch.
            middle = before + self.evaluations(number) / 2
            ends[min(int(middle * workers / total), workers - 1)] = number + 1
            before += self.evaluations(number)
        for worker in range(1, workers):
            ends[worker] = max(ends[worker], ends[worker - 1])
        return [range(first, last) for first, last in zip([0, *ends], ends, strict=False)]

    def pictures(self) -> Iterator[tuple[Point, int]]:
        """Yields every picture's settings and number of model calls, batch by batch."""
        return ((self.point(i), batch.calls) for batch in self.batches for i in batch.points)

    @cached_property
    def counts(self) -> Counts:
        """The numbers of points, pictures, batches, programs and evaluations."""
        pictures = sum(len(batch.points) for batch in self.batches)
        return Counts(
            points=len(self.sweep),
            pictures=pictures,
            batches=len(self.batches),
            programs=len({batch.compiled for batch in self.batches}),
            evaluations=sum(map(self.evaluations, range(len(self.batches)))),
            alone=sum(len(batch.points) * (2 + batch.program.concepts) * batch.calls for batch in self.batches),
            shared=sharing.evaluations(counted(self.pictures(), "counting", pictures)),
        )

    def to_json(self) -> str:
        """Returns the plan as JSON, which `from_json` reads."""
        entries = {"version": _VERSION, "sweep": self.sweep.as_dict(), **self._entries()}
        return json.dumps(entries | {"digest": _digest(entries)}, ensure_ascii=False)

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
        """Reads a plan that `to_json` wrote.

        Raises:
            ValueError: the text is not a plan, has been changed, or has the format of a different version.
        """
        damaged = "this is not a readable plan ({}); restore it from a copy, or delete it and run the same sweep again"
        try:
            entries = json.loads(text)
            version, digest = entries["version"], entries.pop("digest", None)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(damaged.format(error if text.strip() else "it is empty")) from None
        if version != _VERSION:
            raise ValueError(
                f"this plan was made by a different version of sega_jax: its format is {brief(version)}, but this"
                f" version reads format {_VERSION}; start the sweep in a new folder"
            )
        if digest != _digest(entries):
            raise ValueError(damaged.format("its content does not match its checksum"))
        return cls._from(Sweep(**entries["sweep"]), entries)

    @classmethod
    def _from(cls, sweep: Sweep, entries: dict[str, Any]) -> "Plan":
        programs = [Program(**one | {"settings": _pairs(one["settings"])}) for one in entries["programs"]]
        batches = tuple(_batch(batch, programs) for batch in entries["batches"])
        earlier = None if entries["earlier"] is None else cls._from(sweep, entries["earlier"])
        return cls(sweep, _facts(entries["facts"]), entries["rows"], batches, earlier, entries["made_larger"])


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def plan(sweep: Sweep, facts: Facts, rows: int = 8, *, share: bool = True, earlier: Plan | None = None) -> Plan:
    """Groups the points of a sweep into batches.

    All pictures in a batch have the same adapters, size, number of concepts, semantics, support, scheduler and steps.
    Batches with the same adapters are consecutive, so that each adapter is merged once. Among batches with the same
    adapters, batches for the same program are consecutive. Points keep their order. A program gets fewer rows if this
    saves evaluations by reducing the padding.

    Args:
        sweep: the sweep.
        facts: the facts about the sweep's model.
        rows: the maximum number of rows in a batch (the pictures that the model predicts at the same time). It is at
            least 1, and ideally a multiple of the number of devices.
        share: whether to compute the common prefix of pictures only once where this saves evaluations. Pictures have a
            common prefix only if they have the same prompts, seed and numeric arguments. Sharing may change how a
            picture's values are rounded.
        earlier: in a cascade, the plan of the previous stage. With None, the previous stage is planned with the same
            number of rows.

    Raises:
        CheckpointError: an adapter does not fit the checkpoint.
        TypeError, ValueError: `rows` is not a positive integer, or a point's settings are not compatible with each
            other or with the checkpoint.

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
    for i, settings in enumerate(counted(sweep, "planning")):
        complete = point(settings, sweep, facts)
        picture = name(complete, facts)
        if picture in seen:
            continue
        seen.add(picture)
        calls = facts.calls(complete)
        late += any(warmup_of(edit) >= calls for edit in complete.edits.values())
        compiled = tuple((name, value) for name, value in complete.shared if arguments[name].varies == "program")
        others = tuple((name, value) for name, value in complete.shared if arguments[name].varies != "program")
        program = Program(rows, len(complete.edits), compiled, repr(facts.static(complete)))
        details = complete.scheduler, others, calls, lengths(complete)
        groups[(complete.adapters, complete.text_adapters), program, details].append((i, picture, complete))
    if late:
        stage = f" of {facts.stage}" if facts.stage else ""
        warn(
            f"in {late} of {len(seen)} pictures{stage}, the warm-up of an edit lasts until the last model call, so the"
            " edit has no effect; lower its warmup or use more steps"
        )
    programs = defaultdict(list)
    for (adapters, program, details), members in sorted(groups.items(), key=lambda item: str(item[0][:2])):
        programs[adapters, program].append((details, members))
    batches: list[Batch] = []
    for (adapters, program), parts in programs.items():
        options = (_batches(program._replace(rows=count), parts, share) for count in _row_counts(rows, parts))
        best = min(options, key=lambda one: (one[1], -one[0][0].program.rows))[0]
        batches += [batch._replace(adapters=adapters[0], text_adapters=adapters[1]) for batch in best]
    return Plan(sweep, facts, rows, tuple(batches), earlier)


def _row_counts(rows: int, groups: list[Any]) -> set[int]:
    """Returns row counts up to `rows` that need little padding for the pictures or trunks of the largest group."""
    most = max(len(members) for _, members in groups)
    trunks = max(len(sharing.clusters([point for *_, point in members])) for _, members in groups)
    rows = min(rows, most)
    # At least half of `rows`, because small batches are slower per picture.
    return {rows, *(max(-(-count // -(-count // rows)), -(-rows // 2)) for count in (most, trunks))}


def _batches(program: Program, groups: list[Any], share: bool) -> tuple[list[Batch], int]:
    """Splits groups of points into batches for one program, and returns the batches and their total evaluations."""
    batches, total = [], 0
    for (scheduler, settings, calls, _), members in groups:
        parts, shares = _cut(members, program.rows), False
        evaluations = len(parts) * program.rows * (2 + program.concepts) * calls
        if share and program.concepts:
            points = [point for *_, point in members]
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


def _batch(entry: dict[str, Any], programs: list[Program]) -> Batch:
    values = {"program": programs[entry["program"]], "points": tuple(entry["points"]), "names": tuple(entry["names"])}
    return Batch(**entry | values | {name: _pairs(entry[name]) for name in ("settings", "adapters", "text_adapters")})


def _pairs(entries: list[list[Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _tuples(value)) for name, value in entries)


def _tuples(value: Any) -> Any:
    # JSON stores tuples as lists.
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _entries_of(facts: Facts) -> dict[str, Any]:
    entries = {field.name: getattr(facts, field.name) for field in dataclasses.fields(Facts)}
    earlier = None if facts.earlier is None else _entries_of(facts.earlier)
    return entries | {"earlier": earlier, "recommended": facts.recommended.as_dict()}


def _facts(entries: dict[str, Any]) -> Facts:
    sizes: list[Any] = [tuple(value) if isinstance(value, list) else value for value in entries["sizes"]]
    earlier = None if entries["earlier"] is None else _facts(entries["earlier"])
    recommended = Recommended(**entries["recommended"])
    return Facts(**entries | {"sizes": Sizes(*sizes), "earlier": earlier, "recommended": recommended})
