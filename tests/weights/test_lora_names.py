"""Tests names in LoRA files: spellings of layer, prefix and adapter names, and the recognition of families."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import tiny
from support.loras import TEXT

from sega_jax import CheckpointError, merge_lora
from sega_jax.systems import deepfloyd, registry, sdxl, stable_diffusion
from sega_jax.systems.lora_kinds import LoraKind, has
from sega_jax.weights import lora, lora_names
from sega_jax.weights.lora_names import Place, parsed
from sega_jax.weights.original_names import unet_names

PUBLISHED = Path(registry.__file__).parent / "published"


def published(name, models):
    """Returns the networks of a published checkpoint, with shapes but no values."""
    configs = {part: json.loads((PUBLISHED / name / part / "config.json").read_text()) for part in models._fields}
    return models.build(**configs)


@pytest.fixture(scope="module")
def checkpoints():
    """Returns networks of every family that has its own LoRAs, at full size unless only the layers' names matter."""
    return {
        "Stable Diffusion 1.x": published("sd-1.5", stable_diffusion.Models),
        "Stable Diffusion 2.x": published("sd-2.1", stable_diffusion.Models),
        "Stable Diffusion XL": published("sdxl-base-1.0", sdxl.Models),
        "DeepFloyd-IF": deepfloyd.Models.build(tiny.T5, tiny.STAGE_1),
    }


@functools.cache
def place():
    """Returns small Stable Diffusion XL networks, and a function that finds their layers by name."""
    models = sdxl.Models.build(tiny.TEXT, tiny.TEXT_XL_2, tiny.UNET_XL, tiny.VAE)
    names = registry.adapters_of(models).lora
    return models, lora_names.places({part: getattr(models, part) for part in names}, names)


def resblocks(name):
    """Returns OpenCLIP's name for a layer in a text encoder."""
    for diffusers, openclip in (("encoder.layers", "transformer.resblocks"), ("self_attn.out", "attn.out")):
        name = name.replace(diffusers, openclip)
    return name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")


# Names that files use for the UNet's layers, given the layer's name and its name in the original repository.
UNET_SPELLINGS = {
    "diffusers": lambda name, original: f"unet.{name}",
    "peft": lambda name, original: f"base_model.model.{name}",
    "peft in a pipeline": lambda name, original: f"base_model.model.unet.{name}",
    "peft in diffusers": lambda name, original: f"unet.base_model.model.{name}",
    "torch on several devices": lambda name, original: f"module._orig_mod.{name}",
    "kohya": lambda name, original: f"lora_unet_{name.replace('.', '_')}",
    "kohya's XL": lambda name, original: f"lora_unet_{original.replace('.', '_')}",
    "ComfyUI": lambda name, original: f"diffusion_model.{original}",
    "whole models": lambda name, original: f"model.diffusion_model.{original}",
    "OneTrainer": lambda name, original: f"lora_unet.{name}",
    "OneTrainer's exchange format": lambda name, original: f"unet.{original}",
    "SimpleTuner": lambda name, original: f"lycoris_{name.replace('.', '_')}",
}
# Names that files use for the layers of the two text encoders.
TEXT_SPELLINGS = {
    "diffusers": (lambda name: f"text_encoder.text_model.{name}", lambda name: f"text_encoder_2.text_model.{name}"),
    "kohya": (
        lambda name: f"lora_te_text_model_{name.replace('.', '_')}",
        lambda name: f"lora_te2_text_model_{name.replace('.', '_')}",
    ),
    "kohya's XL": (
        lambda name: f"lora_te1_text_model_{name.replace('.', '_')}",
        lambda name: f"lora_te2_{name.replace('.', '_')}",
    ),
    "OneTrainer": (lambda name: f"lora_te1.text_model.{name}", lambda name: f"lora_te2.text_model.{name}"),
    "OneTrainer's exchange format": (
        lambda name: f"clip_l.text_model.{name}",
        lambda name: f"clip_g.text_model.{name}",
    ),
    "ComfyUI": (
        lambda name: f"text_encoders.clip_l.transformer.text_model.{name}",
        lambda name: f"text_encoders.clip_g.transformer.text_model.{name}",
    ),
    "OpenCLIP": (
        lambda name: f"lora_te_{resblocks(name).replace('.', '_')}",
        lambda name: f"lora_te2_{resblocks(name).replace('.', '_')}",
    ),
}
ENDS = {
    "lora_A.weight": ("down", None),
    "lora_B.default_0.weight": ("up", "default_0"),
    "lora_B.my-style.bias": ("up_bias", "my-style"),
    "lora_up.weight": ("up", None),
    "lora.down.weight": ("down", None),
    "lora_linear_layer.up.weight": ("up", None),
    "lora_magnitude_vector": ("magnitude", None),
    "lora_magnitude_vector.weight": ("magnitude", None),
    "lora_magnitude_vector.style.weight": ("magnitude", "style"),
    "lora_magnitude_vector.style": ("magnitude", "style"),
    "dora_scale": ("dora_scale", None),
    "alpha": ("alpha", None),
    "scale": ("scale", None),
    "hada_w1_a": ("hada_w1_a", None),
    "hada_t2.style": ("hada_t2", "style"),
    "lokr_w2_b.style": ("lokr_w2_b", "style"),
    "lokr_w1": ("lokr_w1", None),
    "diff_b": ("diff_b", None),
    "w_norm": ("w_norm", None),
    "ia3_l.style": ("ia3_l", "style"),
    "a1.weight": ("glora_a1", None),
    "weight": ("vector", None),
}


