"""What files of LoRAs and textual inversion call the layers of networks; each family says which it has."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from sega_jax.nn.clip import CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.systems.lora_kinds import LoraKind
from sega_jax.weights.lora_names import LoraNames, layer_keys
from sega_jax.weights.original_names import openclip_names, unet_names
from sega_jax.weights.textual_inversion import TextEncoders

# diffusers' former names of the projections in text encoders.
_FORMER = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class AdapterNames(NamedTuple):
    """The names that a family's networks have in adapter files."""

    lora: Mapping[str, LoraNames] = MappingProxyType({})  # by network; {} if LoRAs are not supported
    words: TextEncoders | None = None  # None if textual inversion is not supported
    kinds: tuple[LoraKind, ...] = ()  # the checkpoints of the family that have LoRAs of their own, as they show it


def diffusers_layers(unet: UNet2DConditionModel) -> dict[str, str]:
    """Returns the keys of a UNet's weights by diffusers' present and former names of their layers."""
    keys = layer_keys(unet)
    return keys | {path.removesuffix(".0"): key for path, key in keys.items() if path.endswith("to_out.0")}


def unet_layers(unet: UNet2DConditionModel) -> dict[str, str]:
    """Returns the keys of a UNet's weights by diffusers' and by the original repository's names of their layers."""
    originals = unet_names(unet)
    names = {originals[key].removesuffix(".weight"): key for key in layer_keys(unet).values()}
    return diffusers_layers(unet) | names


def clip_layers(text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> dict[str, str]:
    """Returns the keys of a text encoder's weights by present and former names of their layers, with and without
    "text_model.", and by OpenCLIP's names of the layers that are the same there."""
    keys = layer_keys(text_encoder)
    names = dict(keys)
    for present, former in _FORMER.items():
        names |= {path.replace(present, former): key for path, key in keys.items()}
    bare = {path.removeprefix("text_model."): key for path, key in names.items()}
    originals = openclip_names(text_encoder)
    openclip = {
        originals[key].removesuffix(".weight"): key for key in keys.values() if originals[key].endswith(".weight")
    }
    return openclip | names | bare | {f"text_model.{path}": key for path, key in bare.items()}


# The LoRA names of each kind of network, with the prefixes of kohya's scripts, diffusers, ComfyUI, OneTrainer and
# SimpleTuner. Tensors without a prefix are the UNet's.
UNET = LoraNames(("lora_unet_", "unet.", "diffusion_model.", "model.diffusion_model.", "lycoris_", ""), unet_layers)
UNET_WITHOUT_ORIGINAL = LoraNames(UNET.starts, diffusers_layers)
TEXT = LoraNames(
    (
        "lora_te_",
        "lora_te1_",
        "text_encoder.",
        *(
            f"{start}clip_{name}.{end}"
            for start in ("", "text_encoders.")
            for name in "lh"
            for end in ("", "transformer.")
        ),
    ),
    clip_layers,
)
TEXT_WITHOUT_FORMER = LoraNames(TEXT.starts, layer_keys)
TEXT_2 = LoraNames(
    (
        "lora_te2_",
        "text_encoder_2.",
        *(f"{start}clip_g.{end}" for start in ("", "text_encoders.") for end in ("", "transformer.")),
    ),
    clip_layers,
)
