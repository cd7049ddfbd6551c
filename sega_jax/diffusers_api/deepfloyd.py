"""diffusers' `IFPipeline` and `IFSuperResolutionPipeline` (0.42.1), with semantic guidance.

The arguments for semantic guidance are the same as in diffusers' `SemanticStableDiffusionPipeline`.
"""

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
    """Pictures that no safety checker or watermark detector has checked."""

    nsfw_detected: list[bool] | None = None
    watermark_detected: list[bool] | None = None


@dataclasses.dataclass
class SemanticIFPipelineOutput(Estimates, UncheckedImages):
    """The output of `SemanticIFPipeline`.

    Attributes:
        images: PIL images, or a float array [rows, height, width, 3] in [0, 1].
        nsfw_detected, watermark_detected: always None; neither detector is supported.
        sem_guidance, uncond_estimates, text_estimates, edit_estimates: arrays [..., height, width, 3], or None without
            `return_guidance`; see `Estimates`.

    Example:
        >>> import numpy as np
        >>> from sega_jax import SemanticIFPipelineOutput
        >>> out = SemanticIFPipelineOutput(images=np.zeros((1, 64, 64, 3), np.float32))
        >>> out.images.shape, out.nsfw_detected, out.sem_guidance
        ((1, 64, 64, 3), None, None)
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
        'whether to clean prompts and concepts (`sega_jax.text.caption_cleaning`). Cleaning needs the "if" extra.'
        " If the libraries of this extra are missing, calls raise an error, whereas diffusers only warns",
    )
    image: Any = argument(None, Opaque(Pictures.noun), "the low-resolution picture for the second stage to enlarge")
    noise_level: int | None = changed(
        Stage2Call,
        "noise_level",
        None,
        help="how much noise the second stage adds to its low-resolution picture, as a timestep of the noise schedule;"
        " None means 250",
    )


class SemanticIFPipeline(LoraPipeline):
    """diffusers' pipelines for the first two stages of DeepFloyd-IF, with semantic guidance.

    Each pipeline wraps the native pipeline of one stage, which is its attribute `pipeline`. To run all stages in one
    call, use `sega_jax.load_cascade`. Pictures are neither safety-checked nor watermarked. Arrays have channels last.
    The noise comes from a seed, a generator or a JAX key.

    Example:
        >>> from sega_jax import SemanticIFPipeline
        >>> stage_1 = SemanticIFPipeline.from_pretrained("DeepFloyd/IF-I-XL-v1.0")  # doctest: +SKIP
        >>> embeds, negative = stage_1.encode_prompt("a fox")  # doctest: +SKIP
        >>> embeddings = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}  # doctest: +SKIP
        >>> out = stage_1(**embeddings, editing_prompt="a hat", output_type="np")  # doctest: +SKIP
        >>> stage_2 = SemanticIFPipeline.from_pretrained("DeepFloyd/IF-II-L-v1.0", text_encoder=None)  # doctest: +SKIP
        >>> stage_2(image=out.images, **embeddings).images[0].size  # doctest: +SKIP
        (256, 256)
    """

    _systems: ClassVar[tuple[System, ...]] = (STAGE_1, STAGE_2)

    # These components are not supported, but code written for diffusers reads these attributes and passes them to the
    # upscaler.
    safety_checker = feature_extractor = watermarker = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, torch_dtype: Any = None, **options: Any
    ) -> Self:
        """Loads a stage.

        If the libraries for `clean_caption=True` (the default in calls) are missing, a warning appears before anything
        is downloaded.

        Args:
            pretrained_model_name_or_path: a folder, hub repository or single file, like `source` in `sega_jax.load`.
            torch_dtype: the dtype of the networks, like `dtype` in `sega_jax.load`. torch dtypes are also accepted.
            options: the options of `sega_jax.load`. As in diffusers, `text_encoder=None` skips the text encoder.

        Raises:
            TypeError: an option is not supported.
            CheckpointError: the checkpoint belongs to a different family. Raised before any weights are downloaded.
            Others: as for `sega_jax.load`.
        """
        from sega_jax.text import caption_cleaning

        if options.pop("safety_checker", None) not in (None, False):
            raise TypeError("safety_checker is not supported for DeepFloyd-IF; leave it out")
        if "text_encoder" in options and options["text_encoder"] is None:
            options["text_encoder"] = False
        if "unet" in options and options["unet"] is None:
            raise TypeError(
                "unet=None is not supported; load only the text encoder with sega_jax.pipelines.part_loading.load_text"
            )
        try:
            caption_cleaning.check()
        except ImportError as error:
            # Outside a `collected` block, the warning appears at once, before anything is downloaded.
            warn(f"calls with default arguments will fail: {error}")
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
        """Returns the embeddings of the prompts and of the negative prompts.

        Args:
            prompt: a prompt or a list of prompts.
            num_images_per_prompt: how many copies of each embedding to return, at least 1.
            negative_prompt: one negative prompt for all prompts, or one for each. None means the empty string.
            clean_caption: whether to clean the prompts first, like the argument of a call.
            device: ignored.

        Returns:
            Two arrays [prompts * num_images_per_prompt, tokens, channels]: one for the prompts, one for the negative
            prompts.

        Raises:
            TypeError, ValueError: a prompt is not a string, or the numbers of prompts and negative prompts differ.
            ImportError: `clean_caption` needs libraries that are not installed.
        """
        del device
        prompts, negatives = prompt_pairs(prompt, negative_prompt or "")
        with collected():
            states = self.pipeline.encode(_cleaned(prompts + negatives, clean_caption)).states
        states = states.repeat(num_images_per_prompt, 0)
        return states[: len(states) // 2], states[len(states) // 2 :]

    @takes(IFArguments, "SemanticIFPipeline")
    def __call__(self, call: IFArguments) -> SemanticIFPipelineOutput | tuple:
        """Generates pictures. The arguments, defaults and results follow diffusers.

        Returns:
            A `SemanticIFPipelineOutput`, or a tuple (images, None, None) if `return_dict` is False.

        Raises:
            TypeError, ValueError: as for `Pipeline.__call__`; raised before any network runs.
            ImportError: `clean_caption` needs libraries that are not installed.
        """
        with collected():
            texts = call.text("prompt", required=True), call.text("negative_prompt"), call.concepts()
            out = self._run(call, *(_cleaned(text, call.clean_caption) for text in texts))
        if not call.return_dict:
            return out.images, None, None
        return SemanticIFPipelineOutput(out.images, **estimates(out.record))


def _cleaned(texts: Any, clean: bool) -> Any:
    """Cleans a string, or nested lists of strings, if `clean` is set. Other values are returned unchanged."""
    if isinstance(texts, str) and texts and clean:
        from sega_jax.text import caption_cleaning  # this import needs the "if" extra

        return caption_cleaning.clean(texts)
    return [_cleaned(text, clean) for text in texts] if isinstance(texts, list | tuple) else texts
