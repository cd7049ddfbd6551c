"""Tests the reader of DeepFloyd-IF's original layout, without weights: tensor names at full size, configs, and rejected
files."""

import hashlib
import math

import pytest
import yaml
from support.conversion import run
from support.published import IF_1_XL, IF_2_L

import convert
from convert import deepfloyd
from sega_jax import CheckpointError
from sega_jax.method import schedules
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.weights.layout import leaves

# `params` in the config.yml of IF-I-XL and of other stages.
I_XL = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 704,
    "channel_mult": "1,2,3,4",
    "num_res_blocks": 3,
    "attention_resolutions": "32,16,8",
    "num_head_channels": 64,
    "encoder_dim": 4096,
    "encoder_channels": 2816,
    "att_pool_heads": 64,
    "activation": "gelu",
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "disable_self_attentions": False,
    "precision": "16",
    "dropout": 0,
    "conv_resample": True,
}
I_L = I_XL | {"model_channels": 320, "encoder_channels": 1280}
II_L = I_XL | {
    "image_size": 256,
    "in_channels": 6,
    "model_channels": 160,
    "channel_mult": "1,2,4,6,8",
    "num_res_blocks": [2, 2, 3, 5, 5],
    "attention_resolutions": "32,16",
    "encoder_channels": 1280,
    "efficient_activation": True,
    "scale_skip_connection": True,
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        folder = tmp_path / "stage"
        folder.mkdir()
        (folder / "config.yml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return folder

    return write


@pytest.mark.parametrize(("params", "published"), [(I_XL, IF_1_XL), (II_L, IF_2_L)], ids=["I-XL", "II-L"])
def test_the_network_is_the_published_one(write, params, published):
    result, expected = deepfloyd.describe(write({"params": params})).unet.config, UNetConfig.from_dict(published)
    if not expected.time_embedding_dim:
        expected = expected._replace(time_embedding_dim=4 * expected.block_out_channels[0])
    layers = (
        (expected.layers_per_block,) * 4 if isinstance(expected.layers_per_block, int) else expected.layers_per_block
    )
    assert result in (expected, expected._replace(layers_per_block=layers))


def original_tensors(unet):
    """Returns the shapes of the original tensors, computed from the shapes of this library's parameters."""
    names, shapes = deepfloyd.original_names(unet), {}
    for key, shape in leaves(unet).items():
        tensor, _, part = names[key].partition("[")
        if part:
            shape = (shapes.get(tensor, (0,))[0] + shape[0], *shape[1:])
        else:
            assert tensor not in shapes
        shapes[tensor] = shape
    return {
        name: (*shape, 1) if name.endswith(("kv.weight", "proj_out.weight")) else shape
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("params", "count", "parameters", "digest"),
    [
        (I_XL, 643, 4_304_695_110, "dfd76b21c027f3eb0fb4d91597fcad5e13c24998b3de3ce7d9ea33bb89bd3d67"),
        (I_L, 643, 935_365_830, "ff13c312a6875cdd665367f4ef468b1d3370a5bb63cb5ed3f1c5b67296c58aeb"),
        (II_L, 801, 1_243_277_190, "084a2b32e9f32fad0322e0141a52f70fc93f73e6d3714ac428ec5e173a0272a5"),
    ],
    ids=["I-XL", "I-L", "II-L"],
)
def test_names_at_full_size(write, params, count, parameters, digest):
    """The digest covers the sorted tensor names and shapes of the original repository's network for `params`."""
    result = original_tensors(deepfloyd.describe(write({"params": params})).unet)
    assert (len(result), sum(map(math.prod, result.values()))) == (count, parameters)
    lines = "\n".join(f"{name} {','.join(map(str, shape))}" for name, shape in sorted(result.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


@pytest.mark.parametrize("params", [I_XL, II_L], ids=["I-XL", "II-L"])
def test_the_files_in_diffusers_layout(write, params):
    files = deepfloyd.describe(write({"params": params})).files
    second = params is II_L
    assert list(files)[-1] == "model_index.json"
    index = files["model_index.json"]
    assert index["_class_name"] == ("IFSuperResolutionPipeline" if second else "IFPipeline")
    assert index["text_encoder"] == [None, None]
    assert ("image_noising_scheduler/scheduler_config.json" in files) == second
    scheduler = schedules.from_config(files["scheduler/scheduler_config.json"])
    assert scheduler.options["sample_max_value"] == (1 if second else 1.5)
    assert scheduler.table("smart50").timestep[0] == 999
    UNet2DConditionModel(UNetConfig.from_dict(files["unet/config.json"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_channels": None, "activation": None}, "params lacks model_channels, activation"),
        ({"in_channels": 4}, "in_channels=4 and out_channels=6 do not fit a supported stage"),
        ({"out_channels": 3}, "in_channels=3 and out_channels=3 do not fit a supported stage"),
        ({"model_channels": "704"}, "model_channels='704' is invalid; use a value such as 704"),
        ({"model_channels": 100}, "100 channels cannot be split into 32 groups"),
        ({"num_head_channels": -1}, "num_head_channels=-1 is invalid; use a value such as 64"),
        ({"num_head_channels": 60}, "1408 channels cannot be split into heads of 60"),
        ({"channel_mult": "1,x"}, "channel_mult='1,x' should be positive numbers like"),
        ({"channel_mult": []}, "channel_mult=[] is invalid; use a value such as"),
        ({"channel_mult": "1,0"}, "channel_mult='1,0' should be positive numbers"),
        ({"attention_resolutions": "32,0"}, "attention_resolutions='32,0' should be positive numbers"),
        ({"num_res_blocks": [3, 3]}, "layers_per_block has 2 entries, but block_out_channels has 4"),
        ({"att_pool_heads": 65}, "cannot be split into 65 heads"),
        ({"activation": "gelu_jit"}, "activation='gelu_jit' is not supported; supported values: gelu, silu"),
        ({"disable_self_attentions": True}, "disable_self_attentions=True is not supported"),
        ({"use_scale_shift_norm": None}, "use_scale_shift_norm=None is not supported; supported values: True"),
        ({"resblock_updown": False}, "resblock_updown=False is not supported; supported values: True"),
        ({"num_classes": 10}, "num_classes=10 is not supported"),
        ({"interpolate_mode": "nearest"}, "interpolate_mode='nearest' is not supported"),
        ({"channel_mult": [[1, 2]]}, "channel_mult is neither a value nor a list of values"),
        ({"channel_mult": {"a": 1}}, "channel_mult is neither a value nor a list of values"),
        ({3: 4}, "3 is neither a value nor a list of values"),
    ],
    ids=str,
)
def test_unsupported_configs_are_rejected(write, tmp_path, change, message):
    folder = write({"params": I_XL | change})
    with pytest.raises(CheckpointError) as caught:
        convert.convert(folder, tmp_path / "dest")
    assert f"{folder}/config.yml: " in str(caught.value)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("params: [", "is not readable YAML"),
        ("\0", "is not readable YAML"),
        ("params: !!python/object/apply:os.system [touch canary]", "is not readable YAML"),
        ("[" * 10_000, "is not readable YAML"),
        ("", "has no params"),
        ("a: b", "has no params"),
        ("params: [1, 2]", "has no params"),
    ],
    ids=["half", "zero", "object", "deep", "empty", "other", "list"],
)
def test_broken_configs_are_rejected(write, tmp_path, content, message):
    folder = write(content)
    with pytest.raises(CheckpointError) as caught:
        convert.convert(folder, tmp_path / "dest")
    assert message in str(caught.value)


def test_references_to_huge_values_are_rejected(write, tmp_path):
    lines = ["a0: &a0 [1, 1]"]
    lines += [f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(60)]
    lines += ["params: {channel_mult: *a60}"]
    with pytest.raises(CheckpointError, match="channel_mult is neither a value nor a list of values"):
        convert.convert(write("\n".join(lines)), tmp_path / "dest")


def test_unknown_options_raise_a_warning(write):
    with pytest.warns(UserWarning, match="ignored the unknown options new_option"):
        deepfloyd.describe(write({"params": I_XL | {"new_option": 1}}))


def test_missing_weights_and_variants_are_rejected(write, tmp_path):
    folder = write({"params": I_XL})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is missing"):
        convert.convert(folder, tmp_path / "dest")
    with pytest.raises(CheckpointError, match="has no variants; omit variant='fp16'"):
        convert.convert(folder, tmp_path / "dest", variant="fp16")
    result = run(folder, tmp_path / "dest")
    assert result.exit_code == 1
    assert "pytorch_model.bin is missing" in result.output
    assert not (tmp_path / "dest").exists()


def test_diffusers_layout_takes_precedence(write, tmp_path):
    folder = write({"params": I_XL})
    (folder / "model_index.json").write_text("{}")
    assert not deepfloyd.is_original(folder)
