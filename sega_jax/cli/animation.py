"""Reads the options of `sega-jax edit` for animations: the setting that changes, and its value in each frame."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import click

from sega_jax.cli import options as shell
from sega_jax.cli.concepts import format_edit, parse_edit
from sega_jax.cli.edit_run import SEEDS
from sega_jax.method.argument_kinds import Integer, Real
from sega_jax.method.arguments import arguments
from sega_jax.method.guidance import Edit
from sega_jax.method.guidance.edits import SETTINGS
from sega_jax.systems.base import System
from sega_jax.systems.call import Steps
from sega_jax.systems.registry import systems

FORMATS = ("webp", "gif")
_MOST_FRAMES = 256
# The units in which files store the duration of a frame, in milliseconds. Browsers play GIFs with less than two units
# slowly.
_UNITS = {"webp": 1, "gif": 10}
_FPS = Real(0.1, 50)
_NUMBER = re.compile(r"[+-]?([0-9]{1,15}\.?[0-9]{0,15}|\.[0-9]{1,15})([eE][+-]?[0-9])?")


def options() -> list[click.Option]:
    """Returns the options for animations."""
    return [
        click.Option(
            ["--animate"],
            metavar="SETTING=VALUES",
            help="Write an animation for each seed instead of pictures. One setting changes: glasses.scale=0:8:0.5 goes"
            " from 0 to 8 in steps of 0.5. The setting is an edit's setting, such as glasses.scale or -beard.scale"
            " (positive scales remove the beard), or a number of the call, such as guidance_scale or steps. The values"
            " are numbers and ranges, separated by commas.",
        ),
        click.Option(
            ["--animate-format"], type=click.Choice(FORMATS), help=f"The animation's format.  [default: {FORMATS[0]}]"
        ),
        click.Option(
            ["--fps"],
            metavar="NUMBER",
            help="The animation's frames per second.  [default: all values in 3 seconds, but at least 2 and at most 20"
            " frames per second; a GIF has the nearest of 50, 33.3, 25, 20, 16.7 and so on]",
        ),
        click.Option(["--one-way"], is_flag=True, default=None, help="Play the animation only forward, not back."),
        click.Option(["--no-captions"], is_flag=True, default=None, help="Leave the value out below each frame."),
    ]


def names() -> list[str]:
    """Returns the names of the parameters that this module's options provide."""
    return [one.name or "" for one in options()]


def pop_options(given: dict[str, Any]) -> dict[str, Any]:
    """Removes this module's options from the given options, and returns those that have a value."""
    values = {name: given.pop(name) for name in names()}
    return {name: value for name, value in values.items() if value is not None}


def words(known: Mapping[str, Any]) -> list[str]:
    """Returns the command-line arguments that set the given options."""
    given = {f"--{name.replace('_', '-')}": known[name] for name in names() if known.get(name) is not None}
    return [word for label, value in given.items() for word in ([label] if value is True else [label, value])]


class Frame(NamedTuple):
    """The settings of a frame."""

    value: str  # the value of the setting that changes
    edits: list[Edit]
    call: dict[str, Any]  # {name: value} if an argument of the call changes, otherwise {}


