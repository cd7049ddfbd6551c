"""Tests checkpoints that diffusers and transformers wrote for Flax."""

import json
import shutil
import struct

import huggingface_hub
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file
from support import flax_files, tiny
from support.checkpoints import edit_json, same
from support.hub import COMMIT, NAME, Stub, fetched

import convert
import sega_jax
from sega_jax import CheckpointError
from sega_jax.method.schedules import from_config
from sega_jax.nn.unet import UNetConfig
from sega_jax.pipelines.weight_files import FLAX, PICKLES, find_weights
from sega_jax.weights import flax_msgpack
from sega_jax.weights.flax_msgpack import FlaxTensors
from sega_jax.weights.float8 import widened

pytestmark = pytest.mark.usefixtures("one_by_default")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Returns a checkpoint with a safety checker, in safetensors format."""
    return tiny.checkpoint(tmp_path_factory.mktemp("flax") / "tiny", unet=tiny.UNET_1, safety=tiny.SAFETY)


@pytest.fixture(scope="module")
def sound(source, tmp_path_factory):
    """Returns the same checkpoint in diffusers' format for Flax."""
    return flax_files.checkpoint(source, tmp_path_factory.mktemp("flax") / "flax")


@pytest.fixture
def folder(sound, tmp_path):
    """Returns a copy of the Flax checkpoint that a test may change."""
    return shutil.copytree(sound, tmp_path / "copy")


@pytest.fixture(scope="module")
def expected(source, one_device):
    return sega_jax.load(source, devices=one_device)


def read(path):
    """Returns {torch's key: array} for the arrays of a file."""
    with FlaxTensors(path.parent, "model", None, str) as tensors:
        return {key: tensors[key] for key in tensors.shapes}


def saved(path, content):
    return flax_files.write(path / "flax_model.msgpack", content)


def raw(path, content):
    """Writes bytes that Flax would not write."""
    (path / "flax_model.msgpack").write_bytes(content)
    return path / "flax_model.msgpack"


def entry(shape, name, entries, code=1):
    """Returns the bytes of a file with one array, whose shape, dtype and entries may contradict each other."""
    return msgpack.packb({"a": msgpack.ExtType(code, msgpack.packb((shape, name, entries)))})


def test_weights_equal_the_safetensors_weights(folder, expected):
    pipe = sega_jax.load(folder)
    assert same(pipe, expected)
    checkers = (jax.tree.leaves(pipeline.safety.checker) for pipeline in (pipe, expected))
    assert all(np.array_equal(a, b) for a, b in zip(*checkers, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"unet": tiny.UNET_2, "text": tiny.TEXT_2}, marks=pytest.mark.slow),
        {"unet": tiny.UNET_1, "dtype": ml_dtypes.bfloat16},
    ],
    ids=["linear projections and lists", "bfloat16"],
)
def test_other_networks_and_dtypes(tmp_path, settings):
    source = tiny.checkpoint(tmp_path / "tiny", **settings)
    folder = flax_files.checkpoint(source, tmp_path / "flax")
    flax, torch = (sega_jax.load(path, dtype="bfloat16") for path in (folder, source))
    assert same(flax, torch)


def test_stable_diffusion_xl(least_xl_folder, least_xl, tmp_path):
    folder = flax_files.checkpoint(least_xl_folder, tmp_path / "flax")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "FlaxStableDiffusionXLPipeline"
    assert (folder / "text_encoder_2" / "flax_model.msgpack").is_file()
    assert same(sega_jax.load(folder), least_xl)


