"""Tests the readers with damaged files: a checkpoint either loads or fails with a `CheckpointError` or `ValueError`.

Every attempt must need little time and memory, even if the file claims to contain 10**10 items. The limits are five
seconds and two gigabytes of address space. If only arrays are read, an attempt may use at most as much memory as the
undamaged file needs, plus twice the file's size.
"""

import copy
import gc
import json
import os
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import time
import tracemalloc
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import save_file
from support import flax_files, float8, lora_forms, pickling, tiny

import convert
from sega_jax import CheckpointError, load
from sega_jax.nn.clip import CLIPTextConfig, CLIPTextModel
from sega_jax.pipelines import loading
from sega_jax.pipelines.adapters import text_encoders
from sega_jax.systems import original_files
from sega_jax.systems.registry import recognise_file
from sega_jax.systems.stable_diffusion import Models
from sega_jax.text.files import read_json
from sega_jax.text.tokenizers import Tokenizer
from sega_jax.weights import lora, lora_names, single_file, textual_inversion, torch_pickle
from sega_jax.weights.flax_msgpack import FlaxTensors
from sega_jax.weights.orbax_reader import OrbaxTensors
from sega_jax.weights.pull import fill
from sega_jax.weights.tensors import Tensors

CASES = int(os.environ.get("SEGA_JAX_FUZZ", "25"))  # 1,000 take a few minutes
SECONDS = 5
# Memory in bytes that Python itself needs, for example for error messages. The files may be smaller than this.
OVERHEAD = 2**17
NETWORKS = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
]
TOKENIZER = ["vocab.json", "special_tokens_map.json", "tokenizer_config.json"]
# Bytes that are more likely than others to keep JSON and headers readable.
JSON_BYTES = b'0123456789-.eE[]{}",:tfnFBUI '
# The opcodes of pickles.
OPCODES = b"".join(code.code.encode("latin-1") for code in pickletools.opcodes)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Returns a checkpoint with as few layers as possible."""
    vae = {"block_out_channels": [4], "down_block_types": [], "up_block_types": []}
    text = tiny.TEXT | {"num_hidden_layers": 1}
    return tiny.checkpoint(tmp_path_factory.mktemp("fuzz") / "tiny", unet=tiny.UNET_1, vae=tiny.VAE | vae, text=text)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bytes_changed(rng, original, end=None):
    """Changes one to three bytes."""
    damaged = bytearray(original)
    while damaged == original:
        for _ in range(rng.randint(1, 3)):
            new = rng.choice(JSON_BYTES) if rng.random() < 0.7 else rng.randrange(256)
            damaged[rng.randrange(end or len(damaged))] = new
    return bytes(damaged)


# Values that are valid JSON, but extreme or of an unexpected type.
EXTREMES = [10**10, -(10**10), 0, -1, 1.5, 1e308, float("nan"), None, True, "", "x" * 1000, [], {}, [[]] * 50]
EXTREMES += [[10**10] * 4, ["../../x"], "../../../etc/passwd", list(range(1000)), {"a": {"b": 1}}, "\0", "10000000000"]


def entries_changed(rng, original):
    """Changes one to three values anywhere in a JSON object, at any depth of nesting."""
    damaged = json.loads(original)
    for _ in range(rng.randint(1, 3)):
        parent, depth = damaged, rng.randint(1, 4)
        for _ in range(depth):
            if not isinstance(parent, dict | list) or not parent:
                break
            inside, key = parent, rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            parent = parent[key]
        # A number may also be doubled; some configs then still load.
        double = isinstance(parent, int | float) and rng.random() < 0.5
        inside[key] = 2 * parent if double else copy.deepcopy(rng.choice(EXTREMES))
    return json.dumps(damaged).encode()


def changed(rng, original):
    """Changes either bytes or values of a JSON object, at random."""
    return rng.choice((bytes_changed, entries_changed))(rng, original)


@contextmanager
def bounded():
    """Limits a block's run time and, on Linux, allows it at most two gigabytes of additional address space."""

    def late(*_):
        raise AssertionError("the attempt took too long")

    before, (soft, hard) = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def survives(attempt, original, write, change=changed, cases=CASES):
    """Writes damaged content to a file several times, and returns the number of attempts that succeeded."""
    rng, good = random.Random(len(original)), 0
    for _ in range(cases):
        damaged = change(rng, original)
        write(damaged)
        try:
            with bounded():
                attempt()
            good += 1
        except ValueError:
            continue
        except BaseException as error:
            raise AssertionError(damaged[:1000]) from error
    write(original)
    return good