@pytest.mark.parametrize("end", ENDS)
def test_roles_and_adapters(end):
    assert parsed(f"unet.mid_block.x.{end}") == ("unet_mid_block_x", *ENDS[end])


@pytest.mark.parametrize("name", ["", "a", "lora_A.weight.x", "unet.x.lora_C", "unet.x.bias", "unet.x.hada_w3_a"])
def test_other_names_are_not_parsed(name):
    assert parsed(name) is None


@pytest.mark.parametrize("spelling", UNET_SPELLINGS)
def test_layers_of_the_unet(spelling):
    """Every layer is found, including norms, for which files store full differences."""
    models, find_place = place()
    for key, original in unet_names(models.unet).items():
        if key.endswith(".weight"):
            written = UNET_SPELLINGS[spelling](key.removesuffix(".weight"), original.removesuffix(".weight"))
            assert find_place(f"{written}.diff") == Place("unet", key, "diff", None)


@pytest.mark.parametrize("spelling", TEXT_SPELLINGS)
def test_layers_of_text_encoders(spelling):
    _, find_place = place()
    layers = [name for name in TEXT if "v_proj" not in name] if spelling == "OpenCLIP" else [*TEXT]
    for part, spelt in zip(("text_encoder", "text_encoder_2"), TEXT_SPELLINGS[spelling], strict=True):
        start = "text_model." if part == "text_encoder_2" else ""
        for name in layers:
            assert find_place(f"{spelt(name)}.lora_up.weight") == Place(part, f"{start}{name}.weight", "up", None)


def test_other_layers_of_text_encoders():
    _, find_place = place()
    for start in ("clip_g.", "text_encoder_2.", "lora_te2_"):
        assert find_place(f"{start}text_projection.alpha") == Place(
            "text_encoder_2", "text_projection.weight", "alpha", None
        )
    result = find_place("clip_g.transformer.resblocks.0.mlp.c_fc.lora_up.weight")
    assert result == Place("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1.weight", "up", None)
    for start in ("clip_l.", "lora_te1_"):
        result = find_place(f"{start}text_model.embeddings.token_embedding.diff")
        assert result == Place("text_encoder", "embeddings.token_embedding.weight", "diff", None)


def test_names_of_former_attention_processors():
    _, find_place = place()
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    for end, key in (("to_q", "to_q"), ("to_out", "to_out.0")):
        result = find_place(f"unet.{layer}.processor.{end}_lora.down.weight")
        assert result == Place("unet", f"{layer}.{key}.weight", "down", None)
    result = find_place("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight")
    assert result == Place("text_encoder", "encoder.layers.0.self_attn.out_proj.weight", "up", None)