def test_safetensors_take_precedence(folder, source, expected):
    """Sharded safetensors files also take precedence, but safetensors files of a different variant do not."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    original = source / "unet" / path.name
    arrays = {key: 2 * array for key, array in load_file(original).items()}
    save_file(arrays, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert same(sega_jax.load(folder), expected)
    save_file(arrays, path)
    assert not same(sega_jax.load(folder), expected)
    tiny.shard(path)
    assert not same(sega_jax.load(folder), expected)


def test_shards(folder, expected):
    """transformers splits large networks into shards."""
    path = folder / "text_encoder" / "flax_model.msgpack"
    parts = dict(enumerate(serialization.msgpack_restore(path.read_bytes())["text_model"].items(), 1))
    names = {i: f"flax_model-0000{i}-of-0000{len(parts)}.msgpack" for i in parts}
    for i, (part, content) in parts.items():
        flax_files.write(path.with_name(names[i]), {"text_model": {part: content}})
    places = {f"text_model/{part}/x": names[i] for i, (part, _) in parts.items()}
    tiny.write_json(path.with_name("flax_model.msgpack.index.json"), {"weight_map": places})
    path.unlink()
    assert len(parts) == 3
    assert same(sega_jax.load(folder), expected)
    path.with_name(names[2]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[2]} is missing, although flax_model.msgpack.index.json lists"):
        sega_jax.load(folder)


def test_a_missing_variant_is_reported(folder):
    with pytest.raises(CheckpointError, match="has no weights of the variant 'fp16'; leave out variant"):
        sega_jax.load(folder, variant="fp16")
    path = folder / "text_encoder" / "flax_model.msgpack"
    path.rename(path.with_name("flax_model.bf16.msgpack"))
    with pytest.raises(CheckpointError, match=r"flax_model.msgpack is missing. The folder has .* variant=.bf16."):
        sega_jax.load(folder)


def test_from_the_hub(sound, expected, tmp_path, monkeypatch, one_device):
    """Msgpack files are downloaded only if the repository has no other format."""
    client = Stub(shutil.copytree(sound, tmp_path / "hub"), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/tf_model.h5", "README.md"):
        (client.folder / name).write_bytes(b"x")
    pipe = sega_jax.load(NAME, revision="flax", devices=one_device)
    assert same(pipe, expected)
    assert [call[1] for call in client.calls] == ["flax", COMMIT, COMMIT]
    weights = {name for name in fetched(client) if "model." in name and not name.endswith(".json")}
    assert weights == {
        "text_encoder/flax_model.msgpack",
        "safety_checker/flax_model.msgpack",
        "unet/diffusion_flax_model.msgpack",
        "vae/diffusion_flax_model.msgpack",
    }
    shutil.rmtree(client.cache)
    for path in client.folder.glob("*/*.msgpack"):
        path.rename(path.with_suffix(".onnx"))
    with pytest.raises(CheckpointError, match=r"owner/tiny has no text_encoder/model.safetensors, nor these weights"):
        sega_jax.load(NAME, devices=one_device)


@pytest.mark.parametrize("form", ["diffusers", pytest.param("orbax", marks=pytest.mark.slow)])
def test_conversion(folder, source, expected, tmp_path, form):
    """The converted checkpoint has torch's classes and names."""
    converted = convert.convert(folder, tmp_path / "converted", to=form)
    assert same(sega_jax.load(converted), expected)
    for name in ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        assert "Flax" not in (converted / name).read_text()
        assert "Flax" in (folder / name).read_text()
    if form == "diffusers":
        for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
            arrays, original = (load_file(path / part / f"{name}.safetensors") for path in (converted, source))
            assert arrays.keys() == original.keys()
            assert all(np.array_equal(arrays[key], original[key]) for key in original)
        keys = load_file(converted / "text_encoder" / "model.safetensors").keys()
        assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in keys
        keys = load_file(converted / "safety_checker" / "model.safetensors").keys()
        assert {"vision_model.vision_model.pre_layrnorm.weight", "concept_embeds"} <= keys


def test_pickles_are_the_last_choice(folder):
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    path.write_bytes(b"x")
    assert find_weights(path.parent, path.stem).form is FLAX
    path.with_name("diffusion_flax_model.msgpack").unlink()
    assert find_weights(path.parent, path.stem).form is PICKLES


