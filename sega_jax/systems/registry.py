"""What kind of checkpoint a folder in diffusers layout holds, by its model_index.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sega_jax.nn.clip import CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.paella import Paella
from sega_jax.nn.prior import PriorModel
from sega_jax.nn.t5 import T5EncoderModel
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.nn.vae import AutoencoderKL
from sega_jax.nn.vqgan import VQModel
from sega_jax.systems import deepfloyd, paella, sdxl, stable_diffusion
from sega_jax.weights.pull import CheckpointError, read_json


class Kind(NamedTuple):
    """A kind of checkpoint."""

    name: str
    models: type[stable_diffusion.Models] | type[sdxl.Models] | type[deepfloyd.Models] | type[paella.Models]
    parts: Mapping[str, type]  # the networks by their folders
    noising: str | None = None  # the folder of the scheduler that noises small pictures


CHECKER = "safety_checker"
_SD = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
_XL = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection, **_SD}
_IF = {"text_encoder": T5EncoderModel, "unet": UNet2DConditionModel}

STABLE_DIFFUSION = Kind("Stable Diffusion 1.x or 2.x", stable_diffusion.Models, _SD)
XL = Kind("Stable Diffusion XL", sdxl.Models, _XL)
UPSCALER = Kind("Stable Diffusion's x4 upscaler", stable_diffusion.Models, _SD, "low_res_scheduler")
STAGE_1 = Kind("DeepFloyd-IF's first stage", deepfloyd.Models, _IF)
STAGE_2 = Kind("DeepFloyd-IF's second stage", deepfloyd.Models, _IF, "image_noising_scheduler")
_PAELLA = {
    "byt5": T5EncoderModel,
    "clip": CLIPTextModelWithProjection,
    "prior": PriorModel,
    "denoiser": Paella,
    "vqgan": VQModel,
}
PAELLA = Kind("Paella", paella.Models, _PAELLA)


_ALL = (STABLE_DIFFUSION, XL, UPSCALER, STAGE_1, STAGE_2, PAELLA)


def of(models: Any) -> Kind:
    """The kind of a pipeline's networks."""
    return next(
        kind for kind in _ALL if type(models) is kind.models and bool(kind.noising) == bool(models.sizes.enlarges)
    )


def entry(entries: Mapping[str, Any], part: str) -> str | None:
    """The class of a part in an index; None where there is none."""
    found = entries.get(part)
    return found[1] if isinstance(found, list) and len(found) == 2 else None


def kind_of(folder: Path) -> Kind:
    """The kind of a folder's checkpoint.

    Raises:
        CheckpointError: it has no index, or one of another kind.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        hint = (
            "; it looks like one part of a checkpoint, give the folder above"
            if (folder / "config.json").is_file()
            else ""
        )
        raise CheckpointError(f"{folder} has no model_index.json, so it is no checkpoint in diffusers layout{hint}")
    entries = read_json(index)
    name = entries.get("_class_name")
    if name == "PaellaPipeline":
        kind = PAELLA
    elif "text_encoder_2" in entries:
        kind = XL
    elif str(name).startswith("IF") and "vae" not in entries:
        kind = STAGE_2 if STAGE_2.noising in entries else STAGE_1
    else:
        kind = UPSCALER if UPSCALER.noising in entries else STABLE_DIFFUSION
    if kind is XL and entry(entries, "text_encoder_2") and not entry(entries, "text_encoder"):
        raise CheckpointError(
            f"{folder} is Stable Diffusion XL's refiner, which goes on with pictures of the base model: only the base"
            " is supported"
        )
    for part, module in kind.parts.items():
        found = entry(entries, part)
        if found != module.__name__ and not (found is None and part in optional(kind)):
            raise CheckpointError(
                f"{folder} is a {name} whose {part} is {found or 'missing'}; expected {kind.name}, with"
                f" {module.__name__} in the folder {part}"
            )
    return kind


def has_other_checker(folder: Path) -> bool:
    """Whether the checkpoint has DeepFloyd-IF's safety checker."""
    return entry(read_json(folder / "model_index.json"), CHECKER) == "IFSafetyChecker"


def weight_stem(part: str) -> str:
    """The name of a network's weight file in diffusers layout, without ending: transformers' or diffusers'."""
    texts = ("text_encoder", "text_encoder_2", "byt5", "clip")
    return "model" if part in (*texts, CHECKER) else "diffusion_pytorch_model"


def optional(kind: Kind) -> tuple[str, ...]:
    """Networks that a checkpoint may do without: the stages of DeepFloyd-IF share one text encoder, and Paella is told
    what there is."""
    if kind is PAELLA:
        return ("byt5", "clip", "prior")
    return ("text_encoder",) if kind.models is deepfloyd.Models else ()
