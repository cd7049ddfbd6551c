"""Tests checkpoints that are broken, of the wrong kind, or in the wrong format."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import pickling, tiny

from sega_jax import CheckpointError, load
from sega_jax.method import numerics
from sega_jax.weights import pull

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def copy(folder, tmp_path):
    """Returns a copy of a small checkpoint for tests to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def read(one_device):
    return partial(load, devices=one_device)


@pytest.fixture
def refused(copy, read):
    """Returns a function that loads the damaged checkpoint and checks that the error contains the given phrases."""

    def check(*phrases, error=CheckpointError, source=copy, **options):
        with pytest.raises(error) as caught:
            read(source, **options)
        missing = [phrase for phrase in phrases if str(phrase) not in str(caught.value)]
        assert not missing, str(caught.value)

    return check


def edit_json(path, **entries):
    tiny.write_json(path, json.loads(path.read_text()) | entries)


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def same(first, second):
    return all(map(np.array_equal, jax.tree.leaves(first.models), jax.tree.leaves(second.models)))


# Folders


@pytest.mark.parametrize("source", ["nowhere", "CompVis/stable-diffusion-v1-4", ""])
def test_missing_folders_are_rejected(refused, tmp_path, source):
    refused("is not a folder", "model_index.json", error=FileNotFoundError, source=tmp_path / "x" / source)


@pytest.mark.parametrize("source", [None, 3, ["a"]])
def test_sources_of_another_type_are_rejected(read, source):
    with pytest.raises(TypeError, match=r"source|folder"):
        read(source)


def test_another_kind_of_file_is_rejected(refused, copy):
    refused("is not a folder", error=FileNotFoundError, source=copy / "model_index.json")


def test_the_home_of_an_unknown_user_is_rejected(refused):
    refused("is not a folder", error=FileNotFoundError, source="~nobody-of-this-name/sd")


def test_an_empty_folder_is_rejected(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("has no model_index.json", source=tmp_path / "empty")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_the_folder_of_one_network_is_rejected(refused, copy, part):
    refused("no model_index.json", "one part of a checkpoint; give its parent folder", source=copy / part)


def test_an_incomplete_checkpoint_of_sdxl_is_rejected(refused, copy):
    """The index describes SDXL, but the second text encoder is missing."""
    extra = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    edit_json(copy / "model_index.json", _class_name="StableDiffusionXLPipeline", **extra)
    refused("no folder text_encoder_2", "give a complete checkpoint")


@pytest.mark.parametrize(
    ("entries", "phrases"),
    [
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, ["text_encoder is T5EncoderModel", "CLIPTextModel"]),
        ({"vae": [None, None]}, ["vae is missing", "AutoencoderKL"]),
        ({"unet": None}, ["unet is missing", "UNet2DConditionModel"]),
        ({"unet": "UNet2DConditionModel"}, ["unet is missing"]),
    ],
)
def test_unsupported_pipelines_are_rejected(refused, copy, entries, phrases):
    edit_json(copy / "model_index.json", _class_name="IFPipeline", **entries)
    refused("is a IFPipeline", "expected Stable Diffusion 1.x or 2.x", *phrases)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_missing_folder_is_named(refused, copy, part):
    shutil.rmtree(copy / part)
    refused(part)


# JSON


JSON = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json"]
JSON += ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"]


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        (b'{"a": ', ["is not readable JSON"]),
        (b"", ["is not readable JSON"]),
        (b'{"a": "\xff"}', ["is not readable JSON"]),
        (b"[" * 100_000, ["is not readable JSON"]),
        (b"[1, 2]", ["contains a list, expected a JSON object"]),
        (b"null", ["contains a NoneType, expected a JSON object"]),
    ],
    ids=["broken", "empty", "no text", "deep", "list", "null"],
)
def test_broken_json_is_rejected(refused, copy, name, content, phrases):
    (copy / name).write_bytes(content)
    refused(name, *phrases)


@pytest.mark.parametrize("name", JSON[:5])
def test_missing_json_files_are_named(refused, copy, name):
    (copy / name).unlink()
    refused(name if name != "model_index.json" else "no model_index.json")


# Configs


