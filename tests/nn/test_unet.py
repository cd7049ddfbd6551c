"""Tests the UNets of upscalers and DeepFloyd-IF without torch: configs, noise levels, sizes, branches and precision."""

from functools import cache

import jax
import numpy as np
import pytest
from support import tiny

from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig

# Compiled without optimisation, because optimising the code would take longer than running it.
QUICK = {"xla_backend_optimization_level": 0}


def build(config):
    return UNet2DConditionModel(UNetConfig.from_dict(config))


def inputs(unet, size=(4, 8), labels=None):
    """Returns the shapes and dtypes of a UNet's arguments."""
    c = unet.config
    arrays = jax.ShapeDtypeStruct((2, *size, c.in_channels), "float32"), jax.ShapeDtypeStruct((2,), "float32")
    text = jax.ShapeDtypeStruct((2, 7, c.text_dim), "float32")
    return unet, *arrays, text, labels and jax.ShapeDtypeStruct((2,), labels)


def shape(unet, *args):
    """Returns the shape of a UNet's output."""
    return jax.eval_shape(UNet2DConditionModel.__call__, *inputs(unet, *args)).shape


def test_shapes():
    """The latent upscaler accepts any size."""
    assert shape(build(tiny.IF_1)) == (2, 4, 8, 6)
    assert shape(build(tiny.IF_2), (8, 4), "float32") == (2, 8, 4, 6)
    assert shape(build(tiny.UPSCALER), (3, 5), "int32") == (2, 3, 5, 4)


@pytest.mark.parametrize("size", [(6, 8), (8, 2)])
def test_sizes_that_deepfloyd_if_cannot_halve(size):
    with pytest.raises(ValueError, match="positions cannot be halved; the height and width should be even"):
        shape(build(tiny.IF_1), size)


@pytest.mark.parametrize("config", [tiny.UPSCALER, tiny.IF_2], ids=["x4 upscaler", "IF, second stage"])
def test_upscalers_require_a_noise_level(config):
    with pytest.raises(ValueError, match="this UNet needs class_labels, the noise level of the low-res"):
        shape(build(config))


@pytest.mark.parametrize("config", [tiny.UNET, tiny.IF_1], ids=["Stable Diffusion", "IF, first stage"])
def test_other_unets_reject_a_noise_level(config):
    with pytest.raises(ValueError, match="this UNet takes no class_labels; leave them out"):
        shape(build(config), (4, 8), "float32")


