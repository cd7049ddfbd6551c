"""Merged LoRAs give the same weights as diffusers' `fuse_lora`, which needs peft."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")


import json

import diffusers
import jax
import numpy as np
import peft
import torch
from safetensors.numpy import save_file
from support.loras import NAMINGS, layers, models, tensors

from sega_jax import load, merge_lora
from sega_jax.weights.layout import from_torch, torch_name

pytestmark = pytest.mark.parity

__all__ = ["layers", "models"]  # fixtures


@pytest.fixture
def theirs(folder):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def difference(ours, theirs):
    """Returns the largest relative difference among all weights of the UNet and the text encoder."""
    worst = 0
    for part in ("unet", "text_encoder"):
        expected = {key.removeprefix("text_model."): x for key, x in getattr(theirs, part).state_dict().items()}
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(ours, part)):
            reference = from_torch(path, expected[torch_name(path)].detach().numpy())
            worst = max(worst, np.abs(reference - np.asarray(leaf)).max() / np.abs(reference).max())
    return worst


def one_alpha(layers):
    """Gives all layers the same alpha.

    With kohya's naming, diffusers 0.42.1 drops some layers' alphas if the alphas differ between layers.
    """
    return {place: (up, down, np.float32(1.5)) for place, (up, down, _) in layers.items()}


@pytest.mark.parametrize("naming", ["peft", "old_diffusers", "kohya"])
def test_one(folder, theirs, models, layers, tmp_path, naming, one_device):
    """The layers have different ranks, and they have alphas if diffusers reads alphas for the naming scheme."""
    selected = one_alpha(layers)
    if naming == "old_diffusers":  # this naming scheme covers only attention layers
        selected = {place: layer for place, layer in selected.items() if ".attn" in place[1]}
    save_file(tensors(selected, NAMINGS[naming], alpha="kohya" in naming), tmp_path / "a.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    ours = load(folder, lora={tmp_path / "a.safetensors": 0.7}, devices=one_device)
    assert difference(ours.models, theirs) < 1e-6
    assert difference(models, theirs) > 0.01


def test_settings_of_peft(theirs, models, layers, tmp_path):
    first = next(name for _, name in layers)
    settings = {}
    for part in ("unet", "text_encoder"):
        ranks = {name: len(down) for (network, name), (_, down, _) in layers.items() if network == part}
        targets = list(ranks)
        settings |= {f"{part}.r": 2, f"{part}.lora_alpha": 5, f"{part}.target_modules": targets}
        settings |= {f"{part}.rank_pattern": ranks}
    settings |= {"unet.alpha_pattern": {first: 3}, "unet.use_rslora": True}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    save_file(tensors(layers, NAMINGS["peft"], alpha=False), tmp_path / "a.safetensors", metadata)
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    assert difference(merge_lora(models, tmp_path / "a.safetensors"), theirs) < 1e-6


def random_lora(**settings):
    """Returns peft's config for a LoRA with random matrices."""
    settings = {"r": 3, "lora_alpha": 11, "init_lora_weights": False} | settings
    torch.manual_seed(0)
    return peft.LoraConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 5}, "alpha_pattern": {"to_q": 2, r"to_out\.0": 17}},
        {"alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_k": 1.5}},
    ],
)
def test_files_of_peft(theirs, models, tmp_path, settings):
    targets = ["to_q", "to_k", "to_out.0", "proj_in"]
    config = random_lora(target_modules=targets, **settings)
    wrapped = peft.get_peft_model(theirs.unet, config)
    wrapped.save_pretrained(tmp_path / "peft")
    theirs.unet = wrapped.merge_and_unload()
    ours = merge_lora(models, tmp_path / "peft" / "adapter_model.safetensors")
    assert difference(ours, theirs) < 1e-6
    assert difference(models, theirs) > 0.01


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "alpha_pattern": {"to_q": 2}}])
def test_files_of_diffusers_save_lora_adapter(theirs, models, tmp_path, settings):
    config = random_lora(target_modules=["to_q", "to_v"], **settings)
    theirs.unet.add_adapter(config)
    theirs.unet.save_lora_adapter(tmp_path, weight_name="a.safetensors")
    theirs.unet.fuse_lora()
    theirs.unet.unload_lora()
    assert difference(merge_lora(models, tmp_path / "a.safetensors"), theirs) < 1e-6
    assert difference(models, theirs) > 0.01


def test_a_text_encoder_of_peft(theirs, models, tmp_path):
    config = random_lora(target_modules=["q_proj", "fc1"])
    wrapped = peft.get_peft_model(theirs.text_encoder, config)
    wrapped.save_pretrained(tmp_path)
    theirs.text_encoder = wrapped.merge_and_unload()
    assert difference(merge_lora(models, tmp_path / "adapter_model.safetensors"), theirs) < 1e-6
    assert difference(models, theirs) > 0.01


def test_several(theirs, models, layers, tmp_path):
    values = one_alpha(layers)
    halves = [{place: layer for i, (place, layer) in enumerate(values.items()) if i % 3 != k} for k in (0, 1)]
    scales = {"a": 0.5, "b": 1.4}
    for name, half in zip(scales, halves, strict=True):
        save_file(tensors(half, NAMINGS["kohya"]), tmp_path / f"{name}.safetensors")
        theirs.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    theirs.set_adapters(list(scales), list(scales.values()))
    theirs.fuse_lora(adapter_names=list(scales))
    theirs.unload_lora_weights()
    ours = merge_lora(models, {tmp_path / f"{name}.safetensors": scale for name, scale in scales.items()})
    assert difference(ours, theirs) < 1e-6
