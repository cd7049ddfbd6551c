"""Tests that torch's pickles are read exactly, that no code in them runs, and that files with other calls are
rejected."""

import pickle
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import pickling, tiny
from support.checkpoints import same
from support.pickling import call, save

from sega_jax import CheckpointError, load, merge_lora
from sega_jax.weights import torch_pickle
from sega_jax.weights.tensors import Tensors
from sega_jax.weights.torch_pickle import PickledTensors, mapped, read

FORMS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64]


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    arrays = {np.dtype(dtype).name: rng.standard_normal((2, 3, 4)).astype(dtype) for dtype in DTYPES}
    return arrays | {"number": np.float32(3), "empty": np.ones((0, 3), np.float32), "transposed": np.ones((2, 3)).T}


def opened(path):
    with torch_pickle.opened(path) as tensors:
        return {name: tensors[name] for name in tensors.shapes}


def content(path):
    with mapped(path) as data:
        return read(path, data)


@FORMS
@pytest.mark.parametrize("wrapped", [False, True])
def test_tensors_are_bit_identical(tmp_path, tensors, legacy, wrapped):
    checkpoint = {
        "state_dict": tensors,
        "global_step": 3,
        "epoch": 1.5,
        "callbacks": {},
        "hyper": [None, True, ("a", 2)],
    }
    result = opened(save(checkpoint if wrapped else tensors, tmp_path / "a.ckpt", legacy=legacy))
    assert result.keys() == tensors.keys()
    for name, array in tensors.items():
        assert result[name].dtype == array.dtype
        np.testing.assert_array_equal(result[name], array)


NESTED = {
    "model": lambda weights, other: {"model": weights, "optimizer": {"state": other}, "step": 3},
    "state_dict in model": lambda weights, other: {"model": {"state_dict": weights, "args": {"lr": 0.1}}, "ema": other},
    "its only dictionary": lambda weights, other: {"weights": weights, "epoch": 3},
    "next to a tensor": lambda weights, other: {"global_step": np.ones((), np.int64), "state_dict": weights},
    "state_dict before others": lambda weights, other: {"other": other, "state_dict": weights, "model": other},
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "weights"])
def test_weights_in_nested_dictionaries(tmp_path, tensors, name, ending):
    content = NESTED[name](tensors, {"x": np.ones(3, np.float32)})
    assert opened(save(content, tmp_path / f"a.{ending}")).keys() == tensors.keys()


def test_several_dictionaries_with_unknown_names_are_rejected(tmp_path, tensors):
    with pytest.raises(CheckpointError, match=r"several dictionaries, generator, critic, and none of them"):
        opened(save({"generator": tensors, "critic": tensors}, tmp_path / "a.pt"))


@pytest.mark.parametrize("protocol", range(6))
def test_containers_of_every_protocol(tmp_path, protocol):
    expected = {
        "a": [1, -2.5, None, True, "\u00e9" * 300, 2**70],
        "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        3: {},
    }
    content_with_references = expected | {"again": [expected["a"], expected["a"], 7, 2**20, []]}
    path = tmp_path / "a.ckpt"
    path.write_bytes(
        b"".join(pickle.dumps(part, protocol) for part in (pickling.MAGIC, 1001, {}, content_with_references, []))
    )
    if protocol >= 2:
        assert content(path) == content_with_references
    else:
        with pytest.raises(CheckpointError, match="truncated or not a torch weight file, expected a pickle"):
            content(path)


@FORMS
def test_a_ckpt_loads_bit_identically_to_a_folder(tmp_path, small, small_folder, legacy):
    result = {key: array.astype(np.float32) for key, array in tiny.original(unet=tiny.UNET_1).items()}
    path = save({"state_dict": result, "global_step": 7}, tmp_path / "model.ckpt", legacy=legacy)
    assert same(load(path, config=small_folder, devices=small.devices), small)


# Calls that Python's pickle module would run

