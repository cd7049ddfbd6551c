"""Tests T5's encoder without torch: configs, tensor names, padding and precision."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import pickling, tiny

from sega_jax.nn.t5 import T5Config, T5EncoderModel, buckets
from sega_jax.pipelines.weight_files import open_weights
from sega_jax.text.files import CheckpointError
from sega_jax.weights.pull import fill


def encoder(dtype=np.float32):
    return tiny.filled(T5EncoderModel(T5Config.from_dict(tiny.T5)), dtype)


IDS = np.random.default_rng(0).integers(0, 60, (2, 9)).astype(np.int32)
MASK = np.arange(9)[None] < np.array([[6], [9]])


def test_the_embedding_may_have_either_name():
    tensors = tiny.tensors(T5EncoderModel(T5Config.from_dict(tiny.T5)))
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        assert T5EncoderModel.rename(name) in tensors
    assert {T5EncoderModel.rename(name) for name in tensors} == set(tensors)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_the_embedding_may_have_both_names(tmp_path, ending):
    """Published models with a decoder store the embedding under both names."""
    module = T5EncoderModel(T5Config.from_dict(tiny.T5))
    tensors = tiny.tensors(module) | {"decoder.final_layer_norm.weight": np.ones(24, np.float32)}

    def read():
        if ending == "bin":
            pickling.save(tensors, tmp_path / "pytorch_model.bin")
        else:
            save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with open_weights(tmp_path, "model", None, module.rename) as weights:
            return fill(module, weights, None)

    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    np.testing.assert_array_equal(read().shared.embedding[...], tensors["shared.weight"])
    tensors["encoder.embed_tokens.weight"] += 1
    with pytest.raises(CheckpointError, match=r"are the same parameter shared\.weight, but differ"):
        read()


def test_padding_has_no_effect_on_other_tokens():
    run = jax.jit(T5EncoderModel.__call__)
    others = np.where(MASK, IDS, 59 - IDS)
    states, other = run(encoder(), IDS, MASK), run(encoder(), others, MASK)
    assert states.shape == (2, 9, 24)
    np.testing.assert_allclose(states[MASK], other[MASK], rtol=1e-5, atol=1e-6)
    assert not np.allclose(states[~MASK], other[~MASK], atol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    states = jax.jit(T5EncoderModel.__call__)(encoder(dtype), IDS, MASK)
    assert states.dtype == dtype
    exact = jax.jit(T5EncoderModel.__call__)(encoder(), IDS, MASK)
    assert np.linalg.norm(states.astype(np.float32) - exact) < 0.05 * np.linalg.norm(exact)


def test_position_buckets():
    """Of 12 buckets, the first six hold the distances 0, 1, 2, 3 to 5, 6 to 10, and 11 or more; the others are for keys
    after the query."""
    ahead = [0, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5]
    table = buckets(13, 12, 20)
    assert table[-1, ::-1].tolist() == ahead
    assert table[0].tolist() == [0, *(6 + bucket for bucket in ahead[1:])]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("feed_forward_proj", "relu", "feed_forward_proj='relu' is not supported; supported values: 'gated-gelu'"),
        ("feed_forward_proj", None, "feed_forward_proj=None is not supported; supported values: 'gated-gelu'"),
        ("relative_attention_num_buckets", 3, "relative_attention_num_buckets 3 should be at least 4"),
        ("relative_attention_max_distance", 3, "below 4 times relative_attention_max_distance 3"),
        ("num_layers", 101, "num_layers=101 exceeds the supported maximum of 100"),
        ("d_kv", 0, "d_kv=0 is invalid; use a value such as 64"),
    ],
)
def test_unsupported_configs(option, value, message):
    with pytest.raises(ValueError, match=message):
        T5Config.from_dict(tiny.T5 | {option: value})


def test_the_default_config_of_transformers_is_unsupported():
    """The default config describes the original T5, which has no gates."""
    with pytest.raises(ValueError, match="feed_forward_proj=None"):
        T5Config.from_dict({})
