"""Tests the readers of single files, LoRAs and textual inversions with the tables of a new family."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from sega_jax import CheckpointError
from sega_jax.nn.layers import Linear
from sega_jax.weights import lora, textual_inversion, torch_pickle, write
from sega_jax.weights.fused import Forms, parameters
from sega_jax.weights.layout import Entry
from sega_jax.weights.lora import LoraNames
from sega_jax.weights.pull import fill
from sega_jax.weights.single_file import Original, OriginalWeights, SingleFile
from sega_jax.weights.tensors import Tensors
from sega_jax.weights.textual_inversion import TextEncoders


class Toy(nnx.Module):
    def __init__(self):
        self.to_q, self.to_k, self.out = Linear(4, 6), Linear(4, 6), Linear(6, 4)

    @staticmethod
    def rename(name):
        return name


def names(_toy):
    fused = {f"to_{x}.{kind}": f"qk.{kind}[to_{x}]" for x in "qk" for kind in ("weight", "bias")}
    return fused | {"out.weight": "proj", "out.bias": "shift"}


FILE = SingleFile(
    name="Toy",
    networks={
        "net": (
            Original("old.", names),
            Original(
                "net.",
                names,
                spelling=lambda name: name.replace("qk_", "qk."),
                others=r"step$",
                spare=lambda toy: f"layers.{len(toy.out.bias)}.",
                forms=Forms({r"\.qk\.": ("to_q", "to_k")}, r"\.qk\.", r"\.proj$"),
                ema="ema_",
            ),
        )
    },
    recognise=lambda shapes: "net.proj" in shapes,
    refuse=lambda path, shapes: None,
    published=lambda path, shapes, prediction_type: path.parent,
)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"net.qk_weight": (12, 4, 1), "net.qk_bias": (12,), "net.proj": (6, 4), "net.shift": (4,)}
    others = {"net.step": (), "net.layers.4.x": (3,), "another.x": (2,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (shapes | others).items()}


def read(path, **options):
    with OriginalWeights(path, torch_pickle.opened(path), FILE.networks["net"], "net", Toy(), **options) as weights:
        return fill(Toy(), weights, np.float32, np.copy)


def test_a_single_file(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    toy = read(path)
    np.testing.assert_array_equal(toy.to_q.kernel[...], tensors["net.qk_weight"][:6, :, 0].T)
    np.testing.assert_array_equal(toy.to_k.bias[...], tensors["net.qk_bias"][6:])
    np.testing.assert_array_equal(toy.out.kernel[...], tensors["net.proj"])
    with pytest.raises(CheckpointError, match=r"no moving average \(no names that start with ema_\); leave out ema"):
        read(path, ema=True)
    save_file({"x": np.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"has no net \(no names that start with old\. or net\.\); give a file"):
        read(path)


def test_a_tensor_that_cannot_be_split_is_listed_as_unexpected(tmp_path, tensors):
    save_file(tensors | {"net.qk_bias": np.ones(11, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"missing    net\.qk\.bias\[to_k\] \(6,\)\n.*\n  unexpected net.qk.bias"):
        read(tmp_path / "a.safetensors")


def test_fused_rows_in_groups():
    """The tensor has two layers in three groups of two rows."""
    entry = Entry("x.qk.bias", (12,), 48, lambda: np.arange(12))
    parts = dict(parameters(entry.key, entry, Forms({"qk": ("q", "k")}), 2))
    assert parts["x.qk.bias[q]"].read().tolist() == [0, 1, 4, 5, 8, 9]
    assert parts["x.qk.bias[k]"].read().tolist() == [2, 3, 6, 7, 10, 11]
    assert {(part.shape, part.nbytes) for part in parts.values()} == {((6,), 24)}
    assert list(parameters(entry.key, entry, Forms({"qk": ("q", "k")}), 4)) == [(entry.key, entry)]


class Models(NamedTuple):
    net: Toy


def test_a_lora(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    models = Models(jax.tree.map(jax.numpy.asarray, read(tmp_path / "a.safetensors")))
    table = {"net": LoraNames(("toy_", ""), lambda toy: {"the.out": "out.weight"})}
    for start in ("toy_", ""):
        content = {f"{start}the_out.lora_A.weight": np.ones((2, 6)), f"{start}the.out.lora_B.weight": np.ones((4, 2))}
        save_file(content, tmp_path / "lora.safetensors")
        changes = lora.read(models._asdict(), {tmp_path / "lora.safetensors": 0.5}, table)
        merged = lora.merged(models, changes).net
        np.testing.assert_allclose(merged.out.kernel[...], tensors["net.proj"] + 1, rtol=1e-6)
        assert merged.to_q.kernel[...] is models.net.to_q.kernel[...]
    with pytest.raises(CheckpointError, match=r"does not fit this checkpoint's net:\n(.*\n)*  unexpected net\.proj"):
        lora.read(models._asdict(), tmp_path / "a.safetensors", table)
    with pytest.raises(CheckpointError, match=r"is not a LoRA but a checkpoint \(Toy\); give it as source"):
        lora.read(models._asdict(), tmp_path / "a.safetensors", table, [FILE])


def test_errors_of_textual_inversion_name_the_family(tmp_path, small):
    family = TextEncoders("Toy", {"a": "one", "b": "two"}, "3 and 5")
    network = {"one": small.models.text_encoder, "two": small.models.text_encoder}
    path = tmp_path / "a.safetensors"

    def read(content, networks):
        save_file(content, path)
        return textual_inversion.read(networks, small.tokenizer, {"<x>": path}, [family])

    (word,) = read({"a": np.ones((2, 16), np.float32), "b": np.ones((2, 16), np.float32)}, network)
    assert [vectors.shape for vectors in word.vectors.values()] == [(2, 16)] * 2
    with pytest.raises(
        CheckpointError, match="has vectors for one and two, expected vectors for one; it was trained for Toy, use"
    ):
        read({"a": np.ones(16), "b": np.ones(16)}, {"one": network["one"]})
    with pytest.raises(
        CheckpointError, match=r"with 3 channels, but the one has 16; .* for this model \(Toy has 3 and 5\)"
    ):
        read({"a": np.ones(3), "b": np.ones(3)}, network)


def test_written_weights_can_be_read(tmp_path, tensors):
    save_file(tensors, tmp_path / "a.safetensors")
    toy = read(tmp_path / "a.safetensors")
    write.write_diffusers(tmp_path, write.network_of(toy, np.float16), "stem")
    with Tensors(tmp_path, "stem", None, str) as weights:
        restored = fill(Toy(), weights, None, np.copy)
    for a, b in zip(jax.tree.leaves(toy), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a.astype(np.float16), b)
        assert b.dtype == np.float16
