"""A small Stable Diffusion XL checkpoint as a folder and as a single file, and the layers of a LoRA for it."""

import numpy as np
import pytest

from sega_jax import load
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.weights.layout import leaves
from sega_jax.weights.original_names import unet_names
from support import tiny

# Two levels; the second level has two-layer transformers.
UNET = tiny.UNET_XL | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2],
    "transformer_layers_per_block": [1, 2],
}
LAYERS = {
    ("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"): 2,
    ("unet", "up_blocks.0.attentions.0.proj_in"): 3,
    ("unet", "add_embedding.linear_1"): 2,
    ("unet", "down_blocks.1.resnets.0.conv1"): 2,
    ("text_encoder", "encoder.layers.0.self_attn.q_proj"): 2,
    ("text_encoder", "encoder.layers.1.self_attn.out_proj"): 2,
    ("text_encoder_2", "text_model.encoder.layers.2.mlp.fc1"): 3,
    ("text_encoder_2", "text_model.encoder.layers.0.self_attn.out_proj"): 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.xl(tmp_path_factory.mktemp("xl") / "tiny", unet=UNET, vae=tiny.VAE_1)


@pytest.fixture(scope="module")
def pipe(folder, one_device):
    return load(folder, devices=one_device)


@pytest.fixture(scope="module")
def single():
    return tiny.original(unet=UNET, vae=tiny.VAE_1, text_2=tiny.TEXT_XL_2)


@pytest.fixture(scope="module")
def layers(pipe):
    rng, values = np.random.default_rng(0), {}
    for (part, name), rank in LAYERS.items():
        outputs, *inputs = leaves(getattr(pipe.models, part))[f"{name}.weight"]
        shapes = (outputs, rank, *[1] * len(inputs[1:])), (rank, *inputs)
        up, down = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        values[part, name] = (up, down, np.float32(rng.uniform(0.5, 3)))
    return values


def kohya(part, name):
    start = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}[part]
    return [f"{start}{name.replace('.', '_')}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")]


def peft(part, name):
    return [f"{part}.{name}.{end}" for end in ("lora_B.weight", "lora_A.weight", "alpha")]


def kohya_original(part, name):
    """Gives the UNet's layers the names from the original repository, as kohya's scripts do."""
    names = unet_names(UNet2DConditionModel(UNetConfig.from_dict(UNET)))
    return kohya(part, names[f"{name}.weight"].removesuffix(".weight") if part == "unet" else name)
