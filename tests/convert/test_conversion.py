"""Tests conversions: round trips, written files, rejected sources, and interruptions."""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file
from support import tiny
from support.calls import CALL
from support.checkpoints import edit_json, edit_tensors, files, same
from support.conversion import apart, run

import convert
from convert import conversion
from sega_jax import CheckpointError, load
from sega_jax.weights import destination
from sega_jax.weights.layout import flax_name, leaves

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
PARTS = ("text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def folder(small_folder):
    return small_folder


@pytest.fixture
def copy(folder, tmp_path):
    """Returns a copy of a small checkpoint for tests to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    """Returns a small checkpoint in Orbax format."""
    return convert.convert(folder, tmp_path_factory.mktemp("converted") / "orbax")


@pytest.fixture
def orbax(converted, tmp_path):
    """Returns a copy of the Orbax checkpoint for tests to damage."""
    return shutil.copytree(converted, tmp_path / "orbax")


@pytest.fixture(scope="module")
def read(one_device):
    return partial(load, devices=one_device)


def tensors(folder):
    """Returns {(network, key): (dtype, shape, bytes)} for a checkpoint in diffusers layout."""
    files = sorted(path for part in PARTS for path in (folder / part).glob("*.safetensors"))
    return {
        (file.parent.name, key): (array.dtype, array.shape, array.tobytes())
        for file in files
        for key, array in load_file(file).items()
    }


# Round trips


@pytest.mark.parametrize(
    ("stored", "sharded", "prefix"),
    [
        (np.float32, False, ""),
        (np.float32, True, "text_model."),
        (np.float16, True, ""),
        pytest.param(np.float16, False, "text_model.", marks=pytest.mark.slow),
        pytest.param(ml_dtypes.bfloat16, False, "text_model.", marks=pytest.mark.slow),
        pytest.param(ml_dtypes.bfloat16, True, "", marks=pytest.mark.slow),
    ],
)
def test_round_trip(tmp_path, stored, sharded, prefix):
    source = tiny.checkpoint(tmp_path / "source", dtype=stored, prefix=prefix, unet=tiny.UNET_1)
    if prefix:
        positions = {"text_model.embeddings.position_ids": np.arange(12)[None]}
        edit_tensors(source / TEXT, lambda arrays: arrays.update(positions))
    unsharded = files(source)
    if sharded:
        for name in (UNET, VAE, TEXT):
            tiny.shard(source / name)
    convert.convert(source, tmp_path / "orbax")
    back = convert.convert(tmp_path / "orbax", tmp_path / "back", to="diffusers")
    assert tensors(back) == tensors(source)
    # The same library wrote both checkpoints, so even the files are equal.
    assert files(back) == unsharded


def test_old_names_survive_a_round_trip(copy, tmp_path):
    def rename(arrays):
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            for key in [key for key in arrays if f".{new}." in key]:
                arrays[key.replace(new, old)] = arrays.pop(key)

    edit_tensors(copy / VAE, rename)
    convert.convert(copy, tmp_path / "orbax")
    back = convert.convert(tmp_path / "orbax", tmp_path / "back", to="diffusers")
    assert any(".query." in key for _, key in tensors(back))
    assert tensors(back) == tensors(copy)


def test_a_changed_bit_is_detected(folder, copy):
    assert tensors(copy) == tensors(folder)
    content = bytearray((copy / UNET).read_bytes())
    content[-1] ^= 1
    (copy / UNET).write_bytes(content)
    assert tensors(copy) != tensors(folder)


def test_other_files_are_copied(copy, tmp_path):
    (copy / "feature_extractor").mkdir()
    (copy / "feature_extractor/preprocessor_config.json").write_text("{}")
    edit_json(copy / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    (copy / "README.md").write_text("Read me.")
    (copy / "LICENSE").symlink_to(copy / "README.md")
    for extra in ("v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors", "notes/x.json"):
        (copy / extra).parent.mkdir(exist_ok=True)
        (copy / extra).touch()
    written = files(convert.convert(copy, tmp_path / "diffusers", to="diffusers"))
    omitted = set(files(copy)) - set(written)
    assert omitted == set(
        map(Path, ["v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors", "notes/x.json"])
    )
    assert written == {name: content for name, content in files(copy).items() if name not in omitted}


# From Orbax


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_both_formats_load_equal_weights(folder, converted, read, dtype):
    assert same(read(converted, dtype=dtype), read(folder, dtype=dtype))


@pytest.mark.slow
def test_both_formats_make_the_same_picture(small, converted, read):
    one, other = (pipe(**CALL).images for pipe in (small, read(converted)))
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(*one)


def test_the_safety_checker_is_converted(tmp_path, read):
    source = tiny.checkpoint(tmp_path / "source", unet=tiny.UNET_1, safety=tiny.SAFETY)
    folder = convert.convert(source, tmp_path / "orbax")
    one, other = read(source), read(folder)
    assert same(one, other)
    for ours, theirs in zip(*(jax.tree.leaves(pipe.safety.checker) for pipe in (one, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    back = convert.convert(folder, tmp_path / "back", to="diffusers")
    name = "safety_checker/model.safetensors"
    assert load_file(back / name).keys() == load_file(source / name).keys()
    for key, tensor in load_file(source / name).items():
        assert load_file(back / name)[key].tobytes() == tensor.tobytes()


@pytest.mark.parametrize("name", ["stage1", "stage2", "upscaler"])
def test_round_trip_of_stages_and_the_upscaler(stages, tmp_path, read, name):
    """The second stage (without a text encoder) and the upscaler each have a scheduler that adds noise to small
    pictures."""
    source = shutil.copytree(stages[name], tmp_path / "source")
    (source / "safety_checker").mkdir()
    (source / "safety_checker" / "model.safetensors").write_bytes(b"of another library")
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["deepfloyd_if", "IFSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    middle = convert.convert(source, tmp_path / "orbax")
    back = convert.convert(middle, tmp_path / "back", to="diffusers")
    assert tensors(back) == tensors(source)
    copied = {path: content for path, content in files(source).items() if path.suffix in (".json", ".txt")}
    assert copied.items() <= files(back).items()
    assert (back / "safety_checker" / "model.safetensors").read_bytes() == b"of another library"
    a, b = (read(folder, safety_checker=False) for folder in (source, middle))
    assert same(a, b)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_orbax_itself_restores_our_names_and_axes(tmp_path, read, stored):
    import orbax.checkpoint as ocp

    source = tiny.checkpoint(tmp_path / "source", dtype=stored, unet=tiny.UNET_1)
    folder = convert.convert(source, tmp_path / "orbax")
    for part, module in read(source, dtype=stored).models._asdict().items():
        restored = ocp.StandardCheckpointer().restore(folder / part / "orbax")
        expected = {flax_name(path): array for path, array in jax.tree_util.tree_leaves_with_path(module)}
        assert restored.keys() == expected.keys()
        for name, array in expected.items():
            assert restored[name].dtype == stored
            assert restored[name].tobytes() == np.asarray(array).tobytes()


# Casts and variants


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_casts(folder, converted, tmp_path, read, dtype):
    expected = read(folder, dtype=dtype)
    assert same(read(convert.convert(folder, tmp_path / "orbax", dtype=dtype), dtype=dtype), expected)
    cast = convert.convert(converted, tmp_path / "diffusers", dtype=dtype, to="diffusers")
    assert same(read(cast, dtype=dtype), expected)
    assert {dtype for dtype, _, _ in tensors(cast).values()} == {expected.dtype}


def test_buffers_are_not_cast(copy, tmp_path):
    positions = {"embeddings.position_ids": np.arange(12)[None]}
    edit_tensors(copy / TEXT, lambda arrays: arrays.update(positions))
    back = convert.convert(convert.convert(copy, tmp_path / "a", dtype="float16"), tmp_path / "b", to="diffusers")
    assert load_file(back / TEXT)["embeddings.position_ids"].dtype == np.int64


@pytest.mark.parametrize("to", ["orbax", "diffusers"])
def test_the_format_may_stay_the_same(folder, converted, tmp_path, read, to):
    source = {"orbax": converted, "diffusers": folder}[to]
    assert same(read(convert.convert(source, tmp_path / "again", to=to)), read(source))


def test_variants(copy, tmp_path, read, folder):
    for name in (UNET, VAE, TEXT):
        (copy / name).rename(copy / name.replace(".safetensors", ".fp16.safetensors"))
    assert same(read(convert.convert(copy, tmp_path / "orbax", variant="fp16")), read(folder))
    with pytest.raises(CheckpointError, match="weights for variant='fp16'"):
        convert.convert(copy, tmp_path / "other")
    with pytest.raises(CheckpointError, match="has no weights of the variant 'fp16'; leave out variant"):
        convert.convert(tmp_path / "orbax", tmp_path / "other", variant="fp16")


# Rejected sources and options


@pytest.fixture
def refused(copy, tmp_path, monkeypatch):
    """Returns a function that attempts a conversion and checks the error.

    The conversion must fail with the given phrases in the error and leave no files behind. Unless `reads_weights` is
    true, it must also fail before it reads any weights.
    """

    def check(
        *phrases, source=copy, dest=tmp_path / "out" / "dest", error=CheckpointError, reads_weights=False, **options
    ):
        if not reads_weights:
            monkeypatch.setattr(conversion, "_read", lambda *_: pytest.fail("weights were read"))
        with pytest.raises(error) as caught:
            convert.convert(source, dest, **options)
        missing = [phrase for phrase in phrases if str(phrase) not in str(caught.value)]
        assert not missing, str(caught.value)
        assert not list((tmp_path / "out").glob("*"))

    return check


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"to": "torch"}, "to='torch' should be one of orbax, diffusers"),
        ({"dtype": "float64"}, "dtype='float64' should be one of float32, float16, bfloat16, or None"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"dtype": "nonsense"}, "dtype='nonsense'"),
        ({"dtype": []}, "dtype=[]"),
    ],
)
def test_unknown_options_are_rejected(refused, options, phrase):
    refused(phrase, error=ValueError, **options)


def test_sources_and_destinations_of_another_type_are_rejected(refused):
    refused("source=3", source=3, error=TypeError)
    refused("dest=None should be the path of a folder", dest=None, error=TypeError)


def test_sources_that_are_not_checkpoints_are_rejected(refused, copy, tmp_path):
    refused("is not a folder", source=tmp_path / "nowhere", error=FileNotFoundError)
    refused("is a single file, not a folder", source=copy / UNET, error=FileNotFoundError)
    refused("give its parent folder", source=copy / "unet")
    refused("has no model_index.json", source=tmp_path)
    edit_json(copy / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    refused("whose text_encoder_2 is CLIPTextModel", "expected Stable Diffusion XL")


def missing(arrays):
    del arrays["conv_in.weight"]


def misshapen(arrays):
    arrays["conv_out.bias"] = np.zeros(5, np.float32)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (missing, "missing    conv_in.weight (8, 4, 3, 3)"),
        (misshapen, "misshapen  conv_out.bias: (5,), expected (4,)"),
    ],
)
def test_weights_that_do_not_fit_are_rejected(refused, copy, change, phrase):
    edit_tensors(copy / UNET, change)
    refused(phrase)


def test_unused_tensors_are_omitted_with_a_warning(copy, tmp_path):
    edit_tensors(copy / UNET, lambda arrays: arrays.update({"extra.weight": np.zeros(3, np.float32)}))
    with pytest.warns(UserWarning, match=r"has a tensor that is not used.*: extra\.weight \(3,\)$") as caught:
        convert.convert(copy, tmp_path / "dest", to="diffusers")
    assert len(caught) == 1
    assert "extra.weight" not in load_file(tmp_path / "dest" / UNET)


@pytest.mark.parametrize("name", [TEXT, UNET, VAE])
def test_truncated_weights_are_rejected(refused, copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:-4])
    refused(name, "truncated", "fetch it again")


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        (TEXT, "model.safetensors is missing"),
        ("tokenizer", "tokenizer needs tokenizer.json"),
        ("tokenizer/merges.txt", "merges.txt missing"),
        ("scheduler", "scheduler_config.json is missing"),
        ("unet/config.json", "config.json is missing"),
        ("vae", "has no folder vae"),
    ],
)
def test_missing_files_are_named(refused, copy, name, phrase):
    shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    refused(phrase)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/vocab.json"])
def test_broken_json_is_rejected(refused, copy, name):
    (copy / name).write_text('{"a": ')
    refused(name, "is not readable JSON")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_rejected(refused, copy, value):
    edit_tensors(copy / UNET, lambda arrays: arrays["conv_in.bias"].fill(value))
    refused("conv_in.bias has NaN or infinite entries", reads_weights=True)


@pytest.mark.parametrize("to", ["orbax", "diffusers"])
def test_weights_that_overflow_are_rejected(refused, copy, to):
    edit_tensors(copy / UNET, lambda arrays: arrays["conv_in.bias"].fill(1e5))
    refused("conv_in.bias overflows float16; use a different dtype", dtype="float16", to=to, reads_weights=True)


# Damaged Orbax checkpoints, which both `load` and `convert` must reject


@pytest.fixture
def unreadable(orbax, read, refused):
    def check(*phrases):
        with pytest.raises(CheckpointError) as caught:
            read(orbax)
        assert all(str(phrase) in str(caught.value) for phrase in phrases), str(caught.value)
        refused(*phrases, source=orbax, to="diffusers", reads_weights=True)

    return check


def test_a_missing_manifest_is_reported(orbax, unreadable):
    (orbax / "unet/orbax/manifest.ocdbt").unlink()
    unreadable("unet/orbax has no manifest.ocdbt", "convert it again")


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d/*"])
def test_a_truncated_database_is_reported(orbax, unreadable, name):
    (path,) = (orbax / "unet/orbax").glob(name)
    path.write_bytes(path.read_bytes()[:-9])
    unreadable("unet/orbax is not a readable Orbax checkpoint", "convert it again")


def test_truncated_and_missing_data_are_reported(orbax, unreadable):
    for path in orbax.glob("unet/orbax/*/d/*"):
        path.write_bytes(path.read_bytes()[:1000])
    unreadable("unet/orbax is not a readable Orbax checkpoint", "convert it again")
    for path in orbax.glob("unet/orbax/*/d/*"):
        path.unlink()
    unreadable("unet/orbax is not a readable Orbax checkpoint", "convert it again")


def database(orbax):
    """Opens the UNet's Orbax database, so that a test can damage it."""
    base = {"driver": "file", "path": f"{orbax / 'unet/orbax'}/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def test_missing_entries_are_not_read_as_zeros(orbax, unreadable):
    del database(orbax)["conv_in.bias/0"]
    unreadable("unet/orbax is not a readable Orbax checkpoint", "convert it again")


def test_arrays_that_do_not_fit_are_listed(orbax, unreadable):
    store = database(orbax)
    entry = "conv_out.bias/.zarray"
    shape = json.loads(store[entry]) | {"shape": [10**12], "chunks": [10**12]}
    store[entry] = json.dumps(shape)
    del store["conv_in.bias/.zarray"]
    store["conv_out.embedding/.zarray"] = json.dumps(shape)
    unreadable(
        "missing    conv_in.bias (8,)",
        "misshapen  conv_out.bias: (1000000000000,), expected (4,)",
        "unexpected conv_out.embedding (1000000000000,)",
    )


@pytest.mark.parametrize(
    ("notes", "phrase"),
    [
        ({"format": 2}, "has format 2, but this version of sega_jax reads format 1"),
        ({"format": None}, "has format None"),
        ({"keys": []}, "keys should be an object"),
        ({"keys": {"conv_in.bias": 3}}, "keys should be an object"),
        ({"keys": {"conv_in.bias": "conv_out.bias"}}, "'conv_out.bias' is not the key of conv_in.bias"),
        ({"keys": {"conv_in.bias": "../x"}}, "'../x' is not the key of conv_in.bias"),
    ],
)
def test_wrong_notes_are_reported(orbax, unreadable, notes, phrase):
    edit_json(orbax / "unet/orbax.json", **notes)
    unreadable("unet/orbax.json", phrase)


def test_missing_notes_are_reported(orbax, unreadable):
    (orbax / "unet/orbax.json").unlink()
    unreadable("unet/orbax.json is missing")


# The destination


def test_an_empty_folder_may_be_the_destination(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert convert.convert(str(folder), str(tmp_path / "empty")) == tmp_path / "empty"
    assert (tmp_path / "empty/model_index.json").is_file()


def test_existing_files_are_not_overwritten(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for name in ("full", "full/file"):
        with pytest.raises(FileExistsError, match="exists and is not an empty folder; choose a new one"):
            convert.convert(folder, tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


def test_the_source_is_not_changed(refused, copy):
    before = files(copy)
    refused("is inside the source", dest=copy / "unet/orbax", error=ValueError)
    refused("exists and is not an empty folder", dest=copy.parent, error=FileExistsError)
    assert files(copy) == before


def test_folders_that_cannot_be_written_are_rejected(refused, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refused("file/below cannot be written to", "choose a different folder", dest=tmp_path / "file/below", error=OSError)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    refused("is a mount point", error=OSError)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folders_without_permission_are_rejected(refused, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    refused("cannot be written to (Permission denied)", dest=tmp_path / "closed/dest", error=OSError)


def test_a_disk_that_is_too_small_is_rejected(refused, monkeypatch):
    usage = namedtuple("usage", "free")(1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("its disk has only 1,000 bytes free", "choose a different folder", error=OSError)


@pytest.mark.parametrize("to", ["orbax", "diffusers"])
def test_a_disk_that_becomes_full_is_reported(refused, monkeypatch, to):
    """A limit on the size of files causes the same kind of error as a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        refused("could not be written; is the disk full?", "File too large", error=OSError, to=to, reads_weights=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, "No space left on device")])
def test_no_files_are_left_if_the_last_step_fails(folder, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(destination, "_sync", fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        convert.convert(folder, tmp_path / "dest")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_conversion_are_removed(folder, tmp_path):
    stale = tmp_path / ".dest.sega-jax-partial"
    (stale / "unet").mkdir(parents=True)
    (stale / "half").touch()
    convert.convert(folder, tmp_path / "dest")
    assert not stale.exists()
    assert not (tmp_path / "dest/half").exists()


def test_a_running_conversion_is_not_disturbed(folder, tmp_path):
    other = tmp_path / ".dest.sega-jax-partial"
    other.mkdir()
    (other / "half").touch()
    descriptor = os.open(other, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(FileExistsError, match="another process is writing"):
        convert.convert(folder, tmp_path / "dest")
    assert (other / "half").exists()
    os.close(descriptor)


def test_a_link_in_place_of_the_hidden_folder_is_not_followed(folder, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (tmp_path / ".dest.sega-jax-partial").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="cannot be written to"):
        convert.convert(folder, tmp_path / "dest")
    assert (tmp_path / "precious/file").exists()


# Tests that run conversions in separate processes


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_stopped_conversions_leave_no_incomplete_folder(folder, tmp_path):
    """Five conversions are killed at random moments, and one is interrupted from the keyboard."""
    result = apart("stop", folder, tmp_path)
    assert result["undisturbed"] == [0, ["undisturbed"]]
    killed = [result[f"killed{number}"] for number in range(5)]
    assert {status for status, _ in killed} == {-signal.SIGKILL}
    assert killed[0] == [-signal.SIGKILL, [".killed0.sega-jax-partial"]]
    assert result["again"] == [0, ["killed0"]]
    assert result["interrupted"] == [130, []]
    for path in tmp_path.glob("[!.]*"):
        assert is_complete(path, folder)


def is_complete(path, source):
    try:
        back = convert.convert(path, path.with_name(f"{path.name}-back"), to="diffusers")
    except ValueError:
        return False
    return files(back) == files(source)


def test_an_incomplete_conversion_is_detected(orbax, folder):
    assert is_complete(orbax, folder)
    (orbax / "vae/orbax/manifest.ocdbt").unlink()
    shutil.rmtree(orbax.with_name("orbax-back"))
    assert not is_complete(orbax, folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is only measured on Linux")
def test_conversions_need_little_memory(tmp_path):
    text = tiny.TEXT | {"hidden_size": 512, "num_hidden_layers": 1}
    folder = tiny.checkpoint(tmp_path / "big", unet=tiny.UNET_1 | {"cross_attention_dim": 512}, text=text)
    text |= {"intermediate_size": 2**14, "num_hidden_layers": 6}
    tiny.write_json(folder / "text_encoder/config.json", text)
    noise = np.random.default_rng(0).integers(0, 0x3C00, 2**20, np.uint16).view(np.float16)
    shapes = leaves(tiny.networks(unet=tiny.UNET_1 | {"cross_attention_dim": 512}, text=text).text_encoder)
    save_file({name: np.resize(noise, shape) for name, shape in shapes.items()}, folder / TEXT, {"format": "pt"})
    largest = (folder / TEXT).stat().st_size
    assert largest > 200e6
    result = apart("measure", folder, tmp_path)
    assert largest < result["orbax"] < 3 * largest
    assert largest < result["diffusers"] < 3 * largest


# The shell


def test_the_command(folder, tmp_path, read):
    result = run(folder, tmp_path / "orbax", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert f"Wrote {tmp_path / 'orbax'}" in result.output
    result = run(tmp_path / "orbax", tmp_path / "back", "--to", "diffusers")
    assert result.exit_code == 0, result.output
    assert same(read(tmp_path / "back", dtype="bfloat16"), read(folder, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "dest"], "Error: nowhere is not a folder"),
        (["nowhere"], "Missing argument 'DEST'"),
        (["nowhere", "dest", "--dtype", "int8"], "'int8' is not one of"),
        (["nowhere", "dest", "--to", "torch"], "'torch' is not one of"),
    ],
)
def test_the_command_reports_errors_without_a_traceback(arguments, message):
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output


def test_the_progress_bar_counts_bytes(folder, tmp_path, capsys):
    convert.convert(folder, tmp_path / "a")
    assert "%" not in capsys.readouterr().err
    convert.convert(folder, tmp_path / "b", progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("100%")
    assert "B/s" in last
