"""Damaged files: a checkpoint loads, or is refused with a `CheckpointError` or a `ValueError`, and nothing else."""

import random
import shutil
import struct
import warnings

import numpy as np
import pytest
import tiny

from sega_jax import load, loading
from sega_jax.checkpoint import Tensors, fill, read_json
from sega_jax.systems.stable_diffusion import Models
from sega_jax.text import Tokenizer

CASES = 300
NETWORKS = [
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
]
TOKENIZER = ["vocab.json", "special_tokens_map.json", "tokenizer_config.json"]
# Bytes that keep JSON and headers readable more often than others do.
TELLING = b'0123456789-.eE[]{}",:tfnFBUI '


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """As few parts as a checkpoint can have."""
    vae = {"block_out_channels": [4], "down_block_types": [], "up_block_types": []}
    text = tiny.TEXT | {"num_hidden_layers": 1}
    return tiny.checkpoint(tmp_path_factory.mktemp("fuzz") / "tiny", unet=tiny.UNET_1, vae=tiny.VAE | vae, text=text)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def mutations(path, end=None):
    """The file with one to three bytes changed, again and again."""
    rng, original = random.Random(path.name), path.read_bytes()
    for _ in range(CASES):
        damaged = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            new = rng.choice(TELLING) if rng.random() < 0.7 else rng.randrange(256)
            damaged[rng.randrange(end or len(damaged))] = new
        path.write_bytes(damaged)
        yield bytes(damaged)


def survives(attempt, path, end=None):
    """How often the attempt worked."""
    good = 0
    for damaged in mutations(path, end):
        try:
            attempt()
            good += 1
        except ValueError:
            continue
        except Exception as error:
            raise AssertionError(damaged[:end]) from error
    return good


@pytest.mark.parametrize("name", NETWORKS)
def test_configs(small, tmp_path, monkeypatch, one_device, name):
    monkeypatch.setattr(loading, "fill", lambda module, *_: module)
    copy = shutil.copytree(small, tmp_path / "copy")

    def attempt():
        pipe = load(copy, devices=one_device)
        pipe.latent_shape()
        pipe.scheduler.table(1)

    assert 0 < survives(attempt, copy / name) < CASES


@pytest.mark.parametrize("name", TOKENIZER)
def test_tokenizers(small, tmp_path, name):
    copy = shutil.copytree(small / "tokenizer", tmp_path / "copy")

    def attempt():
        ids = Tokenizer(copy, 12, 60)(["a b", "z" * 20])
        assert ids.shape[1] >= 2
        assert 0 <= ids.min() <= ids.max() < 60

    assert 0 < survives(attempt, copy / name) < CASES


def test_weights(small, tmp_path):
    path = shutil.copy(small / "text_encoder/model.safetensors", tmp_path / "model.safetensors")
    configs = {part: read_json(small / part / "config.json") for part in Models._fields}
    module = Models.build(**configs).text_encoder

    def attempt():
        with Tensors(path.parent, "model", None, module.rename) as tensors:
            fill(module, tensors, np.float32)

    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert 0 < survives(attempt, path, header) < CASES