@pytest.mark.parametrize(
    ("part", "option", "value", "phrases"),
    [
        ("unet", "class_embed_type", "timestep", ["is not supported; supported values: None"]),
        ("unet", "addition_embed_type", "text", ["is not supported; supported values: None or 'text_time'"]),
        (
            "unet",
            "addition_embed_type",
            "text_time",
            ["projection_class_embeddings_input_dim=0 should be the number of pooled text channels"],
        ),
        ("unet", "time_embedding_type", "fourier", ["supported values: 'positional'"]),
        ("unet", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"], ["'AttnDownBlock2D'", "CrossAttnDownBlock2D"]),
        ("unet", "up_block_types", ["UpBlock2D"], ["1 entries, but block_out_channels has 3"]),
        ("unet", "act_fn", "selu", ["supported values: silu"]),
        ("unet", "block_out_channels", "x", ["'x' is invalid; use a value such as"]),
        ("unet", "block_out_channels", ["x", 16, 24], ["block_out_channels", "is invalid; use a value such as"]),
        ("unet", "block_out_channels", [None, 16, 24], ["block_out_channels", "is invalid; use a value such as"]),
        ("unet", "block_out_channels", [8.5, 16, 24], ["8.5"]),
        ("unet", "block_out_channels", [], []),
        ("unet", "layers_per_block", -1, ["-1 is invalid; use a value such as"]),
        ("unet", "layers_per_block", 10**10, ["10000000000 exceeds the supported maximum of 100"]),
        ("unet", "block_out_channels", [8] * 101, ["exceeds the supported maximum of 100"]),
        ("text_encoder", "num_hidden_layers", 10**10, ["10000000000 exceeds the supported maximum of 100"]),
        ("unet", "layers_per_block", [1, 2], ["2 entries, but block_out_channels has 3"]),
        ("unet", "norm_num_groups", 5, ["8 channels cannot be split"]),
        ("unet", "norm_num_groups", 0, []),
        ("unet", "attention_head_dim", 3, ["8 channels cannot be split into 3 heads"]),
        ("unet", "attention_head_dim", 0, []),
        ("unet", "cross_attention_dim", 24, ["text encoder's hidden_size 16"]),
        ("unet", "in_channels", 9, ["expected 4 input and 4 output channels; inpainting"]),
        ("unet", "num_class_embeds", 20, ["num_class_embeds 20", "Stable Diffusion text-to-image model"]),
        (
            "unet",
            "mid_block_type",
            "UNetMidBlock3D",
            ["supported values: 'UNetMidBlock2DCrossAttn'", "'UNetMidBlock2D' or None"],
        ),
        ("unet", "time_cond_proj_dim", -1, ["-1 is invalid; use a value such as 0"]),
        (
            "unet",
            "transformer_layers_per_block",
            [1, [2, 1], 1],
            ["reverse_transformer_layers_per_block", "is missing"],
        ),
        ("unet", "transformer_layers_per_block", [1, "x", 1], ["is invalid; use a value such as 1"]),
        ("unet", "transformer_layers_per_block", [[1, 10**10], 1, 1], ["exceeds the supported maximum of 100"]),
        ("unet", "reverse_transformer_layers_per_block", [1, 1], ["has 2 entries, but block_out_channels has 3"]),
        (
            "unet",
            "reverse_transformer_layers_per_block",
            [1, 1, [1, 1, 1]],
            ["has 3 entries, but a level has 2 transformers"],
        ),
        ("unet", "mid_block_type", ["UNetMidBlock2DCrossAttn"], ["supported values: 'UNetMidBlock2DCrossAttn'"]),
        ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn", ["supported values: 'scale_shift'"]),
        ("unet", "only_cross_attention", [True, False], ["2 entries, but block_out_channels has 3"]),
        ("unet", "only_cross_attention", "all", ["'all' is invalid; use a value such as False"]),
        ("unet", "sample_size", [8], []),
        ("unet", "sample_size", 0, []),
        ("unet", "flip_sin_to_cos", "yes", ["'yes' is invalid; use a value such as True"]),
        ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 2, ["supported values: DownEncoderBlock2D"]),
        ("vae", "norm_num_groups", 3, ["8 channels cannot be split"]),
        ("vae", "norm_num_groups", 0, []),
        ("vae", "scaling_factor", 0, ["0 is invalid; use a value such as"]),
        ("vae", "scaling_factor", -1, ["-1 is invalid; use a value such as"]),
        ("vae", "scaling_factor", float("nan"), ["nan is invalid; use a value such as"]),
        (
            "vae",
            "latents_mean",
            [0.1] * 4,
            ["only latents_mean is set; set both latents_mean and latents_std, or neither"],
        ),
        ("vae", "latents_std", [0.1, 0.1, 0.1, -1], ["should be a list of positive numbers"]),
        ("vae", "latents_mean", "x", ["latents_mean=x should be a list of numbers"]),
        ("vae", "latent_channels", 16, ["expected 16 input and 16 output channels; inpainting"]),
        ("vae", "layers_per_block", [1, 1], ["layers_per_block", "is invalid; use a value such as"]),
        ("vae", "block_out_channels", [8, "x"], ["block_out_channels", "is invalid; use a value such as"]),
        ("text_encoder", "hidden_act", "tanh", ["supported values: silu"]),
        ("text_encoder", "num_attention_heads", 3, ["hidden_size 16 is not a multiple of"]),
        ("text_encoder", "num_attention_heads", 0, []),
        ("text_encoder", "hidden_size", "16", ["'16' is invalid; use a value such as"]),
        ("text_encoder", "model_type", "t5", ["model_type='t5' is not supported; it should be clip_text_model"]),
        ("text_encoder", "model_type", "chatglm", ["model_type='chatglm' is not supported; it should be clip"]),
    ],
)
def test_unsupported_configs_are_rejected(refused, copy, part, option, value, phrases):
    edit_json(copy / part / "config.json", **{option: value})
    refused(str(copy), *phrases or [option])


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_networks_without_levels_are_rejected(refused, copy, part):
    edit_json(copy / part / "config.json", block_out_channels=[], down_block_types=[], up_block_types=[])
    refused("block_")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_unknown_options_raise_a_warning(copy, read, part):
    edit_json(copy / part / "config.json", time_travel=True, _private=1)
    with pytest.warns(UserWarning, match="ignored the unknown options time_travel$"):
        read(copy)


