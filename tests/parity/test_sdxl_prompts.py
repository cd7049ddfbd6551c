"""Compares Stable Diffusion XL's long and weighted prompts with plain code that uses transformers and diffusers.

The method comes from the widely used web UI (AUTOMATIC1111's stable-diffusion-webui, with the emphasis "Original").
Both encoders read the same chunks of 75 tokens. Each encoder's states are multiplied by the weights and rescaled to
their original mean. The pooled embedding comes from the first chunk, without weights. diffusers' community pipeline
lpw_stable_diffusion_xl differs: it uses the pooled embedding of the last chunk, moves each state away from the chunk's
last state according to the state's weight, does not pad the last chunk, and appends the second prompt to the first
instead of passing it to the second encoder.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import numpy as np
import torch
from support import tiny

import sega_jax
from parity.theirs import first, last, noise, relative

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

ROOM = 10  # word tokens per chunk
# {weighted prompt: [(words, weight)]}. The means of random states are near zero, so restoring these means amplifies
# rounding errors for most texts, but not for the texts below.
TEXTS = {
    "cow, (black:1.4), on [my] mud (in)": [
        ("cow,", 1.0), ("black", 1.4), (", on", 1.0), ("my", 1 / 1.1), ("mud", 1.0), ("in", 1.1)
    ],
    "dog": [("dog", 1.0)],
    "(bad)": [("bad", 1.1)],
    "": [],
}  # fmt: skip
LONG, SHORT, BAD, EMPTY = TEXTS
READ = {"long_prompts": True, "weighted": True}


@pytest.fixture(scope="module")
def both(tmp_path_factory, one_device):
    folder = tiny.xl(tmp_path_factory.mktemp("xl") / "xl", scheduler=tiny.EULER)
    reference = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    return sega_jax.load(folder, dtype="float32", devices=one_device), reference


def weighted_chunks(tokenizer, words, count):
    """Returns ids and weights [count, 12]: start, words, end, and padding."""
    pairs = [(i, weight) for text, weight in words for i in tokenizer(text, add_special_tokens=False).input_ids]
    ids = torch.full((count, ROOM + 2), tokenizer.pad_token_id)
    weights = torch.ones(count, ROOM + 2)
    for c in range(count):
        part = pairs[ROOM * c : ROOM * (c + 1)]
        ids[c, 0], ids[c, len(part) + 1] = tokenizer.bos_token_id, tokenizer.eos_token_id
        for k, (i, weight) in enumerate(part, 1):
            ids[c, k], weights[c, k] = i, weight
    return ids, weights


@torch.no_grad()
def web_ui(reference, words, count, second=None):
    """Returns the hidden states [1, 12 * count, channels] and the pooled embedding [1, channels]."""
    sides = []
    for tokenizer, encoder, text in (
        (reference.tokenizer, reference.text_encoder, words),
        (reference.tokenizer_2, reference.text_encoder_2, words if second is None else second),
    ):
        ids, weights = weighted_chunks(tokenizer, text, count)
        states = []
        for c in range(count):
            outputs = encoder(ids[c : c + 1], output_hidden_states=True)
            state = outputs.hidden_states[-2] * weights[c, None, :, None]
            states.append(state * (outputs.hidden_states[-2].mean() / state.mean()))
            if c == 0:
                pooled = outputs[0]  # after the loop, the second encoder's projected embedding of the first chunk
        sides.append(torch.cat(states, 1))
    return torch.cat(sides, -1), pooled


def test_states_and_pooled_texts(both):
    ours, reference = both
    text = ours.encode(list(TEXTS), **READ)
    expected = [web_ui(reference, words, 2) for words in TEXTS.values()]
    assert text.states.shape == (4, 24, 36)
    assert relative(text.states, torch.cat([states for states, _ in expected]).numpy()) < 1e-5
    assert relative(text.pooled, torch.cat([pooled for _, pooled in expected]).numpy()) < 1e-5


@torch.no_grad()
def test_the_pooled_text_is_not_the_last_chunks(both):
    """The community pipeline pools the last chunk. With a single chunk, the two methods give the same pooled
    embedding."""
    ours, reference = both
    for text, count in ((LONG, 2), (BAD, 1)):
        ids, _ = weighted_chunks(reference.tokenizer_2, TEXTS[text], count)
        last_chunk = reference.text_encoder_2(ids[-1:])[0].numpy()
        error = relative(ours.encode(text, **READ).pooled, last_chunk)
        assert error > 0.1 if count > 1 else error < 1e-5


@pytest.mark.parametrize(("text", "second"), [(LONG, SHORT), (SHORT, LONG)])
def test_another_prompt_for_the_second_encoder(text, second, both):
    ours, reference = both
    encoded = ours.encode(text, second=second, **READ)
    states, pooled = web_ui(reference, TEXTS[text], 2, TEXTS[second])
    assert relative(encoded.states, states.numpy()) < 1e-5
    assert relative(encoded.pooled, pooled.numpy()) < 1e-5


@pytest.mark.parametrize("negative", [BAD, None])
def test_pictures(negative, both):
    """An additional chunk of the empty text extends a shorter negative prompt; zeros replace a missing one."""
    ours, reference = both
    latents = noise(2, 8, 8, 4)
    a = ours([LONG, SHORT], negative_prompt=negative, steps=6, latents=latents, output="latent", **READ).images
    positive = [web_ui(reference, TEXTS[text], 2) for text in (LONG, SHORT)]
    negatives = [web_ui(reference, TEXTS[BAD], 2)] * 2
    if negative is None:
        negatives = [tuple(map(torch.zeros_like, text)) for text in negatives]
    names = ("prompt_embeds", "pooled_prompt_embeds"), ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = {
        name: torch.cat([text[k] for text in texts])
        for pair, texts in zip(names, (positive, negatives), strict=True)
        for k, name in enumerate(pair)
    }
    b = reference(**embeds, num_inference_steps=6, latents=first(latents), output_type="latent").images
    assert relative(a, last(b)) < 3e-4
    assert np.isfinite(a).all()
