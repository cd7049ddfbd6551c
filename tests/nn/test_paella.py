"""Compares Paella's networks with the public code, and tests padding, published names, precision and configs."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import paella as cases
from support import tiny

from sega_jax.nn import attention
from sega_jax.nn.paella import Condition, Paella, PaellaConfig, _Inputs, join, wave
from sega_jax.nn.prior import PriorConfig, PriorModel
from sega_jax.nn.vqgan import VQConfig, VQModel
from sega_jax.weights.layout import leaves

# Tolerances of the relative L2 error.
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


DOUBLE = pytest.mark.parametrize("near", ["float64"], indirect=True)
# Compiled without optimisation, because optimising the code would take longer than running it.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(params=TOLERANCE)
def near(request):
    """Returns a function that compares an array with the recorded array of a given name, in float32 or float64."""
    dtype = request.param

    def check(ours, name):
        reference = cases.recorded(dtype)[name]
        assert ours.shape == reference.shape
        assert ours.dtype == dtype
        return np.linalg.norm(ours - reference) < TOLERANCE[dtype] * np.linalg.norm(reference)

    with jax.enable_x64(dtype == "float64"):
        check.dtype = dtype
        check.cast = lambda *arrays: [np.asarray(a, dtype if a.dtype.kind == "f" else None) for a in arrays]
        yield check


def paella(config=tiny.PAELLA, dtype="float32"):
    return tiny.filled(Paella(PaellaConfig.from_dict(config)), dtype)


def vqgan(dtype="float32"):
    return tiny.filled(VQModel(VQConfig.from_dict(tiny.VQGAN)), dtype)


def prior(dtype="float32"):
    return tiny.filled(PriorModel(PriorConfig.from_dict(tiny.PRIOR)), dtype)


def at(module, path):
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


def condition(net, name, **more):
    influence = cases.INFLUENCE if name == "influenced" else None
    return net.condition(**cases.CONDITIONS[name], influence=influence, **more)


def block_inputs(level, tokens, skip):
    """Returns a block's inputs other than x."""
    tokens = jnp.asarray(tokens)
    text = Condition(tokens, jnp.ones(tokens.shape[:2], bool), jnp.ones(tokens.shape[:2], tokens.dtype))
    return _Inputs(jnp.asarray(level), text, skip)


# Against the public code


@pytest.mark.parametrize(
    ("name", "near"),
    [("full", "float32"), *(pytest.param(name, "float64", marks=pytest.mark.slow) for name in cases.CONDITIONS)],
    indirect=["near"],
)
def test_condition_and_logits(name, near):
    net = paella(cases.paella(name), near.dtype)

    @compiled
    def run(net, x, r):
        text = condition(net, name)
        return text.tokens, net(x, r, text)

    sequence, logits = run(net, *near.cast(*cases.paella_inputs(name)))
    assert near(sequence, f"sequence {name}")
    assert near(logits, f"logits {name}")


def test_embedding_of_noise_levels(near):
    """The levels include 1, where the largest phase is 10000."""
    assert near(wave(*near.cast(cases.LEVELS), 64), "wave")


@pytest.mark.parametrize("std", cases.STDS)
def test_blocks(std, near):
    """Inputs with a small standard deviation reveal a wrong epsilon."""

    @compiled
    def run(net):
        outputs = {}
        for path, channels in cases.BLOCKS.items():
            x, skip, level, tokens = near.cast(*cases.block_inputs(channels, std))
            outputs[path] = at(net, path)(jnp.asarray(x), block_inputs(level, tokens, skip))
        return outputs

    outputs = run(paella(dtype=near.dtype))
    assert {path: near(x, f"{path} {std:g}") for path, x in outputs.items()} == dict.fromkeys(cases.BLOCKS, True)


@pytest.mark.parametrize("path", cases.WIDE_BLOCKS)
def test_blocks_with_the_published_width(path, near):
    """Covers a convolution block with a skip connection, a noise-level block, and an attention block with 16 heads."""
    block = at(Paella(PaellaConfig.from_dict(cases.WIDE)), path)
    x, skip, level, tokens = near.cast(*cases.wide_inputs(cases.WIDE_BLOCKS[path]))
    out = compiled(lambda block, x: block(x, block_inputs(level, tokens, skip)))(
        tiny.filled(block, near.dtype, path), x
    )
    assert near(out[..., ::40], f"wide {path}")