def survives_in_little_memory(attempt, original, write, change=changed, cases=CASES):
    """Does the same as `survives`, and also limits the memory that attempts may use.

    An attempt may use at most as much memory as the undamaged file (which must load) needs, plus twice the file's size.
    """

    def peak():
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            attempt()
        finally:
            taken.append(tracemalloc.get_traced_memory()[1] - before)

    def lower_peak_of_two():
        """Repeats an attempt that needed too much memory, because Python may have enlarged its table of interned
        strings."""
        try:
            peak()
        finally:
            if taken[-1] > limit:
                taken.pop()
                with suppress(ValueError):
                    peak()

    taken = []
    gc.collect()  # finalising objects of other tests during an attempt could cause warnings
    tracemalloc.start()
    try:
        for _ in range(3):
            peak()
        limit, taken = max(taken) + 2 * max(len(original), OVERHEAD), []
        good = survives(lower_peak_of_two, original, write, change, cases)
    finally:
        tracemalloc.stop()
    assert max(taken) <= limit
    return good


@pytest.mark.parametrize("name", NETWORKS)
def test_configs(small, tmp_path, monkeypatch, one_device, name):
    monkeypatch.setattr(loading, "fill", lambda module, *_: module)
    folder = shutil.copytree(small, tmp_path / "copy")

    def attempt():
        pipe = load(folder, devices=one_device)
        pipe.latent_shape()
        pipe.scheduler.table(1)

    path = folder / name
    assert 0 < survives(attempt, path.read_bytes(), path.write_bytes) < CASES


@pytest.mark.parametrize("name", TOKENIZER)
def test_tokenizers(small, tmp_path, name):
    folder = shutil.copytree(small / "tokenizer", tmp_path / "copy")

    def attempt():
        ids = Tokenizer(folder, 12, 60)(["a b", "z" * 20])
        assert ids.shape[1] >= 2
        assert 0 <= ids.min() <= ids.max() < 60

    path = folder / name
    assert 0 < survives(attempt, path.read_bytes(), path.write_bytes) < CASES


@pytest.fixture
def text(small):
    """Returns a text encoder whose parameters have shapes but no values."""
    return Models.build(**{part: read_json(small / part / "config.json") for part in Models._fields}).text_encoder


@pytest.fixture
def weights(small, tmp_path):
    """Returns a copy of the text encoder's weight file for tests to damage."""
    return Path(shutil.copy(small / "text_encoder/model.safetensors", tmp_path / "model.safetensors"))


@pytest.fixture
def read(text, weights):
    def attempt():
        with Tensors(weights.parent, "model", None, text.rename) as tensors:
            fill(text, tensors, np.float32, np.copy)

    return attempt


def header_changed(rng, original):
    """Changes bytes of a safetensors file's header, or changes the header's entries and length.

    Sometimes it only changes metadata that nothing reads, so that some files still load.
    """
    length = struct.unpack("<Q", original[:8])[0]
    if rng.random() < 0.5:
        return bytes_changed(rng, original, 8 + length)
    header = original[8 : 8 + length]
    header = header.replace(b"pt", b"np") if rng.random() < 0.1 else entries_changed(rng, header)
    return struct.pack("<Q", len(header)) + header + original[8 + length :]


def test_headers(weights, read):
    """Uses four times as many cases as other tests, because few of them load."""
    original, cases = weights.read_bytes(), 4 * CASES
    assert 0 < survives_in_little_memory(read, original, weights.write_bytes, header_changed, cases) < cases


def test_single_files(tmp_path, text):
    """The file has a text encoder with OpenCLIP's names. Each fused tensor contains several parameters."""
    path, config = tmp_path / "model.safetensors", tiny.TEXT | {"num_hidden_layers": 1}
    starts = (original_files.OPENCLIP, f"{original_files.UNET}input_blocks.0.0.")
    tensors = tiny.original(unet=tiny.UNET_1, text=config, openclip=True)
    save_file({key: array for key, array in tensors.items() if key.startswith(starts)}, path)

    def attempt():
        with torch_pickle.opened(path) as opened:
            recognise_file(path, opened.shapes)
        opened, file = torch_pickle.opened(path), original_files.STABLE_DIFFUSION_FILE
        with single_file.OriginalWeights(path, opened, file.networks["text_encoder"], "text_encoder", text) as weights:
            fill(text, weights, np.float32, np.copy)

    assert 0 < survives_in_little_memory(attempt, path.read_bytes(), path.write_bytes, header_changed) < CASES


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickles(tmp_path, text, legacy):
    """Most changes affect the description of the tensors, and some affect their values."""
    config = tiny.TEXT | {"num_hidden_layers": 1}
    tensors = tiny.original(unet=tiny.UNET_1, text=config)
    content = {key: array for key, array in tensors.items() if key.startswith(original_files.CLIP)}
    path = pickling.save({"state_dict": content, "epoch": 3}, tmp_path / "model.ckpt", legacy=legacy)
    original = path.read_bytes()
    entries = [original.find(array.tobytes()) for array in content.values() if array.ndim == 2]
    descriptions = range(min(entries)), range(max(entries), len(original))

    def change(rng, original):
        damaged = bytearray(original)
        places = rng.choice((*descriptions, *descriptions, range(len(original))))
        while damaged == original:
            for _ in range(rng.randint(1, 3)):
                new = rng.choice(OPCODES) if rng.random() < 0.5 else rng.randrange(256)
                damaged[rng.choice(places)] = new
        return bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.1 else damaged)

    def attempt():
        opened, file = torch_pickle.opened(path), original_files.STABLE_DIFFUSION_FILE
        with single_file.OriginalWeights(path, opened, file.networks["text_encoder"], "text_encoder", text) as weights:
            fill(text, weights, np.float32, np.copy)

    assert 0 < survives_in_little_memory(attempt, original, path.write_bytes, change) < CASES


