"""Faults in DeepFloyd-IF and the upscaler: T5, the UNets, and complete stages (compared with diffusers)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import cases
from support import tiny

from faults.damage import argument, halves, instead, layer, replaced, result
from faults.views import Fault, View, Views, compiled, recorded
from sega_jax.method import schedules
from sega_jax.nn import t5
from sega_jax.nn.unet import UNet2DConditionModel, UNetConfig, blocks, embedding
from sega_jax.systems import base, deepfloyd, diffusion, low_res, programs
from sega_jax.weights import fused

pytestmark = pytest.mark.fault


def t5_states():
    """Returns T5's hidden states for all tokens except padding."""
    net = tiny.filled(t5.T5EncoderModel(t5.T5Config.from_dict(tiny.T5)))
    return net(cases.WORDS, cases.MASK)[cases.MASK]


def unet(name):
    net = tiny.filled(UNet2DConditionModel(UNetConfig.from_dict(cases.UNETS[name][0])))
    return net(*cases.unet_inputs(name))


STAGES = {"stage1": tiny.STAGE_1, "stage2": tiny.STAGE_2}


def stage(name):
    """Runs a stage and returns the resulting pixels."""
    steps, scale, level, betas = cases.STAGES[name]
    config = tiny.IF_SCHEDULER | ({} if level is None else {"sample_max_value": 1.0})
    family = schedules.from_config(config)
    table, condition = family.table(steps), None
    if level is not None:
        shares = schedules.from_config(betas).shares([level])
        picture = cases.SMALL / np.float32(127.5) - 1
        condition = low_res.LowResCondition(picture, np.int32([level]), *shares, np.zeros(1, bool))
    side = 8 if level is None else 32
    models = deepfloyd.Models.build(tiny.T5, STAGES[name])
    models = type(models)(*map(tiny.filled, models))
    system = deepfloyd.STAGE_1 if level is None else deepfloyd.STAGE_2
    static = base.Static(own=diffusion.DiffusionStatic(family.solver))
    options = {"sampler": system.sampler, "static": static}

    def run(models):
        keys = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
        settings = base.Settings(keys, np.full(1, scale), own=diffusion.DiffusionSettings(np.zeros(1), condition))
        text = deepfloyd.encode(models.text_encoder, np.stack(cases.TEXTS["t5"], 1).astype(np.int32))
        text = jax.tree.map(lambda leaf: leaf[None], text)
        carry = programs.start(settings, None, 1.0, shape=(side, side, 3), dtype=np.float32, **options)
        return programs.advance(models.unet, text, carry, table, settings, **options)[0].x

    return compiled(run, models)


VIEWS = Views(
    {
        "t5": View(t5_states, lambda: recorded("t5")["states"][cases.MASK], 1e-5),
        "first stage": View(lambda: unet("if_1"), lambda: recorded("unet_if_1")["output"], 1e-5),
        "second stage": View(lambda: unet("if_2"), lambda: recorded("unet_if_2")["output"], 1e-5),
        "upscaler": View(lambda: unet("upscaler"), lambda: recorded("unet_upscaler")["output"], 1e-5),
        "pixels": View(lambda: stage("stage1"), lambda: recorded("stage_stage1")["x"], 3e-4),
        "enlarged pixels": View(lambda: stage("stage2"), lambda: recorded("stage_stage2")["x"], 3e-4),
        # The rows that hold the keys in a fused matrix of queries, keys and values, with three heads of width 2.
        "fused rows": View(
            lambda: fused._rows(lambda: np.arange(18)[:, None], (-1, 3, 2, 1), 1, (6, 1))[:, 0],
            lambda: np.array([2, 3, 8, 9, 14, 15]),
        ),
    }
)


def variance_of_the_negative_prompt(predict):
    """Makes the solver use the variance that the network predicts for the negative prompt."""

    def damaged(unet, texts, x, call, *others):
        channels = x.shape[-1]

        def exchanged(*args):
            out = unet(*args)
            pairs = out.reshape(len(x), -1, *out.shape[1:])
            variance = pairs[:, ::-1, ..., channels:]
            return jnp.concatenate([pairs[..., :channels], variance], -1).reshape(out.shape)

        return predict(exchanged, texts, x, call, *others)

    return damaged


def without_heads(read, heads, part, shape):
    """Reads the queries, keys or values as if the fused matrix held all queries, then all keys, then all values."""
    return read().reshape(heads[1], -1, *heads[2:])[part].reshape(shape)


def moving_corners(picture, size):
    """Interpolates with half-pixel centres instead of aligned corners, which moves the corners."""
    return jax.image.resize(picture, (len(picture), *size, picture.shape[-1]), "bilinear")


FAULTS = {
    # T5
    "T5 attends to padding": Fault("pixels", t5.T5EncoderModel, "__call__", argument(2, np.ones_like)),
    "T5 confuses earlier and later tokens": Fault("t5", t5, "buckets", result(np.transpose)),
    # UNets
    "the scale and shift of the embedded time are exchanged": Fault(
        "second stage", blocks.ScaledResnetBlock, "__init__", layer("time_emb_proj", lambda x, y: halves(y))
    ),
    "the pooled text embedding is the mean over the tokens": Fault(
        "first stage", embedding.AttentionPooling, "__call__", instead(lambda self, x: x.mean(1))
    ),
    "the noise level is ignored": Fault(
        "upscaler", UNet2DConditionModel, "__init__", layer("class_embedding", lambda x, y: 0 * y)
    ),
    # Stages
    "the variance of the negative prompt is used": Fault(
        "pixels", diffusion, "predict", variance_of_the_negative_prompt
    ),
    "no noise is added to the small picture": Fault(
        "enlarged pixels", low_res, "noised", argument(1, lambda small: replaced(small, noise=np.zeros_like))
    ),
    "enlarging moves the corners": Fault("enlarged pixels", low_res, "resized", instead(moving_corners)),
    # Files
    "fused queries, keys and values are not separated head by head": Fault(
        "fused rows", fused, "_rows", instead(without_heads)
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, monkeypatch):
    assert VIEWS.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults():
    assert VIEWS.wrong() == set()