@pytest.mark.parametrize(
    ("entries", "phrases"),
    [
        ({"_class_name": "RePaintScheduler"}, ["'RePaintScheduler' is not supported", "DDIMScheduler, PNDMScheduler"]),
        ({"_class_name": ["DDIMScheduler"]}, ["is not supported", "DDIMScheduler, PNDMScheduler"]),
        ({"beta_schedule": "sigmoid"}, ["supported values: linear, scaled_linear"]),
        ({"num_train_timesteps": "1000"}, ["num_train_timesteps='1000' should be a whole number"]),
        ({"num_train_timesteps": 10**10}, ["num_train_timesteps=10000000000 should be", "from 1 to 100000"]),
    ],
)
def test_unsupported_schedulers_are_rejected(refused, copy, entries, phrases):
    edit_json(copy / "scheduler/scheduler_config.json", **entries)
    refused(*phrases)


# Weights


def test_every_wrong_tensor_is_listed(refused, copy):
    def change(tensors):
        del tensors["conv_in.weight"]
        del tensors["mid_block.resnets.1.norm2.bias"]
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["conv_out.bias"] = np.zeros(5, np.float32)

    edit_tensors(copy / WEIGHTS, change)
    refused(
        "unet",
        "missing    conv_in.weight (8, 4, 3, 3)",
        "missing    mid_block.resnets.1.norm2.bias (24,)",
        "unexpected extra.weight (3,)",
        "misshapen  conv_out.bias: (5,), expected (4,)",
    )


def test_unused_tensors_are_named_and_counted_in_a_warning(copy, folder, read, one_device):
    def change(tensors):
        tensors |= {f"{name}.weight": np.full(3, np.nan, np.float32) for name in "edcba"}

    edit_tensors(copy / WEIGHTS, change)
    with pytest.warns(UserWarning, match=r"tensors that are not used") as caught:
        pipe = read(copy)
    (warning,) = (str(one.message) for one in caught)
    assert f"{copy / 'unet'} has tensors" in warning
    assert "UNet2DConditionModel" in warning
    assert warning.endswith("a.weight (3,), b.weight (3,), c.weight (3,) and 2 more")
    assert same(pipe, load(folder, devices=one_device))


def test_a_text_encoder_with_unused_layers(copy, read):
    """The config omits the last layer, as in Stable Diffusion 2.x."""
    layers = tiny.TEXT["num_hidden_layers"]
    edit_json(copy / "text_encoder/config.json", num_hidden_layers=layers - 1)
    with pytest.warns(UserWarning, match=rf"{copy / 'text_encoder'} has tensors.*layers\.{layers - 1}\..* and 13 more"):
        pipe = read(copy)
    assert len(pipe.models.text_encoder.encoder.layers) == layers - 1


