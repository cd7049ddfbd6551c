"""Faults specific to Stable Diffusion XL: two text encoders and tokenizers, pooled embeddings, and sizes."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import cases
from support import tiny

from faults.damage import argument, arguments, instead, replaced, result, results, skipped
from faults.views import Fault, View, Views, compiled, normal, recorded
from sega_jax import Edit, Edits
from sega_jax.method import schedules
from sega_jax.nn import clip
from sega_jax.nn.unet import Context, embedding
from sega_jax.systems import base, diffusion, programs, sdxl, sdxl_text, sizes
from sega_jax.text import prompt_weights
from sega_jax.text.tokenizers import Tokenizer, TokenizerPair

pytestmark = pytest.mark.fault

# "", "a cat" and "glasses". Letters have the ids 0 to 25, or 28 to 53 at the end of a word. Id 56 starts a text, and id
# 57 ends and pads it. The second tokenizer pads with 0, which is also the id of the letter "a".
TOKENS = np.zeros((3, 2, 12), np.int32)
TOKENS[:, 0], TOKENS[:, :, 0] = 57, 56
TOKENS[0, 1, 1] = 57
TOKENS[1, :, 1:6] = [28, 2, 0, 47, 57], [0, 30, 0, 47, 57]
TOKENS[2, :, 1:9] = [6, 11, 0, 18, 18, 4, 46, 57], [6, 39, 0, 18, 18, 4, 46, 57]
# A weighted text that needs more than one chunk, its tokens from each tokenizer, and the tokens' weights.
LONG = "ab (cd:2) [e]" + " f" * 6
CHUNKS = np.zeros((2, 2, 12), np.int32)
CHUNKS[:, 0], CHUNKS[:, :, 0] = 57, 56
CHUNKS[0, :, 1:] = [0, 29, 2, 31, 32, *[33] * 5, 57]
CHUNKS[1, :, 1:3] = 33, 57
WEIGHTS = np.array([[1, 1, 1, 2, 2, 1 / 1.1, *[1] * 6], [1] * 12])
TABLES = normal(60, 16) + 1, normal(60, 20, seed=1) + 1  # stand-ins for the text encoders
SIZES = np.float32([[*cases.XL_SIZES["original_size"], *cases.XL_SIZES["crops_top_left"], 24, 16]])
CHANNELS = 12  # the size of a pooled embedding


def networks():
    config = {"text_encoder": tiny.TEXT, "text_encoder_2": tiny.TEXT_XL_2, "unet": cases.XL["unet"], "vae": tiny.VAE}
    return sdxl.Models(*map(tiny.filled, sdxl.Models.build(**config)))


def text():
    """Returns the hidden states and pooled embeddings of the prompt and the concept."""
    models = networks()
    encoded = sdxl_text.encode((models.text_encoder, models.text_encoder_2), TOKENS)[1:]
    return encoded.states, encoded.pooled


def looked_up(ids):
    """Looks tokens up in `TABLES`. Returns the states, and the sums of the second table's rows as pooled embeddings."""
    first, second = (table[ids[:, side]] for side, table in enumerate(TABLES))
    return np.concatenate([first, second], -1), second.sum(1)


def read(tokenizers):
    """Encodes a long weighted text with stand-in text encoders that look up each token in `TABLES`."""
    encode = base.Encode(sdxl.SYSTEM.text.networks(networks()), lambda _, ids: list(sdxl.SDXLText(*looked_up(ids))))
    (encoded,) = sdxl_text.read([LONG], tokenizers, encode, warnings.warn, long_prompts=True, weighted=True)
    return encoded.states[0], encoded.pooled[0]


def read_by_hand():
    """Computes the same embedding with NumPy.

    The states of each chunk and encoder are weighted and rescaled to their original mean. The pooled embedding comes
    from the first chunk.
    """
    states, pooled = looked_up(CHUNKS)
    parts = []
    for part in np.split(states, [16], -1):
        weighted = part * WEIGHTS[..., None]
        parts.append(weighted * (part.mean((1, 2)) / weighted.mean((1, 2)))[:, None, None])
    return np.concatenate(parts, -1).reshape(-1, 36), pooled[0]


def joined():
    """Joins three texts: the zeros that replace a missing negative prompt, a text, and a longer text."""
    short, long = (sdxl.SDXLText(normal(1, tokens, 36), normal(1, 12)) for tokens in (12, 24))
    none = sdxl.SDXLText(np.zeros((1, 12, 36)), np.zeros((1, 12)))
    text = sdxl_text.join([none, short, long], lambda: sdxl.SDXLText(np.ones((1, 12, 36)), np.ones((1, 12))))
    return text.states, text.pooled


def joined_by_hand():
    states, pooled = np.zeros((3, 24, 36)), np.zeros((3, 12))
    states[1, :12], states[1, 12:], states[2] = normal(1, 12, 36)[0], 1, normal(1, 24, 36)[0]
    pooled[1:] = normal(1, 12)
    return states, pooled


def conditioning():
    """Returns the UNet's embedding of the pooled embeddings and the sizes."""
    known = recorded("xl")
    return networks().unet.project(Context(known["states"], known["pooled"], np.repeat(SIZES, 3, 0))).pooled


