"""Faults made on purpose in what Stable Diffusion XL has otherwise: each changes what is recorded of diffusers by more
than the tests tolerate, or what a call makes of its arguments."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import cases
from test_mutations import damage, error, show
from test_reference import recorded

from sega_jax import Edit, Edits, Pipeline
from sega_jax.method import schedules
from sega_jax.nn import clip
from sega_jax.nn.unet import Context, model
from sega_jax.pipelines import sizes
from sega_jax.pipelines.execution.devices import Devices
from sega_jax.systems import base, sdxl
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair

pytestmark = pytest.mark.fault

# "", "a cat" and "glasses". Letters are 0 to 25, and 28 more at the end of a word; 56 begins, 57 ends and pads. The
# second tokenizer pads with 0, an a, which is therefore no letter to it, but the end of the word before.
TOKENS = np.zeros((3, 2, 12), np.int32)
TOKENS[:, 0], TOKENS[:, :, 0] = 57, 56
TOKENS[0, 1, 1] = 57
TOKENS[1, :, 1:6] = [28, 2, 0, 47, 57], [0, 30, 0, 47, 57]
TOKENS[2, :, 1:9] = [6, 11, 0, 18, 18, 4, 46, 57], [6, 39, 0, 18, 18, 4, 46, 57]
SIZES = np.float32([[*cases.XL_SIZES["original_size"], *cases.XL_SIZES["crops_top_left"], 24, 16]])


def networks():
    config = {"text_encoder": tiny.TEXT, "text_encoder_2": tiny.TEXT_XL_2, "unet": cases.XL["unet"], "vae": tiny.VAE}
    return sdxl.Models(*map(tiny.filled, sdxl.Models.build(**config)))


def text():
    """The recorded embeddings of no prompt, the prompt and the concept, as one row's."""
    known = recorded("xl")
    pooled = np.pad(known["pooled"], ((0, 0), (0, known["states"].shape[-1] - known["pooled"].shape[-1])))
    return np.concatenate([known["states"], pooled[:, None]], 1)[None]


def view_text():
    """Of the words; no prompt is zeros."""
    found = show(lambda encoders: sdxl.encode(encoders, TOKENS), networks().reader)[1:]
    return found[:, :-1], found[:, -1, :12]


def view_told():
    """What the UNet makes of the pooled texts and the sizes."""
    known = recorded("xl")
    context = Context(known["states"], known["pooled"], np.repeat(SIZES, 3, 0))
    return show(lambda net: net.project(context).pooled, networks().unet)


def view_picture():
    """The latents that a row with an edit ends with."""
    scale, beta = cases.XL_MOMENTUM
    edits = Edits.stack([[Edit("", **cases.XL_EDIT)]], momentum_scale=scale, momentum_beta=beta)
    family = schedules.from_config(cases.XL["scheduler"])
    table, method = family.table(cases.XL_STEPS), base.Method(family.solver)

    def run(unet):
        keys = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
        settings = base.Settings(keys, np.full(1, cases.XL_SCALE), np.zeros(1), edits, sizes=SIZES)
        carry = sdxl.start(settings, cases.XL_LATENTS, 1.0, shape=(8, 8, 4), method=method, dtype=np.float32)
        return sdxl.advance(unet, text(), carry, table, settings, method=method)[0].x

    return show(run, networks().unet)


def pair(folder):
    for name, pad in (("first", "<|endoftext|>"), ("second", "a")):
        (folder / name).mkdir()
        tiny.tokenizer(folder / name, 12, pad)
    return TokenizerPair(*(Tokenizer(folder / name, 12, 60) for name in ("first", "second")))


@pytest.fixture(scope="module")
def views(tmp_path_factory, one_device):
    tokenizers = pair(tmp_path_factory.mktemp("tokenizers"))
    pipe = Pipeline(networks(), tokenizers, schedules.from_config(tiny.DDIM), Devices(one_device), zeros=True)
    pipe._run = lambda plan: SimpleNamespace(negative=plan.rows.negatives[0], sizes=plan.settings.sizes)

    def call():
        """What a call says of nothing, and of sizes."""
        plain, told = pipe("a"), pipe("a", height=48, width=16, **cases.XL_SIZES)
        negative = np.ones(1) if isinstance(plain.negative, str) else plain.negative
        return negative, plain.sizes, told.sizes, pipe("a", height=48, width=16).sizes

    return {
        "text": view_text,
        "told": view_told,
        "picture": view_picture,
        "tokens": lambda: tokenizers(["", *cases.XL_WORDS]),
        "call": call,
    }


def sound(view):
    known = recorded("xl")
    zeros = np.zeros((13, 36), np.float32)
    return {
        "text": (known["states"][1:], known["pooled"][1:]),
        "told": known["told"],
        "picture": known["latents"],
        "tokens": TOKENS,
        "call": (zeros, np.float32([[16, 16, 0, 0, 16, 16]]), SIZES, np.float32([[48, 16, 0, 0, 48, 16]])),
    }[view]