def test_a_folder_whose_unet_declares_its_prediction_type(copy, read):
    edit_tensors(copy / WEIGHTS, lambda tensors: tensors.update({"v_pred": np.zeros(0), "ztsnr": np.zeros(0)}))
    assert read(copy).scheduler.options["prediction_type"] == "v_prediction"
    with pytest.warns(UserWarning, match=r"declares prediction_type='v_prediction', but the given options"):
        scheduler = read(copy, prediction_type="epsilon").scheduler
    assert scheduler.options["prediction_type"] == "epsilon"
    assert scheduler.options["rescale_betas_zero_snr"]


def test_unused_tensors_that_are_known_raise_no_warning(copy, folder, one_device, read, recwarn):
    def change(tensors):
        spare = {
            "text_projection.weight": (8, 16),
            "text_projection": (8, 16),
            "logit_scale": (),
            "vision_model.x": (2,),
        }
        spare |= {"visual_projection.weight": (8, 16), "text_model.embeddings.position_ids": (1, 77)}
        tensors |= {name: np.ones(shape, np.float32) for name, shape in spare.items()}

    edit_tensors(copy / TEXT, change)
    assert same(read(copy), load(folder, devices=one_device))
    assert not recwarn.list


def test_a_kernel_in_our_layout_is_rejected(refused, copy):
    def change(tensors):
        tensors["conv_in.weight"] = np.ascontiguousarray(tensors["conv_in.weight"].transpose(2, 3, 1, 0))

    edit_tensors(copy / WEIGHTS, change)
    refused("misshapen  conv_in.weight: (3, 3, 4, 8), expected (8, 4, 3, 3)")


@pytest.mark.parametrize("length", [0, 4, 1000, 100_000])
def test_truncated_files_are_rejected(refused, copy, length):
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:length])
    refused(WEIGHTS, "truncated", "fetch it again")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_rejected(refused, copy, value):
    def change(tensors):
        tensors["conv_in.bias"][0] = value

    edit_tensors(copy / WEIGHTS, change)
    refused("conv_in.bias has NaN or infinite entries")


def test_weights_that_overflow_in_half_precision_are_rejected(refused, read, copy):
    def change(tensors):
        tensors["conv_in.bias"][0] = 1e5

    edit_tensors(copy / WEIGHTS, change)
    refused("conv_in.bias overflows float16; use a different dtype", dtype="float16")
    assert read(copy, dtype="bfloat16").models.unet.conv_in.bias[0] == jnp.bfloat16(1e5)


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_weights_that_are_not_floats_are_rejected(refused, copy, dtype):
    def change(tensors):
        tensors["conv_in.bias"] = tensors["conv_in.bias"].astype(dtype)

    edit_tensors(copy / WEIGHTS, change)
    refused("conv_in.bias", np.dtype(dtype).name)


def test_a_parameter_under_two_names(refused, read, copy):
    """Equal values are accepted, but different values are rejected."""
    edit_tensors(copy / TEXT, lambda tensors: tensors.update(**{f"text_model.{k}": v for k, v in tensors.items()}))
    read(copy)
    name = "text_model.final_layer_norm.bias"
    edit_tensors(copy / TEXT, lambda tensors: tensors.update({name: tensors[name] + 1}))
    refused("final_layer_norm.bias are the same parameter final_layer_norm.bias, but differ; fetch the file again")


def test_variants(refused, copy, read, pipe):
    refused("has no weights of the variant 'fp16'; leave out variant", variant="fp16")
    for name in (WEIGHTS, TEXT, "vae/diffusion_pytorch_model.safetensors"):
        (copy / name).rename(copy / name.replace(".safetensors", ".fp16.safetensors"))
    assert same(read(copy, variant="fp16"), pipe)
    refused("model.safetensors is missing", "weights for variant='fp16'")
    shutil.copy(copy / TEXT.replace(".safe", ".fp16.safe"), copy / TEXT)
    refused("has no weights of the variant 'ema'; it has weights for", variant="ema")
    refused("variant='fp16'; did you mean fp16?", variant="fp61")
    (copy / "vae/diffusion_pytorch_model.fp16.safetensors").rename(copy / "vae/diffusion_pytorch_model.safetensors")
    with pytest.warns(UserWarning, match=r"has no weights of the variant 'fp16' for vae; using those without"):
        result = read(copy, variant="fp16")
    assert same(result, pipe)


def test_pickles(copy, read, pipe):
    """Pickles are read only if there are no safetensors files. A text encoder's pickle has a different name."""
    for name, pickled in ((WEIGHTS, WEIGHTS), (TEXT, TEXT.replace("/model", "/pytorch_model"))):
        pickling.save(load_file(copy / name), (copy / pickled).with_suffix(".bin"))
        (copy / name).unlink()
    (copy / "vae/diffusion_pytorch_model.bin").write_bytes(b"never read")
    assert same(read(copy), pipe)


