"""diffusers' `StableDiffusionUpscalePipeline` (0.42.1), with semantic guidance.

The arguments for semantic guidance are the same as in diffusers' `SemanticStableDiffusionPipeline`.
"""

import dataclasses
from typing import Any

from sega_jax.diffusers_api.arguments import DiffusionArguments, PipelineArguments, positional
from sega_jax.diffusers_api.files import LatentPipeline
from sega_jax.diffusers_api.stable_diffusion import SemanticStableDiffusionPipeline
from sega_jax.method.argument_kinds import Opaque
from sega_jax.method.arguments import argument, changed, takes
from sega_jax.systems.clip_text import ClipCall
from sega_jax.systems.diffusion_call import DiffusionCall
from sega_jax.systems.images import Pictures
from sega_jax.systems.upscaler import SYSTEM, UpscalerCall


@positional(
    *("prompt", "image", "num_inference_steps", "guidance_scale", "noise_level", "negative_prompt"),
    *("num_images_per_prompt", "eta", "generator", "latents", "prompt_embeds", "negative_prompt_embeds"),
    *("output_type", "return_dict", "callback", "callback_steps", "cross_attention_kwargs", "clip_skip"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UpscaleArguments(DiffusionArguments):
    """The arguments of `StableDiffusionUpscalePipeline`."""

    shared = (
        *DiffusionArguments.shared,
        "latents",
        "image",
        "noise_level",
        "long_prompts",
        "weighted",
        "clip_skip",
    )

    image: Any = argument(None, Opaque(Pictures.noun), "the low-resolution picture to enlarge")
    num_inference_steps: int = changed(PipelineArguments, "num_inference_steps", 75)
    guidance_scale: float | list[float] = changed(PipelineArguments, "guidance_scale", 9.0)
    noise_level: int = changed(UpscalerCall, "noise_level", 20)
    latents: Any = changed(DiffusionCall, "latents", None)
    long_prompts: bool = changed(ClipCall, "long_prompts", False)
    weighted: bool = changed(ClipCall, "weighted", False)
    clip_skip: int | None = changed(ClipCall, "clip_skip", None)


class StableDiffusionUpscalePipeline(LatentPipeline):
    """diffusers' pipeline for the x4 upscaler, with semantic guidance.

    It wraps a native pipeline, `pipeline`. Arrays have channels last. The noise comes from a seed, a generator or a JAX
    key.
    """

    _systems = (SYSTEM,)

    __call__ = takes(UpscaleArguments, "StableDiffusionUpscalePipeline")(
        SemanticStableDiffusionPipeline.__call__.__wrapped__  # type: ignore[attr-defined]
    )
