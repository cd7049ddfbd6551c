"""Compares the TPU attention kernel, interpreted on a CPU, with XLA's attention."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from support import tiny

from sega_jax.nn import attention
from sega_jax.nn.paella import Condition, Paella, PaellaConfig
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig
from sega_jax.nn.vae import AutoencoderConfig, AutoencoderKL
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.pipelines.loading import pick_attention

HEADS, CALL = 2, "tpu_custom_call"


def arrays(width, queries, keys, dtype):
    rng = np.random.default_rng(0)
    shapes = [(3, n, HEADS * width) for n in (queries, keys, keys)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def both(monkeypatch, arrays, **options):
    """Returns the results from XLA and from the kernel."""
    monkeypatch.setattr(attention, "_PALLAS_KEYS", 1)
    expected = attention.attend(*arrays, heads=HEADS, **options)
    with force_tpu_interpret_mode():
        found = attention.attend(*arrays, heads=HEADS, implementation="pallas", **options)
    assert found.dtype == expected.dtype
    return [np.asarray(array, np.float32) for array in (expected, found)]


@pytest.mark.parametrize(
    ("width", "queries", "keys", "dtype"),
    [(40, 130, 77, "float32"), (40, 130, 77, "bfloat16"), (160, 64, 64, "float32"), (80, 256, 641, "float32")],
)
def test_kernel_equals_xla(monkeypatch, width, queries, keys, dtype):
    """Covers position counts that are not multiples of the block size or that exceed one block, with and without
    masks."""
    qkv = arrays(width, queries, keys, dtype)
    tolerance = {"float32": 3e-6, "bfloat16": 0.01}[dtype]
    mask = jnp.arange(keys)[None] >= jnp.array([[0], [keys // 2], [keys - 1]])
    options = {} if keys == queries else {"mask": mask}
    expected, found = both(monkeypatch, qkv, **options)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_causal_kernel_equals_xla(monkeypatch):
    expected, found = both(monkeypatch, arrays(8, 10, 10, "float32"), causal=True)
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.slow
def test_gradients_of_the_kernel_equal_xla(monkeypatch):
    monkeypatch.setattr(attention, "_PALLAS_KEYS", 1)
    qkv, mask = arrays(8, 10, 7, "float32"), jnp.arange(7)[None] < jnp.array([[1], [4], [7]])

    def gradient(implementation):
        def loss(*qkv):
            return jnp.square(attention.attend(*qkv, heads=HEADS, mask=mask, implementation=implementation)).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(*qkv)

    with force_tpu_interpret_mode():
        found = gradient("pallas")
    for ours, expected in zip(found, gradient("xla"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "keys", "used"), [("bfloat16", 7, True), ("float32", 8, False), ("float16", 7, False)]
)
def test_when_the_kernel_is_used(monkeypatch, dtype, keys, used):
    """`keys` is the lowest number of keys for which the kernel is used; there are 7."""
    monkeypatch.setattr(attention, "_PALLAS_KEYS", keys)
    qkv = arrays(8, 10, 7, dtype)
    attend = jax.jit(lambda *qkv: attention.attend(*qkv, heads=HEADS, implementation="pallas"))
    assert (CALL in attend.trace(*qkv).lower(lowering_platforms=("tpu",)).as_text()) == used


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_precision_of_the_kernel(monkeypatch, dtype, precision):
    """The gradients have the precision that is set while the forward pass is traced."""
    monkeypatch.setattr(attention, "_PALLAS_KEYS", 1)

    def gradients(*qkv):
        with jax.default_matmul_precision("highest"):
            out, gradient = jax.vjp(lambda *qkv: attention.attend(*qkv, heads=HEADS, implementation="pallas"), *qkv)
        return gradient(out)

    with jax.default_matmul_precision(None):
        jaxpr = jax.make_jaxpr(gradients)(*arrays(8, 10, 7, dtype))
    found = [str(equation.params["precision"][0]) for equation in products(jaxpr.jaxpr)]
    assert len(found) >= 7
    assert set(found) == {precision}


def products(jaxpr):
    """Returns the matrix products of a program, including those in its kernels."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation)
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += products(getattr(inner, "jaxpr", inner))
    return found


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def stable_diffusion(attention):
    return UNet2DConditionModel(UNetConfig.from_dict(tiny.UNET), attention), array(2, 12, 16)


def autoencoder(attention):
    return AutoencoderKL(AutoencoderConfig.from_dict(tiny.VAE), attention), None


def deepfloyd(attention):
    return UNet2DConditionModel(UNetConfig.from_dict(tiny.STAGE_1), attention), array(2, 12, 24)


def paella(attention):
    text = Condition(array(2, 12, 14), array(2, 12, dtype=bool), array(2, 12))
    return Paella(PaellaConfig.from_dict(tiny.PAELLA), attention), text


@pytest.mark.parametrize("build", [stable_diffusion, autoencoder, deepfloyd, paella])
def test_networks_use_the_requested_implementation(monkeypatch, build):
    """Covers networks with separate attention to positions and text, and with joint attention, with and without
    masks."""
    monkeypatch.setattr(attention, "_PALLAS_KEYS", 1)

    def lowered(attention):
        net, text = build(attention)
        net = jax.tree.map(lambda leaf: array(*leaf.shape), net)
        if build is autoencoder:
            arguments = net, array(2, 8, 8, net.config.latent_channels)
        else:
            x = array(2, 8, 8, dtype=jnp.int32) if build is paella else array(2, 8, 8, net.config.in_channels)
            arguments = net, x, array(2, dtype=jnp.float32), text
        call = type(net).decode if build is autoencoder else type(net).__call__
        program = jax.jit(lambda *args: call(*args)).trace(*arguments)
        return program.lower(lowering_platforms=("tpu",)).as_text()

    assert CALL in lowered("pallas")
    assert CALL not in lowered("xla")


@pytest.mark.parametrize(("dtype", "rejected"), [("bfloat16", False), ("float32", False), ("float16", True)])
def test_default_implementation_on_tpus(monkeypatch, dtype, rejected):
    devices = Devices()
    monkeypatch.setattr(devices, "devices", [SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")])
    assert pick_attention(None, jnp.dtype(dtype), devices) == ("xla" if rejected else "pallas")
    if rejected:
        with pytest.raises(ValueError, match=f"bfloat16 or float32, got TPU v5 lite and {dtype}"):
            pick_attention("pallas", jnp.dtype(dtype), devices)
    else:
        assert pick_attention("pallas", jnp.dtype(dtype), devices) == "pallas"
