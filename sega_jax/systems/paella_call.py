"""The arguments of Paella's calls."""

import dataclasses
from typing import Any

import numpy as np

from sega_jax.method.argument_kinds import Choice, Flag, Integer, Kind, Opaque, Pair, Real
from sega_jax.method.arguments import argument, changed
from sega_jax.method.checks import check_float
from sega_jax.method.naming import assignment
from sega_jax.method.solvers import CHOICES
from sega_jax.systems.call import PICTURES, Call

# From the published inference scripts: the share of steps that add new noise to the tokens, and the temperatures.
RENOISED, TEMPERATURE = 26 / 32, (1.2, 0.2)
MAX_STEPS = 2**20


class Positive(Real):
    """Numbers above 0."""

    range = "above 0"

    @property
    def noun(self) -> str:
        return "a number above 0"

    def check(self, name: str, value: Any) -> float:
        number = check_float(name, value)
        if number <= 0:
            raise ValueError(f"{assignment(name, value)} should be above 0")
        return number


class NotNegative(Real):
    """Numbers of at least 0."""

    range = "at least 0"

    @property
    def noun(self) -> str:
        return "a number of at least 0"

    def check(self, name: str, value: Any) -> float:
        number = check_float(name, value)
        if number < 0:
            raise ValueError(f"{assignment(name, value)} should be at least 0")
        return number


class TokenGrid(Kind):
    """A grid of tokens. Its shape is checked when the call is set up."""

    noun = "integers [pictures, height / f, width / f]"

    def check(self, name: str, value: Any) -> np.ndarray:
        try:
            return np.asarray(value)
        except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for tensors with gradients
            raise TypeError(f"{assignment(name, value)} should be {self.noun}") from None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PaellaCall(Call):
    """The arguments of a Paella call, with the defaults of the published inference scripts.

    The SEGA authors' own code for Paella adds s (e - u) after the warm-up. Edits with threshold=0 and momentum_scale=0
    do the same.
    """

    steps: Any = changed(Call, "steps", 32, kind=Integer(1, MAX_STEPS))
    guidance_scale: Any = changed(Call, "guidance_scale", 8.0)
    renoise_steps: int | None = argument(
        None,
        Integer(0),
        "the number of initial steps that renoise tokens",
        default_text="13/16 of all steps",
        sweep=True,
        shell=True,
        shell_help="the number of first steps that replace some tokens with random ones again",
    )
    temperature: float | tuple[float, float] = argument(
        TEMPERATURE,
        Pair(Positive(), "a number, or two", alone=True),
        "the temperature of the logits at the first and the last step; it changes linearly in between",
        sweep=True,
        shell=True,
        shell_help="how random the choice of tokens is, at the first and at the last step",
    )
    choice: str = argument(
        CHOICES[0],
        Choice(*CHOICES),
        'how to choose tokens: "sample" draws them, "argmax" takes the most likely one, and "nearest" takes the one'
        " whose codebook entry is nearest to the expected entry",
        varies="program",
        sweep=True,
        shell=True,
        shell_help="how to choose tokens: draw them at random, take the most likely ones, or those nearest to the mean",
    )
    influence: tuple[float, float] | float = argument(
        (1.0, 1.0),
        Pair(NotNegative(), "a number, or two", alone=True),
        "two factors that scale the attention to the prompt: one for its text and one for its picture embedding (see"
        " `sega_jax.nn.paella.Paella.condition`). The published scripts use (1.2, 0.4), and the published sampler uses"
        " (1, 1). Values other than (1, 1) need a prior and a prompt in words",
        sweep=True,
        shell=True,
        shell_help="how much attention the prompt gets as text, and how much as a picture that the prior predicts from"
        " it; the published scripts use 1.2,0.4",
    )
    centred: bool = argument(
        False,
        Flag(),
        "subtract the mean over the vocabulary from the logits; this affects only the thresholds of edits",
        varies="program",
        sweep=True,
        shell=True,
        shell_help="compare predictions with an edit's threshold after subtracting their mean over all tokens",
        of_edits=True,
    )
    noise: Any = changed(
        Call,
        "noise",
        None,
        kind=Opaque(
            "a pair of arrays: standard Gumbel noise [calls, pictures, height / f, width / f, labels] and uniform"
            " numbers in [0, 1) [calls, pictures, height / f, width / f]"
        ),
        help="the random numbers for choosing and renoising tokens at every model call; they replace the numbers drawn"
        " from the seed",
    )
    tokens: Any = argument(
        None, TokenGrid(), "the tokens to start from and to renoise with; they replace the tokens drawn from the seed"
    )
    output: str = changed(Call, "output", "pil", kind=Choice(*PICTURES, "tokens"))

    def check_together(self) -> None:
        super().check_together()
        if self.renoise_steps is not None and self.renoise_steps > self.steps:
            raise ValueError(
                f"{assignment('renoise_steps', self.renoise_steps)} should be from 0 to {self.steps}, the number of"
                " steps"
            )
