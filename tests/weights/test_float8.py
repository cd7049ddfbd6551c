"""Tests 8-bit floats: they are widened without rounding and multiplied by their scales."""

import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import pickling
from support.float8 import DTYPES, save

from sega_jax import CheckpointError, load
from sega_jax.weights import float8
from sega_jax.weights.torch_pickle import opened

UNET = "unet/diffusion_pytorch_model.safetensors"


def same(first, second):
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def read(path):
    with opened(path) as tensors:
        return {name: tensors[name] for name in tensors.shapes}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pickled", [False, True])
def test_every_value_is_read_without_rounding(tmp_path, dtype, pickled):
    every = np.arange(256, dtype=np.uint8).view(dtype).reshape(4, 64)
    rest = {"y": np.ones((2, 3), np.float32)}
    if pickled:
        path = pickling.save({"x": every, **rest}, tmp_path / "a.pt")
    else:
        path = save({"x": every, **rest}, tmp_path / "a.safetensors")
    with opened(path) as tensors:
        result, size = tensors["x"], tensors.sizes["x"]
    assert (result.dtype, size) == (np.float16, 512)
    np.testing.assert_array_equal(result.astype(np.float32), every.astype(np.float32))


SCALES = {
    "one number": (),
    "one number in an array": (1,),
    "rows": (256,),
    "rows as a column": (256, 1),
    "blocks of 128": (2, 3),
    "blocks of 64 and 100": (4, 5),
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
def test_weights_are_multiplied_by_their_scales(tmp_path, kind, name):
    rng = np.random.default_rng(0)
    inputs = 500 if kind == "blocks of 64 and 100" else 320
    weight = rng.standard_normal((256, inputs)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, SCALES[kind]).astype(np.float32)
    notes = {"layer.scale_input": scale, "layer.input_scale": scale}
    if name == "weight_scale":
        notes["layer.comfy_quant"] = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    tensors = {"layer.weight": weight, f"layer.{name}": scale, "scaled_fp8": weight[:0, 0], **notes}
    result = read(save(tensors, tmp_path / "a.safetensors"))
    assert result.keys() == {"layer.weight"}
    if kind.startswith("blocks"):
        block = (128, 128) if kind == "blocks of 128" else (64, 100)
        factors = np.array([[scale[i // block[0], j // block[1]] for j in range(inputs)] for i in range(256)])
    else:
        factors = scale.reshape(-1, 1)
    assert result["layer.weight"].dtype == np.float32
    np.testing.assert_array_equal(result["layer.weight"], weight.astype(np.float32) * factors)


def test_scales_may_be_stored_as_powers_of_two(tmp_path):
    weight = np.ones((2, 3), ml_dtypes.float8_e5m2)
    scale = np.array([2.0**-100], ml_dtypes.float8_e8m0fnu)
    result = read(save({"weight": weight, "weight_scale": scale}, tmp_path / "a.safetensors"))
    np.testing.assert_array_equal(result["weight"], np.full((2, 3), 2.0**-100, np.float32))


@pytest.mark.parametrize("shape", [(3,), (255, 1), (3, 7), (0,), (1, 1, 256)])
def test_scales_that_do_not_fit_are_rejected(tmp_path, shape):
    tensors = {"x.weight": np.ones((256, 320), ml_dtypes.float8_e4m3fn), "x.scale_weight": np.ones(shape, np.float32)}
    with pytest.raises(CheckpointError, match=r"a\.safetensors: x\.scale_weight .* does not fit x\.weight"):
        read(save(tensors, tmp_path / "a.safetensors"))


def test_a_folder_with_8_bit_weights(tmp_path, small_folder, small):
    """Some weights have scales, as in ComfyUI's files. Biases stay in float32."""
    folder = shutil.copytree(small_folder, tmp_path / "copy")
    tensors, expected, eight_bit = load_file(folder / UNET), {}, {}
    for i, (name, array) in enumerate(tensors.items()):
        expected[name] = eight_bit[name] = array
        if array.ndim > 1:
            scale = np.float32(np.abs(array).max() / 448) if i % 2 else np.float32(1)
            eight_bit[name] = (array / scale).astype(ml_dtypes.float8_e4m3fn)
            expected[name] = eight_bit[name].astype(np.float32) * scale
            eight_bit |= {f"{name.removesuffix('weight')}scale_weight": np.array(scale)} if i % 2 else {}
    save(eight_bit, folder / UNET)
    result = load(folder, devices=small.devices).models.unet
    save_file(expected, folder / UNET)
    assert same(result, load(folder, devices=small.devices).models.unet)
    assert not same(result, small.models.unet)


def test_values_that_are_not_finite_are_rejected(tmp_path, small_folder, small):
    folder = shutil.copytree(small_folder, tmp_path / "copy")
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"] = np.full(tensors["conv_in.weight"].shape, np.nan, ml_dtypes.float8_e4m3fn)
    save(tensors, folder / UNET)
    with pytest.raises(CheckpointError, match=r"conv_in\.weight has NaN or infinite entries"):
        load(folder, devices=small.devices)


def test_a_truncated_file_is_rejected(tmp_path):
    path = save({"x": np.ones((8, 8), ml_dtypes.float8_e5m2)}, tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is missing, truncated"):
        read(path)


EIGHT_BIT = np.ones((8, 8), ml_dtypes.float8_e4m3fn)
SCALE = {"x.weight_scale": np.ones((), np.float32)}
UNSUPPORTED = {
    "another format": (SCALE | {"x.comfy_quant": b'{"format": "mxfp8"}'}, "has the format 'mxfp8', which is not"),
    "a format without its scale": ({"x.comfy_quant": b'{"format": "float8_e5m2"}'}, "'float8_e5m2' without its scale"),
    "a broken note": (SCALE | {"x.comfy_quant": b"{"}, r"x\.comfy_quant is not readable"),
    "a note of something else": (SCALE | {"x.comfy_quant": b"[]"}, r"x\.comfy_quant is not readable"),
    "a second scale": (SCALE | {"x.weight_scale_2": b"1"}, r"x\.weight_scale_2 scales weights in an unsupported way"),
    "a scale of another name": ({"x.scale": b"1"}, r"x\.scale scales weights in an unsupported way"),
    "a scale of the weight": ({"x.weight.scale_weight": b"1"}, r"x\.weight\.scale_weight scales weights"),
    "scales in bytes": ({"x.weight_scale": b"12345678"}, r"x\.weight and x\.weight_scale are float16 and uint8"),
    "bitsandbytes": ({"x.SCB": b"1"}, r"x\.SCB was quantised with bitsandbytes"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_other_kinds_of_quantisation_are_rejected(tmp_path, kind):
    more, message = UNSUPPORTED[kind]
    more = {key: np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value for key, value in more.items()}
    with pytest.raises(CheckpointError, match=message):
        read(save({"x.weight": EIGHT_BIT} | more, tmp_path / "a.safetensors"))


def test_integers_with_a_scale_are_rejected(tmp_path):
    tensors = {"x.weight": np.ones((8, 8), np.uint8), "x.weight_scale": np.ones((), np.float32)}
    with pytest.raises(CheckpointError, match=r"x\.weight and x\.weight_scale are uint8 and float32, expected floats"):
        read(save(tensors, tmp_path / "a.safetensors"))


def test_the_header_is_read_once_for_all_tensors(tmp_path, monkeypatch):
    tensors = {f"{i}.weight": np.ones((2, 2), ml_dtypes.float8_e5m2) for i in range(50)}
    path, read_header, calls = save(tensors, tmp_path / "a.safetensors"), float8.in_safetensors, []
    monkeypatch.setattr(float8, "in_safetensors", lambda path: calls.append(path) or read_header(path))
    assert len(read(path)) == 50
    assert calls == [path]
