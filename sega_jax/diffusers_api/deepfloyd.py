"""diffusers' `IFPipeline` and `IFSuperResolutionPipeline` (0.42.1), with the arguments of semantic guidance of its
`SemanticStableDiffusionPipeline`."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from sega_jax.diffusers_api.arguments import OUTPUTS, DiffusionArguments, TimestepArguments, positional
from sega_jax.diffusers_api.files import LoraPipeline
from sega_jax.diffusers_api.kinds import OutputType
from sega_jax.diffusers_api.outputs import Estimates, Images, estimates
from sega_jax.diffusers_api.texts import prompt_pairs
from sega_jax.method.argument_kinds import Flag, Opaque
from sega_jax.method.arguments import argument, changed, takes
from sega_jax.pipelines.messages import collected, warn
from sega_jax.systems.base import System
from sega_jax.systems.deepfloyd import STAGE_1, STAGE_2, Stage2Call
from sega_jax.systems.images import Pictures

_OUTPUTS = {name: OUTPUTS[name] for name in ("pil", "np")}


@dataclasses.dataclass
class UncheckedImages(Images):
    """Pictures without a safety checker and a watermark."""

    nsfw_detected: list[bool] | None = None
    watermark_detected: list[bool] | None = None


@dataclasses.dataclass
class SemanticIFPipelineOutput(Estimates, UncheckedImages):
    """The result of a call.

    Attributes:
        images: PIL pictures, or an array [rows, height, width, 3] in [0, 1].
        nsfw_detected, watermark_detected: None, since neither is supported.
        sem_guidance, uncond_estimates, text_estimates, edit_estimates: arrays of the shape of pictures; see
            `Estimates`.
    """


@positional(
    *("prompt", "num_inference_steps", "timesteps", "guidance_scale", "negative_prompt", "num_images_per_prompt"),
    *("height", "width", "eta", "seed", "prompt_embeds", "negative_prompt_embeds", "output_type", "return_dict"),
    *("callback", "callback_steps", "clean_caption"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IFArguments(TimestepArguments, DiffusionArguments):
    """The arguments of `SemanticIFPipeline`."""

    outputs = _OUTPUTS
    shared = (*DiffusionArguments.shared, "image", "noise_level")

    output_type: str = changed(DiffusionArguments, "output_type", "pil", kind=OutputType(*_OUTPUTS))
    clean_caption: bool = argument(
        True,
        Flag(),
        "whether words, also those of edits, are cleaned (`sega_jax.text.caption_cleaning`), which needs the extra"
        ' "if"; without its libraries this is an error, where diffusers warns and goes on',
    )
    image: Any = argument(None, Opaque(Pictures.noun), "the second stage's low-resolution picture")
    noise_level: int | None = changed(
        Stage2Call,
        "noise_level",
        None,
        help="how much noise the second stage adds to its low-resolution picture, a timestep of that noise's training;"
        " None is 250",
    )


class SemanticIFPipeline(LoraPipeline):
    """diffusers' pipelines of either stage of DeepFloyd-IF around a native one (`pipeline`), with semantic guidance.

    The cascade of diffusers is one pipeline for each stage, and `encode_prompt` of the first:

        embeddings, negative = stage_1.encode_prompt("a fox")
        small = stage_1(prompt_embeds=embeddings, negative_prompt_embeds=negative, output_type="np").images
        large = stage_2(image=small, prompt_embeds=embeddings, negative_prompt_embeds=negative).images

    `sega_jax.load_cascade` does the same in one call. There is no safety checker and no watermark. Arrays are channels
    last; randomness is a seed or a key.
    """

    _systems: ClassVar[tuple[System, ...]] = (STAGE_1, STAGE_2)

    # Neither is supported; code passes them on to the upscaler.
    safety_checker = feature_extractor = watermarker = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, torch_dtype: Any = None, **options: Any
    ) -> Self:
        """Loads a stage.

        If the libraries that clean captions are missing, a warning says so before anything is fetched.

        Args:
            pretrained_model_name_or_path: the `source` of `sega_jax.load`.
            torch_dtype: another name of the option `dtype`; it may be torch's own.
            options: the options of `sega_jax.load`. As in diffusers, `text_encoder=None` loads no text encoder.

        Raises:
            TypeError: an option is not supported.
            CheckpointError: the checkpoint is of another family; nothing but its index was fetched.
            Others as `sega_jax.load`.
        """
        from sega_jax.text import caption_cleaning

        if options.pop("safety_checker", None) not in (None, False):
            raise TypeError("safety_checker is not supported: pictures go unchecked; leave it out")
        if "text_encoder" in options and options["text_encoder"] is None:
            options["text_encoder"] = False
        if "unet" in options and options["unet"] is None:
            raise TypeError("unet=None is not supported; sega_jax.pipelines.part_loading.load_text loads the texts")
        try:
            caption_cleaning.check()
        except ImportError as error:
            # Outside of `collected`, so that it is emitted before anything is fetched.
            warn(f"calls with their defaults will fail: {error}")
        return cls._load(pretrained_model_name_or_path, torch_dtype, options | {"safety_checker": False})

    def encode_prompt(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        negative_prompt: str | list[str] | None = None,
        clean_caption: bool = False,
        *,
        device: Any = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the embeddings of the prompts and of their negative prompts, [prompts * pictures, tokens, channels]
        each.

        Args:
            device: ignored.

        Raises:
            TypeError, ValueError: a prompt is not words, or their numbers differ.
        """
        del device
        prompts, negatives = prompt_pairs(prompt, negative_prompt or "")
        with collected():
            states = self.pipeline.encode(_cleaned(prompts + negatives, clean_caption)).states
        states = states.repeat(num_images_per_prompt, 0)
        return states[: len(states) // 2], states[len(states) // 2 :]

    @takes(IFArguments, "SemanticIFPipeline")
    def __call__(self, call: IFArguments) -> SemanticIFPipelineOutput | tuple:
        """Makes pictures with diffusers' arguments, defaults and results.

        Raises:
            TypeError, ValueError: as `Pipeline.__call__`; nothing ran.
            ImportError: the libraries that clean captions are not installed.
        """
        with collected():
            texts = call.text("prompt", required=True), call.text("negative_prompt"), call.concepts()
            out = self._run(call, *(_cleaned(text, call.clean_caption) for text in texts))
        if not call.return_dict:
            return out.images, None, None
        return SemanticIFPipelineOutput(out.images, **estimates(out.record))


def _cleaned(texts: Any, clean: bool) -> Any:
    """Cleans the words of one or several texts, and returns everything else as it is."""
    if isinstance(texts, str) and texts and clean:
        from sega_jax.text import caption_cleaning  # needs the libraries of an extra

        return caption_cleaning.clean(texts)
    return [_cleaned(text, clean) for text in texts] if isinstance(texts, list | tuple) else texts
