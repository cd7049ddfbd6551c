"""Single-file checkpoints of Stable Diffusion 1.x, 2.x and XL, with the tensor names of the original repositories."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sega_jax.method.naming import name_of
from sega_jax.text.files import CheckpointError
from sega_jax.weights.original_names import (
    OPENCLIP_FORMS,
    VAE_FORMS,
    clip_names,
    clip_spelling,
    openclip_names,
    openclip_spelling,
    unet_names,
    vae_names,
    vae_spelling,
)
from sega_jax.weights.single_file import Original, Shapes, SingleFile

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# Stable Diffusion 1.x uses OpenAI's text encoder, 2.x uses OpenCLIP's, and XL uses both.
CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPENCLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

# A folder of checkpoints in diffusers layout that contain neither weights nor vocabularies.
_PUBLISHED = Path(__file__).parent / "published"
# {folder: the repository that contains its vocabulary}
_VOCABULARIES = {
    "sd-1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-2.1": "stabilityai/stable-diffusion-2-1",
    "sd-2.1-base": "stabilityai/stable-diffusion-2-1",
    "sdxl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
}

# The refiner's only text encoder is OpenCLIP's.
_REFINER = "conditioner.embedders.0.model."
_EDM = {"edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}
_SIZES = f"{UNET}label_emb.0.0.weight"  # the layer that embeds the picture sizes and the pooled text in XL's UNet

_NOT_OF_VAE = r"(?!(encoder|decoder|quant_conv|post_quant_conv)\.)"
_NOT_OF_TEXT = r".*(position_ids|text_projection(\.weight)?|logit_scale|attn_mask)$"
_NOT_OF_PROJECTED_TEXT = r".*(position_ids|logit_scale|attn_mask)$"


def _last_of_openclip(text_encoder: Any) -> str:
    """Returns the name prefix of OpenCLIP's last layer, which is unused but present in Stable Diffusion 2.x files."""
    return f"transformer.resblocks.{text_encoder.config.num_hidden_layers}."


def _recognise(shapes: Shapes, *, xl: bool) -> bool:
    return (_SIZES in shapes) == xl and any(key.startswith(UNET) for key in shapes)


def _refuse(path: Path, shapes: Shapes) -> None:
    if any(key.startswith(_REFINER) for key in shapes):
        raise CheckpointError(
            f"{path} is the Stable Diffusion XL refiner, which is not supported; give a checkpoint of the base model"
        )
    if not _EDM.isdisjoint(shapes):
        raise CheckpointError(f"{path} is a Stable Diffusion XL model with EDM preconditioning, which is not supported")
    channels = shapes.get(f"{UNET}input_blocks.0.0.weight", ())[1:2]
    if channels not in ((), (4,)):
        raise CheckpointError(
            f"the UNet in {path} has {channels[0]} input channels, expected 4: inpainting, upscaling and depth models"
            " are not supported in single files; give a text-to-image checkpoint"
        )


def _published(path: Path, shapes: Shapes, prediction_type: str | None) -> Path:
    """Returns the folder with the configs of Stable Diffusion 1.5, 2.1 or 2.1-base.

    A single file does not state its model's prediction type. For 2.x, `prediction_type=None` means v-prediction, as in
    diffusers.
    """
    second = "sd-2.1-base" if prediction_type == "epsilon" else "sd-2.1"
    return _folder(path, shapes, 1, {768: "sd-1.5", 1024: second})


def _published_xl(path: Path, shapes: Shapes, _prediction_type: str | None) -> Path:
    return _folder(path, shapes, 4, {2048: "sdxl-base-1.0"})


def _folder(path: Path, shapes: Shapes, block: int, names: Mapping[int, str]) -> Path:
    """Returns the config folder for a file, which depends on the text width in the given input block of the UNet."""
    width = shapes.get(f"{UNET}input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight", (0,))[-1]
    if width not in names:
        raise CheckpointError(
            f"the UNet in {path} attends to text of width {width}, expected 768 (Stable Diffusion 1.x), 1024 (2.x) or"
            f" 2048 (XL); for another model, give its configs as {name_of('config')}, a folder in diffusers layout"
        )
    return _PUBLISHED / names[width]


_UNET = Original(UNET, unet_names, ema="model_ema.diffusion_model")
_VAE = Original(VAE, vae_names, spelling=vae_spelling, others=_NOT_OF_VAE, forms=VAE_FORMS)
_CLIP = Original(CLIP, clip_names, spelling=clip_spelling, others=_NOT_OF_TEXT)
_OPENCLIP = Original(OPENCLIP, openclip_names, others=_NOT_OF_TEXT, spare=_last_of_openclip, forms=OPENCLIP_FORMS)

_OPENCLIP_XL = Original(
    OPENCLIP_XL,
    openclip_names,
    spelling=openclip_spelling,
    others=_NOT_OF_PROJECTED_TEXT,
    forms=OPENCLIP_FORMS,
)

STABLE_DIFFUSION_FILE = SingleFile(
    name="Stable Diffusion 1.x or 2.x",
    networks={
        "unet": (_UNET,),
        "vae": (_VAE, _VAE._replace(start="vae.")),
        "text_encoder": (_CLIP, _OPENCLIP),
    },
    recognise=partial(_recognise, xl=False),
    refuse=_refuse,
    published=_published,
    vocabularies=_VOCABULARIES,
)
SDXL_FILE = SingleFile(
    name="Stable Diffusion XL",
    networks={
        "unet": (_UNET,),
        "vae": (_VAE, _VAE._replace(start="vae.")),
        "text_encoder": (_CLIP._replace(start=CLIP_XL),),
        "text_encoder_2": (_OPENCLIP_XL,),
    },
    recognise=partial(_recognise, xl=True),
    refuse=_refuse,
    published=_published_xl,
    vocabularies=_VOCABULARIES,
)
