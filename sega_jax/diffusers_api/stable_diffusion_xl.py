"""diffusers' `StableDiffusionXLPipeline` (0.42.1) with the arguments of semantic guidance that its Stable Diffusion
has, translated."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from sega_jax.diffusers_api import arguments
from sega_jax.diffusers_api.files import FilesFace
from sega_jax.method.numerics import floating
from sega_jax.method.schedules import Scheduler
from sega_jax.nn.clip import CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.loading import load
from sega_jax.pipelines.pipeline import USUAL, Pipeline
from sega_jax.systems.registry import XL
from sega_jax.systems.sdxl import Models
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair

# What diffusers has besides, the values that change nothing there, and what to do instead.
_OTHERS: dict[str, tuple[tuple, str]] = {
    "sigmas": ((None,), "give timesteps, or another scheduler"),
    "denoising_start": ((None,), "it is of the refiner, which is not supported; for a picture give image and strength"),
    "denoising_end": ((None, 1.0), "it is of the refiner, which is not supported"),
    "ip_adapter_image": ((None,), "adapters are not supported"),
    "ip_adapter_image_embeds": ((None,), "adapters are not supported"),
    "cross_attention_kwargs": ((None, {}), "LoRAs are merged into the weights: sega_jax.merge_lora"),
    "negative_original_size": ((None,), "all branches of a picture are told the same sizes"),
    "negative_crops_coords_top_left": ((None, (0, 0)), "all branches of a picture are told the same sizes"),
    "negative_target_size": ((None,), "all branches of a picture are told the same sizes"),
    "aesthetic_score": ((None, 6.0), "it is of the refiner, which is not supported"),
    "negative_aesthetic_score": ((None, 2.5), "it is of the refiner, which is not supported"),
    "clip_skip": ((None, 0), "the last layer but one is taken, on which the UNet was trained"),
    "callback_on_step_end": ((None,), "give callback, a function of call, timestep and latents"),
    "callback_on_step_end_tensor_inputs": ((None, ["latents"]), "callback is given the latents"),
}
# diffusers' default.
_STRENGTH = 0.3


@dataclasses.dataclass
class SemanticStableDiffusionXLPipelineOutput:
    """The result of a call.

    Attributes:
        images: PIL pictures, or an array [rows, height, width, 3] in [0, 1], or latents, channels last.
        sem_guidance: with `return_guidance`, what the edits added at each model call, without
            classifier-free and replayed guidance: [calls, rows, height / f, width / f, channels].
        uncond_estimates, text_estimates: likewise, the predictions for the negative prompt and the prompt.
        edit_estimates: likewise, for the concepts: [calls, n, rows, height / f, width / f, channels]; None
            without concepts.
    """

    images: list[Image.Image | None] | np.ndarray
    sem_guidance: np.ndarray | None = None
    uncond_estimates: np.ndarray | None = None
    text_estimates: np.ndarray | None = None
    edit_estimates: np.ndarray | None = None


class SemanticStableDiffusionXLPipeline(FilesFace):
    """The face of diffusers' pipeline of Stable Diffusion XL on ours (`pipeline`), with semantic guidance.

    There is no watermark. Arrays are channels last; randomness is a seed or a key.
    """

    _kinds = (XL,)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: Tokenizer,
        tokenizer_2: Tokenizer,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        force_zeros_for_empty_prompt: bool = True,
        *,
        devices: Sequence[jax.Device] | Devices | None = None,
    ):
        """From the components of another pipeline, `SemanticStableDiffusionXLPipeline(**pipe.components)`: nothing is
        loaded or compiled again."""
        where = devices if isinstance(devices, Devices) else Devices(devices)
        models = where.place(Models.build(text_encoder, text_encoder_2, unet, vae))
        pair = TokenizerPair(tokenizer, tokenizer_2)
        self.pipeline = Pipeline(models, pair, scheduler, where, zeros=bool(force_zeros_for_empty_prompt))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: Any = None,
        torch_dtype: Any = None,
        tokenizer: Tokenizer | None = None,
        tokenizer_2: Tokenizer | None = None,
        force_zeros_for_empty_prompt: bool | None = None,
        **options: Any,
    ) -> "SemanticStableDiffusionXLPipeline":
        """See `sega_jax.load`. `torch_dtype` is another name of `dtype` and may be torch's own; another pipeline's
        tokenizers come together; None of `force_zeros_for_empty_prompt` is what the checkpoint says."""
        for name in ("image_encoder", "feature_extractor", "add_watermarker"):
            if options.pop(name, None) not in (None, False):
                raise TypeError(f"{name} is not supported; leave it out")
        if (tokenizer is None) != (tokenizer_2 is None):
            raise TypeError("tokenizer and tokenizer_2 belong together; give both of another pipeline, or neither")
        pair = None if tokenizer is None else TokenizerPair(tokenizer, tokenizer_2)
        cls._check(pretrained_model_name_or_path, options.get("revision"))
        dtype = torch_dtype if dtype is None else dtype
        made = cls.from_pipe(load(pretrained_model_name_or_path, dtype=dtype, tokenizer=pair, **options))
        if force_zeros_for_empty_prompt is not None:
            made.pipeline.zeros = bool(force_zeros_for_empty_prompt)
        return made

    @property
    def components(self) -> dict[str, Any]:
        """By diffusers' names, and the devices: what the constructor takes."""
        return {
            **self.pipeline.models._asdict(),
            "tokenizer": self.tokenizer,
            "tokenizer_2": self.tokenizer_2,
            "scheduler": self.pipeline.scheduler,
            "force_zeros_for_empty_prompt": self.pipeline.zeros,
            "devices": self.pipeline.devices,
        }

    @property
    def text_encoder_2(self) -> CLIPTextModelWithProjection:
        return self.pipeline.models.text_encoder_2

    @text_encoder_2.setter
    def text_encoder_2(self, value: CLIPTextModelWithProjection) -> None:
        self._exchange("text_encoder_2", value)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.pipeline.tokenizer.first

    @property
    def tokenizer_2(self) -> Tokenizer:
        return self.pipeline.tokenizer.second

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        *,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        original_size: Sequence | None = None,
        crops_coords_top_left: Sequence | None = (0, 0),
        target_size: Sequence | None = None,
        image: Any = None,
        strength: float = USUAL,
        callback: Callable[[int, float, np.ndarray], Any] | None = None,
        callback_steps: int = 1,
        editing_prompt: str | Sequence[str] | None = None,
        editing_prompt_embeddings: Any = None,
        editing_pooled_prompt_embeddings: Any = None,
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
        **others: Any,
    ) -> SemanticStableDiffusionXLPipelineOutput | tuple:
        """Arguments, defaults and results as in diffusers, with these differences.

        Args:
            prompt_2, negative_prompt_2: what the second text encoder reads in place of `prompt` and
                `negative_prompt`, one for all or one each. Concepts are read by both.
            timesteps: in place of a number of steps, falling.
            prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds: in place of the
                words, [prompts, tokens, channels] and [prompts, pooled] (one negative for all is of one prompt), as
                `sega_jax.systems.sdxl.parted` takes them of what `pipe.pipeline.encode` gives.
            editing_prompt_embeddings, editing_pooled_prompt_embeddings: a concept each, for all rows,
                [n, tokens, channels] and [n, pooled]; or [prompts, n, ...]. Ignored where `editing_prompt` is given.
            original_size, crops_coords_top_left, target_size: one for all pictures, or one each.
            image, strength: a picture to start from, and the share of the steps that is run, by default 0.3, as
                diffusers' `StableDiffusionXLImg2ImgPipeline` has them; see `Pipeline.__call__`.
            seed, key, latents, guidance_scale, guidance_rescale, sem_guidance, progress, return_guidance, and all else
                that is of edits: as of `SemanticStableDiffusionPipeline`.
            others: what else diffusers has, at values that change nothing there.

        Raises:
            TypeError, ValueError: as `Pipeline.__call__`; or an argument that is not supported. Nothing ran but, for
                `prompt_2`, the text encoders.
        """
        _check_others(others)
        concepts = editing_prompt_embeddings
        if not editing_prompt and (concepts is not None or editing_pooled_prompt_embeddings is not None):
            names = "editing_prompt_embeddings", "editing_pooled_prompt_embeddings"
            concepts = self._joined(names, concepts, editing_pooled_prompt_embeddings)
        edits = arguments.edits(
            arguments.concepts(editing_prompt, concepts),
            scale=edit_guidance_scale,
            reverse=reverse_editing_direction,
            threshold=edit_threshold,
            warmup=edit_warmup_steps,
            cooldown=edit_cooldown_steps,
            weight=edit_weights,
        )
        if negative_prompt_2 and negative_prompt is negative_prompt_embeds is None:
            raise ValueError(
                f"negative_prompt_2={negative_prompt_2!r} without negative_prompt, which may be '', means nothing in"
                " diffusers; give both"
            )
        negative = negative_prompt_embeds, negative_pooled_prompt_embeds
        out = self._made(
            self._text("prompt", prompt, prompt_2, prompt_embeds, pooled_prompt_embeds),
            edits,
            negative_prompt=self._text("negative_prompt", negative_prompt, negative_prompt_2, *negative, needed=False),
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps if timesteps is None else timesteps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            seed=seed,
            key=key,
            generator=generator,
            latents=latents,
            image=image,
            strength=_STRENGTH if strength is USUAL and image is not None else strength,
            height=height,
            width=width,
            original_size=original_size,
            crops_top_left=crops_coords_top_left,
            target_size=target_size,
            edit_momentum_scale=edit_momentum_scale,
            edit_mom_beta=edit_mom_beta,
            sem_guidance=sem_guidance,
            output_type=output_type,
            return_guidance=return_guidance,
            callback=callback,
            callback_steps=callback_steps,
            progress=progress,
        )
        if not return_dict:
            return (out.images,)
        return SemanticStableDiffusionXLPipelineOutput(out.images, **arguments.recorded(out.record))

    def _text(self, name: str, first: Any, second: Any, states: Any, pooled: Any, needed: bool = True) -> Any:
        """Words; or embeddings [prompts, tokens + 1, channels], given or of words that differ."""
        text = arguments.either(name, first, states, needed)
        names = f"{name}_embeds", f"{name.replace('prompt', 'pooled_prompt')}_embeds"
        if states is None and pooled is None:
            if not second or second == first:
                return text
            texts, others = (list(one) if isinstance(one, list | tuple) else [one] for one in (first, second))
            for said, several in ((name, texts), (f"{name}_2", others)):
                if not all(isinstance(one, str) for one in several):
                    raise TypeError(f"{said}={repr(several)[:80]} should be words or a list of them")
            if len(others) not in (1, len(texts)):
                raise ValueError(f"{name}_2 has {len(others)} entries, expected {len(texts)}, one each, or one for all")
            return self.pipeline.encode(texts, others)
        if first is not None or second:
            raise ValueError(f"{name} or {name}_2 and {' or '.join(names)} were both given; give words or embeddings")
        return self._joined(names, states, pooled)

    def _joined(self, names: tuple[str, str], states: Any, pooled: Any) -> np.ndarray:
        """States and pooled texts as one array, [..., tokens + 1, channels]."""
        if states is None or pooled is None:
            raise ValueError(f"{names[0]} and {names[1]} belong together; give both")
        axes = "(..., tokens, channels)", "(..., channels)"
        states, pooled = (floating(*one) for one in zip(names, (states, pooled), axes, strict=True))
        rows, channels = self.pipeline.models.text_shape(self.pipeline.tokenizer.length)
        if states.shape[-2:] != (rows - 1, channels):
            raise ValueError(f"{names[0]} has shape {states.shape}, expected (..., {rows - 1}, {channels}) {axes[0]}")
        wanted = (*states.shape[:-2], self.unet.config.pooled_dim)
        if pooled.shape != wanted:
            raise ValueError(f"{names[1]} has shape {pooled.shape}, expected {wanted} {axes[1]}")
        last = np.zeros((*states.shape[:-2], 1, channels), states.dtype)
        last[..., 0, : wanted[-1]] = pooled
        return np.concatenate([states, last], -2)


def _check_others(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in _OTHERS:
            raise TypeError(f"__call__() got an unexpected keyword argument {name!r}")
        harmless, instead = _OTHERS[name]
        if not any(value is one or (isinstance(value, type(one)) and value == one) for one in harmless):
            raise ValueError(f"{name}={repr(value)[:80]} is not supported; {instead}")
