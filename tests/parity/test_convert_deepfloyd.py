"""Converts stages in DeepFloyd-IF's original layout; diffusers' network and ours must then agree with the original."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import collections

import diffusers
import huggingface_hub
import jax
import numpy as np
import torch
from safetensors.torch import load_file
from support import tiny
from support.conversion import run
from support.hub import NAME, Stub

import convert
from parity import original_if
from parity.hostile import Hostile
from parity.original_if import FIRST, SECOND, UNPROJECTED
from parity.theirs import first, last, noise, relative
from sega_jax import CheckpointError
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.pipelines.weight_files import open_weights
from sega_jax.text.files import read_json
from sega_jax.weights.pull import fill

pytestmark = pytest.mark.parity

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STAGES = {"first": FIRST, "second": SECOND, "unprojected": UNPROJECTED}


@pytest.fixture(scope="module", params=STAGES)
def stage(request, tmp_path_factory):
    """Returns a stage's `params`, network and folder."""
    folder = tmp_path_factory.mktemp("stages") / request.param
    return STAGES[request.param], original_if.write(folder, STAGES[request.param]), folder


def read(folder):
    """Loads a converted stage into our network."""
    unet = UNet2DConditionModel(UNetConfig.from_dict(read_json(folder / "unet/config.json")))
    with open_weights(folder / "unet", "diffusion_pytorch_model", None, unet.rename) as weights:
        return fill(unet, weights, None)


def inputs(params):
    x, states = noise(2, 16, 16, params["in_channels"]), noise(2, 7, params["encoder_dim"], seed=1)
    levels = np.array([250, 3], np.float32) if params["in_channels"] == 6 else None
    return x, np.array([999, 7], np.float32), states, levels


def original(unet, params):
    x, steps, states, levels = inputs(params)
    conditions = [torch.tensor(value) for value in (steps, states, *([] if levels is None else [levels]))]
    return last(unet(first(x), *conditions))


def test_diffusers_network_agrees_with_the_original(stage, tmp_path):
    params, unet, folder = stage
    convert.convert(folder, tmp_path / "dest", to="diffusers")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "dest" / "unet")
    x, steps, states, levels = inputs(params)
    labels = {} if levels is None else {"class_labels": torch.tensor(levels)}
    with torch.no_grad():
        output = theirs(first(x), torch.tensor(steps), torch.tensor(states), **labels).sample
    assert relative(last(output), original(unet, params)) < 1e-5