CALLS = {
    "os.system": lambda canary: call("posix.system", f"touch {canary}"),
    "eval": lambda canary: call("builtins.eval", f"open({str(canary)!r}, 'w')"),
    "a class": lambda canary: (
        b"csubprocess\nPopen\n" + pickling.opcodes((["touch", str(canary)],), []) + b"\x81"
    ),
    "a method": lambda canary: call("pathlib.Path.touch", call("pathlib.Path", str(canary))),
    "a function on the stack": lambda canary: (
        b"\x8c\x05posix\x8c\x06system\x93" + pickling.opcodes((f"touch {canary}",), []) + b"R"
    ),
    "a nested call": lambda canary: call("torch._utils._rebuild_parameter", call("posix.system", f"touch {canary}")),
    "an extension": lambda canary: b"\x82\x01",
    "an old class": lambda canary: b"(X\x01\x00\x00\x00aiposix\nsystem\n",
}  # fmt: skip


@FORMS
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("position", ["value", "key", "another entry", "everything"])
def test_no_call_is_run(tmp_path, tensors, legacy, name, position):
    canary = tmp_path / "canary"
    hostile = CALLS[name](canary)
    value = {
        "value": tensors | {"x": hostile},
        "key": tensors | {hostile: 3},
        "another entry": {"state_dict": tensors, "optimizer": [hostile]},
        "everything": hostile,
    }[position]
    path = save(value, tmp_path / "a.ckpt", legacy=legacy)
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt was rejected, and none of its code was run: it contains objects other than"
    ):
        opened(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt"]


def test_pythons_pickle_module_runs_such_calls(tmp_path):
    """Checks that the hostile files above would do harm."""
    path = tmp_path / "a"
    path.write_bytes(b"\x80\x02" + CALLS["os.system"](tmp_path / "canary") + b".")
    pickle.loads(path.read_bytes())
    assert (tmp_path / "canary").exists()


def test_references_to_classes_are_harmless(tmp_path, tensors):
    """Lightning checkpoints use callback classes as keys."""
    callbacks = {b"cpytorch_lightning.callbacks\nModelCheckpoint\n": {"best": call("numpy.core.multiarray.scalar", 3)}}
    result = opened(save({"state_dict": tensors, "callbacks": callbacks}, tmp_path / "a.ckpt"))
    assert result.keys() == tensors.keys()


# Files that would need too much memory or time


def storage(count, key="0"):
    return pickling.opcodes(("storage", b"ctorch\nFloatStorage\n", key, "cpu", count), []) + b"Q"


def view(*arguments):
    return call("torch._utils._rebuild_tensor_v2", storage(24), *arguments, False, {})


INVALID = {
    "repeated": (view(0, (10**12,), (0,)), "its tensors exceed the file's"),
    "beyond the end": (view(20, (2, 3), (3, 1)), "is not the name of a dense tensor"),
    "before the start": (view(-1, (2, 3), (3, 1)), "is not the name of a dense tensor"),
    "backwards": (view(5, (2, 3), (3, -1)), "is not the name of a dense tensor"),
    "of many axes": (view(0, (1,) * 100, (1,) * 100), "is not the name of a dense tensor"),
    "of huge numbers": (view(0, (0, 2**800), (1, 1)), "is not the name of a dense tensor"),
    "no numbers": (view(0, ("a",), (1,)), "is not the name of a dense tensor"),
    "sparse": (call("torch._utils._rebuild_sparse_tensor", 1), "is not the name of a dense tensor"),
    "a list": ([1], "is not the name of a dense tensor"),
    "a storage too small": (
        call("torch._utils._rebuild_tensor_v2", storage(10**9), 0, (10**9,), (1,), False, {}),
        "truncated or not a torch weight file",
    ),
    "no such storage": (call("torch._utils._rebuild_tensor_v2", storage(1, "x"), 0, (1,), (1,)), "truncated or not a"),
    "a key of tuples": ({b")" + b"2\x86" * 64: 1}, "a tuple as a key"),
    "no end": (b"]" * (2**20 + 2), "truncated or not a torch weight file"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "no end" else name for name in INVALID]
)
def test_invalid_tensors_are_rejected(tmp_path, tensors, name):
    value, message = INVALID[name]
    path = save({"float64": tensors["float64"], "x": value}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message):
        opened(path)


def test_tensors_that_share_entries(tmp_path):
    """A few such tensors are accepted, because weights may be tied. Many of them are rejected."""
    content = {"own": np.arange(24, dtype=np.float32), "again": view(0, (24,), (1,)), "part": view(6, (2, 3), (1, 2))}
    result = opened(save(content, tmp_path / "a.ckpt"))
    np.testing.assert_array_equal(result["again"], np.arange(24))
    np.testing.assert_array_equal(result["part"], [[6, 8, 10], [7, 9, 11]])
    path = tmp_path / "a.ckpt"
    many = {f"x{i}": call("torch._utils._rebuild_tensor_v2", storage(10**5), 0, (10**5,), (1,)) for i in range(9)}
    with pytest.raises(CheckpointError, match="its tensors exceed the file's"):
        opened(save({"own": np.ones(10**5, np.float32)} | many, path))


def test_compressed_files_are_not_unpacked(tmp_path):
    path = save({"x": np.zeros(10**6, np.float32)}, tmp_path / "bomb.ckpt", compressed=True)
    assert path.stat().st_size < 10**4
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="is compressed, expected an uncompressed zip file as torch writes it"):
        opened(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


# Files with the wrong extension


def test_mislabelled_files(tmp_path, tensors, small, small_folder):
    floats = {"float32": tensors["float32"]}
    save_file(floats, tmp_path / "real.safetensors")
    save(floats, tmp_path / "zip")
    save(floats, tmp_path / "pickle", legacy=True)
    files = {
        "a zip file": (tmp_path / "zip").read_bytes(),
        "a pickle": (tmp_path / "pickle").read_bytes(),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        "a web page": b"\n<!DOCTYPE html><html></html>",
    }
    for kind, data in files.items():
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"a\.safetensors is {kind}, expected a safetensors file; \w+"):
            Tensors(tmp_path, "a", None, str)
        if kind in ("a zip file", "a pickle"):
            assert opened(tmp_path / "a.safetensors").keys() == floats.keys()
        else:
            with pytest.raises(CheckpointError, match=rf"a\.safetensors is {kind}, expected a safetensors file; \w+"):
                load(tmp_path / "a.safetensors", config=small_folder, devices=small.devices)
            (tmp_path / "a.ckpt").write_bytes(data)
            with pytest.raises(
                CheckpointError, match=rf"a\.ckpt is {kind}, expected a pickle, because its extension is \.ckpt"
            ):
                load(tmp_path / "a.ckpt", config=small_folder, devices=small.devices)
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "real.safetensors").read_bytes())
    assert opened(tmp_path / "a.ckpt").keys() == floats.keys()
    with pytest.raises(CheckpointError, match="contains a list, expected a dictionary of tensors"):
        opened(save([1], tmp_path / "a.ckpt"))
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is missing or empty"):
        opened(tmp_path / "a.ckpt")


def test_shards(tmp_path, tensors):
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    places = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        save({key: array for key, array in tensors.items() if places[key] == name}, tmp_path / name)
    tiny.write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": places})
    with PickledTensors(tmp_path, "pytorch_model", None, str) as result:
        assert {name: result[name].tobytes() for name in result.shapes} == {k: a.tobytes() for k, a in tensors.items()}


def test_a_checkpoint_is_not_accepted_as_a_lora(tmp_path, small, small_folder):
    save_file(tiny.original(unet=tiny.UNET_1), tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match=r"whole\.safetensors is not a LoRA but a checkpoint .*give it as source"):
        merge_lora(small.models, tmp_path / "whole.safetensors")
    assert Tensors(tmp_path, "whole", None, str).sizes
