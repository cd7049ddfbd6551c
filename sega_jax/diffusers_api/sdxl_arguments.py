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
# Why arguments are not supported.
_REFINER = "it belongs to the refiner, which is not supported"
_SIZES = "all branches of a picture have the same sizes"


@positional("prompt", "prompt_2", "height", "width", "num_inference_steps")
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SDXLArguments(TimestepArguments, LatentArguments):
    """The arguments of `SemanticStableDiffusionXLPipeline`."""

    shared = (*LatentArguments.shared, "original_size", "target_size", "long_prompts", "weighted", "clip_skip")

    num_inference_steps: int = changed(PipelineArguments, "num_inference_steps", 50)
    guidance_scale: float | list[float] = changed(PipelineArguments, "guidance_scale", 5.0)
    prompt_2: str | list[str] | None = argument(
        None,
        Opaque("words, one for all prompts or one for each"),
        "the prompts of the second text encoder, in place of `prompt`; both encoders read the words of concepts",
    )
    negative_prompt_2: str | list[str] | None = argument(
        None,
        Opaque("words, one for all negative prompts or one for each"),
        "the negative prompts of the second text encoder, in place of `negative_prompt`",
    )
    pooled_prompt_embeds: Any = argument(
        None, Opaque("an array [prompts, channels]"), "the pooled embeddings of the prompts, with prompt_embeds"
    )
    negative_pooled_prompt_embeds: Any = argument(
        None,
        Opaque("an array [prompts, channels]; one prompt's stands for all"),
        "the pooled embeddings of the negative prompts, with negative_prompt_embeds",
    )
    editing_pooled_prompt_embeddings: Any = argument(
        None,
        Opaque("an array [n, channels] for all prompts, or [prompts, n, channels]"),
        "the pooled embeddings of n concepts, with editing_prompt_embeddings",
    )
    strength: float | None = changed(
        LatentArguments,
        "strength",
        None,
        help="the share of the steps that is run after a picture to start from: the last int(steps strength), as in"
        f" diffusers. None is {_STRENGTH}. Warm-ups and cool-downs count the calls that are run",
    )
    original_size: Sequence | None = changed(SDXLCall, "original_size", None)
    crops_coords_top_left: Sequence | None = changed(
        SDXLCall, "crops_top_left", (0, 0), kind=OrNone(arguments(SDXLCall)["crops_top_left"].kind)
    )
    target_size: Sequence | None = changed(SDXLCall, "target_size", None)
    long_prompts: bool = changed(SDXLCall, "long_prompts", False)
    weighted: bool = changed(SDXLCall, "weighted", False)
    clip_skip: int | None = changed(SDXLCall, "clip_skip", None)
    # The other arguments of diffusers.
    denoising_start: Any = argument(
        None, Unsupported(f"{_REFINER}; to start from a picture, give image and strength"), "not supported"
    )
    denoising_end: Any = argument(None, Unsupported(_REFINER, (1.0,)), "not supported")
    negative_original_size: Any = argument(None, Unsupported(_SIZES), "not supported")
    negative_crops_coords_top_left: Any = argument((0, 0), Unsupported(_SIZES, ((0, 0),)), "not supported")
    negative_target_size: Any = argument(None, Unsupported(_SIZES), "not supported")
    aesthetic_score: Any = argument(None, Unsupported(_REFINER, (6.0,)), "not supported")
    negative_aesthetic_score: Any = argument(None, Unsupported(_REFINER, (2.5,)), "not supported")

    def native(self, prompt: Any, negative_prompt: Any, concepts: list[Any]) -> dict[str, Any]:
        own: dict[str, Any] = {"crops_top_left": self.crops_coords_top_left}
        if self.image is not None and self.strength is None:
            own["strength"] = _STRENGTH
        return super().native(prompt, negative_prompt, concepts) | own