@pytest.mark.parametrize("std", cases.STDS)
def test_blocks_of_the_vqgan_and_of_the_prior(std, near):
    net = vqgan(near.dtype)
    for path, channels in cases.VQ_BLOCKS.items():
        x = jnp.asarray(*near.cast(cases.block_inputs(channels, std)[0]))
        assert near(compiled(at(net, path).__call__)(x), f"vqgan.{path} {std:g}")
    block = at(prior(near.dtype), cases.PRIOR_BLOCK)
    assert near(block(*near.cast(cases.prior_block_input(std))), f"prior.{cases.PRIOR_BLOCK} {std:g}")


def test_vqgan(near):
    """Covers both directions, with continuous latents and with tokens. Tokens must be equal."""
    net = vqgan(near.dtype)
    tokens, latents = compiled(VQModel.encode)(net, *near.cast(cases.IMAGE))
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, cases.recorded(near.dtype)["tokens"])
    assert near(latents, "latents")
    assert near(net.vquantizer.codebook(tokens) / net.config.scale_factor, "quantised")
    assert near(compiled(VQModel.decode)(net, *near.cast(cases.LATENTS)), "decoded")
    assert near(compiled(VQModel.decode_indices)(net, cases.TOKENS), "decoded tokens")


def test_prior(near):
    assert near(compiled(PriorModel.__call__)(prior(near.dtype), *near.cast(*cases.PRIOR)), "prior")


# Padding


@DOUBLE
@pytest.mark.parametrize("name", ["full", "influenced"])
def test_padded_texts(name, near):
    """Each row has a different amount of padding between the bytes of its text and CLIP's tokens."""
    net, embeddings = paella(dtype=near.dtype), dict(cases.CONDITIONS[name])
    byt5 = near.cast(embeddings.pop("byt5"))[0]
    mask = np.ones((2, 10), bool)
    mask[0, 7:] = mask[1, :3] = False
    states = np.full((2, 10, 18), 3, near.dtype)
    states[mask] = byt5.reshape(-1, 18)
    influence = cases.INFLUENCE if name == "influenced" else None

    @compiled
    def run(net, x, r):
        return net(x, r, net.condition(states, **embeddings, mask=mask, influence=influence))

    assert near(run(net, *near.cast(*cases.paella_inputs(name))), f"logits {name}")


@pytest.mark.slow
@DOUBLE
def test_branches_of_different_lengths(near):
    """A joint call gives the same result as separate calls, whatever the padding contains."""
    net, names = paella(dtype=near.dtype), ["empty", "text", "pictures"]
    x, r = (np.concatenate(arrays) for arrays in zip(*(cases.paella_inputs(name) for name in names), strict=True))
    text = join([condition(net, name) for name in names])
    assert text.tokens.shape == (3, 8, 14)
    assert text.mask.sum(1).tolist() == [3, 5, 8]
    run = compiled(Paella.__call__)
    logits = run(net, x, *near.cast(r), text)
    assert [near(row[None], f"logits {name}") for row, name in zip(logits, names, strict=True)] == [True] * 3
    other = text._replace(
        tokens=jnp.where(text.mask[..., None], text.tokens, 5), weights=jnp.where(text.mask, text.weights, 9)
    )
    np.testing.assert_array_equal(run(net, x, *near.cast(r), other), logits)


def test_padding_if_attention_is_computed_row_by_row(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, n, 8), np.float32) for n in (5, 7, 7))
    mask = np.arange(7) < np.array([[7], [1], [4]])
    at_once = attention.attend(q, k, v, heads=2, mask=mask)
    monkeypatch.setattr(attention, "_LOGITS", 0)
    np.testing.assert_allclose(attention.attend(q, k, v, heads=2, mask=mask), at_once, rtol=1e-5)
    rows = [
        attention.attend(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n], heads=2) for i, n in enumerate((7, 1, 4))
    ]
    np.testing.assert_allclose(at_once, np.concatenate(rows), rtol=1e-5)


@DOUBLE
def test_the_order_of_tokens_does_not_matter(near):
    net, name = paella(dtype=near.dtype), "influenced"
    order = np.random.default_rng(0).permutation(11)
    text = jax.tree.map(lambda array: array[:, order], condition(net, name))
    assert near(compiled(Paella.__call__)(net, *near.cast(*cases.paella_inputs(name)), text), f"logits {name}")


def test_gradients_of_zero_channels_are_finite():
    """For such channels, the norm's gradient is 0, as in torch."""
    norm = at(paella(), "down_blocks.0.0").channelwise[2]
    gradients = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 4, 4, 32)).at[..., 1:].set(1))
    assert np.isfinite(gradients).all()


# Names, sizes and precision


