"""diffusers' `SemanticStableDiffusionPipeline` (0.42.1)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from sega_jax.diffusers_api.arguments import LatentArguments, PipelineArguments, TimestepArguments, positional
from sega_jax.diffusers_api.files import LatentPipeline
from sega_jax.diffusers_api.outputs import Estimates, Images, estimates
from sega_jax.diffusers_api.texts import prompt_pairs
from sega_jax.method.arguments import changed, takes
from sega_jax.method.checks import check_float
from sega_jax.method.schedules import Scheduler
from sega_jax.nn.clip import CLIPTextModel
from sega_jax.nn.safety import StableDiffusionSafetyChecker
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.messages import collected
from sega_jax.pipelines.pipeline import Pipeline
from sega_jax.pipelines.safety import FeatureExtractor, Safety
from sega_jax.systems.clip_text import ClipCall
from sega_jax.systems.stable_diffusion import SYSTEM, Models
from sega_jax.text.tokenizers import Tokenizer


@dataclasses.dataclass
class CheckedImages(Images):
    """Pictures, and the safety checker's results for them."""

    nsfw_content_detected: list[bool] | None


@dataclasses.dataclass
class SemanticStableDiffusionPipelineOutput(Estimates, CheckedImages):
    """The output of `SemanticStableDiffusionPipeline`.

    Attributes:
        images: PIL images, or a float array [rows, height, width, 3] in [0, 1], or latents
            [rows, height / f, width / f, channels], where f is the checkpoint's downsampling factor.
        nsfw_content_detected: for each picture, whether the safety checker flagged it (flagged pictures are black).
            None for latents or without a safety checker.
        sem_guidance, uncond_estimates, text_estimates, edit_estimates: arrays of latents, or None without
            `return_guidance`; see `Estimates`.

    Example:
        >>> import numpy as np
        >>> from sega_jax import SemanticStableDiffusionPipelineOutput
        >>> images = np.zeros((1, 512, 512, 3), np.float32)
        >>> out = SemanticStableDiffusionPipelineOutput(images, nsfw_content_detected=[False])
        >>> out.images.shape, out.nsfw_content_detected, out.sem_guidance
        ((1, 512, 512, 3), [False], None)
    """