def test_unsupported_formats_are_rejected(refused, copy):
    (copy / WEIGHTS).rename(copy / WEIGHTS.replace(".safetensors", ".onnx"))
    refused("The folder has diffusion_pytorch_model.onnx, which is not supported; fetch .safetensors")


def test_missing_weights_are_rejected(refused, copy):
    (copy / WEIGHTS).unlink()
    refused(WEIGHTS, "Is", "a complete checkpoint")


@pytest.mark.parametrize("part", [WEIGHTS, TEXT])
def test_shards(read, copy, pipe, part):
    tiny.shard(copy / part)
    assert same(read(copy), pipe)


def test_shards_of_a_variant(read, copy, pipe):
    index, _ = tiny.shard(copy / WEIGHTS)
    index.rename(index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json"))
    for name in (TEXT, "vae/diffusion_pytorch_model.safetensors"):
        (copy / name).rename(copy / name.replace(".safetensors", ".fp16.safetensors"))
    assert same(read(copy, variant="fp16"), pipe)


def test_a_missing_shard_is_named(refused, copy):
    tiny.shard(copy / WEIGHTS)
    (copy / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    refused("diffusion_pytorch_model-00002-of-00002.safetensors is missing", "lists it", "fetch it again")


@pytest.mark.parametrize("name", ["../vae/x.safetensors", "/etc/passwd", "..", "", "a\0b"])
def test_shards_outside_the_folder_are_rejected(refused, copy, name):
    index, content = tiny.shard(copy / WEIGHTS)
    content["weight_map"]["conv_in.weight"] = name
    tiny.write_json(index, content)
    refused("diffusion_pytorch_model.safetensors.index.json")


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"conv_in.weight": 3}}])
def test_an_index_without_a_weight_map_is_rejected(refused, copy, content):
    index, _ = tiny.shard(copy / WEIGHTS)
    tiny.write_json(index, content)
    refused(index.name, "weight_map should be an object")


def test_prefixes_and_buffers_of_old_files(read, copy, pipe):
    """Old text encoders use a prefix and `position_ids`; old autoencoders use different names for attention layers."""

    def change(tensors):
        renamed = {f"text_model.{key}": value for key, value in tensors.items()}
        tensors.clear()
        tensors.update(renamed, **{"text_model.embeddings.position_ids": np.arange(12)[None]})

    def rename(tensors):
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            for key in [key for key in tensors if f".{new}." in key]:
                tensors[key.replace(new, old)] = tensors.pop(key)

    edit_tensors(copy / TEXT, change)
    edit_tensors(copy / "vae/diffusion_pytorch_model.safetensors", rename)
    assert same(read(copy), pipe)


# Tokenizers


def test_a_missing_tokenizer_file_is_named(refused, copy):
    (copy / "tokenizer/merges.txt").unlink()
    refused("tokenizer/merges.txt missing", "needs tokenizer.json, or vocab.json and merges.txt")


def test_more_tokens_than_embeddings_are_rejected(refused, copy):
    vocabulary = json.loads((copy / "tokenizer/vocab.json").read_text())
    tiny.write_json(copy / "tokenizer/vocab.json", vocabulary | {f"x{i}": 58 + i for i in range(5)})
    refused("tokenizer has 63 tokens", "the text encoder has 60", "belong together")


def test_tokens_beyond_the_embeddings_are_rejected(refused, copy):
    edit_json(copy / "tokenizer/vocab.json", b=1000)
    refused("tokenizer", "1000", "60")


@pytest.mark.parametrize("value", ["x", [], {}, 10.5, -1, 0])
def test_invalid_lengths_are_rejected(refused, copy, value):
    edit_json(copy / "tokenizer/tokenizer_config.json", model_max_length=value)
    refused("tokenizer", "model_max_length")


def test_a_tokenizer_without_padding_is_rejected(refused, copy):
    for name in ("special_tokens_map", "tokenizer_config"):
        edit_json(copy / f"tokenizer/{name}.json", pad_token=None)
    refused("has no pad_token")


# Options


