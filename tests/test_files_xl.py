"""Stable Diffusion XL in other files than its folder: single files, LoRAs, textual inversion, Orbax."""

import json
import shutil

import jax
import numpy as np
import pickling
import published
import pytest
import tiny
from safetensors.numpy import save_file
from test_convert import same
from test_lora import close, tensors, wanted

import convert
from sega_jax import CheckpointError, Edit, add_words, load, merge_lora
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.pipelines.loading import describe
from sega_jax.systems.registry import XL, kind_of
from sega_jax.weights import original_names, single_file
from sega_jax.weights.pull import leaves

# Two levels, whose transformers have 1 and 2 layers.
UNET = tiny.UNET_XL | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [1, 2],
    "transformer_layers_per_block": [1, 2],
}
CALL = {"prompt": "a cat at", "edits": [Edit("hat", warmup=1)], "steps": 2, "output": "float", "negative_prompt": "b"}
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


def test_every_form_is_the_same_to_the_bit(tmp_path, pipe, folder, single):
    save_file(single, tmp_path / "a.safetensors")
    pickling.save({"state_dict": single}, tmp_path / "a.ckpt")
    convert.convert(folder, tmp_path / "orbax")
    convert.convert_single(tmp_path / "a.ckpt", tmp_path / "made", config=folder, tokenizer=folder / "tokenizer")
    picture = pipe(**CALL).images
    for name in ("a.safetensors", "a.ckpt", "orbax", "made"):
        config = folder if name.startswith("a.") else None
        found = load(tmp_path / name, config=config, devices=pipe.devices)
        assert same(found, pipe)
        np.testing.assert_array_equal(found.tokenizer(["a b,"]), pipe.tokenizer(["a b,"]))
        np.testing.assert_array_equal(found(**CALL).images, picture)


def test_one_vocabulary_is_enough(tmp_path, pipe, folder, single):
    save_file(single, tmp_path / "a.safetensors")
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    with pytest.raises(CheckpointError, match="does not hold CLIP's vocabulary; give tokenizer="):
        load(tmp_path / "a.safetensors", config=bare, devices=pipe.devices)
    for tokenizer in (folder / "tokenizer", str(folder / "tokenizer"), pipe.tokenizer, pipe.tokenizer.first):
        found = load(tmp_path / "a.safetensors", config=bare, tokenizer=tokenizer, devices=pipe.devices)
        np.testing.assert_array_equal(found.tokenizer(["a b,", "c"]), pipe.tokenizer(["a b,", "c"]))
    with pytest.raises(CheckpointError, match=r"the tokenizer pads with 'a', as those of Stable Diffusion 2\.x"):
        load(tmp_path / "a.safetensors", config=bare, tokenizer=folder / "tokenizer_2", devices=pipe.devices)


def test_what_is_refused(tmp_path, pipe, folder, small_folder, single):
    def said(content, config=folder):
        save_file(content, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "a.safetensors", config=config, devices=pipe.devices)
        return str(caught.value)

    key = f"{original_names.OPENCLIP_XL}text_projection"
    assert f"missing    {key} (12, 20)" in said({name: array for name, array in single.items() if name != key})
    assert f"misshapen  {key}: (20, 20), expected (12, 20)" in said(single | {key: np.ones((20, 20), np.float32)})
    assert "is Stable Diffusion 1.x or 2.x, expected Stable Diffusion XL" in said(single, small_folder)
    wide = single | {f"{original_names.UNET}input_blocks.0.0.weight": np.ones((8, 9, 3, 3), np.float32)}
    assert "takes 9 channels, as models that fill in" in said(wide)
    assert "attends to text of width 0" in said(single, None)
    ours = {name: array for name, array in single.items() if not name.startswith("conditioner.embedders.1")}
    assert "has no text_encoder_2, names that start with conditioner.embedders.1.model." in said(ours)


def test_configs_as_published(pipe):
    key = f"{original_names.UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    shapes = {key: (640, 2048), f"{original_names.UNET}label_emb.0.0.weight": (1280, 2816)}
    folder = single_file.published("x", shapes)
    assert kind_of(folder) is XL
    found = describe(folder, tokenizer=pipe.tokenizer)
    models = found.models.build(**published.XL)
    assert [leaves(network) for network in found.models] == [leaves(network) for network in models]
    assert [network.config for network in found.models[1:3]] == [network.config for network in models[1:3]]
    assert found.models.vae.config.scaling_factor == 0.13025
    assert found.zeros
    assert found.scheduler.name == "EulerDiscreteScheduler"