@pytest.mark.parametrize(
    ("name", "module", "parameters"),
    [
        ("paella", Paella(PaellaConfig()), 1_008_350_592),
        ("vqgan", VQModel(VQConfig()), 18_406_894),
        ("prior", PriorModel(PriorConfig()), 899_770_624),
    ],
)
def test_published_names_and_shapes(name, module, parameters):
    """All tensors of the published classes exist here with the same shapes, except for a batch counter."""
    published, ours = cases.published(name), leaves(module)
    buffers = published.keys() - ours.keys()
    assert buffers == ({"down_blocks.3.1.num_batches_tracked"} if name == "vqgan" else set())
    assert ours == {key: shape for key, shape in published.items() if key not in buffers}
    statistics = {key for key in ours if ".running_" in key}
    assert sum(math.prod(shape) for key, shape in ours.items() if key not in statistics) == parameters


def test_unsupported_sizes():
    net = paella()
    with pytest.raises(ValueError, match="the grid has 8x12 tokens; use multiples of 8"):
        net(np.zeros((1, 8, 12), int), np.ones(1, np.float32), condition(net, "empty"))
    with pytest.raises(ValueError, match="pictures have 12x16 pixels; height and width should be multiples of 8"):
        vqgan().encode(np.zeros((1, 12, 16, 3), np.float32))


@cache
def networks(dtype):
    """Returns the outputs of the denoiser, the VQGAN and the prior in the given dtype."""

    @compiled
    def run(net, vq, embed):
        x, r = cases.paella_inputs("full")
        return net(x, r, condition(net, "full")), vq.decode_indices(cases.TOKENS), embed(*cases.PRIOR)

    return run(paella(dtype=dtype), vqgan(dtype), prior(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    """The noise level is not rounded."""
    for ours, exact in zip(networks(dtype), networks("float32"), strict=True):
        assert ours.dtype == dtype
        assert np.linalg.norm(ours.astype(np.float32) - exact) < 0.05 * np.linalg.norm(exact)


def test_nearest_codes_in_half_precision():
    """Only the inputs are rounded, not the distances."""
    codes = np.asarray(vqgan("bfloat16").vquantizer.codebook.embedding[...], np.float64)
    x = jnp.asarray(cases.LATENTS, "bfloat16")
    distance = np.linalg.norm(np.asarray(x, np.float64)[..., None, :] - codes, axis=-1)
    np.testing.assert_array_equal(vqgan("bfloat16").vquantizer(x), distance.argmin(-1))


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (PaellaConfig, {"nhead": [1, 2]}, "Paella config: nhead has 2 entries, but c_hidden 3"),
        (PaellaConfig, {"blocks": [1, 2, 1, 1]}, "Paella config: blocks has 4 entries, but c_hidden 3"),
        (PaellaConfig, {"blocks": [1, 2, 101]}, "exceeds the supported maximum of 100"),
        (PaellaConfig, {"level_config": ["CT", "CTX", "C"]}, "level_config='CTX' should contain only the letters"),
        (PaellaConfig, {"level_config": ["CT", "", "C"]}, "level_config='' should contain only the letters"),
        (PaellaConfig, {"nhead": [1, 3, 3]}, "16 channels (c_hidden) cannot be split into 3 heads"),
        (PaellaConfig, {"kernel_size": 5}, "kernel_size=5 is not supported; supported values: 3"),
        (PaellaConfig, {"c_r": 3}, "c_r=3 should be at least 4"),
        (VQConfig, {"c_hidden": 18}, "VQGAN config: c_hidden=18 cannot be halved from level to level for levels=3"),
        (VQConfig, {"scale_factor": 0}, "VQGAN config: scale_factor=0 is invalid; use a value such as 0.3764"),
        (PriorConfig, {"num_blocks": 101}, "prior config: num_blocks=101 exceeds the supported maximum of 100"),
        (PriorConfig, {"c_r": 3}, "prior config: c_r=3 should be at least 4"),
    ],
)
def test_unsupported_configs(config, values, message):
    base = {PaellaConfig: tiny.PAELLA, VQConfig: tiny.VQGAN, PriorConfig: tiny.PRIOR}[config]
    with pytest.raises(ValueError, match="config: ") as error:
        config.from_dict(base | values)
    assert message in str(error.value)


def test_published_configs_are_the_defaults():
    assert [kind.from_dict({}) for kind in (PaellaConfig, VQConfig, PriorConfig)] == [
        PaellaConfig(),
        VQConfig(),
        PriorConfig(),
    ]
