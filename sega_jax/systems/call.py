"""The call arguments that all families share. A family extends `Call` with its own arguments."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sega_jax.method.argument_kinds import Choice, Flag, Integer, Kind, Opaque, Real, Words
from sega_jax.method.arguments import Argument, argument, check_arguments, required
from sega_jax.method.checks import check_int, is_sequence
from sega_jax.method.guidance import SEMANTICS, SUPPORTS, Edit
from sega_jax.method.naming import assignment
from sega_jax.method.numerics import floating
from sega_jax.method.schedules.spacing import NAMED
from sega_jax.systems.conditioning import Text

Prompt = str | Text | np.ndarray | jax.Array
EditLike = Edit | Prompt
PICTURES = ("pil", "uint8", "float")  # values of `output` that request pictures; all others request the final state
MAX_PIXELS = 2**20  # the maximum height and width, in pixels
_MAX_PICTURES = 2**16  # the maximum number of pictures per prompt; far more than one call can generate
_RANGE = re.compile(r"([+-]?[0-9]{1,99})(?:-([0-9]{1,99}))?")  # one seed, or a range on the command line


class Prompts(Kind):
    """A string or the family's text conditioning."""

    noun = "a string or text conditioning"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, str | Text) or hasattr(value, "ndim"):
            return value
        if not isinstance(value, list | tuple) or not value:
            raise TypeError(
                f"{assignment(name, value)} should be a string, text conditioning, or a non-empty list of these"
            )
        for one in value:
            if not isinstance(one, str | Text) and not hasattr(one, "ndim"):
                raise TypeError(
                    f"{assignment(name, value)} should be a string, text conditioning, or a non-empty list of these"
                )
        return value

    def check_one(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{assignment(name, value)} should be a string")
        return value

    def several(self, value: Any) -> bool:
        return False


class Seeds(Integer):
    """Whole numbers from 0 to 2^32 - 1.

    Sequences are checked when the batch is built, because the number of pictures is not known until then. On the
    command line, write several seeds as a range or a list, such as 1-8 or 1-3,8.
    """

    metavar = "SEEDS"
    range = "0 to 4294967295"
    shell_hint = "Write several seeds as 1-8 or 1,4,9."

    def check(self, name: str, value: Any) -> Any:
        if is_sequence(value) or bool(getattr(value, "ndim", 0)):
            return value
        return super().check(name, value)

    def check_one(self, name: str, value: Any) -> int:
        return super().check(name, value)

    def several(self, value: Any) -> bool:
        return False

    def parse(self, name: str, text: str) -> Any:
        """Returns one seed as an int, or several distinct seeds as a list."""
        seeds: list[int] = []
        for part in text.split(","):
            bounds = _RANGE.fullmatch(part.strip())
            if bounds is None:
                raise ValueError(
                    f"{assignment(name, text)} should be a whole number such as 7, a range such as 1-8 or a list such"
                    " as 1,4,9"
                )
            first = self.check_one(name, int(bounds[1]))
            last = first if bounds[2] is None else self.check_one(name, int(bounds[2]))
            if last < first:
                raise ValueError(f"{assignment(name, text)}: the range {first}-{last} is empty; write {last}-{first}")
            if len(seeds) + last - first >= _MAX_PICTURES:
                raise ValueError(f"{assignment(name, text)} gives too many seeds; give at most {_MAX_PICTURES}")
            seeds += range(first, last + 1)
        if len(set(seeds)) < len(seeds):
            repeated = next(seed for seed, count in Counter(seeds).items() if count > 1)
            raise ValueError(f"{assignment(name, text)} gives the seed {repeated} more than once; give each seed once")
        return seeds if len(seeds) > 1 else seeds[0]

    def show(self, value: Any) -> str:
        """Formats one or several seeds; three or more consecutive seeds are written as a range."""
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
    """A number of steps, descending timesteps, or the name of a timestep list.

    Timesteps are checked later, against the scheduler.
    """

    noun = "a whole number of at least 1, a list of descending timesteps, or the name of such a list"
    metavar = "STEPS"
    range = "at least 1"

    def check(self, name: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            return value
        return check_int(name, value, 1)

    def check_one(self, name: str, value: Any) -> int | str:
        if isinstance(value, str):
            if value not in NAMED:
                raise ValueError(f"{assignment(name, value)} should be a whole number, or one of {', '.join(NAMED)}")
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
            raise ValueError(
                f"{assignment(name, text)} should be a whole number, or one of {', '.join(NAMED)}"
            ) from None
        return check_int(name, number, 1)

    def columns(self, name: str) -> dict[str, str]:
        return {name: "int64", "step_list": "string"}

    def cells(self, name: str, value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            return {name: sum(NAMED[value]), "step_list": value}
        return {name: value, "step_list": None}


class Guidance(Kind):
    """Recorded guidance as a floating-point array. Its shape is checked when the batch is built."""

    noun = "an array [1 or pictures, calls, height / f, width / f, channels]"

    def check(self, name: str, value: Any) -> np.ndarray:
        return floating(name, value, "(pictures, calls, height, width, channels)")


class GuidanceScale(Real):
    """Numbers that are negative or at least 1.

    With a scale s in [0, 1), classifier-free guidance, u + s (p - u), would ignore or weaken the prompt.
    """

    range = "at least 1 or negative"

    @property
    def noun(self) -> str:
        return f"a number that is {self.range}"

    def check(self, name: str, value: Any) -> float:
        number = super().check(name, value)
        if 0 <= number < 1:
            effect = "ignores" if number == 0 else "weakens"
            raise ValueError(
                f"{assignment(name, value)} {effect} the prompt; give 1 to turn off classifier-free guidance (model"
                " cards of distilled checkpoints say 0 but mean 1)"
            )
        return number


class Callback(Kind):
    """A function that takes the call index, the timestep and the state."""

    noun = "a function (call index, timestep, state)"

    def check(self, name: str, value: Any) -> Any:
        if value is not None and not callable(value):
            raise TypeError(f"{assignment(name, value)} should be a function that takes (call index, timestep, state)")
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The checked arguments of a pipeline call.

    Raises:
        TypeError, ValueError: An argument has the wrong type, is out of range, or contradicts another.

    Example:
        >>> from sega_jax import Call
        >>> Call("a cat", steps=20).guidance_scale
        7.5
        >>> Call("a cat", guidance_scale=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: guidance_scale=0 ignores the prompt; give 1 to turn off classifier-free guidance ...
    """

    prompt: Prompt | Sequence[Prompt] = dataclasses.field(
        metadata=required(
            Prompts(),
            "what the pictures should show: one prompt or a list of prompts. Here and in edits, text conditioning from"
            " `encode` may be given instead of words",
            sweep=True,
            shell=True,
            varies="row",
        )
    )
    edits: EditLike | Sequence[EditLike] | Sequence[Sequence[EditLike]] = argument(
        (),
        Opaque("strings and `Edit`s for all pictures, or one list of them for each prompt or picture"),
        "the concepts to add to the pictures or remove from them",
    )
    _: dataclasses.KW_ONLY
    negative_prompt: Prompt | Sequence[Prompt] | None = argument(
        None, Prompts(), "what the pictures should not show", varies="row", sweep=True, shell=True
    )
    images_per_prompt: int = argument(
        1,
        Integer(1, _MAX_PICTURES),
        "the number of pictures for each prompt, each with its own seed",
        shell=True,
        shell_help="the number of pictures; their seeds are --seed and the numbers that follow it",
    )
    seed: int | Sequence[int] | None = argument(
        None,
        Seeds(0, 2**32 - 1),
        "the seed of the random noise. With a number s, the pictures have the seeds s, s + 1, ...; a list must contain"
        " one seed for each picture",
        varies="row",
        sweep=True,
        shell=True,
        shell_help="the number that the random noise is drawn from; each seed gives a different picture",
        default_text="0",
    )
    key: jax.Array | None = argument(
        None, Opaque("a JAX key"), "replaces the seed; the index of each picture is folded into the key"
    )
    steps: int | str | Sequence[int] = argument(
        50,
        Steps(),
        "the number of solver steps. The warm-up and cool-down of edits are counted in model calls instead",
        sweep=True,
        recommendable=True,
        shell=True,
        shell_help="the number of steps from noise to picture; more steps take longer",
    )
    guidance_scale: float | Sequence[float] = argument(
        7.5,
        GuidanceScale(),
        "how strongly the pictures follow the prompt: s in u + s (p - u), where u and p are the unconditional and"
        " conditional predictions. 1 turns off classifier-free guidance. Guidance-distilled networks, such as LCM's,"
        " take the scale as an input",
        varies="row",
        sweep=True,
        recommendable=True,
        shell=True,
        shell_help="how strongly the pictures follow the prompt; 1 turns the amplification of the prompt off",
    )
    height: int | None = argument(
        None,
        Integer(1, MAX_PIXELS),
        "the height of the pictures",
        default_text="the checkpoint's height",
        unit="pixels",
        varies="program",
        sweep=True,
        shell=True,
    )
    width: int | None = argument(
        None,
        Integer(1, MAX_PIXELS),
        "the width of the pictures",
        default_text="the checkpoint's width",
        unit="pixels",
        varies="program",
        sweep=True,
        shell=True,
    )
    momentum_scale: float = argument(
        0.1,
        Real(0, 1),
        "the momentum scale for edits that do not set their own",
        sweep=True,
        recommendable=True,
        shell=True,
        of_edits=True,
        shell_help="how much of an edit's earlier effect is added at every model call",
    )
    momentum_beta: float = argument(
        0.4,
        Real(0, 1),
        "the momentum decay for edits that do not set their own",
        sweep=True,
        recommendable=True,
        shell=True,
        shell_help="how slowly this earlier effect changes; 0 remembers only the last model call",
        of_edits=True,
    )
    semantics: str = argument(
        SEMANTICS[0],
        Choice(*SEMANTICS),
        "how several concepts are combined; see `sega_jax.sega`",
        varies="program",
        sweep=True,
        recommendable=True,
        shell=True,
        shell_help='how several concepts are combined: "diffusers" as the library of that name does, "per_concept" each'
        " independently of the others",
        of_edits=True,
    )
    support: str = argument(
        SUPPORTS[0],
        Choice(*SUPPORTS),
        "which entries of a prediction share a threshold; see `sega_jax.sega`",
        varies="program",
        sweep=True,
        recommendable=True,
        shell=True,
        shell_help="which values a threshold compares with each other: those of one channel, all values of the picture,"
        " its pixels (all channels added up), or those of one position (for models of tokens)",
        of_edits=True,
    )
    replay: Any = argument(
        None,
        Guidance(),
        "recorded guidance to add to the predictions; none is added at model calls after the end of the recording",
    )
    output: str = argument(
        "pil",
        Choice(*PICTURES, "latent"),
        "the format of the returned pictures; the last choice returns the final state instead",
    )
    noise: Any = argument(
        None,
        Opaque("an array [calls, pictures, height / f, width / f, channels]"),
        "the standard normal noise that a stochastic solver adds at every model call; it replaces the noise drawn from"
        " the seed",
    )
    record: bool = argument(False, Flag(), "return the predictions of every model call")
    record_noise: bool = argument(
        False, Flag(), "include the solver's noise in the record, in the form that the argument `noise` takes"
    )
    callback: Callable[[int, float, np.ndarray], Any] | None = argument(
        None,
        Callback(),
        "called as callback(call, timestep, state) after the first model call and then after every `callback_steps`"
        " calls, where `call` counts from 0",
    )
    callback_steps: int = argument(1, Integer(1), "the number of model calls between callbacks")
    progress: bool | None = argument(None, Flag(), "show a progress bar; None shows it only in terminals and notebooks")
    strict: bool = argument(
        True,
        Flag(),
        "raise an error instead of a warning for arguments that have no effect, such as an edit that ends before it"
        " begins or an `eta` that the scheduler ignores",
    )

    def __post_init__(self) -> None:
        check_arguments(self)
        self.check_together()

    def check_together(self) -> None:
        """Checks arguments that depend on each other. Families extend this method with their own checks.

        Raises:
            TypeError, ValueError: Arguments contradict each other.
        """
        if self.seed is not None and self.key is not None:
            raise ValueError("seed and key were both given, but key replaces seed; give only one of them")
        if self.record_noise and not self.record:
            raise ValueError("record_noise=True needs a record; give record=True as well")


__all__ = ["PICTURES", "Argument", "Call", "EditLike", "Prompt", "Prompts", "Steps", "Words"]
