"""diffusers' `SemanticStableDiffusionPipeline` (0.42.1), translated."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from sega_jax.arrays import floating
from sega_jax.components import as_module
from sega_jax.guidance import Edit
from sega_jax.loading import load
from sega_jax.nn.clip import CLIPTextModel
from sega_jax.nn.safety import StableDiffusionSafetyChecker
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.parallel import Devices
from sega_jax.pipeline import Pipeline
from sega_jax.rows import number, whole
from sega_jax.safety import FeatureExtractor, Safety
from sega_jax.schedules import Scheduler
from sega_jax.systems.stable_diffusion import Models
from sega_jax.text import Tokenizer

_OUTPUTS = {"pil": "pil", "np": "float", "latent": "latent"}


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


class SemanticStableDiffusionPipeline:
    """The face of diffusers' pipeline on ours (`pipeline`).

    It differs where diffusers is wrong: edits also act at `guidance_scale <= 1`, embeddings of several
    concepts stay apart in a batch, tuples and None work wherever lists do, and nothing is recorded
    unless asked for. Arrays are channels last; randomness is a seed or a key.
    """

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

    @classmethod
    def from_pipe(cls, pipeline: Any) -> "SemanticStableDiffusionPipeline":
        """Another face of a `sega_jax.Pipeline`, or of the pipeline behind another face."""
        pipeline = getattr(pipeline, "pipeline", pipeline)
        if not isinstance(pipeline, Pipeline):
            raise TypeError(f"pipeline={pipeline!r} should be what sega_jax.load gives")
        self = cls.__new__(cls)
        self.pipeline = pipeline
        return self

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
    def unet(self) -> UNet2DConditionModel:
        return self.pipeline.models.unet

    @unet.setter
    def unet(self, value: UNet2DConditionModel) -> None:
        self._exchange("unet", value)

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipeline.models.vae

    @vae.setter
    def vae(self, value: AutoencoderKL) -> None:
        self._exchange("vae", value)

    @property
    def text_encoder(self) -> CLIPTextModel:
        return self.pipeline.models.text_encoder

    @text_encoder.setter
    def text_encoder(self, value: CLIPTextModel) -> None:
        self._exchange("text_encoder", value)

    def _exchange(self, name: str, value: Any) -> None:
        models = self.pipeline.models
        self.pipeline.models = models._replace(**{name: as_module(name, value, type(getattr(models, name)))})

    @property
    def tokenizer(self) -> Tokenizer:
        return self.pipeline.tokenizer

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; assign a class name of diffusers', a config, a folder, or an object of diffusers'."""
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, value: Any) -> None:
        self.pipeline.scheduler = value

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
            progress: whether to show a bar; None is in terminals and notebooks.
            return_guidance: whether the output has the estimates and the guidance of every call.

        Raises:
            TypeError, ValueError: as `Pipeline.__call__`; nothing ran.
        """
        if output_type not in list(_OUTPUTS):
            raise ValueError(f"output_type={output_type!r} should be one of {', '.join(_OUTPUTS)}")
        several = isinstance(guidance_scale, list | tuple | np.ndarray)
        scales = [max(number("guidance_scale", s), 1.0) for s in (guidance_scale if several else [guidance_scale])]
        if generator is not None:
            raise TypeError("generator is torch's; give seed=, one number or one a picture, or a JAX key=")
        out = self.pipeline(
            _either("prompt", prompt, prompt_embeds),
            _edits(
                _concepts(editing_prompt, editing_prompt_embeddings),
                scale=edit_guidance_scale,
                reverse=reverse_editing_direction,
                threshold=edit_threshold,
                warmup=edit_warmup_steps,
                cooldown=edit_cooldown_steps,
                weight=edit_weights,
            ),
            negative_prompt=_either("negative_prompt", negative_prompt, negative_prompt_embeds, needed=False),
            images_per_prompt=num_images_per_prompt,
            steps=num_inference_steps,
            guidance_scale=scales if several else scales[0],
            eta=eta,
            seed=seed,
            key=key,
            latents=latents,
            height=height,
            width=width,
            momentum_scale=0.1 if edit_momentum_scale is None else edit_momentum_scale,
            momentum_beta=0.4 if edit_mom_beta is None else edit_mom_beta,
            replay=_replayed(sem_guidance, _count(prompt, prompt_embeds), num_images_per_prompt),
            output=_OUTPUTS[output_type],
            record=return_guidance,
            callback=callback,
            callback_steps=callback_steps,
            progress=progress,
            strict=False,
        )
        flags = None if out.flagged is None else out.flagged.tolist()
        if not return_dict:
            return out.images, flags
        if out.record is None:
            return SemanticStableDiffusionPipelineOutput(out.images, flags)
        return SemanticStableDiffusionPipelineOutput(
            out.images,
            flags,
            sem_guidance=np.moveaxis(out.record.sem_guidance, 0, 1),
            uncond_estimates=np.moveaxis(out.record.uncond, 0, 1),
            text_estimates=np.moveaxis(out.record.cond, 0, 1),
            edit_estimates=None if out.record.edits is None else np.moveaxis(out.record.edits, 0, 2),
        )


def _either(name: str, words: Any, embeddings: Any, needed: bool = True) -> Any:
    """Words, or in their place embeddings [prompts, tokens, channels]."""
    if words is not None and embeddings is not None:
        raise ValueError(f"{name} and {name}_embeds were both given; they say the same thing, give one")
    if embeddings is None:
        if words is None and needed:
            raise TypeError(f"{name}=None should be words, or give {name}_embeds")
        return words
    axes = "(prompts, tokens, channels)"
    embeddings = floating(f"{name}_embeds", embeddings, axes)
    if embeddings.ndim != 3:
        raise ValueError(f"{name}_embeds has shape {embeddings.shape}, expected {axes}")
    return embeddings


def _safety(checker: Any, extractor: Any) -> Safety | None:
    if checker is None:
        return None
    if not (isinstance(checker, StableDiffusionSafetyChecker) and isinstance(extractor, FeatureExtractor)):
        raise TypeError("safety_checker should be another pipeline's, with its feature_extractor; or None")
    return Safety(extractor, checker)


def _count(words: Any, embeddings: Any) -> int:
    given = words if embeddings is None else embeddings
    return 1 if isinstance(given, str) or not hasattr(given, "__len__") else len(given)


def _replayed(recorded: Any, prompts: int, pictures: int) -> np.ndarray | None:
    if recorded is None:
        return None
    rows = prompts * whole("num_images_per_prompt", pictures, 1)
    axes = "(calls, rows, height, width, channels)"
    recorded = floating("sem_guidance", recorded, axes)
    if recorded.ndim != 5 or recorded.shape[1] not in (1, rows):
        raise ValueError(f"sem_guidance has shape {recorded.shape}, expected {axes}, {rows} rows or one for all")
    return np.moveaxis(recorded, 0, 1)


def _concepts(words: Any, embeddings: Any) -> list:
    """Concepts for all rows, or a list of concepts for each prompt."""
    words = [words] if isinstance(words, str) and words else words
    if words:
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise TypeError(f"editing_prompt={words!r} should be words or a list of them")
        return list(words)
    if embeddings is None:
        return []
    axes = "(n, tokens, channels) or (prompts, n, tokens, channels)"
    embeddings = floating("editing_prompt_embeddings", embeddings, axes)
    if embeddings.ndim not in (3, 4):
        raise ValueError(f"editing_prompt_embeddings have shape {embeddings.shape}, expected {axes}")
    return [list(row) for row in embeddings] if embeddings.ndim == 4 else list(embeddings)


_DEFAULTS = {"scale": 5.0, "reverse": False, "threshold": 0.9, "warmup": 10, "cooldown": None, "weight": 1.0}
_NAMES = {
    "scale": "edit_guidance_scale",
    "reverse": "reverse_editing_direction",
    "threshold": "edit_threshold",
    "warmup": "edit_warmup_steps",
    "cooldown": "edit_cooldown_steps",
    "weight": "edit_weights",
}


def _edits(concepts: list, **settings: Any) -> list:
    rows = concepts if concepts and isinstance(concepts[0], list) else [concepts]
    n = len(rows[0])
    columns = {name: _broadcast(name, value, n) for name, value in settings.items()}
    edits = []
    for row in rows:
        edits.append([])
        for k, concept in enumerate(row):
            one = {name: column[k] for name, column in columns.items()}
            reverse = one.pop("reverse")
            edit = Edit(concept, **one)
            edits[-1].append(dataclasses.replace(edit, scale=-edit.scale) if reverse else edit)
    return edits if rows is concepts else edits[0]


def _broadcast(name: str, value: Any, n: int) -> list:
    """One entry a concept, from a scalar, list, tuple or array."""
    if isinstance(value, np.ndarray | jax.Array):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        value = [value] * n
    elif name == "weight" and not value:
        value = [None] * n
    if len(value) < n:
        raise ValueError(f"{_NAMES[name]} has {len(value)} entries for {n} concepts; give one each, or one for all")
    if len(value) > n > 0:
        warnings.warn(f"{_NAMES[name]} has {len(value)} entries for {n} concepts; the last are ignored", stacklevel=5)
    value = [_DEFAULTS[name] if v is None else v for v in value[:n]]
    if name == "reverse" and not all(isinstance(v, bool | np.bool_) for v in value):
        raise TypeError(f"{_NAMES[name]}={value!r} should be True or False, or one each")
    if name in ("warmup", "cooldown"):
        # i >= 10.5 begins at call 11.
        value = [math.ceil(v) if isinstance(v, float) and math.isfinite(v) else v for v in value]
    return value
