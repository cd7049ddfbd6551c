"""The arguments of `SemanticStableDiffusionXLPipeline`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from sega_jax.diffusers_api.arguments import LatentArguments, PipelineArguments, TimestepArguments, positional
from sega_jax.diffusers_api.kinds import OrNone, Unsupported
from sega_jax.method.argument_kinds import Opaque
from sega_jax.method.arguments import argument, arguments, changed
from sega_jax.systems.sdxl import SDXLCall

_STRENGTH = 0.3  # the default of diffusers' `StableDiffusionXLImg2ImgPipeline`
# Reasons why arguments are not supported, with remedies.
_REFINER = "it belongs to the SDXL refiner, so leave it out"
_SIZES = "the negative prompt uses the sizes of the prompt, so leave it out"


@positional("prompt", "prompt_2", "height", "width", "num_inference_steps")
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SDXLArguments(TimestepArguments, LatentArguments):
    """The arguments of `SemanticStableDiffusionXLPipeline`."""

    shared = (*LatentArguments.shared, "original_size", "target_size", "long_prompts", "weighted", "clip_skip")

    num_inference_steps: int = changed(PipelineArguments, "num_inference_steps", 50)
    guidance_scale: float | list[float] = changed(PipelineArguments, "guidance_scale", 5.0)
    prompt_2: str | list[str] | None = argument(
        None,
        Opaque("a string for all prompts, or a list with one for each"),
        "the prompts for the second text encoder, instead of `prompt`. Both encoders read the same concepts",
    )
    negative_prompt_2: str | list[str] | None = argument(
        None,
        Opaque("a string for all negative prompts, or a list with one for each"),
        "the negative prompts for the second text encoder, instead of `negative_prompt`",
    )
    pooled_prompt_embeds: Any = argument(
        None,
        Opaque("an array [prompts, channels]"),
        "the pooled embeddings of the prompts; required with prompt_embeds",
    )
    negative_pooled_prompt_embeds: Any = argument(
        None,
        Opaque("an array [prompts, channels], or [1, channels] for all prompts"),
        "the pooled embeddings of the negative prompts; required with negative_prompt_embeds",
    )
    editing_pooled_prompt_embeddings: Any = argument(
        None,
        Opaque("an array [n, channels] for all prompts, or [prompts, n, channels]"),
        "the pooled embeddings of n concepts; required with editing_prompt_embeddings",
    )
    strength: float | None = changed(
        LatentArguments,
        "strength",
        None,
        help="how far the result may depart from the initial picture: only the last int(steps * strength) steps run,"
        " as in diffusers. Warm-ups and cool-downs count only the model calls that run",
        default_text=str(_STRENGTH),
    )
    original_size: Sequence | None = changed(SDXLCall, "original_size", None)
    crops_coords_top_left: Sequence | None = changed(
        SDXLCall, "crops_top_left", (0, 0), kind=OrNone(arguments(SDXLCall)["crops_top_left"].kind)
    )
    target_size: Sequence | None = changed(SDXLCall, "target_size", None)
    long_prompts: bool = changed(SDXLCall, "long_prompts", False)
    weighted: bool = changed(SDXLCall, "weighted", False)
    clip_skip: int | None = changed(SDXLCall, "clip_skip", None)
    # Unsupported diffusers arguments.
    denoising_start: Any = argument(
        None, Unsupported(f"{_REFINER}, or give image and strength to start from a picture"), "not supported"
    )
    denoising_end: Any = argument(None, Unsupported(_REFINER, (1.0,)), "not supported")
    negative_original_size: Any = argument(None, Unsupported(_SIZES), "not supported")
    negative_crops_coords_top_left: Any = argument((0, 0), Unsupported(_SIZES, ((0, 0),)), "not supported")
    negative_target_size: Any = argument(None, Unsupported(_SIZES), "not supported")
    aesthetic_score: Any = argument(None, Unsupported(_REFINER, (6.0,)), "not supported")
    negative_aesthetic_score: Any = argument(None, Unsupported(_REFINER, (2.5,)), "not supported")

    def native(self, prompt: Any, negative_prompt: Any, concepts: list[Any]) -> dict[str, Any]:
        specific: dict[str, Any] = {"crops_top_left": self.crops_coords_top_left}
        if self.image is not None and self.strength is None:
            specific["strength"] = _STRENGTH
        return super().native(prompt, negative_prompt, concepts) | specific
