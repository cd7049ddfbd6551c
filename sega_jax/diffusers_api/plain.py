"""diffusers' standard pipelines.

They are subclasses of the semantic pipelines and also support semantic guidance, but their positional arguments have
the same order as in diffusers.
"""

import dataclasses
from typing import Any

from PIL import Image

from sega_jax.diffusers_api.arguments import positional
from sega_jax.diffusers_api.base import DiffusersPipeline
from sega_jax.diffusers_api.deepfloyd import IFArguments, SemanticIFPipeline
from sega_jax.diffusers_api.sdxl_arguments import SDXLArguments
from sega_jax.diffusers_api.stable_diffusion import SemanticStableDiffusionPipeline, StableDiffusionArguments
from sega_jax.diffusers_api.stable_diffusion_xl import SemanticStableDiffusionXLPipeline
from sega_jax.method.arguments import takes
from sega_jax.systems.deepfloyd import STAGE_1, STAGE_2
from sega_jax.systems.images import read

_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
_ADAPTER = ("ip_adapter_image", "ip_adapter_image_embeds", "output_type", "return_dict", "cross_attention_kwargs")
_CALLBACK = ("callback_on_step_end", "callback_on_step_end_tensor_inputs")
_COUNT = ("num_images_per_prompt", "eta", "generator")


@positional(
    *("prompt", "height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "negative_prompt"),
    *(*_COUNT, "latents", *_EMBEDS, *_ADAPTER, "guidance_rescale", "clip_skip", *_CALLBACK),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextToImageArguments(StableDiffusionArguments):
    """The arguments of `StableDiffusionPipeline`."""


@positional(
    *("prompt", "image", "strength", "num_inference_steps", "timesteps", "sigmas", "guidance_scale"),
    *("negative_prompt", *_COUNT, *_EMBEDS, *_ADAPTER, "clip_skip", *_CALLBACK),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageToImageArguments(StableDiffusionArguments):
    """The arguments of `StableDiffusionImg2ImgPipeline`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_image(self.image)


_XL_PROMPTS = ("negative_prompt", "negative_prompt_2", *_COUNT, "latents", *_EMBEDS)
_XL_POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds", *_ADAPTER, "guidance_rescale")
_XL_SIZES = (
    *("original_size", "crops_coords_top_left", "target_size"),
    *("negative_original_size", "negative_crops_coords_top_left", "negative_target_size"),
)


@positional(
    *("prompt", "prompt_2", "height", "width", "num_inference_steps", "timesteps", "sigmas", "denoising_end"),
    *("guidance_scale", *_XL_PROMPTS, *_XL_POOLED, *_XL_SIZES, "clip_skip", *_CALLBACK),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SDXLTextToImageArguments(SDXLArguments):
    """The arguments of `StableDiffusionXLPipeline`."""


@positional(
    *("prompt", "prompt_2", "image", "strength", "num_inference_steps", "timesteps", "sigmas", "denoising_start"),
    *("denoising_end", "guidance_scale", *_XL_PROMPTS, *_XL_POOLED, *_XL_SIZES),
    *("aesthetic_score", "negative_aesthetic_score", "clip_skip", *_CALLBACK),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SDXLImageToImageArguments(SDXLArguments):
    """The arguments of `StableDiffusionXLImg2ImgPipeline`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_image(self.image)


@positional(
    *("prompt", "height", "width", "image", "num_inference_steps", "timesteps", "guidance_scale", "negative_prompt"),
    *(*_COUNT, *_EMBEDS, "output_type", "return_dict", "callback", "callback_steps", "cross_attention_kwargs"),
    *("noise_level", "clean_caption"),
)
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SuperResolutionArguments(IFArguments):
    """The arguments of `IFSuperResolutionPipeline`."""


def _check_image(image: object) -> None:
    if image is None:
        raise TypeError("image is missing; give the picture to start from, or use a text-to-image pipeline")


class ImageToImagePipeline(DiffusersPipeline):
    """A pipeline that starts from pictures. The results have the same size as the initial pictures."""

    def _with_picture_size(self, options: dict[str, Any]) -> dict[str, Any]:
        """Adds the size of the initial pictures to the arguments of a native call.

        As in diffusers, the sides of PIL images are rounded down to multiples of the checkpoint's downsampling factor.

        Raises:
            FileNotFoundError, TypeError, ValueError: `image` is not a picture, or the pictures differ in size.
        """
        multiple = self.pipeline.system.sampler.sizes(self.pipeline.models).multiple
        source = options["image"]
        is_list = isinstance(source, list | tuple)
        image: Any = [_fitted(picture, multiple) for picture in (source if is_list else [source])]
        image = image if is_list else image[0]
        height, width = read(image).shape[1:3]
        return options | {"image": image, "height": height, "width": width}


def _fitted(picture: Any, multiple: int) -> Any:
    """Resizes a PIL image so that its sides are multiples of `multiple`. Other values are returned unchanged."""
    if not isinstance(picture, Image.Image):
        return picture
    width, height = (max(side - side % multiple, multiple) for side in picture.size)
    size = width, height
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


class StableDiffusionPipeline(SemanticStableDiffusionPipeline):
    """diffusers' `StableDiffusionPipeline`; see `SemanticStableDiffusionPipeline`."""

    __call__ = takes(TextToImageArguments, "StableDiffusionPipeline")(
        SemanticStableDiffusionPipeline.__call__.__wrapped__  # type: ignore[attr-defined]
    )


class StableDiffusionImg2ImgPipeline(ImageToImagePipeline, SemanticStableDiffusionPipeline):
    """diffusers' `StableDiffusionImg2ImgPipeline`; see `SemanticStableDiffusionPipeline`."""

    __call__ = takes(ImageToImageArguments, "StableDiffusionImg2ImgPipeline")(
        SemanticStableDiffusionPipeline.__call__.__wrapped__  # type: ignore[attr-defined]
    )


class StableDiffusionXLPipeline(SemanticStableDiffusionXLPipeline):
    """diffusers' `StableDiffusionXLPipeline`; see `SemanticStableDiffusionXLPipeline`."""

    __call__ = takes(SDXLTextToImageArguments, "StableDiffusionXLPipeline")(
        SemanticStableDiffusionXLPipeline.__call__.__wrapped__  # type: ignore[attr-defined]
    )


class StableDiffusionXLImg2ImgPipeline(ImageToImagePipeline, SemanticStableDiffusionXLPipeline):
    """diffusers' `StableDiffusionXLImg2ImgPipeline`; see `SemanticStableDiffusionXLPipeline`."""

    __call__ = takes(SDXLImageToImageArguments, "StableDiffusionXLImg2ImgPipeline")(
        SemanticStableDiffusionXLPipeline.__call__.__wrapped__  # type: ignore[attr-defined]
    )


class IFPipeline(SemanticIFPipeline):
    """diffusers' `IFPipeline` for the first stage; see `SemanticIFPipeline`."""

    _systems = (STAGE_1,)


class IFSuperResolutionPipeline(SemanticIFPipeline):
    """diffusers' `IFSuperResolutionPipeline` for the second stage; see `SemanticIFPipeline`."""

    _systems = (STAGE_2,)

    __call__ = takes(SuperResolutionArguments, "IFSuperResolutionPipeline")(
        SemanticIFPipeline.__call__.__wrapped__  # type: ignore[attr-defined]
    )
