"""Call arguments for families with continuous states (latents or pixels)."""

import dataclasses
from typing import Any

import numpy as np

from sega_jax.method.argument_kinds import Flag, Integer, Kind, Real
from sega_jax.method.arguments import argument
from sega_jax.method.checks import check_int
from sega_jax.method.naming import assignment, name_of
from sega_jax.method.numerics import floating
from sega_jax.systems.call import MAX_PIXELS, Call
from sega_jax.systems.images import Pictures

STRENGTH = 0.8  # diffusers' default


@dataclasses.dataclass(frozen=True)
class Latents(Kind):
    """Noise as a floating-point array. Its shape is checked when the call is set up."""

    noun: str = "an array [pictures, height / f, width / f, channels]"

    def check(self, name: str, value: Any) -> np.ndarray:
        return floating(name, value, "(pictures, height, width, channels)")


class Tiles(Kind):
    """True, False, or the side length of a tile in pixels."""

    noun = "True, False, or the side length of a tile in pixels"
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
    """The call arguments of a family with continuous states."""

    guidance_rescale: float | Any = argument(
        0.0,
        Real(0, 1),
        "how much of the extra contrast from a high guidance scale to remove (`sega_jax.rescale`): 0 for none, 1 for"
        " all. 0.7 suits zero-SNR checkpoints. Edits are not rescaled",
        varies="row",
        sweep=True,
        recommendable=True,
        shell=True,
        shell_help="how much to remove of the extra contrast of a high --guidance-scale, from none (0) to all (1)",
    )
    eta: float | Any = argument(
        None,
        Real(0, 1),
        "the share of fresh noise in each step of DDIM and TCD. Other schedulers reject it, or ignore it with a warning"
        " if `strict` is false",
        default_text="0 for DDIM and 0.3 for TCD",
        varies="row",
        sweep=True,
        shell=True,
        shell_help="the share of fresh noise in each step of the schedulers DDIM and TCD; other schedulers have none",
    )
    latents: Any = argument(
        None,
        Latents(),
        "the initial noise, which replaces the noise drawn from the seed; f is the checkpoint's downsampling factor",
    )
    rows_at_once: int | None = argument(
        None,
        Integer(1),
        "the number of pictures that a device predicts at once; lower values save memory. By default, a CPU predicts"
        " one picture at a time, which is faster there, and other devices predict all their pictures at once. Results"
        " differ only by rounding",
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AutoencodedCall(DiffusionCall):
    """The call arguments of a family whose states are an autoencoder's latents."""

    tiled: bool | int = argument(
        False,
        Tiles(),
        "decode large pictures in overlapping tiles, as diffusers does. This saves memory, but seams may show. A number"
        " sets the side length of a tile and must be a multiple of 4 times the autoencoder's downsampling factor",
        varies="program",
        sweep=True,
        shell=True,
        shell_help="decode large pictures in overlapping tiles, which saves memory; a number sets the side of a tile",
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StartingCall(AutoencodedCall):
    """The arguments of a call that may start from a picture."""

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
        "how far the result may depart from the initial picture: only the last int(steps * strength) steps run,"
        " as in diffusers. The warm-up and cool-down of edits count only model calls that run",
        default_text=str(STRENGTH),
        sweep=True,
        shell=True,
        shell_help="how far the result may depart from the picture of --image: 0.8 runs the last 80 % of the steps",
    )

    image_noise: Any = argument(
        None,
        Latents(),
        "the standard normal noise for drawing the latents of the picture to start from; it replaces the noise drawn"
        " from the seed",
    )

    def check_together(self) -> None:
        super().check_together()
        if self.image is not None:
            return
        if self.strength is not None:
            raise ValueError(
                f"{assignment('strength', self.strength)} needs a picture to start from; give one as"
                f" {name_of('image')}, or leave out {name_of('strength')}"
            )
        if self.image_noise is not None:
            raise ValueError("image_noise needs a picture to start from; give one as image, or leave out image_noise")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ConditionedCall(DiffusionCall):
    """The arguments of a call that enlarges a low-resolution picture."""

    image: Any = argument(
        None, Pictures(), "the low-resolution picture to enlarge", varies="row", sweep=True, shell=True
    )
    noise_level: int | Any = argument(
        0,
        Integer(0),
        "the amount of noise added to the low-resolution picture, as a training timestep; higher values invent more"
        " detail",
        varies="row",
        sweep=True,
        shell=True,
        shell_help="the amount of noise added to the small picture; higher values invent more detail",
    )
    noise_anew: bool = argument(
        False,
        Flag(),
        "draw new noise for the low-resolution picture at every model call, as the original DeepFloyd-IF code does;"
        " diffusers draws it once",
        sweep=True,
        shell=True,
        shell_help="draw that noise again at every step, as the original DeepFloyd-IF code does, instead of once",
    )
    image_noise: Any = argument(
        None,
        Latents("an array [pictures, height / f, width / f, 3], or [calls, pictures, ...] with noise_anew"),
        "the standard normal noise that is added to the low-resolution picture after it is resized to the state's"
        " height and width. It replaces the noise drawn from the seed. f is the checkpoint's downsampling factor",
    )
