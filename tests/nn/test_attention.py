"""Tests attention computed in parts, the choice of attention implementation, and grouped convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.nn import attention, layers

HEADS, QUERIES, KEYS = 2, 10, 7


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((3, n, HEADS * 4)), dtype) for n in (QUERIES, KEYS, KEYS)]


@pytest.mark.parametrize("logits", [1, HEADS * KEYS * 3, HEADS * KEYS * QUERIES, HEADS * KEYS * QUERIES * 2])
def test_attention_in_parts_equals_attention_at_once(monkeypatch, logits):
    """The parts are single queries, blocks whose size does not divide the number of queries, or rows."""

    def run(q, k, v):
        return attention.attend(q, k, v, heads=HEADS)

    def gradient(*of):
        return jax.grad(lambda *x: (run(*x) ** 2).sum(), argnums=(0, 1, 2))(*of)

    at_once, gradients = run(*arrays()), gradient(*arrays())
    monkeypatch.setattr(attention, "_LOGITS", logits)
    np.testing.assert_allclose(run(*arrays()), at_once, rtol=1e-5, atol=1e-6)
    for found, expected in zip(gradient(*arrays()), gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert "while" in jax.jit(run).lower(*arrays()).as_text()


@pytest.mark.parametrize("logits", [1, 2**28])
def test_causal_attention_ignores_later_keys(monkeypatch, logits):
    monkeypatch.setattr(attention, "_LOGITS", logits)
    q, k, v = (x[:, :KEYS] for x in arrays())
    out = attention.attend(q, k, v, heads=HEADS, causal=True)
    other = attention.attend(q, k.at[:, 4:].add(1), v.at[:, 4:].add(1), heads=HEADS, causal=True)
    np.testing.assert_allclose(out[:, :4], other[:, :4], rtol=1e-5, atol=1e-6)
    assert not np.allclose(out[:, 4:], other[:, 4:], atol=1e-2)


@pytest.mark.parametrize(("inputs", "padding"), [(1, 0), (1, 1), (2, 1), (3, 1)])
def test_grouped_convolutions_on_cpus_equal_those_on_other_devices(inputs, padding):
    rng, channels = np.random.default_rng(0), 5
    net = layers.Conv(inputs * channels, channels, padding=padding, groups=channels)
    x, kernel = (rng.standard_normal(shape) for shape in ((2, 6, 7, inputs * channels), (3, 3, inputs, channels)))
    with jax.enable_x64(True):
        np.testing.assert_allclose(net._by_shifts(x, kernel), net._convolved(x, kernel), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "width", "logits", "used"),
    [("bfloat16", 8, 1, True), ("bfloat16", 8, 10**6, False), ("bfloat16", 6, 1, False), ("float32", 8, 1, False)],
)
def test_when_cudnn_is_used(monkeypatch, dtype, width, logits, used):
    """`logits` is the lowest number of logits for which cuDNN is used. Because not every machine has cuDNN, a stand-in
    takes cuDNN's arguments and calls XLA."""
    calls, original = [], jax.nn.dot_product_attention

    def fake(*args, implementation, **options):
        calls.append(implementation)
        with jax.numpy_dtype_promotion("standard"):
            return original(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    monkeypatch.setattr(attention, "_CUDNN_LOGITS", logits)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, n, HEADS * width)), dtype) for n in (QUERIES, KEYS, KEYS))
    mask = jnp.arange(KEYS)[None] < np.array([[1], [4], [KEYS]])
    for options in ({}, {"mask": mask}):
        found = attention.attend(q, k, v, heads=HEADS, implementation="cudnn", **options).astype(np.float32)
        expected = attention.attend(q, k, v, heads=HEADS, **options).astype(np.float32)
        np.testing.assert_allclose(found, expected, atol=0.02)
    assert calls == ["cudnn"] * 2 * used


def test_attention_of_many_positions_takes_little_memory():
    """The picture has 256x256 positions in one head, as in the autoencoder of the x4 upscaler."""
    x = jax.ShapeDtypeStruct((1, 256 * 256, 512), jnp.bfloat16)
    compiled = jax.jit(lambda q, k, v: attention.attend(q, k, v, heads=1)).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**30