class Animation(NamedTuple):
    """The setting that changes, its values, and the options for the file."""

    setting: str  # in the notation of --animate, such as "-beard.scale"
    name: str  # the name of the argument, such as "scale"
    edit: int | None  # the index of the edit, or None if an argument of the call changes
    values: list[str]
    known: Mapping[str, Any]  # the options, as they are stored in files

    @property
    def format(self) -> str:
        """The file's format, "webp" or "gif"."""
        return self.known.get("animate_format", FORMATS[0])

    @property
    def fps(self) -> float:
        """The number of frames per second."""
        return float(self.known.get("fps", min(max(len(self.values) / 3, 2), 20)))

    @property
    def duration(self) -> int:
        """The duration of a frame in milliseconds, which gives the nearest rate that the format can play."""
        unit = _UNITS[self.format]
        shorter = int(1000 / self.fps / unit) * unit
        return min((shorter, shorter + unit), key=lambda one: abs(1000 / one - self.fps))

    def check_family(self, system: System, model: str) -> None:
        """Checks that a family's calls accept the argument that changes, and its values.

        Args:
            model: the checkpoint's name, for error messages.

        Raises:
            TypeError, ValueError: the family does not have the argument, or a value is out of range.
        """
        if self.edit is None:
            shell.check_family(system, model, [self.name])
            self.frames([], system)

    def frames(self, concepts: Sequence[Edit], system: System) -> list[Frame]:
        """Returns the frames, in the order of the values. All other settings of the edits stay as they are.

        Raises:
            TypeError, ValueError: a value is out of range.
        """
        with _naming(self.known["animate"]):
            if self.edit is None:
                return [Frame(one, list(concepts), shell.parsed(system.call, {self.name: one})) for one in self.values]
            return [Frame(one, self._changed(concepts, self.edit, one), {}) for one in self.values]

    def _changed(self, concepts: Sequence[Edit], index: int, value: str) -> list[Edit]:
        """Returns the edits with another value of one setting of one edit."""
        number = arguments(Edit)[self.name].kind.parse(self.setting, value)
        if self.name == "scale" and self.setting.startswith("-"):
            number = -number
        changed = dataclasses.replace(concepts[index], **{self.name: number})
        return [*concepts[:index], changed, *concepts[index + 1 :]]


def read(given: Mapping[str, Any], edits: Sequence[str], concepts: Sequence[Edit], image: bool) -> Animation | None:
    """Reads and checks the options for animations as far as possible without reading a checkpoint.

    Args:
        given: {parameter: value} for the options that were given.
        edits: the edits as they were given.
        concepts: the edits.
        image: whether the command names a picture to start from.

    Returns:
        The animation. None if the command makes pictures instead.

    Raises:
        TypeError, ValueError: an option is given without --animate or is malformed, the setting is unknown, a value is
            out of range, or there are too few or too many values.
    """
    if "animate" not in given:
        for name in given:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is given without --animate; name the setting to animate, or leave {option} out")
        return None
    if "fps" in given:
        _FPS.parse("--fps", given["fps"])
    text = given["animate"]
    with _naming(text):
        setting, equals, listed = text.rpartition("=")
        if not equals:
            raise ValueError("the setting should be followed by its values, as in glasses.scale=0:8:0.5")
        values = parse_values(listed)
        if len(values) < 2:
            raise ValueError(
                f"{listed.strip()} is one value, but an animation needs at least two; give a range such as 0:8:0.5"
            )
        setting, name, index, negated = _find(setting.strip(), edits, concepts)
        if negated:
            values = [_plain(-Fraction(one)) for one in values]
            listed = ",".join(values)
        if name == "strength" and not image:
            raise ValueError("strength needs a picture to start from; name one with --image")
        animation = Animation(setting, name, index, values, {**given, "animate": f"{setting}={listed.strip()}"})
        if "fps" in given and animation.format == "gif":
            # Files store the rate at which they are played.
            animation = animation._replace(known={**animation.known, "fps": f"{1000 / animation.duration:g}"})
        if index is None:
            for one in values:
                shell.check_early({name: one})
        else:
            for one in values:
                animation._changed(concepts, index, one)
    return animation