# LoRAs


@pytest.fixture(scope="module")
def layers(pipe):
    rng, found = np.random.default_rng(0), {}
    for (part, name), rank in LAYERS.items():
        outputs, *inputs = leaves(getattr(pipe.models, part))[f"{name}.weight"]
        shapes = (outputs, rank, *[1] * len(inputs[1:])), (rank, *inputs)
        up, down = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        found[part, name] = (up, down, np.float32(rng.uniform(0.5, 3)))
    return found


def kohya(part, name):
    start = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}[part]
    return [f"{start}{name.replace('.', '_')}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")]


def peft(part, name):
    return [f"{part}.{name}.{end}" for end in ("lora_B.weight", "lora_A.weight", "alpha")]


def kohya_original(part, name):
    """With the UNet's layers as in the original repository, which is what kohya's scripts write."""
    names = original_names.original_names(UNet2DConditionModel(UNetConfig.from_dict(UNET)), "")
    return kohya(part, names[f"{name}.weight"].removesuffix(".weight") if part == "unet" else name)


@pytest.mark.parametrize("names", [kohya, kohya_original, peft])
def test_loras(tmp_path, pipe, layers, names):
    save_file(tensors(layers, names), tmp_path / "a.safetensors")
    found = merge_lora(pipe.models, {tmp_path / "a.safetensors": 0.7})
    assert close(found, wanted(pipe.models, layers, 0.7))
    assert not close(found, wanted(pipe.models, layers, 0.6))


def test_names_of_the_original():
    place = "unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    assert kohya_original(*place)[2] == "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k.alpha"
    assert kohya_original("unet", "add_embedding.linear_1")[2] == "lora_unet_label_emb_0_0.alpha"


# Textual inversion


def test_textual_inversion(tmp_path, pipe, folder):
    rng = np.random.default_rng(0)
    vectors = {"clip_l": rng.standard_normal((2, 16)), "clip_g": rng.standard_normal((2, 20))}
    vectors = {name: array.astype(np.float32) for name, array in vectors.items()}
    save_file(vectors, tmp_path / "a.safetensors")
    pickling.save(vectors, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        found = load(folder, devices=pipe.devices, textual_inversion={"<toy>": tmp_path / name})
        ids = found.tokenizer(["x <toy>"])[0]
        tables = found.models.text_encoder, found.models.text_encoder_2.text_model
        for tower, row, own in zip(tables, ids, vectors.values(), strict=True):
            table = np.asarray(tower.embeddings.token_embedding.embedding[...])
            assert row[2:4].tolist() == [58, 59]
            np.testing.assert_array_equal(table[row[2:4]], own)
    with pytest.raises(CheckpointError, match="does not name its word"):
        add_words(pipe.models, pipe.tokenizer, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="'<cat>' has a special token in it, such as 'a'; give another word"):
        add_words(pipe.models, pipe.tokenizer, {"<cat>": tmp_path / "a.pt"})


def test_textual_inversion_of_one_tower(tmp_path, pipe):
    save_file({"<toy>": np.ones((2, 16), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match="for text_encoder, expected for text_encoder and text_encoder_2: it is of"
    ):
        add_words(pipe.models, pipe.tokenizer, tmp_path / "a.safetensors")
    content = {"clip_l": np.ones((2, 16), np.float32), "clip_g": np.ones((3, 20), np.float32)}
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="other numbers of vectors for each text encoder"):
        add_words(pipe.models, pipe.tokenizer, {"<toy>": tmp_path / "a.safetensors"})


def test_the_index_of_a_conversion(tmp_path, folder, single):
    save_file(single, tmp_path / "a.safetensors")
    made = convert.convert_single(tmp_path / "a.safetensors", tmp_path / "made", config=folder)
    index = json.loads((made / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert jax.tree.leaves(index) == jax.tree.leaves(json.loads((folder / "model_index.json").read_text()))
