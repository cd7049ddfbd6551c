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
    """Pictures, and what the safety checker says of them."""

    nsfw_content_detected: list[bool] | None


@dataclasses.dataclass
class SemanticStableDiffusionPipelineOutput(Estimates, CheckedImages):
    """The result of a call.

    Attributes:
        images: PIL pictures, or an array [rows, height, width, 3] in [0, 1], or latents.
        nsfw_content_detected: whether the safety checker flagged each picture, which makes it black; None for latents
            and without a safety checker.
        sem_guidance, uncond_estimates, text_estimates, edit_estimates: arrays of the shape of latents; see `Estimates`.
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
    """diffusers' pipeline around a native one (`pipeline`).

    It differs from diffusers where that is wrong: edits also act at `guidance_scale <= 1`, the embeddings of several
    concepts stay apart in a batch, tuples and None work wherever lists do, and nothing is recorded unless asked for.
    Arrays are channels last; randomness is a seed or a key.
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
        """Builds a pipeline from the components of another one, `SemanticStableDiffusionPipeline(**pipe.components)`,
        without loading or compiling anything again."""
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
            pretrained_model_name_or_path: the `source` of `sega_jax.load`.
            torch_dtype: another name of the option `dtype`; it may be torch's own.
            safety_checker: whether to load the checkpoint's; or another pipeline's, together with its
                `feature_extractor`.
            feature_extractor: another pipeline's.
            requires_safety_checker: ignored.
            options: the other options of `sega_jax.load`.

        Raises:
            TypeError: the safety checker is not another pipeline's, or is given without its feature extractor.
            CheckpointError: the checkpoint is of another family; nothing but its index was fetched.
            Others as `sega_jax.load`.
        """
        del requires_safety_checker
        safety: Safety | bool | None
        if safety_checker is None or isinstance(safety_checker, bool):
            if feature_extractor is not None:
                raise TypeError("feature_extractor is the checkpoint's own; give another's with its safety_checker")
            safety = safety_checker
        else:
            safety = _safety(safety_checker, feature_extractor)
        return cls._load(pretrained_model_name_or_path, torch_dtype, options | {"safety_checker": safety})

    @property
    def components(self) -> dict[str, Any]:
        """The arguments of the constructor that build this pipeline."""
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
        """The preprocessing of pictures for the safety checker, or None."""
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
        """Returns the embeddings of the prompts and of their negative prompts, [prompts * pictures, tokens, channels]
        each; the latter are None without `do_classifier_free_guidance`.

        Args:
            device: ignored.
            lora_scale: multiplies the weights of loaded LoRAs.
            clip_skip: as of the call.

        Raises:
            TypeError, ValueError: a prompt is not words, or their numbers differ.
        """
        del device
        prompts, negatives = prompt_pairs(prompt, negative_prompt or "")
        with collected(), self._scaled_loras(1.0 if lora_scale is None else check_float("lora_scale", lora_scale)):
            states = self.pipeline.encode(prompts, clip_skip=clip_skip or 0).states
            others = self.pipeline.encode(negatives).states if do_classifier_free_guidance else None
        count = num_images_per_prompt
        return states.repeat(count, 0), None if others is None else others.repeat(count, 0)

    @takes(StableDiffusionArguments, "SemanticStableDiffusionPipeline")
    def __call__(self, call: StableDiffusionArguments) -> SemanticStableDiffusionPipelineOutput | tuple:
        """Makes pictures with diffusers' arguments, defaults and results.

        Settings of edits are numbers, lists, tuples or arrays. With too few entries they are an error; with too many
        they are cut with a warning. Long and weighted prompts, which diffusers leaves to other libraries, and a picture
        to start from, which `StableDiffusionImg2ImgPipeline` of diffusers takes, are arguments here.

        Raises:
            TypeError, ValueError: as `Pipeline.__call__`; nothing ran.
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
        raise TypeError("safety_checker should be another pipeline's, with its feature_extractor; or None")
    return Safety(extractor, checker)