@contextmanager
def _naming(text: str) -> Iterator[None]:
    """Adds the option to the messages of errors that are raised inside a `with` block."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"--animate {text!r}: {error}") from None


def parse_values(text: str) -> list[str]:
    """Parses a list of numbers and ranges, such as "0:8:0.5" or "0,2,4:8:1". Ranges include both ends.

    Raises:
        ValueError: a part is neither a number nor a range, a range does not reach its end, or there are too many
            values.
    """
    values: list[Fraction] = []
    for part in text.split(","):
        numbers = [one.strip() for one in part.split(":")]
        if len(numbers) not in (1, 3) or not all(map(_NUMBER.fullmatch, numbers)):
            raise ValueError(
                f"{part.strip()!r} should be a number such as 0.5, or a range FROM:TO:STEP such as 0:8:0.5"
            )
        first, *rest = map(Fraction, numbers)
        count = _count(part.strip(), first, *rest) if rest else 1
        if len(values) + count > _MOST_FRAMES:
            raise ValueError(
                f"{text.strip()} gives more than {_MOST_FRAMES} values, which is the maximum; give a larger step"
            )
        # Fractions avoid accumulated rounding errors.
        values += [first + i * rest[1] for i in range(count)] if rest else [first]
    return list(map(_plain, values))


def _count(part: str, first: Fraction, last: Fraction, step: Fraction) -> int:
    """Returns the number of values in a range."""
    if step == 0 or (last - first) / step < 0:
        begin, end, _ = part.split(":")
        size = _plain(abs(step) or Fraction(1, 2))
        raise ValueError(
            f"the range {part} never reaches {end.strip()}; write {begin}:{end}:{'-' * (last < first)}{size}"
        )
    steps = (last - first) / step
    if steps.denominator > 1:
        reached = first + int(steps) * step
        raise ValueError(
            f"the range {part} passes {_plain(last)} without reaching it; write"
            f" {_plain(first)}:{_plain(reached)}:{_plain(step)}, or choose a step that divides the range evenly"
        )
    return int(steps) + 1


def _plain(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else repr(float(value))


def _find(setting: str, edits: Sequence[str], concepts: Sequence[Edit]) -> tuple[str, str, int | None, bool]:
    """Finds the argument that a setting names.

    Returns:
        The setting in the notation of the command that `info` prints; the argument's name; the index of its edit, or
        None for an argument of a call; and whether the notation needs the negative values.

    Raises:
        ValueError: there is no such argument, or several edits have the concept.
    """
    words, dot, name = (part.strip() for part in setting.rpartition("."))
    name = name.replace("-", "_")
    of_calls = _of_calls()
    if not dot:
        if name in of_calls:
            return name, name, None, False
        example = f"; for an edit's {name}, name its concept, as in glasses.{name}" if name in SETTINGS else ""
        raise ValueError(f"{setting!r} cannot be animated{example}; the numbers of a call are {', '.join(of_calls)}")
    if name not in SETTINGS:
        raise ValueError(f"{name!r} is not a setting of an edit; the settings are {', '.join(SETTINGS)}")
    notations = [_notation(one.concept, text.startswith("-")) for one, text in zip(concepts, edits, strict=True)]
    try:
        named = parse_edit(words)
        indices = [i for i, one in enumerate(notations) if one == _notation(named.concept, named.scale < 0)]
    except ValueError:
        indices = []
    if len(indices) != 1:
        if indices:
            raise ValueError(
                f"{len(indices)} edits are {words!r}, so it is unclear which of them changes; give one of them"
            )
        known = f"; the edits are {', '.join(notations)}" if notations else ""
        raise ValueError(f"no --edit is {words!r}{known}")
    [index] = indices
    # The command that `info` prints writes edits with a negative scale with a minus, however they were given.
    minus = concepts[index].scale < 0
    setting = f"{_notation(concepts[index].concept, minus)}.{name}"
    return setting, name, index, name == "scale" and minus != edits[index].startswith("-")


def _notation(concept: str, minus: bool) -> str:
    """Returns the notation of an edit without its settings."""
    edit = Edit(concept)
    return format_edit(dataclasses.replace(edit, scale=-edit.scale) if minus else edit)


def _of_calls() -> list[str]:
    """Returns the arguments of calls that are numbers and that can change without recompilation, for any family."""
    declared = [one for system in systems().values() for one in shell.shell_arguments(system.call).values()]
    kinds = (Integer, Real, Steps)
    return list(
        dict.fromkeys(
            one.name
            for one in declared
            if isinstance(one.kind, kinds) and one.varies != "program" and one.name not in SEEDS
        )
    )
