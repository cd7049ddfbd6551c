"""LoRAs for the small networks in every supported naming scheme, and the expected weights after a merge."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sega_jax.weights.layout import from_torch, leaves, torch_name
from sega_jax.weights.original_names import unet_names
from support import tiny

# {layer name in diffusers: rank}, for linear layers, 1x1 and 3x3 convolutions, and a strided convolution.
LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 2,
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0": 4,
    "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj": 3,
    "down_blocks.1.attentions.0.proj_in": 2,
    "mid_block.resnets.1.conv1": 5,
    "mid_block.resnets.0.time_emb_proj": 1,
    "down_blocks.1.downsamplers.0.conv": 2,
    "up_blocks.0.resnets.0.conv_shortcut": 2,
    "conv_in": 2,
    "time_embedding.linear_1": 3,
}
TEXT = {"encoder.layers.0.self_attn.v_proj": 2, "encoder.layers.1.self_attn.out_proj": 3, "encoder.layers.1.mlp.fc2": 2}


@pytest.fixture(scope="module")
def models():
    return jax.tree.map(jax.numpy.asarray, tiny.Models(*map(tiny.filled, tiny.networks())))


@pytest.fixture(scope="module")
def layers(models):
    """Returns {(part, layer name in diffusers): (up, down, alpha)}."""
    rng, values = np.random.default_rng(0), {}
    for part, names in (("unet", LAYERS), ("text_encoder", TEXT)):
        shapes = leaves(getattr(models, part))
        for name, rank in names.items():
            outputs, *inputs = shapes[f"{name}.weight"]
            down, up = (
                rng.standard_normal((rank, *inputs)),
                rng.standard_normal((outputs, rank, *[1] * len(inputs[1:]))),
            )
            values[part, name] = (up.astype(np.float32), down.astype(np.float32), np.float32(rng.uniform(0.5, 3)))
    return values


def peft(part, name):
    """Names a layer as peft does. Files that peft writes have no alpha."""
    prefix = "text_model." if part == "text_encoder" else ""
    return [f"{part}.{prefix}{name}.{end}" for end in ("lora_B.weight", "lora_A.weight", "alpha")]


def diffusers(part, name):
    end = "lora_linear_layer" if part == "text_encoder" else "lora"
    return [f"{part}.{name}.{end}.{role}" for role in ("up.weight", "down.weight", "alpha")]


def old_diffusers(part, name):
    layer = name.removesuffix(".0")
    if part == "text_encoder":
        for new, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
            layer = layer.replace(new, old)
    elif ".attn" in layer:
        layer = layer.replace(".to_", ".processor.to_")
    return [f"{part}.{layer}_lora.{role}" for role in ("up.weight", "down.weight", "alpha")]


def kohya(part, name):
    start = "lora_te_text_model_" if part == "text_encoder" else "lora_unet_"
    layer = start + name.replace(".", "_")
    return [f"{layer}.{role}" for role in ("lora_up.weight", "lora_down.weight", "alpha")]


def kohya_original(part, name):
    """Names a layer as kohya's scripts do for Stable Diffusion XL."""
    if part == "text_encoder":
        return [key.replace("lora_te_", "lora_te1_") for key in kohya(part, name)]
    original = unet_names(tiny.networks().unet)[f"{name}.weight"].removesuffix(".weight")
    return kohya(part, original)


def write(path, models, layers, seed=0):
    """Writes a LoRA of rank 2 and returns its path. `layers` is {network: [linear layers in diffusers' names]}."""
    rng, arrays = np.random.default_rng(seed), {}
    for part, names in layers.items():
        shapes = leaves(getattr(models, part))
        for name in names:
            outputs, inputs = shapes[f"{name}.weight"]
            up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((outputs, 2), (2, inputs)))
            arrays |= dict(zip(peft_keys(part, name), (up, down), strict=True))
    save_file(arrays, path)
    return path


def peft_keys(part, name):
    return [f"{part}.{name}.{end}" for end in ("lora_B.weight", "lora_A.weight")]


NAMINGS = {f.__name__: f for f in (peft, diffusers, old_diffusers, kohya, kohya_original)}


def tensors(layers, naming, alpha=True):
    """Returns the tensors of a file, without the alphas if `alpha` is False."""
    arrays = {}
    for (part, name), (up, down, number) in layers.items():
        for key, array in zip(naming(part, name), (up, down, number), strict=True):
            if alpha or array is not number:
                arrays[key] = np.asarray(array)
    return arrays


def merged_by_hand(models, layers, scale=1.0, alpha=True):
    """Merges the LoRA into the models in float64."""
    changed = {}
    for (part, name), (up, down, number) in layers.items():
        rank = len(down)
        product = up.reshape(-1, rank).astype(np.float64) @ down.reshape(rank, -1).astype(np.float64)
        changed[part, f"{name}.weight"] = (
            scale * (number / rank if alpha else 1) * product.reshape(len(up), *down.shape[1:])
        )

    def change(part, path, leaf):
        difference = changed.get((part, torch_name(path)))
        return np.asarray(leaf, np.float64) + (0 if difference is None else from_torch(path, difference))

    parts = models._asdict()
    trees = {
        part: jax.tree_util.tree_map_with_path(lambda p, x, part=part: change(part, p, x), net)
        for part, net in parts.items()
    }
    return type(models)(**trees)


def close(models, expected, tolerance=1e-6):
    trees = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (models, expected))
    return all(np.abs(a - b).max() <= tolerance * (1 + np.abs(b).max()) for a, b in zip(*trees, strict=True))