UNETS = {
    "Stable Diffusion 1.x": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768),
    "Stable Diffusion 2.x": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", 320, 1024),
    "Stable Diffusion XL": ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 640, 2048),
    "DeepFloyd-IF": ("unet.down_blocks.0.attentions.0.add_k_proj", 704, 1024),
}
FOREIGN = [
    ("Stable Diffusion XL", "lora_te2_text_model_encoder_layers_0_mlp_fc1", 5120, 1280),
    ("Stable Diffusion XL", "clip_g.text_model.encoder.layers.0.mlp.fc1", 5120, 1280),
    ("Stable Diffusion XL", "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", 640, 640),
    ("Stable Diffusion 1.x", "lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768),
    ("Stable Diffusion 2.x", "lora_te_text_model_encoder_layers_0_mlp_fc1", 4096, 1024),
    ("FLUX", "transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072),
    ("FLUX", "transformer.transformer_blocks.0.attn.to_q", 3072, 3072),
    ("FLUX", "lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072),
    ("FLUX", "diffusion_model.single_blocks.3.linear1", 21504, 3072),
    ("Stable Diffusion 3", "transformer.transformer_blocks.0.attn.add_q_proj", 1536, 1536),
    ("Stable Diffusion 3", "lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536),
    ("Wan", "diffusion_model.blocks.0.self_attn.q", 5120, 5120),
    ("PixArt", "transformer.transformer_blocks.0.attn1.to_q", 1152, 1152),
    ("LTX-Video", "diffusion_model.transformer_blocks.0.attn1.to_q", 2048, 2048),
    ("Qwen-Image", "transformer_blocks.0.img_mlp.net.0.proj", 12288, 3072),
    ("HiDream", "diffusion_model.double_stream_blocks.0.block.attn1.to_q", 2560, 2560),
    ("Stable Cascade", "lora_prior_unet_down_blocks_0_0_mapper", 4, 4),
    ("Z-Image", "diffusion_model.layers.0.attention.to_q", 3840, 3840),
]
FORMS = {
    "LoRA": lambda o, i: {"lora_down.weight": (2, i), "lora_up.weight": (o, 2)},
    "LoHa": lambda o, i: {"hada_w1_a": (o, 2), "hada_w1_b": (2, i), "hada_w2_a": (o, 2), "hada_w2_b": (2, i)},
    "LoKr": lambda o, i: {"lokr_w1": (4, 4), "lokr_w2_a": (o // 4, 2), "lokr_w2_b": (2, i // 4)},
    "GLoRA": lambda o, i: {"a1.weight": (i, 2), "a2.weight": (2, i), "b1.weight": (o, 2), "b2.weight": (2, i)},
}


def tensors(layer, outputs, inputs, form="LoRA"):
    shapes = FORMS[form](outputs, inputs)
    return {f"{layer}.{end}": np.ones(shape, np.float16) for end, shape in shapes.items()}


def family_of(content):
    """Returns the family that a file is for, even if this library does not support that family."""
    sizes = lora._sizes_in({key: array.shape for key, array in content.items()})
    return registry.lora_families(None).of_file(sizes)


@pytest.mark.parametrize("family", UNETS)
def test_families_of_loras(family):
    for form in FORMS:
        assert family_of(tensors(*UNETS[family], form)) == family


@pytest.mark.slow
@pytest.mark.parametrize("family", UNETS)
def test_families_of_checkpoints(checkpoints, family):
    models = checkpoints[family]
    networks = {part: getattr(models, part) for part in registry.adapters_of(models).lora}
    assert registry.lora_families(models).of_checkpoint(lora._sizes_of(networks)) == family


@pytest.mark.parametrize(("family", "layer", "outputs", "inputs"), FOREIGN)
def test_unsupported_families_of_loras(family, layer, outputs, inputs):
    assert family_of(tensors(layer, outputs, inputs)) == family


def test_names_that_do_not_determine_a_family():
    for layer in ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "unet.mid_block.resnets.0.conv1", "x.y"):
        assert family_of(tensors(layer, 768, 768)) is None


def refused(tmp_path, models, content):
    """Returns the error message for a rejected file, without the folder's path at the start."""
    save_file(content, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError) as caught:
        merge_lora(models, tmp_path / "lora.safetensors")
    return str(caught.value).removeprefix(str(tmp_path))


def test_the_error_for_a_lora_of_another_family_is_one_line(tmp_path):
    ours, models = "Stable Diffusion 1.x", published("sd-1.5", stable_diffusion.Models)
    content = tensors(*UNETS["Stable Diffusion XL"]) | tensors("lora_unet_x", 4, 4)
    message = refused(tmp_path, models, content)
    families = f"is a LoRA for Stable Diffusion XL, but this checkpoint is {ours}"
    assert message == f"/lora.safetensors {families}; use a LoRA for {ours}"


@pytest.mark.slow
def test_the_error_for_a_lora_of_the_same_family_lists_problems(checkpoints, tmp_path):
    layer, outputs, inputs = UNETS["Stable Diffusion XL"]
    for name, size in ((layer.replace("4_1", "40_1"), outputs), (layer, outputs + 320)):
        message = refused(tmp_path, checkpoints["Stable Diffusion XL"], tensors(name, size, inputs))
        assert "does not fit this checkpoint's text_encoder and text_encoder_2 and unet:\n" in message
        assert ("unexpected" if name != layer else "misshapen") in message


def test_loras_of_a_registered_family_are_recognised():
    system = stable_diffusion.SYSTEM
    kinds = system.checkpoint.adapters._replace(kinds=(LoraKind("Toy", has("^toy_")),))
    toy = registry.register(system._replace(name="toy", checkpoint=system.checkpoint._replace(adapters=kinds)))
    try:
        assert family_of(tensors("toy.layer", 4, 4)) == "Toy"
    finally:
        registry.unregister(toy.name)
