"""Faults made on purpose where pictures begin, in rescaled guidance, in parts and tiles, and in how words are read:
each breaks a test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_guidance
import test_img2img
import test_memory
import test_prompts
import tiny
from test_mutations import damage
from test_prompts import tokenizer as tokenizer

from sega_jax.method import guidance, schedules
from sega_jax.method.schedules import ddim_ddpm_pndm, exponential
from sega_jax.method.schedules import sigmas as along
from sega_jax.nn import vae_tiling
from sega_jax.nn.vae import AutoencoderConfig
from sega_jax.systems import base
from sega_jax.text import prompt_weights
from sega_jax.text.tokenizers import Tokenizer

pytestmark = pytest.mark.fault


class Blurred:
    """An autoencoder whose encoder says mean 2 and deviation 3."""

    config = AutoencoderConfig(scaling_factor=0.5)

    def encode(self, image):
        return jnp.full((len(image), 2, 2, 4), 2.0), jnp.full((len(image), 2, 2, 4), 2 * np.log(np.float32(3)))


def begun(_):
    key = jax.random.split(jax.random.key(0), 2)
    z = np.stack([jax.random.normal(jax.random.fold_in(k, base.POSTERIOR), (2, 2, 4)) for k in key])
    clean = base.embed(Blurred(), key, jnp.zeros((2, 4, 4, 3)))
    np.testing.assert_allclose(clean, (2 + 3 * z) / 2, rtol=1e-5)
    settings = base.Settings(key, np.ones(2), np.zeros(2), None)
    latents = np.ones((2, 2, 2, 4), np.float32)
    carry = base.start(settings, latents, 0.6, clean, 0.8, shape=(2, 2, 4), method=base.Method(), dtype=np.float32)
    np.testing.assert_allclose(carry.x, 0.8 * clean + 0.6, rtol=1e-5)


def entered(_):
    for name in tiny.SCHEDULERS:
        test_img2img.test_the_state_before_a_call_has_the_shares_of_its_row(name)
    for name in ("DPM", "UniPC", "PNDM"):
        test_img2img.test_what_is_remembered_begins_where_the_schedule_is_entered(name)


def parsed(_):
    for text in test_prompts.WEIGHTED:
        test_prompts.test_weights_are_the_web_uis(text)


def read(tokenizer):
    test_prompts.test_one_chunk_is_what_the_tokenizer_makes(tokenizer)
    test_prompts.test_longer_texts_are_cut_into_chunks(tokenizer)
    test_prompts.test_weights_stand_at_their_tokens(tokenizer)


def weighed(_):
    test_prompts.test_the_mean_of_a_chunk_is_restored()


def rescaled(_):
    test_guidance.test_rescaled_guidance_is_the_formula()
    test_guidance.test_rescaling_nothing_is_nothing()


def parted(_):
    test_memory.test_rows_and_their_branches_stay_together(2)


def tiled(_):
    test_memory.test_a_tile_in_the_middle_is_the_decoders_own()


# The test that must show it, the function, a piece of its source and what takes its place.
FAULTS = {
    "the latents' mean": (begun, base.embed, "+ jnp.exp(logvar / 2) * z", "+ 0 * z"),
    "variance for deviation": (begun, base.embed, "logvar / 2", "logvar"),
    "latents not scaled": (begun, base.embed, "* vae.config.scaling_factor", "* 1"),
    "the initial noise once more": (begun, base.embed, "POSTERIOR", "INITIAL"),
    "nothing of the picture": (begun, base.start, "x += jnp", "x += 0 * jnp"),
    "the whole of the picture": (begun, base.start, "* jnp.asarray(signal).astype(dtype)", "* 1"),
    "calls by their old numbers": (
        entered,
        schedules._from,
        "np.arange(len(table.call)",
        "call + np.arange(len(table.call)",
    ),
    "sigmas scaled as signal": (entered, along._table, "shares=(1.0, sigma)", "shares=(0.5, sigma)"),
    "PNDM's noise of the end of a step": (entered, ddim_ddpm_pndm.pndm, "here = _at(options, bars, t)", "here = after"),
    "an order without what it remembers": (entered, exponential.dpm_solver, "i - begin + 1", "i + 1"),
    "a corrector without a step": (entered, exponential.unipc, "if i > begin", "if i > 0"),
    "PNDM entered in its middle": (
        entered,
        ddim_ddpm_pndm._low_orders,
        "call = np.arange(len(t))",
        "call = begin + np.arange(len(t))",
    ),
    "all rows by one deviation": (rescaled, guidance.rescale, "range(1, cond.ndim)", "range(cond.ndim)"),
    "of the unconditional prediction": (rescaled, guidance.rescale, "_wide(preds.cond)", "_wide(preds.uncond)"),
    "branches of other rows": (
        parted,
        base.in_parts,
        "leaf.reshape(rows, -1, *leaf.shape[1:])",
        "leaf.reshape(-1, rows, *leaf.shape[1:]).swapaxes(0, 1)",
    ),
    "filled rows kept": (parted, base.in_parts, "[:rows]", "[-rows:]"),
    "seams": (tiled, vae_tiling._faded, "np.arange(fade) / fade", "np.ones(fade)"),
    "seams faded the other way": (
        tiled,
        vae_tiling._faded,
        "end * (1 - share) + begin * share",
        "end * share + begin * (1 - share)",
    ),
    "tiles further apart": (tiled, vae_tiling.tiled, "tile - tile // SHARES", "tile"),
    "a bracket's own weight": (
        parsed,
        prompt_weights.fragments,
        'multiply(opened["("].pop(), _number(written, text))',
        'multiply(opened["("].pop(), _STEP)',
    ),
    "square brackets that strengthen": (
        parsed,
        prompt_weights.fragments,
        'if here == ")" else 1 / _STEP',
        "if here else 1",
    ),
    "escapes that stay": (parsed, prompt_weights.fragments, "text[at + 1 : at + size]", "text[at : at + size]"),
    "open brackets that do nothing": (parsed, prompt_weights.fragments, "multiply(start, _STEP)", "multiply(start, 1)"),
    "weights apart": (parsed, prompt_weights.fragments, "joined[-1][1] == weight", "False"),
    "chunks that overlap": (read, prompt_weights.chunks, "len(ids), 1), room)", "len(ids), 1), room - 1)"),
    "weights one token early": (read, prompt_weights.chunks, "row[1 : 1 + len(part)]", "row[: len(part)]"),
    "chunks without an end": (read, Tokenizer.framed, "made.eos_token_id]", "0]"),
    "another mean": (weighed, prompt_weights.weighed, "state.mean() / mean if mean else 1", "1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, tokenizer, monkeypatch):
    test, *fault = FAULTS[name]
    damage(monkeypatch, *fault)
    with pytest.raises(AssertionError):
        test(tokenizer)


def test_without_a_fault_nothing_is_seen(tokenizer):
    for test in dict.fromkeys(test for test, *_ in FAULTS.values()):
        test(tokenizer)
