"""Compares long and weighted prompts with a plain loop that encodes chunks with transformers, and with diffusers'
sampling."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import numpy as np
import torch
from support import tiny

from parity import theirs
from parity.theirs import first, last, noise, relative, schedule

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

# {weighted prompt: [(words, weight)]}
TEXTS = {
    "a cat, (black:1.4), on [a] mat (in b)": [
        ("a cat,", 1.0), ("black", 1.4), (", on", 1.0), ("a", 1 / 1.1), ("mat", 1.0), ("in b", 1.1)
    ],
    "dog": [("dog", 1.0)],
    "(bad)": [("bad", 1.1)],
    "": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory, one_device):
    folder = tiny.checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", unet=tiny.UNET_1)
    ours, semantic = theirs.load(folder, "float32", one_device)
    reference = diffusers.StableDiffusionPipeline(**semantic.components, image_encoder=None)
    reference.set_progress_bar_config(disable=True)
    return ours, reference


def embedding(reference, words, chunks):
    """Computes the states chunk by chunk: pads the ids, weights the states, and rescales them to their original
    mean."""
    tokenizer, states = reference.tokenizer, []
    pairs = [(i, w) for text, w in words for i in tokenizer(text, add_special_tokens=False).input_ids]
    for c in range(chunks):
        part = pairs[10 * c : 10 * c + 10]
        ids = [tokenizer.bos_token_id, *(i for i, _ in part), *[tokenizer.eos_token_id] * (11 - len(part))]
        weights = torch.tensor([1.0, *(w for _, w in part), *[1.0] * (11 - len(part))])
        with torch.no_grad():
            z = reference.text_encoder(torch.tensor([ids]))[0]
        mean = z.mean()
        z = z * weights[None, :, None]
        states.append(z * (mean / z.mean()))
    return torch.cat(states, 1)


def test_states(both):
    ours, reference = both
    states = ours.pipeline.encode(list(TEXTS), long_prompts=True, weighted=True).states
    expected = torch.cat([embedding(reference, words, 2) for words in TEXTS.values()])
    assert states.shape == (4, 24, 16)
    assert relative(states, expected.numpy()) < 1e-5


def test_pictures(both):
    """The negative prompt is shorter than the prompt, so an additional chunk of the empty text extends it."""
    ours, reference = both
    latents, (long, short, bad, _) = noise(2, 8, 8, 4), TEXTS
    schedule(ours, reference, tiny.DDIM)
    call = {"num_inference_steps": 6, "guidance_scale": 6.0}
    read = {"long_prompts": True, "weighted": True}
    a = ours([long, short], negative_prompt=[bad, bad], **call, **read, latents=latents, output_type="latent").images
    cond, uncond = ([embedding(reference, TEXTS[text], 2) for text in texts] for texts in ((long, short), (bad, bad)))
    embeds = {"prompt_embeds": torch.cat(cond), "negative_prompt_embeds": torch.cat(uncond)}
    b = reference(**embeds, **call, latents=first(latents), output_type="latent").images
    assert relative(a, last(b)) < 3e-4
    assert np.isfinite(a).all()
