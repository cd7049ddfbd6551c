"""diffusers' `IFPipeline` and `IFSuperResolutionPipeline` (0.42.1) with the arguments of semantic guidance that its
Stable Diffusion has, translated."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from sega_jax.diffusers_api import arguments
from sega_jax.diffusers_api.base import Face
from sega_jax.pipelines.loading import load
from sega_jax.pipelines.pipeline import USUAL
from sega_jax.systems.registry import STAGE_1, STAGE_2

_OUTPUTS = {"pil": "pil", "np": "float"}


@dataclasses.dataclass
class SemanticIFPipelineOutput:
    """The result of a call.

    Attributes:
        images: PIL pictures, or an array [rows, height, width, 3] in [0, 1].
        nsfw_detected, watermark_detected: None, since nothing looks for either.
        sem_guidance: with `return_guidance`, what the edits added at each model call, without classifier-free and
            replayed guidance: [calls, rows, height, width, 3].
        uncond_estimates, text_estimates: likewise, the predictions for the negative prompt and the prompt.
        edit_estimates: likewise, for the concepts: [calls, n, rows, height, width, 3]; None without concepts.
    """

    images: list[Image.Image | None] | np.ndarray
    nsfw_detected: list[bool] | None = None
    watermark_detected: list[bool] | None = None
    sem_guidance: np.ndarray | None = None
    uncond_estimates: np.ndarray | None = None
    text_estimates: np.ndarray | None = None
    edit_estimates: np.ndarray | None = None


class SemanticIFPipeline(Face):
    """The face of diffusers' pipelines of either stage of DeepFloyd-IF on ours (`pipeline`), with semantic guidance.

    The cascade in diffusers' way is one of these for each stage, with `encode_prompt` of the first:

        embeddings, negative = stage_1.encode_prompt("a fox")
        small = stage_1(prompt_embeds=embeddings, negative_prompt_embeds=negative, output_type="np").images
        large = stage_2(image=small, prompt_embeds=embeddings, negative_prompt_embeds=negative).images

    and `sega_jax.load_cascade` is the same in one call. Neither safety checker nor watermark are applied; arrays are
    channels last, randomness is a seed or a key.
    """

    _kinds = (STAGE_1, STAGE_2)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, dtype: Any = None, torch_dtype: Any = None, **options: Any
    ) -> "SemanticIFPipeline":
        """See `sega_jax.load`. `torch_dtype` is another name of `dtype` and may be torch's own; `text_encoder=None`,
        given, does without one, as in diffusers.

        Where the libraries are missing that calls clean captions with by default, a warning says so before anything is
        fetched."""
        from sega_jax.text import caption_cleaning

        if "text_encoder" in options and options["text_encoder"] is None:
            options["text_encoder"] = False
        if "unet" in options and options["unet"] is None:
            raise TypeError(
                "unet=None is not supported; sega_jax.pipelines.loading.load_text is the text encoder alone"
            )
        for name in ("safety_checker", "watermarker", "feature_extractor"):
            if options.pop(name, None) not in (None, False):
                raise TypeError(f"{name} is not supported; leave it out")
        try:
            caption_cleaning.check()
        except ImportError as error:
            warnings.warn(f"calls will not run as they are by default: {error}", stacklevel=2)
        cls._check(pretrained_model_name_or_path, options.get("revision"))
        dtype = torch_dtype if dtype is None else dtype
        return cls.from_pipe(load(pretrained_model_name_or_path, dtype=dtype, safety_checker=False, **options))

    def encode_prompt(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        negative_prompt: str | list[str] | None = None,
        clean_caption: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the prompts and of their negative prompts, [prompts * pictures, tokens, channels] each."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = negative_prompt or ""
        negatives = [negatives] * len(prompts) if isinstance(negatives, str) else list(negatives)
        if len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt has {len(negatives)} entries, expected {len(prompts)}, one a prompt")
        made = self.pipeline.encode(_cleaned(prompts + negatives, clean_caption))
        made = made.repeat(num_images_per_prompt, 0)
        return made[: len(made) // 2], made[len(made) // 2 :]

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = USUAL,
        timesteps: Sequence[int] | str | None = None,
        guidance_scale: float = USUAL,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, float, np.ndarray], Any] | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        *,
        image: Any = None,
        noise_level: int | None = None,
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
        sem_guidance: Any = None,
        key: jax.Array | None = None,
        generator: None = None,
        return_guidance: bool = False,
        progress: bool | None = None,
    ) -> SemanticIFPipelineOutput | tuple:
        """Arguments, defaults and results as in diffusers, with these differences.

        Args:
            timesteps: in place of a number of steps, falling; or the name of one of DeepFloyd-IF's lists.
            guidance_scale: up to 1, the plain conditional estimate is used (s = 1) and edits are added.
            seed, key, progress, return_guidance, sem_guidance, and all that is of edits: as of
                `SemanticStableDiffusionPipeline`.
            prompt_embeds, negative_prompt_embeds: in place of the words, [prompts, tokens, channels] (one negative
                for all is [1, tokens, channels]).
            output_type: "pil" or "np"; tensors of torch there are none.
            clean_caption: whether words, also those of edits, are cleaned (`sega_jax.text.caption_cleaning`). It needs
                the extra
                "if"; diffusers warns where its libraries are missing, and goes on without.
            image: the second stage's small picture, of PIL or as an array in [0, 1], channels last; or several.
            noise_level: of the second stage, 250 where None is given.

        Raises:
            TypeError, ValueError: as `Pipeline.__call__`; nothing ran.
            ImportError: captions are to be cleaned, and what cleans them is not installed.
        """
        if output_type not in list(_OUTPUTS):
            raise ValueError(f"output_type={output_type!r} should be one of {', '.join(_OUTPUTS)}")
        arguments.no_generator(generator)
        negative = arguments.either("negative_prompt", negative_prompt, negative_prompt_embeds, needed=False)
        concepts = arguments.concepts(editing_prompt, editing_prompt_embeddings)
        given = arguments.either("prompt", prompt, prompt_embeds)
        out = self.pipeline(
            _cleaned(given, clean_caption),
            arguments.edits(
                _cleaned(concepts, clean_caption),
                scale=edit_guidance_scale,
                reverse=reverse_editing_direction,
                threshold=edit_threshold,
                warmup=edit_warmup_steps,
                cooldown=edit_cooldown_steps,
                weight=edit_weights,
            ),
            negative_prompt=_cleaned(negative, clean_caption),
            images_per_prompt=num_images_per_prompt,
            image=image,
            noise_level=noise_level,
            steps=num_inference_steps if timesteps is None else timesteps,
            guidance_scale=USUAL if guidance_scale is USUAL else arguments.guidance_scale(guidance_scale),
            eta=eta,
            seed=seed,
            key=key,
            height=height,
            width=width,
            momentum_scale=0.1 if edit_momentum_scale is None else edit_momentum_scale,
            momentum_beta=0.4 if edit_mom_beta is None else edit_mom_beta,
            replay=arguments.replayed(sem_guidance, arguments.count(given), num_images_per_prompt),
            output=_OUTPUTS[output_type],
            record=return_guidance,
            callback=callback,
            callback_steps=callback_steps,
            progress=progress,
            strict=False,
        )
        if not return_dict:
            return out.images, None, None
        return SemanticIFPipelineOutput(out.images, **arguments.recorded(out.record))


def _cleaned(texts: Any, clean: bool) -> Any:
    """The words of one or several texts cleaned, and all else as it is."""
    if isinstance(texts, str) and texts and clean:
        from sega_jax.text import caption_cleaning  # whose libraries are of an extra

        return caption_cleaning.clean(texts)
    return [_cleaned(text, clean) for text in texts] if isinstance(texts, list | tuple) else texts