def test_every_kind_of_array_is_read_as_flax_reads_it(tmp_path, monkeypatch):
    """The file contains arrays of every dtype, scalars, empty arrays, and large arrays in chunks."""
    dtypes = flax_msgpack._DTYPES.values()
    content = {dtype.name: (8 * np.random.default_rng(0).random((2, 3))).astype(dtype) for dtype in dtypes}
    content |= {"scalar": np.float32(3), "zero": np.ones((), np.float16), "none": np.ones((0, 2), np.float32)}
    content |= {"jax": jax.numpy.ones((2, 2), jax.numpy.bfloat16), "below": {"deep": {"chunked": np.arange(70.0)}}}
    content["below"]["table"] = np.arange(35, dtype=np.float32).reshape(5, 7).astype(ml_dtypes.bfloat16)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    path = saved(tmp_path, content)
    assert path.read_bytes().count(b"__msgpack_chunked_array__") == 2
    flax = serialization.msgpack_restore(path.read_bytes())
    flat = {**flax.pop("below")["deep"], "table": None, **flax}
    result = read(path)
    for name in flat:
        array = result[{"chunked": "below.deep.chunked", "table": "below.table"}.get(name, name)]
        expected = content["below"]["table"] if name == "table" else np.asarray(flat[name])
        expected = widened(expected)
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        assert array.tobytes() == expected.tobytes()
    assert len(result) == len(flat)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is missing or empty"),
        (b"\x00", r"its content has type int, expected an array"),
        (b"\x81\xa1a", r"is truncated or not a Flax weight file, expected a Flax msgpack file \(.*incomplete"),
        (b"\x81\xa1a" * 3000 + b"\x00", r"expected a Flax msgpack file \(StackError\)"),
        (b"\x81\xa1a" * 300 + b"\x00", r"a path of more than 512 characters"),
        (b"\x81\xa1a\x80\x00", r"extra data"),
        (b"\x81\x01\x80", r"int is not allowed"),
        (b"\x81\xa1\xff\x80", r"can't decode"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", r"exceeds max_array_len\(0\)"),
        (b"\x81\xa1a\xdf\xff\xff\xff\xff", r"exceeds max_map_len\(1024\)"),
        (msgpack.packb({"a": b"b"}), r"exceeds max_bin_len\(0\)"),
        (msgpack.packb({"a" * 513: {}}), r"exceeds max_str_len\(512\)"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", r"exceeds max_ext_len"),
        (msgpack.packb({"a": {"b": 1}}), r"a.b has type int, expected an array"),
        (msgpack.packb({"a": "words"}), r"a has type str, expected an array"),
        (msgpack.packb({str(i): {str(j): {} for j in range(999)} for i in range(99)}), r"more than 65536 names"),
        (entry((2,), "float32", b"1234"), r"1 entries for an array of shape \[2\]"),
        (entry((-1,), "float32", b"1234"), r"1 entries for an array of shape \[-1\]"),
        (entry((2**40, 2**40), "float32", b"1234"), r"1 entries for an array of shape \[1099511627776, "),
        (entry((1.0,), "float32", b"1234"), r"1 entries for an array of shape"),
        (entry(((1,),), "float32", b"1234"), r"1 entries for an array of shape"),
        (entry((1,), "float32", b"123"), r"buffer size must be a multiple"),
        (entry((1,), "O", b"12345678"), r"entries of type O, expected one of float64, "),
        (entry((1,), "V2000000000", b"12345678"), r"entries of type V2000000000"),
        (entry((1,), "float32", b"1234", code=2), r"an extension of type 2, expected an array"),
        (msgpack.packb({"a": msgpack.ExtType(1, b"\x91\x00")}), r"not enough values to unpack"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True}}), r"'shape'"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"is a Git LFS pointer"),
        (b"<html>", r"is a web page, expected a Flax msgpack file"),
        (struct.pack("<Q", 2) + b"{}", r"is a safetensors file, expected"),
    ],
)
def test_broken_and_hostile_files_are_rejected(tmp_path, content, message):
    path = raw(tmp_path, content)
    with pytest.raises(CheckpointError, match=rf"^{path} .*{message}"):
        read(path)


