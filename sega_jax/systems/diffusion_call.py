"""The arguments of the families of continuous states, latents or pixels."""

import dataclasses
from typing import Any

import numpy as np

from sega_jax.method.argument_kinds import Flag, Integer, Kind, Real
from sega_jax.method.arguments import argument
from sega_jax.method.checks import check_int
from sega_jax.method.numerics import floating
from sega_jax.systems.call import MAX_PIXELS, Call
from sega_jax.systems.images import Pictures

STRENGTH = 0.8  # diffusers' default


@dataclasses.dataclass(frozen=True)
class Latents(Kind):
    """Noise, an array of floats; the setup checks its shape."""

    noun: str = "an array [pictures, height / f, width / f, channels]"

    def check(self, name: str, value: Any) -> np.ndarray:
        return floating(name, value, "(pictures, height, width, channels)")


class Tiles(Kind):
    """True, False, or the side of a tile in pixels."""

    noun = "True, False, or the side of a tile in pixels"
    metavar = "PIXELS"
    flag_value = "true"

    def check(self, name: str, value: Any) -> bool | int:
        return value if isinstance(value, bool) else check_int(name, value, 1, MAX_PIXELS)

    def parse(self, name: str, text: str) -> bool | int:
        return True if text == self.flag_value else Integer(1, MAX_PIXELS).parse(name, text)

    def cells(self, name: str, value: Any) -> dict[str, Any]:
        return {name: str(value).lower()}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DiffusionCall(Call):
    """A call of a family of continuous states."""

    guidance_rescale: float | Any = argument(
        0.0,
        Real(0, 1),
        "the share of the contrast added by a high guidance scale that is removed again (`sega_jax.rescale`); 0.7 suits"
        " zero-SNR checkpoints. Edits are not rescaled",
        varies="row",
        sweep=True,
        shell=True,
    )
    eta: float | Any = argument(
        None,
        Real(0, 1),
        "the share of fresh noise in DDIM (by default 0) and TCD (by default 0.3); with another scheduler it is an"
        " error, or ignored if `strict` is false",
        varies="row",
        sweep=True,
        shell=True,
    )
    latents: Any = argument(
        None, Latents(), "the initial noise, which replaces the seed's; f is the checkpoint's factor"
    )
    rows_at_once: int | None = argument(
        None,
        Integer(1),
        "the number of pictures a device predicts at once, to save memory; by default all of them, but one at a time on"
        " CPUs, where that is faster. Results differ only by rounding",
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AutoencodedCall(DiffusionCall):
    """A call of a family whose states are latents of an autoencoder."""

    tiled: bool | int = argument(
        False,
        Tiles(),
        "whether to decode large pictures in overlapping tiles, as diffusers does. It saves memory, but seams may show."
        " A number sets the side of a tile, a multiple of 4 times the checkpoint's factor",
        varies="program",
        sweep=True,
        shell=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StartingCall(AutoencodedCall):
    """A call that may start from a picture."""

    image: Any = argument(
        None,
        Pictures(),
        "the picture to start from, of the same size as the result",
        varies="row",
        sweep=True,
        shell=True,
    )
    strength: float | None = argument(
        None,
        Real(0, 1),
        "how far the result may leave the picture to start from: only the last int(steps * strength) steps run, as in"
        f" diffusers; {STRENGTH} by default. Warm-ups and cool-downs count the model calls that run",
        sweep=True,
        shell=True,
    )

    image_noise: Any = argument(
        None,
        Latents(),
        "the standard normal noise with which the latents of the picture to start from are drawn, in place of the"
        " seed's",
    )

    def check_together(self) -> None:
        super().check_together()
        if self.image is not None:
            return
        if self.strength is not None:
            raise ValueError(
                f"strength={self.strength!r} needs a picture to start from; give it as image, or leave both out"
            )
        if self.image_noise is not None:
            raise ValueError("image_noise needs a picture to start from; give it as image, or leave both out")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ConditionedCall(DiffusionCall):
    """A call that enlarges a picture."""

    image: Any = argument(
        None, Pictures(), "the low-resolution picture to enlarge", varies="row", sweep=True, shell=True
    )
    noise_level: int | Any = argument(
        0,
        Integer(0),
        "the timestep whose noise is added to the low-resolution picture; higher values invent more detail",
        varies="row",
        sweep=True,
        shell=True,
    )
    noise_anew: bool = argument(
        False,
        Flag(),
        "whether to draw that noise again at every model call, as DeepFloyd-IF's own code does; diffusers draws it"
        " once",
        sweep=True,
        shell=True,
    )
    image_noise: Any = argument(
        None,
        Latents("an array [pictures, height / f, width / f, 3], or [calls, pictures, ...] with noise_anew"),
        "the standard normal noise that is added to the low-resolution picture once that is as large as the state, in"
        " place of the seed's; f is the checkpoint's factor",
    )
