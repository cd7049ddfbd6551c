"""The arguments of a call that all families share. A family extends `Call` by its own."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sega_jax.method.argument_kinds import Choice, Flag, Integer, Kind, Opaque, Real, Words
from sega_jax.method.arguments import Argument, argument, check_arguments, required
from sega_jax.method.checks import brief, check_int, is_sequence
from sega_jax.method.guidance import SEMANTICS, SUPPORTS, Edit
from sega_jax.method.numerics import floating
from sega_jax.method.schedules.spacing import NAMED
from sega_jax.systems.conditioning import Text

Prompt = str | Text | np.ndarray | jax.Array
EditLike = Edit | Prompt
PICTURES = ("pil", "uint8", "float")  # outputs that are pictures; any other is the state that sampling ends with
MOST_PIXELS = 2**20  # of a side
_MOST_PICTURES = 2**16  # of a prompt, far more than one call can make
_RANGE = re.compile(r"([+-]?[0-9]{1,99})(?:-([0-9]{1,99}))?")  # of seeds, in the shell


class Prompts(Kind):
    """Words, or the text conditioning of the family in their place."""

    noun = "words"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, str | Text) or hasattr(value, "ndim"):
            return value
        if not isinstance(value, list | tuple) or not value:
            raise TypeError(f"{name}={brief(value)} should be words, their conditioning, or a non-empty list of them")
        for one in value:
            if not isinstance(one, str | Text) and not hasattr(one, "ndim"):
                raise TypeError(f"{name}={brief(value)} should be words, their conditioning, or a non-empty list")
        return value

    def check_one(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{name}={brief(value)} should be words")
        return value

    def several(self, value: Any) -> bool:
        return False


class Seeds(Integer):
    """Whole numbers from 0 to 2^32 - 1; a sequence is left to the batch, which knows how many pictures there are.

    The shell writes several seeds as ranges and lists: 1-8, or 1-3,8.
    """

    metavar = "SEEDS"
    shell_hint = "Several seeds are written as 1-8 or 1,4,9."

    def check(self, name: str, value: Any) -> Any:
        if is_sequence(value) or bool(getattr(value, "ndim", 0)):
            return value
        return super().check(name, value)

    def check_one(self, name: str, value: Any) -> int:
        return super().check(name, value)

    def several(self, value: Any) -> bool:
        return False

    def parse(self, name: str, text: str) -> Any:
        """Reads one seed as an int, or several different ones as a list."""
        seeds: list[int] = []
        for part in text.split(","):
            bounds = _RANGE.fullmatch(part.strip())
            if bounds is None:
                raise ValueError(f"{name}={brief(text)} should be a whole number such as 7, or several: 1-8 or 1,4,9")
            first = self.check_one(name, int(bounds[1]))
            last = first if bounds[2] is None else self.check_one(name, int(bounds[2]))
            if last < first:
                raise ValueError(f"{name}={brief(text)}: the range {first}-{last} is empty; write {last}-{first}")
            if len(seeds) + last - first >= _MOST_PICTURES:
                raise ValueError(f"{name}={brief(text)} gives too many seeds; give at most {_MOST_PICTURES}")
            seeds += range(first, last + 1)
        if len(set(seeds)) < len(seeds):
            repeated = next(seed for seed, count in Counter(seeds).items() if count > 1)
            raise ValueError(f"{name}={brief(text)} gives the seed {repeated} more than once; give each seed once")
        return seeds if len(seeds) > 1 else seeds[0]

    def show(self, value: Any) -> str:
        """Writes a seed, or several: runs of three or more as ranges."""
        if not is_sequence(value):
            return super().show(value)
        runs: list[list[int]] = []
        for seed in value:
            if runs and seed == runs[-1][-1] + 1:
                runs[-1].append(seed)
            else:
                runs.append([seed])
        return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


class Steps(Kind):
    """A number of steps, the name of a list of timesteps, or falling timesteps; the scheduler checks the latter."""

    noun = "a whole number of at least 1, falling timesteps, or the name of a list of them"
    metavar = "STEPS"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            return value
        return check_int(name, value, 1)

    def check_one(self, name: str, value: Any) -> int | str:
        if isinstance(value, str):
            if value not in NAMED:
                raise ValueError(f"{name}={brief(value)} should be a whole number, or one of {', '.join(NAMED)}")
            return value
        return check_int(name, value, 1)

    def several(self, value: Any) -> bool:
        return False

    def parse(self, name: str, text: str) -> int | str:
        if text in NAMED:
            return text
        try:
            number = int(text)
        except ValueError:
            raise ValueError(f"{name}={text!r} should be a whole number, or one of {', '.join(NAMED)}") from None
        return check_int(name, number, 1)

    def columns(self, name: str) -> dict[str, str]:
        return {name: "int64", "step_list": "string"}

    def cells(self, name: str, value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            return {name: sum(NAMED[value]), "step_list": value}
        return {name: value, "step_list": None}


class Guidance(Kind):
    """Recorded guidance, an array of floats; the batch checks its shape."""

    noun = "an array [1 or pictures, calls, height / f, width / f, channels]"

    def check(self, name: str, value: Any) -> np.ndarray:
        return floating(name, value, "(pictures, calls, height, width, channels)")


class GuidanceScale(Real):
    """Numbers below 0 or from 1 on. From 0 to 1 the formula u + s (p - u) weakens the prompt, or ignores it."""

    @property
    def noun(self) -> str:
        return "a number of at least 1"

    def check(self, name: str, value: Any) -> float:
        number = super().check(name, value)
        if 0 <= number < 1:
            effect = "ignores" if number == 0 else "weakens"
            raise ValueError(
                f"{name}={value!r} {effect} the prompt; give 1 to turn classifier-free guidance off, which is what"
                " model cards of distilled checkpoints mean by 0"
            )
        return number


class Callback(Kind):
    """A function of call, timestep and state."""

    noun = "a function of call, timestep and state"

    def check(self, name: str, value: Any) -> Any:
        if value is not None and not callable(value):
            raise TypeError(f"{name}={brief(value)} should be a function of call, timestep and latents")
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a call of a pipeline, checked.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """

    prompt: Prompt | Sequence[Prompt] = dataclasses.field(
        metadata=required(
            Prompts(),
            "what the pictures show, words or a list of them. The family's text conditioning, as `encode` returns it,"
            " may stand in place of words, here and in edits",
            sweep=True,
            shell=True,
            varies="row",
        )
    )
    edits: EditLike | Sequence[EditLike] | Sequence[Sequence[EditLike]] = argument(
        (), Opaque("words and `Edit`s for all pictures, or one list of them for each prompt or picture"), "concepts"
    )
    _: dataclasses.KW_ONLY
    negative_prompt: Prompt | Sequence[Prompt] | None = argument(
        None, Prompts(), "what the pictures should not show", varies="row", sweep=True, shell=True
    )
    images_per_prompt: int = argument(
        1, Integer(1, _MOST_PICTURES), "the number of pictures of each prompt, from different seeds", shell=True
    )
    seed: int | Sequence[int] | None = argument(
        None,
        Seeds(0, 2**32 - 1),
        "the seed of the noise. A number s gives the pictures the seeds s, s + 1, ...; a list gives one for each"
        " picture. The default is 0, unless a key is given",
        varies="row",
        sweep=True,
        shell=True,
    )
    key: jax.Array | None = argument(None, Opaque("a JAX key"), "replaces the seed; each picture folds in its index")
    steps: int | str | Sequence[int] = argument(
        50,
        Steps(),
        "the number of solver steps; warm-ups and cool-downs count model calls instead",
        sweep=True,
        shell=True,
    )
    guidance_scale: float | Sequence[float] = argument(
        7.5,
        GuidanceScale(),
        "the strength of the prompt, s in u + s (p - u); 1 turns classifier-free guidance off. Networks that were"
        " distilled from it, as LCM's, take the scale as an input",
        varies="row",
        sweep=True,
        shell=True,
    )
    height: int | None = argument(
        None,
        Integer(1, MOST_PIXELS),
        "the height of the pictures; by default the checkpoint's own",
        unit="pixels",
        varies="program",
        sweep=True,
        shell=True,
    )
    width: int | None = argument(
        None,
        Integer(1, MOST_PIXELS),
        "the width of the pictures; by default the checkpoint's own",
        unit="pixels",
        varies="program",
        sweep=True,
        shell=True,
    )
    momentum_scale: float = argument(
        0.1, Real(0, 1), "the momentum scale of edits that do not set their own", sweep=True, shell=True, of_edits=True
    )
    momentum_beta: float = argument(
        0.4,
        Real(0, 1),
        "the decay of the momentum of edits that do not set their own",
        sweep=True,
        shell=True,
        of_edits=True,
    )
    semantics: str = argument(
        SEMANTICS[0],
        Choice(*SEMANTICS),
        "how several concepts act together; see `sega_jax.sega`",
        varies="program",
        sweep=True,
        shell=True,
        of_edits=True,
    )
    support: str = argument(
        SUPPORTS[0],
        Choice(*SUPPORTS),
        "which entries share a threshold; see `sega_jax.sega`",
        varies="program",
        sweep=True,
        shell=True,
        of_edits=True,
    )
    replay: Any = argument(
        None,
        Guidance(),
        "recorded guidance to add again; model calls after its last one get nothing",
    )
    output: str = argument(
        "pil", Choice(*PICTURES, "latent"), "the form of the returned pictures, or the final state instead"
    )
    noise: Any = argument(
        None,
        Opaque("an array [calls, pictures, height / f, width / f, channels]"),
        "the standard normal noise that a stochastic solver adds at every model call, which replaces the seed's",
    )
    record: bool = argument(False, Flag(), "whether to return the predictions of every model call")
    record_noise: bool = argument(
        False, Flag(), "whether the record also has the noise that the solver drew, in the form that `noise` takes"
    )
    callback: Callable[[int, float, np.ndarray], Any] | None = argument(
        None,
        Callback(),
        "a function called as (call, timestep, state) after model call 0 and then after every `callback_steps` calls",
    )
    callback_steps: int = argument(1, Integer(1), "the number of model calls between callbacks")
    progress: bool | None = argument(
        None, Flag(), "whether to show a progress bar; None shows it in terminals and notebooks"
    )
    strict: bool = argument(
        True,
        Flag(),
        "whether an edit that ends before it begins, or an `eta` that the scheduler ignores, is an error or a warning",
    )

    def __post_init__(self) -> None:
        check_arguments(self)
        self.check_together()

    def check_together(self) -> None:
        """Checks that depend on several arguments; a family extends it.

        Raises:
            TypeError, ValueError: arguments that contradict each other.
        """
        if self.seed is not None and self.key is not None:
            raise ValueError("seed and key were both given; they say the same thing, give one")
        if self.record_noise and not self.record:
            raise ValueError("record_noise=True is for the record that record=True returns; give both")


__all__ = ["PICTURES", "Argument", "Call", "EditLike", "Prompt", "Prompts", "Steps", "Words"]
