"""Paella in diffusers' words, which has no pipeline of version 3, with those of semantic guidance that its Stable
Diffusion has, and the published sampler's own."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from sega_jax.diffusers_api import arguments
from sega_jax.diffusers_api.base import AnyFace
from sega_jax.pipelines.loading import load
from sega_jax.pipelines.paella import PaellaPipeline
from sega_jax.pipelines.pipeline import USUAL
from sega_jax.pipelines.running import one_of
from sega_jax.systems.paella import TEMPERATURE
from sega_jax.systems.registry import PAELLA

_OUTPUTS = {"pil": "pil", "np": "float", "latent": "tokens"}
# The published sampler's words.
_MODES = {"multinomial": "sample", "argmax": "argmax", "quant": "nearest"}


@dataclasses.dataclass
class SemanticPaellaPipelineOutput:
    """The result of a call.

    Attributes:
        images: PIL pictures, or an array [rows, height, width, 3] in [0, 1], or tokens [rows, height / f, width / f].
        sem_guidance: with `return_guidance`, what the edits added to the logits at each model call, without
            classifier-free guidance: [calls, rows, height / f, width / f, vocabulary].
        uncond_estimates, text_estimates: likewise, the logits for the negative prompt and the prompt.
        edit_estimates: likewise, for the concepts: [calls, n, rows, height / f, width / f, vocabulary]; None without
            concepts.
    """

    images: list[Image.Image | None] | np.ndarray
    sem_guidance: np.ndarray | None = None
    uncond_estimates: np.ndarray | None = None
    text_estimates: np.ndarray | None = None
    edit_estimates: np.ndarray | None = None


class SemanticPaellaPipeline(AnyFace):
    """A face on `sega_jax.PaellaPipeline` (`pipeline`). Arrays are channels last; randomness is a seed or a key."""

    pipeline: PaellaPipeline
    _kinds = (PAELLA,)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, dtype: Any = None, torch_dtype: Any = None, **options: Any
    ) -> "SemanticPaellaPipeline":
        """Of a folder that `sega-jax-convert` wrote; see `sega_jax.load`. `torch_dtype` is another name of `dtype` and
        may be torch's own."""
        cls._check(pretrained_model_name_or_path, options.get("revision"))
        dtype = torch_dtype if dtype is None else dtype
        return cls.from_pipe(load(pretrained_model_name_or_path, dtype=dtype, **options))

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = USUAL,
        guidance_scale: float = USUAL,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, float, np.ndarray], Any] | None = None,
        callback_steps: int = 1,
        *,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        renoise_steps: int | None = None,
        temperature: float | tuple[float, float] = TEMPERATURE,
        mode: str = "multinomial",
        influence: tuple[float, float] = (1.0, 1.0),
        editing_prompt: str | Sequence[str] | None = None,
        editing_prompt_embeddings: Any = None,
        reverse_editing_direction: bool | Sequence[bool] | None = False,
        edit_guidance_scale: float | Sequence[float] | None = 5,
        edit_warmup_steps: int | Sequence[int] | None = 10,
        edit_cooldown_steps: int | Sequence[int | None] | None = None,
        edit_threshold: float | Sequence[float] | None = 0.9,
        edit_momentum_scale: float | None = 0.1,
        edit_mom_beta: float | None = 0.4,
        edit_weights: Sequence[float] | None = None,
        support: str = "channel",
        centred: bool = False,
        key: jax.Array | None = None,
        generator: None = None,
        return_guidance: bool = False,
        progress: bool | None = None,
    ) -> SemanticPaellaPipelineOutput | tuple:
        """Arguments mean what they mean in diffusers' `SemanticStableDiffusionPipeline` and in our face of it.

        Args:
            num_inference_steps, guidance_scale: 32 and 8 where nothing is said. Up to a scale of 1, the plain
                conditional logits are used (s = 1) and edits are added.
            latents: tokens to start from, integers [rows, height / f, width / f].
            output_type: "pil", "np", or "latent", which is tokens.
            prompt_embeds, negative_prompt_embeds: states of ByT5 in place of the words, [prompts, bytes, channels].
            mode: "multinomial", "argmax" or "quant", as in the published sampler.
            renoise_steps, temperature, influence, support, centred: as of `PaellaPipeline`.

        Raises:
            TypeError, ValueError: as `PaellaPipeline.__call__`; nothing ran.
        """
        one_of("output_type", output_type, list(_OUTPUTS))
        one_of("mode", mode, list(_MODES))
        arguments.no_generator(generator)
        out = self.pipeline(
            arguments.either("prompt", prompt, prompt_embeds),
            arguments.edits(
                arguments.concepts(editing_prompt, editing_prompt_embeddings),
                scale=edit_guidance_scale,
                reverse=reverse_editing_direction,
                threshold=edit_threshold,
                warmup=edit_warmup_steps,
                cooldown=edit_cooldown_steps,
                weight=edit_weights,
            ),
            negative_prompt=arguments.either("negative_prompt", negative_prompt, negative_prompt_embeds, needed=False),
            images_per_prompt=num_images_per_prompt,
            steps=num_inference_steps,
            renoise_steps=renoise_steps,
            temperature=temperature,
            choice=_MODES[mode],
            influence=influence,
            guidance_scale=USUAL if guidance_scale is USUAL else arguments.guidance_scale(guidance_scale),
            seed=seed,
            key=key,
            tokens=latents,
            height=height,
            width=width,
            momentum_scale=0.1 if edit_momentum_scale is None else edit_momentum_scale,
            momentum_beta=0.4 if edit_mom_beta is None else edit_mom_beta,
            support=support,
            centred=centred,
            output=_OUTPUTS[output_type],
            record=return_guidance,
            callback=callback,
            callback_steps=callback_steps,
            progress=progress,
            strict=False,
        )
        if not return_dict:
            return (out.images,)
        return SemanticPaellaPipelineOutput(out.images, **arguments.recorded(out.record))