@positional(
    *("prompt", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "num_images_per_prompt"),
    *("eta", "seed", "latents", "output_type", "return_dict", "callback", "callback_steps"),
    *("editing_prompt", "editing_prompt_embeddings", "reverse_editing_direction", "edit_guidance_scale"),
    *("edit_warmup_steps", "edit_cooldown_steps", "edit_threshold", "edit_momentum_scale", "edit_mom_beta"),
    *("edit_weights", "sem_guidance"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusionArguments(TimestepArguments, LatentArguments):
    """The arguments of `SemanticStableDiffusionPipeline`."""

    shared = (*LatentArguments.shared, "long_prompts", "weighted", "clip_skip")

    num_inference_steps: int = changed(PipelineArguments, "num_inference_steps", 50)
    guidance_scale: float | list[float] = changed(PipelineArguments, "guidance_scale", 7.5)
    long_prompts: bool = changed(ClipCall, "long_prompts", False)
    weighted: bool = changed(ClipCall, "weighted", False)
    clip_skip: int | None = changed(ClipCall, "clip_skip", None)


class SemanticStableDiffusionPipeline(LatentPipeline):
    """diffusers' semantic pipeline for Stable Diffusion 1.x and 2.x.

    It wraps a native pipeline, which is its attribute `pipeline`, and fixes some of diffusers' bugs: edits also take
    effect at `guidance_scale <= 1`, the embeddings of several concepts are not mixed up in a batch, and tuples and None
    work wherever lists do. Predictions are recorded only with `return_guidance=True`. Arrays have channels last. The
    noise comes from a seed, a generator or a JAX key.

    Example:
        >>> from sega_jax import SemanticStableDiffusionPipeline
        >>> from sega_jax.pipelines.loading import DEMO
        >>> pipe = SemanticStableDiffusionPipeline.from_pretrained(DEMO)
        >>> call = {"num_inference_steps": 2, "edit_warmup_steps": 1, "output_type": "latent", "progress": False}
        >>> out = pipe("a portrait", editing_prompt=["glasses", "smile"], edit_guidance_scale=[6, 4], seed=3, **call)
        >>> len(out.images)
        1
    """

    _systems = (SYSTEM,)

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
        """Builds a pipeline from another pipeline's components, usually passed as `**pipe.components`.

        The pipelines share weights and compiled programs.

        Raises:
            TypeError: the safety checker does not come from a pipeline, or its feature extractor is missing.
        """
        del requires_safety_checker
        where = devices if isinstance(devices, Devices) else Devices(devices)
        models = where.place(Models.build(text_encoder, unet, vae))
        safety = _safety(safety_checker, feature_extractor)
        self.pipeline = Pipeline(SYSTEM, models, tokenizer, scheduler, where, safety)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: Any = None,
        safety_checker: StableDiffusionSafetyChecker | bool | None = True,
        feature_extractor: FeatureExtractor | None = None,
        requires_safety_checker: bool = True,
        **options: Any,
    ) -> Self:
        """Loads a checkpoint.

        Args:
            pretrained_model_name_or_path: a folder, hub repository or single file, like `source` in `sega_jax.load`.
            torch_dtype: the dtype of the networks, like `dtype` in `sega_jax.load`. torch dtypes are also accepted.
            safety_checker: whether to load the checkpoint's safety checker; or another pipeline's safety checker,
                together with its `feature_extractor`.
            feature_extractor: the feature extractor that belongs to the given safety checker.
            requires_safety_checker: ignored.
            options: the other options of `sega_jax.load`.

        Raises:
            TypeError: the safety checker does not come from a pipeline, or its feature extractor is missing.
            CheckpointError: the checkpoint belongs to a different family. Raised before any weights are downloaded.
            Others: as for `sega_jax.load`.
        """
        del requires_safety_checker
        safety: Safety | bool | None
        if safety_checker is None or isinstance(safety_checker, bool):
            if feature_extractor is not None:
                raise TypeError("feature_extractor needs the safety_checker that it belongs to; give both or neither")
            safety = safety_checker
        else:
            safety = _safety(safety_checker, feature_extractor)
        return cls._load(pretrained_model_name_or_path, torch_dtype, options | {"safety_checker": safety})

    @property
    def components(self) -> dict[str, Any]:
        """The constructor arguments that rebuild this pipeline."""
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
        """The safety checker, or None. Assign None to turn it off."""
        return self.components["safety_checker"]

    @safety_checker.setter
    def safety_checker(self, value: None) -> None:
        if value is not None:
            raise TypeError(
                "safety_checker can be set to None to turn it off, but cannot be replaced; load a pipeline with"
                " from_pretrained(..., safety_checker=..., feature_extractor=...)"
            )
        self.pipeline.safety = None

    @property
    def feature_extractor(self) -> FeatureExtractor | None:
        """The feature extractor that prepares pictures for the safety checker, or None if there is no checker."""
        return self.components["feature_extractor"]

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        *,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the embeddings of the prompts and of the negative prompts.

        Args:
            prompt: a prompt or a list of prompts.
            device: ignored.
            num_images_per_prompt: how many copies of each embedding to return, at least 1.
            do_classifier_free_guidance: whether to encode the negative prompts.
            negative_prompt: one negative prompt for all prompts, or one for each. None means the empty string.
            lora_scale: multiplies the weights of loaded LoRAs.
            clip_skip: as for a call.

        Returns:
            Two arrays [prompts * num_images_per_prompt, tokens, channels]: one for the prompts, one for the negative
            prompts. The second is None without `do_classifier_free_guidance`.

        Raises:
            TypeError, ValueError: a prompt is not a string, or the numbers of prompts and negative prompts differ.
        """
        del device
        prompts, negatives = prompt_pairs(prompt, negative_prompt or "")
        with collected(), self._scaled_loras(1.0 if lora_scale is None else check_float("lora_scale", lora_scale)):
            states = self.pipeline.encode(prompts, clip_skip=clip_skip or 0).states
            negative_states = self.pipeline.encode(negatives).states if do_classifier_free_guidance else None
        count = num_images_per_prompt
        return states.repeat(count, 0), None if negative_states is None else negative_states.repeat(count, 0)

    @takes(StableDiffusionArguments, "SemanticStableDiffusionPipeline")
    def __call__(self, call: StableDiffusionArguments) -> SemanticStableDiffusionPipelineOutput | tuple:
        """Generates pictures. The arguments, defaults and results follow diffusers.

        The settings of edits may be numbers, lists, tuples or arrays. If there are too few entries, an error is raised;
        extra entries are ignored with a warning. In addition to diffusers' arguments, this pipeline accepts
        `long_prompts`, `weighted`, `image` and `strength`.

        Returns:
            A `SemanticStableDiffusionPipelineOutput`, or (images, nsfw_content_detected) if `return_dict` is False.

        Raises:
            TypeError, ValueError: as for `Pipeline.__call__`; raised before any network runs.
        """
        with collected():
            texts = call.text("prompt", required=True), call.text("negative_prompt"), call.concepts()
            out = self._run(call, *texts)
        flags = None if out.flagged is None else out.flagged.tolist()
        if not call.return_dict:
            return out.images, flags
        return SemanticStableDiffusionPipelineOutput(out.images, flags, **estimates(out.record))


def _safety(checker: Any, extractor: Any) -> Safety | None:
    if checker is None:
        return None
    if not (isinstance(checker, StableDiffusionSafetyChecker) and isinstance(extractor, FeatureExtractor)):
        raise TypeError(
            "safety_checker and feature_extractor should both come from another pipeline, or safety_checker should be"
            " None"
        )
    return Safety(extractor, checker)