def test_our_network_agrees_with_the_original(tmp_path):
    unet = original_if.write(tmp_path / "stage", SECOND)
    ours = read(convert.convert(tmp_path / "stage", tmp_path / "dest"))
    output = jax.jit(lambda net, *x: net(*x))(ours, *inputs(SECOND))
    assert relative(output, original(unet, SECOND)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_conversion_keeps_every_row_exactly(tmp_path, dtype):
    unet = original_if.write(tmp_path / "stage", SECOND, dtype=dtype)
    folder = convert.convert(tmp_path / "stage", tmp_path / "diffusers", to="diffusers")
    assert rows(load_file(folder / WEIGHTS)) == rows(unet.state_dict())
    one, other = read(folder), read(convert.convert(tmp_path / "stage", tmp_path / "orbax"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def rows(tensors):
    """Counts how often each row, as bytes, occurs in the tensors. Splitting fused tensors does not change the
    counts."""
    return collections.Counter(
        row.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for tensor in tensors.values()
        for row in tensor.detach()
    )


def test_the_heads_of_a_projection_are_joined(tmp_path):
    """For one layer, compares the rows of each head with those of the fused tensor."""
    unet = original_if.write(tmp_path / "stage", FIRST)
    folder = convert.convert(tmp_path / "stage", tmp_path / "dest", to="diffusers")
    converted, fused = load_file(folder / WEIGHTS), unet.state_dict()["input_blocks.4.1.qkv.weight"]
    for i, part in enumerate("qkv"):
        matrix = converted[f"down_blocks.1.attentions.0.to_{part}.weight"]
        assert matrix.shape == (64, 64)
        for head in range(8):
            start = 8 * (3 * head + i)
            assert torch.equal(matrix[8 * head : 8 * head + 8], fused[start : start + 8, :, 0])


@pytest.mark.parametrize(
    ("unet", "pipeline"), [(tiny.STAGE_1, "IFPipeline"), (tiny.STAGE_2, "IFSuperResolutionPipeline")]
)
def test_diffusers_loads_a_stage_from_the_hub(tmp_path, monkeypatch, unet, pipeline):
    """The conversion downloads neither the safety checker nor the watermarker."""
    source = tiny.stage(tmp_path / "source", unet, safety=True)
    index = read_json(source / "model_index.json")
    index |= {"watermarker": ["deepfloyd_if", "IFWatermarker"]}
    tiny.write_json(source / "model_index.json", index | {"feature_extractor": ["transformers", "CLIPImageProcessor"]})
    for part in ("safety_checker", "watermarker", "feature_extractor"):
        (source / part).mkdir()
        (source / part / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Stub(source, tmp_path / "cache"))
    with pytest.warns(UserWarning, match="has no feature_extractor, safety_checker, watermarker, so the converted"):
        converted = convert.convert(NAME, tmp_path / "made", to="diffusers")
    pipe = getattr(diffusers, pipeline).from_pretrained(converted)
    assert pipe.safety_checker is pipe.watermarker is pipe.feature_extractor is None
    for part, name in (("unet", WEIGHTS), ("text_encoder", "text_encoder/model.safetensors")):
        expected, loaded = load_file(source / name), getattr(pipe, part).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_casts(stage, tmp_path, dtype):
    folder = convert.convert(stage[2], tmp_path / "dest", dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(read(folder))} == {dtype or "float32"}


@pytest.mark.parametrize(
    ("params", "pipeline"), [(FIRST, diffusers.IFPipeline), (SECOND, diffusers.IFSuperResolutionPipeline)]
)
def test_diffusers_loads_a_converted_stage(tmp_path, params, pipeline):
    unet = original_if.write(tmp_path / "stage", params)
    (tmp_path / "stage" / "LICENSE-MODEL").write_text("Read me.")
    folder = convert.convert(tmp_path / "stage", tmp_path / "dest", to="diffusers")
    assert (folder / "LICENSE-MODEL").read_text() == "Read me."
    pipe = pipeline.from_pretrained(folder)
    assert sum(tensor.numel() for tensor in pipe.unet.parameters()) == sum(p.numel() for p in unet.parameters())
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert pipe.text_encoder is None


@pytest.fixture
def broken(tmp_path):
    """Changes a stage's tensors and returns the error's message; a failed conversion must leave no files."""
    original_if.write(tmp_path / "stage", FIRST)
    path = tmp_path / "stage/pytorch_model.bin"

    def broken(change):
        tensors = torch.load(path)
        torch.save(change(tensors) or tensors, path)
        with pytest.raises(CheckpointError) as caught:
            convert.convert(tmp_path / "stage", tmp_path / "out" / "dest")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    return broken


def test_every_wrong_tensor_is_named(broken):
    def change(tensors):
        del tensors["input_blocks.4.1.qkv.bias"], tensors["out.0.weight"]
        tensors["middle_block.1.qkv.weight"] = torch.ones(3 * 96 + 1, 96, 1)
        tensors["middle_block.1.encoder_kv.weight"] = torch.ones(2 * 88, 64, 1)
        tensors["middle_block.1.proj_out.weight"] = torch.ones(96, 96, 3)
        tensors["time_embed.0.weight"] = torch.ones(96, 31)
        tensors["qkv"] = tensors["label_emb.0.0.weight"] = torch.ones(1)

    message = broken(change)
    assert "do not fit the UNet2DConditionModel" in message
    expected = """
  misshapen  middle_block.1.encoder_kv.weight[add_k_proj]: (88, 64), expected (96, 64)
  misshapen  middle_block.1.encoder_kv.weight[add_v_proj]: (88, 64), expected (96, 64)
  misshapen  middle_block.1.proj_out.weight: (96, 96, 3), expected (96, 96)
  misshapen  time_embed.0.weight: (96, 31), expected (96, 32)
  missing    input_blocks.4.1.qkv.bias[to_k] (64,)
  missing    input_blocks.4.1.qkv.bias[to_q] (64,)
  missing    input_blocks.4.1.qkv.bias[to_v] (64,)
  missing    middle_block.1.qkv.weight[to_k] (96, 96)
  missing    middle_block.1.qkv.weight[to_q] (96, 96)
  missing    middle_block.1.qkv.weight[to_v] (96, 96)
  missing    out.0.weight (32,)
  unexpected label_emb.0.0.weight (1,)
  unexpected middle_block.1.qkv.weight (289, 96)
  unexpected qkv (1,)"""
    print(message)
    assert message.endswith(expected)


def test_values_that_are_not_finite_are_refused(broken):
    message = broken(lambda tensors: tensors | {"out.2.bias": torch.full((6,), np.nan)})
    assert "out.2.bias has NaN or infinite entries" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda tensors: {"state_dict": tensors}, "'state_dict' is not the name of a dense tensor"),
        (list, "contains a list"),
    ],
    ids=["nested", "list"],
)
def test_files_of_other_content_are_refused(broken, content, words):
    assert words in broken(content)


def test_hostile_pickles_are_refused(tmp_path):
    original_if.write(tmp_path / "stage", FIRST)
    torch.save({"out.0.weight": Hostile(tmp_path / "canary")}, tmp_path / "stage/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="was rejected, and none of its code was run"):
        convert.convert(tmp_path / "stage", tmp_path / "dest")
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "dest").exists()


def test_the_shell(tmp_path):
    original_if.write(tmp_path / "stage", FIRST)
    result = run(tmp_path / "stage", tmp_path / "dest")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "dest/unet/orbax.json").is_file()
    assert (tmp_path / "dest/model_index.json").is_file()