TOLERANCE = {"text": 1e-5, "told": 1e-5, "picture": 3e-4}

# The view that must show it, the function, a piece of its source and what takes its place.
FAULTS = {
    # Texts
    "the final layer norm in the first encoder": (
        "text",
        clip.CLIPTextModel.penultimate,
        "self.encoder.last_two(self.embeddings(ids))[0]",
        "self.final_layer_norm(self.encoder.last_two(self.embeddings(ids))[0])",
    ),
    "the final layer norm in the second encoder": (
        "text",
        clip.CLIPTextModelWithProjection.states,
        "return before,",
        "return text.final_layer_norm(before),",
    ),
    "the last states of the first encoder": (
        "text",
        clip.CLIPTextModel.penultimate,
        "(self.embeddings(ids))[0]",
        "(self.embeddings(ids))[1]",
    ),
    "the last states of the second encoder": (
        "text",
        clip.CLIPTextModelWithProjection.states,
        "return before,",
        "return last,",
    ),
    "pooled before the final layer norm": (
        "text",
        clip.CLIPTextModelWithProjection.states,
        "text.final_layer_norm(last)",
        "last",
    ),
    "pooled from the states that are read": (
        "text",
        clip.CLIPTextModelWithProjection.states,
        "text.final_layer_norm(last)",
        "text.final_layer_norm(before)",
    ),
    "pooled at the last token": ("text", clip.CLIPTextModelWithProjection._pooled, "end[:,", "(0 * end - 1)[:,"),
    "not projected": (
        "text",
        clip.CLIPTextModelWithProjection._pooled,
        "self.text_projection(",
        "(",
    ),
    "encoders in the other order": (
        "text",
        sdxl.encode,
        "[one.penultimate(ids[:, 0]), states]",
        "[states, one.penultimate(ids[:, 0])]",
    ),
    "tokens of the other encoder": ("text", sdxl.encode, "one.penultimate(ids[:, 0])", "one.penultimate(ids[:, 1])"),
    "padded alike": ("tokens", TokenizerPair.__call__, "self.second(texts", "self.first(texts"),
    # What the UNet is told
    "sine before cosine in the sizes": (
        "told",
        model.UNet2DConditionModel._wave,
        "flip=c.flip_sin_to_cos",
        "flip=c.flip_sin_to_cos and channels is None",
    ),
    "sizes before the pooled text": (
        "told",
        model.UNet2DConditionModel.project,
        "[context.pooled.astype(dtype), wave.reshape(len(context.sizes), -1)]",
        "[wave.reshape(len(context.sizes), -1), context.pooled.astype(dtype)]",
    ),
    "waves interleaved": (
        "told",
        model.UNet2DConditionModel.project,
        "wave.reshape(len(context.sizes), -1)",
        "wave.reshape(*context.sizes.shape, -1).swapaxes(1, 2).reshape(len(context.sizes), -1)",
    ),
    "the prompt's pooled text for its concepts": (
        "picture",
        sdxl.parted,
        "text[..., -1, :pooled]",
        "jnp.broadcast_to(text[:, 1:2], text.shape)[..., -1, :pooled]",
    ),
    "the prompt's pooled text for no prompt": (
        "picture",
        sdxl.parted,
        "text[..., -1, :pooled]",
        "jnp.asarray(text).at[:, 0].set(text[:, 1])[..., -1, :pooled]",
    ),
    "no sizes": ("picture", sdxl.advance, "jnp.broadcast_to(jnp", "0 * jnp.broadcast_to(jnp"),
    "the pooled text among the states": ("picture", sdxl.parted, "text[..., :-1, :]", "text"),
    # Calls
    "width before height": ("call", sizes.told, "one, rows) for", "one, rows)[:, ::-1] for"),
    "the target before the crop": (
        "call",
        sizes.told,
        "for name, one in said.items()",
        "for name, one in ((name, said[name]) for name in ('original_size', 'target_size', 'crops_top_left'))",
    ),
    "width before height by default": (
        "call",
        Pipeline._told,
        "told((height, width)",
        "told((width, height)",
    ),
    "latents' sizes": ("call", Pipeline._told, "self.models.sizes.factor * side", "side"),
    "words for no prompt": ("call", Pipeline.__call__, "negative_prompt is None and self.zeros", "False"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, views, monkeypatch):
    view, *fault = FAULTS[name]
    damage(monkeypatch, *fault)
    assert seen(view, views)


def test_without_a_fault_nothing_is_seen(views):
    assert {view for view in views if seen(view, views)} == set()


def seen(view, views):
    found, wanted = views[view](), sound(view)
    if view in TOLERANCE:
        return error(found, wanted) > TOLERANCE[view]
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return not all(np.array_equal(a, b) for a, b in pairs)