SHARING = {
    "Stable Diffusion": (tiny.UNET_1, ()),
    "upscaler": (tiny.UNET_1 | {"only_cross_attention": True, "num_class_embeds": 20}, (np.array([3, 7]),)),
    "IF, second stage": (tiny.STAGE_2, (np.array([0.0, 250.0]),)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARING)
def test_branches_share_the_layers_before_the_text(name):
    """Three projected texts for each of two pictures give the same result as repeating the picture for each text, but
    with less work.

    The tolerance is a relative L2 error of 1e-12 in float64.
    """
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        config, labels = SHARING[name]
        net = tiny.filled(build(config), "float64")
        c = net.config
        x, text = rng.standard_normal((2, 4, 8, c.in_channels)), rng.standard_normal((6, 7, c.text_dim))
        pictures = x, np.array([999.0, 3.0]), *labels

        def run(net, repeats):
            x, timestep, *labels = (np.repeat(array, repeats, 0) for array in pictures)
            return net(x, timestep, net.project(text) if repeats == 1 else text, *labels)

        once, each = (jax.jit(run, static_argnums=1, compiler_options=QUICK).lower(net, repeats) for repeats in (1, 3))
        found, expected = once.compile()(net), each.compile()(net)
    assert found.dtype == "float64"
    assert np.linalg.norm(found - expected) < 1e-12 * np.linalg.norm(expected)
    assert once.cost_analysis()["flops"] < 0.99 * each.cost_analysis()["flops"]


@cache
def predicted(dtype):
    """Returns the prediction of the second stage's network in the given dtype."""
    module, rng = build(tiny.STAGE_2), np.random.default_rng(0)
    x, text = rng.standard_normal((2, 4, 8, 6), np.float32), rng.standard_normal((2, 7, 24), np.float32)
    args = x, np.array([999, 3], np.float32), text, np.array([0, 250], np.float32)
    return jax.jit(UNet2DConditionModel.__call__, compiler_options=QUICK)(tiny.filled(module, dtype), *args)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    """Noise levels, timesteps and the sums of the last convolution are not rounded."""
    found, exact = predicted(dtype), predicted("float32")
    assert found.dtype == np.float32
    assert not np.array_equal(found, found.astype(dtype))
    assert np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("cross_attention_norm", None, "cross_attention_norm=None is not supported; supported values: 'group_norm'"),
        ("resnet_time_scale_shift", "default", "'default' is not supported; supported values: 'scale_shift'"),
        ("class_embed_type", "projection", "'projection' is not supported; supported values: None or 'timestep'"),
        ("addition_embed_type", "image", "'image' is not supported; supported values: None or 'text'"),
        ("encoder_hid_dim_type", "image_proj", "'image_proj' is not supported; supported values: None or 'text_proj'"),
        ("encoder_hid_dim", None, "encoder_hid_dim is missing, but encoder_hid_dim_type needs it"),
        ("only_cross_attention", True, "only_cross_attention=True is not supported; supported values: False"),
        ("mid_block_only_cross_attention", True, "mid_block_only_cross_attention=True is not supported"),
        ("num_class_embeds", 20, "num_class_embeds=20 is not supported; supported values: None"),
        (
            "down_block_types",
            ["DownBlock2D"] * 3,
            "supported values: ResnetDownsampleBlock2D, SimpleCrossAttnDownBlock2D",
        ),
        ("up_block_types", ["UpBlock2D"] * 3, "supported values: SimpleCrossAttnUpBlock2D, ResnetUpsampleBlock2D"),
        ("time_embedding_act_fn", "selu", "time_embedding_act_fn='selu' is not supported; supported values: silu"),
        ("attention_head_dim", [8, 8, 8], "attention_head_dim=(8, 8, 8) is not supported; it should be one number"),
        ("attention_head_dim", 5, "16 channels cannot be split into heads of 5 channels (attention_head_dim)"),
        ("cross_attention_dim", [64] * 3, "cross_attention_dim=(64, 64, 64) is not supported; it should be one number"),
        ("cross_attention_dim", 48, "cross_attention_dim 48 cannot be split into 32 groups"),
        ("addition_embed_type_num_heads", 64, "24 text channels cannot be split into 64 heads"),
        ("resnet_out_scale_factor", 0, "resnet_out_scale_factor=0 is invalid; use a value such as 1.0"),
        ("norm_num_groups", 3, "8 channels cannot be split into 3 groups"),
    ],
)
def test_unsupported_configs(option, value, message):
    with pytest.raises(ValueError, match="UNet config: ") as error:
        UNetConfig.from_dict(tiny.IF_1 | {option: value})
    assert message in str(error.value)


def test_the_defaults_of_diffusers_are_unsupported_in_deepfloyd_if():
    """diffusers' defaults are Stable Diffusion's values."""
    config = {key: value for key, value in tiny.IF_1.items() if key != "resnet_time_scale_shift"}
    with pytest.raises(
        ValueError, match="resnet_time_scale_shift=None is not supported; supported values: 'scale_shift'"
    ):
        UNetConfig.from_dict(config)


def test_the_text_is_projected_if_the_config_has_its_width():
    """Older files have no `encoder_hid_dim_type`."""
    config = {key: value for key, value in tiny.IF_1.items() if key != "encoder_hid_dim_type"}
    assert build(config).encoder_hid_proj.kernel.shape == (24, 64)
    assert build(config | {"encoder_hid_dim": None, "addition_embed_type": None}).encoder_hid_proj is None