def latents():
    """Samples one row with an edit and returns its latents."""
    scale, beta = cases.XL_MOMENTUM
    edits = Edits.stack([[Edit("", **cases.XL_EDIT)]], momentum_scale=scale, momentum_beta=beta)
    family, known = schedules.from_config(cases.XL["scheduler"]), recorded("xl")
    table, static = family.table(cases.XL_STEPS), base.Static(own=diffusion.DiffusionStatic(family.solver))
    options = {"sampler": sdxl.SYSTEM.sampler, "static": static}
    texts = sdxl.SDXLText(known["states"][None], known["pooled"][None])

    def run(unet):
        keys = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
        own = diffusion.DiffusionSettings(np.zeros(1), size_conditioning=SIZES)
        settings = base.Settings(keys, np.full(1, cases.XL_SCALE), edits, own=own)
        carry = programs.start(settings, cases.XL_LATENTS, 1.0, shape=(8, 8, 4), dtype=np.float32, **options)
        return programs.advance(unet, texts, carry, table, settings, **options)[0].x

    return compiled(run, networks().unet)


def sizes_of_calls():
    """Returns the six numbers that condition the UNet, for a call without sizes and for a call with all sizes."""
    return sizes.size_conditioning((48, 16), 1), sizes.size_conditioning((48, 16), 1, **cases.XL_SIZES)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, pad in (("first", "<|endoftext|>"), ("second", "a")):
        (folder / name).mkdir()
        tiny.tokenizer(folder / name, 12, pad)
    tokenizers = [Tokenizer(folder / name, 12, 60) for name in ("first", "second")]
    return Views(
        {
            "text": View(text, lambda: [recorded("xl")[name][1:] for name in ("states", "pooled")], 1e-5),
            "conditioning": View(conditioning, lambda: recorded("xl")["told"], 1e-5),
            "latents": View(latents, lambda: recorded("xl")["latents"], 3e-4),
            "sizes": View(sizes_of_calls, lambda: [np.array([[48, 16, 0, 0, 48, 16]]), SIZES]),
            "tokens": View(lambda: TokenizerPair(*tokenizers)(["", *cases.XL_WORDS]), lambda: TOKENS),
            "read": View(lambda: read(TokenizerPair(*tokenizers)), read_by_hand, 1e-5),
            "joined": View(joined, joined_by_hand, 1e-6),
        }
    )


def of_the_last_chunk(rows):
    """Uses the last chunk's pooled embedding for all chunks."""
    return [dataclasses.replace(row, pooled=rows[-1].pooled) for row in rows]


def of_the_first_encoder(weights):
    """Sets the weights of the second text encoder's tokens to 1."""
    return np.stack([weights[:, 0], np.ones_like(weights[:, 1])], 1)


def of_the_prompt(context):
    """Uses the prompt's pooled embedding for all branches."""
    return replaced(context, pooled=lambda pooled: jnp.broadcast_to(pooled[:, 1:2], pooled.shape))


FAULTS = {
    "the encoders' last states are used instead of the second to last": Fault(
        "text", clip.Encoder, "last_two", results(lambda before, last: (last, last))
    ),
    "the pooled embedding skips the final layer norm": Fault(
        "text", clip.CLIPTextModel, "__init__", skipped("final_layer_norm")
    ),
    "each encoder reads the tokens of the other": Fault(
        "text", sdxl_text, "encode", argument(1, lambda ids: ids[:, ::-1])
    ),
    "both tokenizers pad with the same token": Fault(
        "tokens", TokenizerPair, "__init__", arguments(lambda self, first, second: (self, first, first))
    ),
    "the pooled embedding is that of the last chunk": Fault(
        "read", sdxl_text, "joined_chunks", argument(0, of_the_last_chunk)
    ),
    "only the first text encoder's states are weighted": Fault(
        "read", sdxl_text, "joined_chunks", argument(1, of_the_first_encoder)
    ),
    "both text encoders share one mean": Fault(
        "read", sdxl_text, "joined_chunks", argument(2, lambda width: width + 19)
    ),
    "the second text encoder reads the first one's padding": Fault(
        "read", prompt_weights, "pair_chunks", argument(0, lambda pair: TokenizerPair(pair.first, pair.first))
    ),
    "a missing negative prompt is padded with chunks of the empty text": Fault(
        "joined", sdxl_text, "_zeros", instead(lambda text, tokens: text)
    ),
    "sizes come before the pooled embedding": Fault(
        "conditioning",
        embedding.TimestepEmbedding,
        "__call__",
        argument(1, lambda inputs: jnp.roll(inputs, -CHANNELS, -1)),
    ),
    "concepts have the prompt's pooled embedding": Fault("latents", diffusion, "denoiser", argument(1, of_the_prompt)),
    "width comes before height": Fault("sizes", sizes, "_pairs", result(lambda pairs: pairs[:, ::-1])),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_view_shows_the_fault(name, views, monkeypatch):
    assert views.sees(FAULTS[name], monkeypatch)


def test_no_view_differs_without_faults(views):
    assert views.wrong() == set()