def eight_bit(text):
    """Returns the tensors of a text encoder in 8-bit floats. Some have scales: one for the tensor, for each row, or for
    each block."""
    tensors = {}
    for i, (key, array) in enumerate(tiny.tensors(text).items()):
        tensors[key] = array.astype((ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)[i % 2])
        if key.endswith("weight") and array.ndim == 2:
            shape = [(), (len(array), 1), (2, 4), None][i % 4]
            tensors |= {} if shape is None else {key.replace("weight", "scale_weight"): np.full(shape, 0.5, np.float32)}
    return tensors | {"scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)}


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_8_bit_floats(tmp_path, text, pickled):
    path = tmp_path / "model"
    if pickled:
        pickling.save({"model": eight_bit(text)}, path)
    else:
        float8.save(eight_bit(text), path)

    def attempt():
        with torch_pickle.opened(path, CLIPTextModel.rename) as weights:
            fill(text, weights, np.float16, np.copy)

    change = bytes_changed if pickled else header_changed
    assert 0 < survives_in_little_memory(attempt, path.read_bytes(), path.write_bytes, change) < CASES


def test_flax(small, tmp_path, text):
    """Most changes affect the description of the arrays, and some affect their values."""
    path = tmp_path / "flax_model.msgpack"
    flax_files.write(path, flax_files.tree_of(small / "text_encoder/model.safetensors"))
    original = path.read_bytes()
    dtype = b"float32"
    places = [at for at in range(len(original)) if dtype in original[max(at - 40, 0) : at + 16]]

    def change(rng, original):
        damaged = bytearray(original)
        near = rng.random() < 0.8
        while damaged == original:
            for _ in range(rng.randint(1, 3)):
                new = rng.randrange(0x80, 0x100) if rng.random() < 0.7 else rng.randrange(256)
                damaged[rng.choice(places) if near else rng.randrange(len(damaged))] = new
        return bytes(damaged[: rng.randrange(len(damaged))] if rng.random() < 0.1 else damaged)

    def attempt():
        with FlaxTensors(path.parent, "model", None, text.rename) as tensors:
            fill(text, tensors, np.float32, np.copy)

    assert 0 < survives_in_little_memory(attempt, original, path.write_bytes, change) < CASES


# A linear layer and a convolution, in torch's layout and in this library's layout.
SHAPES = {"linear": (8, 12), "conv": (8, 6, 3, 3)}
NET = {
    "linear": {"kernel": {"value": np.ones((12, 8), np.float32)}, "bias": {"value": np.ones(8, np.float32)}},
    "conv": {"kernel": {"value": np.ones((3, 3, 6, 8), np.float32)}},
}
NET_NAMES = {"net": lora_names.LoraNames(("unet.", ""), lora_names.layer_keys)}


def merging(path):
    """Returns a function that reads a LoRA and computes its differences. Its errors must name the file."""

    def attempt():
        try:
            layers = lora.read({"net": NET}, path, NET_NAMES)[0].layers["net"]
        except CheckpointError as error:
            error_names_file = str(path) in str(error)
        else:
            error_names_file = None
            for key, layer in layers.items():
                weight = np.ones(8 if key.endswith("bias") else SHAPES[key.removesuffix(".weight")], np.float32)
                with np.errstate(all="ignore"):
                    assert layer.difference(weight).shape == weight.shape
        assert error_names_file is not False
        if error_names_file:
            raise CheckpointError

    return attempt


def anything_changed(rng, original):
    """Changes bytes anywhere in a safetensors file, bytes of its header, or entries of the header."""
    return rng.choice((header_changed, bytes_changed))(rng, original)


def test_loras(tmp_path):
    """The changes affect names, shapes, and the settings in the header."""
    path, content = tmp_path / "lora.safetensors", {}
    for layer, kernel in (("linear", ()), ("conv", (3, 3))):
        inputs = 6 if kernel else 12
        content[f"unet.{layer}.lora_A.weight"] = np.ones((2, inputs, *kernel), np.float32)
        content[f"unet.{layer}.lora_B.weight"] = np.ones((8, 2, *[1] * len(kernel)), np.float32)
    content["unet.linear.alpha"] = np.ones((), np.float32)
    settings = {"net.lora_alpha": 4, "net.alpha_pattern": {"conv": 2}, "net.rank_pattern": {"conv": 2}}
    save_file(content, path, {"lora_adapter_metadata": json.dumps(settings)})
    assert 0 < survives_in_little_memory(merging(path), path.read_bytes(), path.write_bytes, header_changed) < CASES


OTHERS = [form for form in lora_forms.FORMS if form not in lora_forms.SIMPLEST]


@pytest.mark.parametrize(
    "form", [*lora_forms.SIMPLEST, *(pytest.param(form, marks=pytest.mark.slow) for form in OTHERS)]
)
def test_other_adapters(tmp_path, form):
    """The changes affect names, shapes and values."""
    path = tmp_path / "lora.safetensors"
    save_file(lora_forms.tensors(SHAPES, form)[0], path)
    assert survives_in_little_memory(merging(path), path.read_bytes(), path.write_bytes, anything_changed) < CASES


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["zip", "legacy"])
def test_pickled_loras(tmp_path, legacy):
    content = {"state_dict": lora_forms.tensors(SHAPES, "LoKr with both as products")[0]}
    path = pickling.save(content, tmp_path / "lora.pt", legacy=legacy)
    assert 0 < survives_in_little_memory(merging(path), path.read_bytes(), path.write_bytes, bytes_changed) < CASES


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_textual_inversion(tmp_path, ending):
    path, vectors = tmp_path / f"a{ending}", np.ones((2, 16), np.float32)
    if ending == ".pt":
        pickling.save({"string_to_param": {"*": vectors}, "name": "<a>", "step": 3}, path)
    else:
        save_file({"<a>": vectors}, path)
    text = {"text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=16))}

    def attempt():
        assert textual_inversion._word(path, None, text, text_encoders()).vectors["text_encoder"].shape[1:] == (16,)

    change = bytes_changed if ending == ".pt" else header_changed
    assert 0 < survives_in_little_memory(attempt, path.read_bytes(), path.write_bytes, change) < CASES


def test_indices(weights, read):
    path, _ = tiny.shard(weights)
    assert 0 < survives_in_little_memory(read, path.read_bytes(), path.write_bytes) < CASES


@pytest.fixture
def orbax(small, tmp_path):
    """Returns the folder of a network in Orbax format for tests to damage."""
    return convert.convert(small, tmp_path / "orbax") / "text_encoder"


@pytest.fixture
def restore(text, orbax):
    def attempt():
        with OrbaxTensors(orbax, text.rename) as tensors:
            fill(text, tensors, np.float32, np.copy)

    return attempt


def test_orbax_notes(orbax, restore):
    path = orbax / "orbax.json"
    assert survives_in_little_memory(restore, path.read_bytes(), path.write_bytes) < CASES


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d/*"])
def test_orbax_databases(orbax, restore, name):
    """The database's checksums detect every changed byte."""
    (path,) = (orbax / "orbax").glob(name)
    assert survives_in_little_memory(restore, path.read_bytes(), path.write_bytes, bytes_changed) == 0


@pytest.mark.parametrize("name", ["_METADATA", "_CHECKPOINT_METADATA"])
def test_orbax_metadata_is_not_needed(orbax, restore, name):
    path = orbax / "orbax" / name
    assert survives_in_little_memory(restore, path.read_bytes(), path.write_bytes, cases=30) == 30


def test_orbax_arrays(orbax, restore):
    """The changed description of an array has a valid checksum."""
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{orbax / 'orbax'}/"}}
    store, key = tensorstore.KvStore.open(database).result(), "embeddings.token_embedding.embedding/.zarray"

    def write(description):
        store[key] = description

    assert survives_in_little_memory(restore, store[key], write) < CASES


def test_excessive_memory_is_detected(weights, read):
    def attempt():
        read()
        if weights.read_bytes() != original:
            np.ones(max(len(original), OVERHEAD))

    original = weights.read_bytes()
    with pytest.raises(AssertionError, match=r"assert \d+ <="):
        survives_in_little_memory(attempt, original, weights.write_bytes, bytes_changed, 3)


@pytest.mark.parametrize("excess", [lambda: np.ones(2**29), lambda: time.sleep(1)])
def test_limits_of_time_and_memory_are_enforced(monkeypatch, excess):
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.1)
    with pytest.raises((AssertionError, MemoryError)), bounded():
        excess()
