"""The names of networks and layers in LoRA and textual-inversion files. Each family declares its own names."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from sega_jax.nn.clip import CLIPTextModel, CLIPTextModelWithProjection
from sega_jax.nn.unet import UNet2DConditionModel
from sega_jax.systems.lora_kinds import LoraKind
from sega_jax.weights.lora_names import LoraNames, layer_keys
from sega_jax.weights.original_names import openclip_names, unet_names
from sega_jax.weights.textual_inversion import TextEncoders

# The names that older versions of diffusers used for the projection layers in text encoders.
_FORMER = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class AdapterNames(NamedTuple):
    """The names that LoRA and textual-inversion files use for a family's networks."""

    lora: Mapping[str, LoraNames] = MappingProxyType({})  # {network: names}; {} if LoRAs are not supported
    words: TextEncoders | None = None  # None if textual inversion is not supported
    kinds: tuple[LoraKind, ...] = ()  # how to recognise LoRAs trained for the family's checkpoints


def diffusers_layers(unet: UNet2DConditionModel) -> dict[str, str]:
    """Returns {layer name: weight key} for a UNet, with both current and former diffusers names as keys."""
    keys = layer_keys(unet)
    return keys | {path.removesuffix(".0"): key for path, key in keys.items() if path.endswith("to_out.0")}


def unet_layers(unet: UNet2DConditionModel) -> dict[str, str]:
    """Returns {layer name: weight key} for a UNet, with both diffusers' and the original repository's names as keys."""
    originals = unet_names(unet)
    names = {originals[key].removesuffix(".weight"): key for key in layer_keys(unet).values()}
    return diffusers_layers(unet) | names


def clip_layers(text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> dict[str, str]:
    """Returns {layer name: weight key} for a text encoder.

    The layer names include the current and former diffusers names, with and without "text_model.". OpenCLIP's names are
    included for layers whose weights OpenCLIP stores in the same form.
    """
    keys = layer_keys(text_encoder)
    names = dict(keys)
    for current, former in _FORMER.items():
        names |= {path.replace(current, former): key for path, key in keys.items()}
    bare = {path.removeprefix("text_model."): key for path, key in names.items()}
    originals = openclip_names(text_encoder)
    openclip = {
        originals[key].removesuffix(".weight"): key for key in keys.values() if originals[key].endswith(".weight")
    }
    return openclip | names | bare | {f"text_model.{path}": key for path, key in bare.items()}


# The prefixes of each network's tensors in LoRA files written by kohya's scripts, diffusers, ComfyUI, OneTrainer and
# SimpleTuner. Tensors without a prefix belong to the UNet.
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