@pytest.mark.parametrize("dtype", ["int32", "nonsense", 3, "complex64", "float8_e4m3fn", [], True])
def test_unknown_dtypes_are_rejected(refused, dtype):
    refused(f"dtype={dtype!r} should be one of float32, bfloat16, float16", error=ValueError, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "meant"),
    [("bfloat", "bfloat16"), ("fp16", "float16"), ("bf16", "bfloat16"), ("Float32", "float32"), ("flaot16", "float16")],
)
def test_the_error_for_a_misspelt_dtype_suggests_one(refused, dtype, meant):
    refused(f"; did you mean {meant}?", error=ValueError, dtype=dtype)


def test_float64_needs_x64(refused, read, copy):
    refused("jax_enable_x64", error=ValueError, dtype="float64")
    with jax.enable_x64(True):
        assert read(copy, dtype="float64").models.unet.conv_in.bias[...].dtype == np.float64


@pytest.mark.parametrize(
    ("attention", "phrases"),
    [
        ("flash", "should be one of xla, cudnn, pallas, or None"),
        ("cudnn", "needs GPUs"),
        ("pallas", "needs TPUs and dtype bfloat16 or float32, got cpu and float32"),
        (3, "xla, cudnn"),
    ],
)
def test_unknown_attention_is_rejected(refused, attention, phrases):
    refused(f"attention={attention!r}", phrases, error=ValueError, attention=attention)


@pytest.mark.parametrize("devices", [[], 0, ["cpu:0"], [None]])
def test_invalid_devices_are_rejected(folder, devices):
    with pytest.raises((TypeError, ValueError), match=r"devices=.* should be a list of JAX devices"):
        load(folder, devices=devices)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, "float16", np.float16, "float32"])
def test_weights_are_cast_to_a_dtype(copy, read, pipe, dtype):
    cast = read(copy, dtype=dtype)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), pipe.models)
    assert same(cast, pipe) == (jnp.dtype(dtype) == np.float32)
    assert all(map(np.array_equal, jax.tree.leaves(cast.models), jax.tree.leaves(expected)))
    assert cast.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_files_of_any_floating_type(tmp_path, read, stored):
    pipe = read(tiny.checkpoint(tmp_path / "stored", dtype=stored))
    name = "conv_in.bias"
    assert np.array_equal(pipe.models.unet.conv_in.bias[...], tiny.values(name, (8,)).astype(stored).astype(np.float32))


def test_options_may_be_null(copy, read, pipe):
    edit_json(copy / "unet/config.json", class_embed_type=None, freq_shift=None, dropout=0.1, upcast_attention=True)
    assert same(read(copy), pipe)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64])
def test_kernels_are_transposed_in_parts(monkeypatch, shape, dtype):
    monkeypatch.setattr(pull, "_COLUMNS", 3)
    transposed = np.random.default_rng(0).standard_normal(shape).astype(dtype).T
    result = pull._contiguous(transposed)
    assert result.flags.c_contiguous
    assert result.dtype == dtype
    assert np.array_equal(result, transposed)


@pytest.mark.parametrize("position", range(11))
def test_values_that_are_not_finite_are_detected_in_every_part(monkeypatch, position):
    monkeypatch.setattr(numerics, "_PART", 4)
    values = np.ones(11, np.float16)
    assert numerics.is_finite(values)
    values[position] = -np.inf
    assert not numerics.is_finite(values)


def test_a_tensor_in_two_shards(refused, copy, read, pipe):
    """Equal copies are accepted. Different copies are rejected, because the shards may come from different versions."""
    tiny.shard(copy / WEIGHTS)
    paths = sorted((copy / "unet").glob("*-of-00002.safetensors"))
    first, second = map(load_file, paths)
    name = next(iter(first))
    save_file(second | {name: first[name]}, paths[1], {"format": "pt"})
    assert same(read(copy), pipe)
    save_file(second | {name: first[name] + 1}, paths[1], {"format": "pt"})
    refused(f"{paths[1]}: {name} differs from the same tensor in another file; fetch both files again")


def test_variants_of_pickles_and_shards_are_listed(refused, copy):
    for path in (copy / "unet").glob("*.safetensors"):
        pickling.save(load_file(path), path.with_suffix(".fp16.bin"))
        path.unlink()
    refused("The folder has weights for variant='fp16'")
    refused("it has weights for no variant or variant='fp16'; did you mean fp16?", variant="fp61")
    (copy / "unet/diffusion_pytorch_model.fp16.bin").unlink()
    for i in (1, 2):
        (copy / f"unet/diffusion_pytorch_model.bf16-0000{i}-of-00002.safetensors").write_bytes(b"x")
    refused("The folder has weights for variant='bf16'")