def test_chunks_that_do_not_fit_the_shape_are_rejected(tmp_path):
    def chunked(shape, *chunks):
        places = {str(i): size for i, size in enumerate(shape)}
        return {"__msgpack_chunked_array__": True, "shape": places, "chunks": dict(zip("012", chunks, strict=False))}

    halves = np.ones(2, np.float32), np.ones(2, np.float32)
    assert read(saved(tmp_path, {"a": {"kernel": chunked((2, 2), *halves)}}))["a.weight"].shape == (2, 2)
    for content, message in (
        (chunked((2, 3), *halves), "4 entries for an array of shape"),
        (chunked((2, 2), halves[0], np.ones(2)), "have different dtypes"),
        (chunked((2, 2), *halves) | {"chunks": {"0": halves[0], "2": halves[1]}}, "'1'"),
        (chunked((2, 2)), "have different dtypes"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(saved(tmp_path, {"a": {"kernel": content}}))


def test_weights_that_do_not_fit_are_listed(folder):
    """The error lists torch's names with shapes in this library's axis order."""
    path = folder / "unet" / "diffusion_flax_model.msgpack"
    tree = serialization.msgpack_restore(path.read_bytes())
    tree["conv_in"]["kernel"] = tree["conv_in"]["kernel"].transpose(3, 2, 0, 1)
    tree["conv_norm_out"]["other"] = tree["conv_norm_out"].pop("scale")
    flax_files.write(path, tree)
    with pytest.raises(CheckpointError) as caught:
        sega_jax.load(folder)
    for line in (
        "missing    conv_norm_out.weight (8,)",
        "misshapen  conv_in.weight: (8, 4, 3, 3), expected (3, 3, 4, 8)",
        "unexpected conv_norm_out.other (8,)",
    ):
        assert line in str(caught.value)


# Defaults of Flax's schedulers that differ from torch's.
DEFAULTS = {
    "DDIMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {"final_sigmas_type": "sigma_min"},
    "EulerDiscreteScheduler": {"steps_offset": 1},
}


def test_schedulers_for_flax():
    """A Flax scheduler class becomes the corresponding torch class, but Flax's defaults are kept."""
    config = {**tiny.SD_BETAS, "_diffusers_version": "0.4.0.dev0", "trained_betas": None}
    for name, options in {
        "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
        "DDIMScheduler": {"set_alpha_to_one": False, "steps_offset": 1},
        "DPMSolverMultistepScheduler": {},
        "LMSDiscreteScheduler": {},
        "EulerDiscreteScheduler": {"timestep_spacing": "leading"},
        "DDPMScheduler": {"clip_sample": False},
    }.items():
        scheduler = from_config({**config, **options, "_class_name": f"Flax{name}"})
        assert scheduler.name == scheduler.config["_class_name"] == name
        same = from_config({**config, **options, "_class_name": name, **DEFAULTS.get(name, {})})
        assert dict(scheduler.options) == dict(same.options)
    clipped = from_config({**config, "_class_name": "FlaxDDIMScheduler", "clip_sample": True})
    assert clipped.options["clip_sample"]
    with pytest.raises(ValueError, match="'KarrasVeScheduler' is not supported; supported schedulers: DDIMScheduler"):
        from_config({"_class_name": "FlaxKarrasVeScheduler"})


@pytest.mark.parametrize(
    ("version", "stored", "result"),
    [("0.4.0.dev0", 32, 64), ("0.8.1", 8, 64), ("0.6.0", 96, 96), ("0.9.0", 32, 32), ("0.30.3", 32, 32), (None, 8, 8)],
)
def test_default_sample_size_of_old_versions(version, stored, result):
    config = {"sample_size": stored} | ({} if version is None else {"_diffusers_version": version})
    assert UNetConfig.from_dict(config).sample_size == result


def test_an_old_config_with_few_keys(folder, expected):
    """diffusers 0.4 wrote fewer keys than current versions. Keys that only Flax uses cause no warning."""
    unet = {key: value for key, value in tiny.UNET_1.items() if key not in ("out_channels", "in_channels")}
    unet |= {"_class_name": "FlaxUNet2DConditionModel", "_diffusers_version": "0.4.0", "freq_shift": 0, "dropout": 0.0}
    tiny.write_json(folder / "unet" / "config.json", unet)
    edit_json(folder / "vae" / "config.json", _diffusers_version="0.4.0")
    pipe = sega_jax.load(folder)
    assert same(pipe, expected)
    assert pipe.models.unet.config.sample_size == 64
