"""Tests other file formats for Stable Diffusion XL: single files, LoRAs, textual inversions, and Orbax."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import pickling, published
from support.checkpoints import same
from support.loras import close, merged_by_hand, tensors
from support.sdxl_files import folder, kohya, kohya_original, layers, peft, pipe, single

import convert
from sega_jax import CheckpointError, Edit, add_words, load, merge_lora
from sega_jax.pipelines.loading import describe
from sega_jax.systems import original_files, sdxl
from sega_jax.systems.registry import recognise
from sega_jax.weights.layout import leaves

__all__ = ["folder", "layers", "pipe", "single"]  # fixtures

CALL = {"prompt": "a cat at", "edits": [Edit("hat", warmup=1)], "steps": 2, "output": "float", "negative_prompt": "b"}


@pytest.mark.slow
def test_every_format_is_bit_identical(tmp_path, pipe, folder, single):
    save_file(single, tmp_path / "a.safetensors")
    pickling.save({"state_dict": single}, tmp_path / "a.ckpt")
    convert.convert(folder, tmp_path / "orbax")
    convert.convert_single(tmp_path / "a.ckpt", tmp_path / "made", config=folder, tokenizer=folder / "tokenizer")
    picture = pipe(**CALL).images
    for name in ("a.safetensors", "a.ckpt", "orbax", "made"):
        config = folder if name.startswith("a.") else None
        result = load(tmp_path / name, config=config, devices=pipe.devices)
        assert same(result, pipe)
        np.testing.assert_array_equal(result.tokenizer(["a b,"]), pipe.tokenizer(["a b,"]))
        np.testing.assert_array_equal(result(**CALL).images, picture)


def test_one_vocabulary_is_enough(tmp_path, pipe, folder, single):
    save_file(single, tmp_path / "a.safetensors")
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    with pytest.raises(CheckpointError, match=r"does not contain CLIP's vocabulary: .*As tokenizer, give"):
        load(tmp_path / "a.safetensors", config=bare, devices=pipe.devices)
    for tokenizer in (folder / "tokenizer", str(folder / "tokenizer"), pipe.tokenizer, pipe.tokenizer.first):
        result = load(tmp_path / "a.safetensors", config=bare, tokenizer=tokenizer, devices=pipe.devices)
        np.testing.assert_array_equal(result.tokenizer(["a b,", "c"]), pipe.tokenizer(["a b,", "c"]))
    with pytest.raises(CheckpointError, match=r"the tokenizer pads with 'a', like Stable Diffusion 2\.x"):
        load(tmp_path / "a.safetensors", config=bare, tokenizer=folder / "tokenizer_2", devices=pipe.devices)


def test_unsupported_and_broken_files_are_rejected(tmp_path, pipe, folder, small_folder, single):
    def error(content, config=folder):
        save_file(content, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "a.safetensors", config=config, devices=pipe.devices)
        return str(caught.value)

    key = f"{original_files.OPENCLIP_XL}text_projection"
    assert f"missing    {key} (12, 20)" in error({name: array for name, array in single.items() if name != key})
    assert f"misshapen  {key}: (20, 20), expected (12, 20)" in error(single | {key: np.ones((20, 20), np.float32)})
    assert "is Stable Diffusion 1.x or 2.x, expected Stable Diffusion XL" in error(single, small_folder)
    wide = single | {f"{original_files.UNET}input_blocks.0.0.weight": np.ones((8, 9, 3, 3), np.float32)}
    assert "has 9 input channels, expected 4: inpainting" in error(wide)
    assert "attends to text of width 0" in error(single, None)
    incomplete = {name: array for name, array in single.items() if not name.startswith("conditioner.embedders.1")}
    assert "has no text_encoder_2 (no names that start with conditioner.embedders.1.model." in error(incomplete)


def test_configs_as_published(pipe):
    key = f"{original_files.UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    shapes = {key: (640, 2048), f"{original_files.UNET}label_emb.0.0.weight": (1280, 2816)}
    folder = original_files.SDXL_FILE.published("x", shapes, None)
    assert recognise(folder) is sdxl.SYSTEM
    result = describe(folder, tokenizer=pipe.tokenizer)
    models = result.models.build(**published.XL)
    assert [leaves(network) for network in result.models] == [leaves(network) for network in models]
    assert [network.config for network in result.models[1:3]] == [network.config for network in models[1:3]]
    assert result.models.vae.config.scaling_factor == 0.13025
    assert result.extras.zero_negative
    assert result.scheduler.name == "EulerDiscreteScheduler"


# LoRAs


@pytest.mark.parametrize("names", [kohya, kohya_original, peft])
def test_loras(tmp_path, pipe, layers, names):
    save_file(tensors(layers, names), tmp_path / "a.safetensors")
    result = merge_lora(pipe.models, {tmp_path / "a.safetensors": 0.7})
    assert close(result, merged_by_hand(pipe.models, layers, 0.7))
    assert not close(result, merged_by_hand(pipe.models, layers, 0.6))


def test_original_names():
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
        result = load(folder, devices=pipe.devices, textual_inversion={"<toy>": tmp_path / name})
        ids = result.tokenizer(["x <toy>"])[0]
        tables = result.models.text_encoder, result.models.text_encoder_2.text_model
        for tower, row, expected in zip(tables, ids, vectors.values(), strict=True):
            table = np.asarray(tower.embeddings.token_embedding.embedding[...])
            assert row[2:4].tolist() == [58, 59]
            np.testing.assert_array_equal(table[row[2:4]], expected)
    with pytest.raises(CheckpointError, match="does not store its word"):
        add_words(pipe.models, pipe.tokenizer, tmp_path / "a.pt")
    with pytest.raises(
        ValueError, match="the new word '<cat>' contains a special token, such as 'a'; choose another word"
    ):
        add_words(pipe.models, pipe.tokenizer, {"<cat>": tmp_path / "a.pt"})


def test_textual_inversion_for_one_text_encoder_is_rejected(tmp_path, pipe):
    save_file({"<toy>": np.ones((2, 16), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError,
        match="for text_encoder, expected vectors for text_encoder and text_encoder_2; it was trained for",
    ):
        add_words(pipe.models, pipe.tokenizer, tmp_path / "a.safetensors")
    content = {"clip_l": np.ones((2, 16), np.float32), "clip_g": np.ones((3, 20), np.float32)}
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="different numbers of vectors for the text encoders"):
        add_words(pipe.models, pipe.tokenizer, {"<toy>": tmp_path / "a.safetensors"})


def test_the_index_of_a_conversion(tmp_path, folder, single):
    save_file(single, tmp_path / "a.safetensors")
    converted = convert.convert_single(tmp_path / "a.safetensors", tmp_path / "converted", config=folder)
    index = json.loads((converted / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert jax.tree.leaves(index) == jax.tree.leaves(json.loads((folder / "model_index.json").read_text()))


V_PREDICTION = {"prediction_type": "v_prediction"}
DECLARED = {
    "empty tensors": (["v_pred", "ztsnr"], None, V_PREDICTION | {"rescale_betas_zero_snr": True}),
    "only v": (["v_pred"], None, V_PREDICTION),
    "the header": ([], "v", V_PREDICTION),
    "the header says epsilon": ([], "epsilon", {"prediction_type": "epsilon"}),
    "tensors before the header": (["v_pred"], "epsilon", V_PREDICTION),
    "an unknown value in the header": ([], "flow", {"prediction_type": "epsilon"}),
}


def declaring(single, path, keys, prediction):
    """Writes a file that declares its prediction type with empty tensors or in its header."""
    tensors = single | {key: np.zeros(0, np.float32) for key in keys}
    save_file(tensors, path, None if prediction is None else {"modelspec.prediction_type": prediction})
    return path


@pytest.mark.parametrize("name", DECLARED)
def test_files_that_declare_their_prediction_type(single, folder, pipe, tmp_path, name):
    keys, prediction, expected = DECLARED[name]
    path = declaring(single, tmp_path / "a.safetensors", keys, prediction)
    result = load(path, config=folder, devices=pipe.devices)
    settings = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False} | expected
    assert {key: result.scheduler.options[key] for key in settings} == settings
    # Changing the scheduler's class keeps the settings.
    result.scheduler = "DDIMScheduler"
    assert {key: result.scheduler.options[key] for key in settings} == settings
    converted = convert.convert_single(path, tmp_path / "converted", config=folder, to="diffusers")
    assert load(converted, devices=pipe.devices).scheduler.options.items() >= settings.items()


def test_pickles_that_declare_their_prediction_type(single, folder, pipe, tmp_path):
    pickling.save({"state_dict": single | {"v_pred": np.zeros(0, np.float32)}}, tmp_path / "a.ckpt")
    assert (
        load(tmp_path / "a.ckpt", config=folder, devices=pipe.devices).scheduler.options.items() >= V_PREDICTION.items()
    )


def test_arguments_override_declarations_with_a_warning(single, folder, pipe, tmp_path):
    path = declaring(single, tmp_path / "a.safetensors", ["v_pred", "ztsnr"], None)
    options = {"config": folder, "devices": pipe.devices}
    with pytest.warns(UserWarning, match="declares prediction_type='v_prediction', but the given options"):
        result = load(path, **options, prediction_type="epsilon", scheduler="DDIMScheduler")
    assert result.scheduler.options["prediction_type"] == "epsilon"
    assert result.scheduler.options["rescale_betas_zero_snr"]
    with pytest.warns(UserWarning, match="declares prediction_type='v_prediction' and rescale_betas_zero_snr=True"):
        result = load(path, **options, scheduler=pipe.scheduler)
    assert result.scheduler.config == pipe.scheduler.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path, **options, prediction_type="v_prediction")


@pytest.mark.parametrize("form", ["parameter", "linear layer"])
def test_a_file_with_only_openclips_text_encoder(tmp_path, pipe, folder, single, form):
    """Covers two cases: the projection is stored as [in, out] or as a linear layer's weight."""
    start = original_files.OPENCLIP_XL
    tensors = {key.removeprefix(start): array for key, array in single.items() if key.startswith(start)}
    if form == "linear layer":
        tensors["text_projection.weight"] = np.ascontiguousarray(tensors.pop("text_projection").T)
    save_file(tensors, tmp_path / "clip_g.safetensors")
    result = load(folder, text_encoder_2=tmp_path / "clip_g.safetensors", devices=pipe.devices).models.text_encoder_2
    assert all(map(np.array_equal, jax.tree.leaves(result), jax.tree.leaves(pipe.models.text_encoder_2)))
