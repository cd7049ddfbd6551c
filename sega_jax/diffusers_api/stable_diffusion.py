"""diffusers' `SemanticStableDiffusionPipeline` (0.42.1), translated."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from sega_jax.diffusers_api import arguments
from sega_jax.diffusers_api.files import FilesFace
from sega_jax.method.schedules import Scheduler
from sega_jax.nn.clip import CLIPTextModel
from sega_jax.nn.safety import StableDiffusionSafetyChecker
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.loading import load
from sega_jax.pipelines.pipeline import USUAL, Pipeline
from sega_jax.pipelines.safety import FeatureExtractor, Safety
from sega_jax.systems.registry import STABLE_DIFFUSION
from sega_jax.systems.stable_diffusion import Models
from sega_jax.text.tokenizers import Tokenizer


@dataclasses.dataclass
class SemanticStableDiffusionPipelineOutput:
    """The result of a call.

    Attributes:
        images: PIL pictures, or an array [rows, height, width, 3] in [0, 1], or latents, channels last.
        nsfw_content_detected: of each picture whether the safety checker flagged it, which makes it black; None
            for latents and without a safety checker.
        sem_guidance: with `return_guidance`, what the edits added at each model call, without
            classifier-free and replayed guidance: [calls, rows, height / f, width / f, channels].
        uncond_estimates, text_estimates: likewise, the predictions for the negative prompt and the prompt.
        edit_estimates: likewise, for the concepts: [calls, n, rows, height / f, width / f, channels]; None
            without concepts.
    """

    images: list[Image.Image | None] | np.ndarray
    nsfw_content_detected: list[bool] | None
    sem_guidance: np.ndarray | None = None
    uncond_estimates: np.ndarray | None = None
    text_estimates: np.ndarray | None = None
    edit_estimates: np.ndarray | None = None


class SemanticStableDiffusionPipeline(FilesFace):
    """The face of diffusers' pipeline on ours (`pipeline`).

    It differs where diffusers is wrong: edits also act at `guidance_scale <= 1`, embeddings of several
    concepts stay apart in a batch, tuples and None work wherever lists do, and nothing is recorded
    unless asked for. Arrays are channels last; randomness is a seed or a key.
    """

    _kinds = (STABLE_DIFFUSION,)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: Tokenizer,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: FeatureExtractor | None = None,
        requires_safety_checker: bool = True,
        *,
        devices: Sequence[jax.Device] | Devices | None = None,
    ):
        """From the components of another pipeline, `SemanticStableDiffusionPipeline(**pipe.components)`: nothing is
        loaded or compiled again."""
        del requires_safety_checker
        where = devices if isinstance(devices, Devices) else Devices(devices)
        models = where.place(Models.build(text_encoder, unet, vae))
        self.pipeline = Pipeline(models, tokenizer, scheduler, where, _safety(safety_checker, feature_extractor))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        variant: str | None = None,
        devices: Sequence[jax.Device] | Devices | None = None,
        attention: str | None = None,
        scheduler: Any = None,
        safety_checker: StableDiffusionSafetyChecker | bool | None = True,
        feature_extractor: FeatureExtractor | None = None,
        requires_safety_checker: bool = True,
        text_encoder: CLIPTextModel | None = None,
        unet: UNet2DConditionModel | None = None,
        vae: AutoencoderKL | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> "SemanticStableDiffusionPipeline":
        """See `sega_jax.load`. `torch_dtype` is another name of `dtype` and may be torch's own. With
        `safety_checker=None` none is loaded; another pipeline's comes with its `feature_extractor`;
        `requires_safety_checker` changes nothing."""
        del requires_safety_checker
        if feature_extractor is not None and (safety_checker is None or isinstance(safety_checker, bool)):
            raise TypeError("feature_extractor is the checkpoint's own; give another's with its safety_checker")
        if not (safety_checker is None or isinstance(safety_checker, bool)):
            safety_checker = _safety(safety_checker, feature_extractor)
        cls._check(pretrained_model_name_or_path, revision)
        return cls.from_pipe(
            load(
                pretrained_model_name_or_path,
                revision=revision,
                dtype=torch_dtype if dtype is None else dtype,
                variant=variant,
                devices=devices,
                attention=attention,
                scheduler=scheduler,
                safety_checker=safety_checker,
                text_encoder=text_encoder,
                unet=unet,
                vae=vae,
                tokenizer=tokenizer,
            )
        )

    @property
    def components(self) -> dict[str, Any]:
        """By diffusers' names, and the devices: what the constructor takes."""
        models, safety = self.pipeline.models, self.pipeline.safety
        return {
            "vae": models.vae,
            "text_encoder": models.text_encoder,
            "tokenizer": self.pipeline.tokenizer,
            "unet": models.unet,
            "scheduler": self.pipeline.scheduler,
            "safety_checker": None if safety is None else safety.checker,
            "feature_extractor": None if safety is None else safety.feature_extractor,
            "devices": self.pipeline.devices,
        }

    @property
    def safety_checker(self) -> StableDiffusionSafetyChecker | None:
        """The checkpoint's safety checker, or None; `pipe.safety_checker = None` turns it off."""
        return self.components["safety_checker"]

    @safety_checker.setter
    def safety_checker(self, value: None) -> None:
        if value is not None:
            raise TypeError("safety_checker can be turned off with None, but not replaced")
        self.pipeline.safety = None

    @property
    def feature_extractor(self) -> FeatureExtractor | None:
        """What prepares pictures for the safety checker, or None."""
        return self.components["feature_extractor"]

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, float, np.ndarray], Any] | None = None,
        callback_steps: int = 1,
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
        *,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        image: Any = None,
        strength: float = USUAL,
        guidance_rescale: float = 0.0,
        long_prompts: bool = False,
        weighted: bool = False,
        key: jax.Array | None = None,
        generator: None = None,
        return_guidance: bool = False,
        progress: bool | None = None,
    ) -> SemanticStableDiffusionPipelineOutput | tuple:
        """Arguments, defaults and results as in diffusers, with these differences.

        Args:
            seed: in place of a generator: s for pictures s, s + 1, ..., or one each; 0 where none is given.
                `key` is a JAX key. The noise is JAX's: only given `latents` make diffusers' own picture.
            latents: initial noise, channels last, [rows, height / f, width / f, channels].
            editing_prompt_embeddings: [n, tokens, channels], a concept each, for all rows; or
                [prompts, n, tokens, channels]. Ignored where `editing_prompt` is given.
            reverse_editing_direction, edit_guidance_scale, edit_warmup_steps, edit_cooldown_steps,
                edit_threshold, edit_weights: one for all concepts or one each, as a number, list, tuple or
                array; None is the default. Too few are an error; too many warn and are cut.
            guidance_scale: up to 1, the plain conditional estimate is used (s = 1) and edits are added.
            sem_guidance: guidance to add, as `sem_guidance` of an earlier output.
            prompt_embeds, negative_prompt_embeds: in place of the words, [prompts, tokens, channels] (one negative
                for all is [1, tokens, channels]), as `pipe.pipeline.encode` gives them.
            image, strength: a picture to start from, and the share of the steps that is run, as diffusers'
                `StableDiffusionImg2ImgPipeline` has them; see `Pipeline.__call__`.
            guidance_rescale: as `StableDiffusionPipeline` of diffusers has it; see `Pipeline.__call__`.
            long_prompts, weighted: how texts are read, which diffusers' pipelines leave to others; see
                `Pipeline.__call__`.
            progress: whether to show a bar; None is in terminals and notebooks.
            return_guidance: whether the output has the estimates and the guidance of every call.

        Raises:
            TypeError, ValueError: as `Pipeline.__call__`; nothing ran.
        """
        out = self._made(
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
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            long_prompts=long_prompts,
            weighted=weighted,
            eta=eta,
            seed=seed,
            key=key,
            generator=generator,
            latents=latents,
            image=image,
            strength=strength,
            height=height,
            width=width,
            edit_momentum_scale=edit_momentum_scale,
            edit_mom_beta=edit_mom_beta,
            sem_guidance=sem_guidance,
            output_type=output_type,
            return_guidance=return_guidance,
            callback=callback,
            callback_steps=callback_steps,
            progress=progress,
        )
        flags = None if out.flagged is None else out.flagged.tolist()
        if not return_dict:
            return out.images, flags
        return SemanticStableDiffusionPipelineOutput(out.images, flags, **arguments.recorded(out.record))


def _safety(checker: Any, extractor: Any) -> Safety | None:
    if checker is None:
        return None
    if not (isinstance(checker, StableDiffusionSafetyChecker) and isinstance(extractor, FeatureExtractor)):
        raise TypeError("safety_checker should be another pipeline's, with its feature_extractor; or None")
    return Safety(extractor, checker)
