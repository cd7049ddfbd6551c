"""Textual inversion gives the same tokens, embeddings and pictures as diffusers' `load_textual_inversion`."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from support import pickling

from parity.theirs import first, last, relative
from sega_jax import load

pytestmark = pytest.mark.parity

TEXTS = ["a <cat-toy>, b", "<cat-toy><one>", "x<one>y <one>", "<CAT-TOY> a", "<cat-toy> <cat-toy>"]


def as_diffusers(vectors, folder, name):
    save_file({"<x>": vectors}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def as_diffusers_pickled(vectors, folder, name):
    torch.save({"<x>": vectors}, folder / f"{name}.bin")
    return folder / f"{name}.bin"


def as_the_web_ui(vectors, folder, name):
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": {"*": torch.nn.Parameter(vectors)}}
    content |= {"name": "x", "step": 10, "sd_checkpoint": None, "sd_checkpoint_name": None}
    torch.save(content, folder / f"{name}.pt")
    return folder / f"{name}.pt"


@pytest.mark.parametrize("form", [as_diffusers, as_diffusers_pickled, as_the_web_ui])
def test_one_pipeline(folder, tmp_path, one_device, form):
    generator = torch.Generator().manual_seed(0)
    words = {word: torch.randn(n, 16, generator=generator) for word, n in (("<cat-toy>", 3), ("<one>", 1))}
    paths = {word: form(vectors, tmp_path, str(i)) for i, (word, vectors) in enumerate(words.items())}
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    for word, path in paths.items():
        theirs.load_textual_inversion(tmp_path, weight_name=path.name, token=word)
    ours = load(folder, textual_inversion=paths, devices=one_device)

    # If a word is written in a different case, diffusers silently uses only the first of its tokens.
    written = [theirs.maybe_convert_prompt(text.lower(), theirs.tokenizer) for text in TEXTS]
    settings = {"padding": "max_length", "max_length": 12, "truncation": True}
    ids = np.asarray(theirs.tokenizer(written, **settings).input_ids)
    np.testing.assert_array_equal(ours.tokenizer(TEXTS), ids)
    assert {58, 59, 60, 61} <= set(ids.flat)
    table = theirs.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(ours.models.text_encoder.embeddings.token_embedding.embedding[...][ids], table[ids])

    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    call = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 7.5, "negative_prompt": "<one> b"}
    reference = theirs(TEXTS[0], latents=first(latents), **call).images
    call = {"steps": 3, "output": "latent", "negative_prompt": "<one> b"}
    assert relative(ours(TEXTS[0], latents=latents, **call).images, last(reference)) < 1e-5
    assert relative(ours("a b, b", latents=latents, **call).images, last(reference)) > 1e-2


def test_torch_loads_the_pickles_of_other_tests(tmp_path):
    """torch loads the pickles that other tests write without torch."""
    content = {"a": np.ones((2, 3), np.float32), "b": [1, "x", None], "c": (np.zeros((3, 2), np.int64).T, 2.5)}
    for legacy in (False, True):
        loaded = torch.load(pickling.save(content, tmp_path / "a.pt", legacy=legacy), weights_only=True)
        assert loaded["b"] == content["b"]
        np.testing.assert_array_equal(loaded["a"].numpy(), content["a"])
        assert loaded["c"][0].shape == (2, 3)
        assert loaded["c"][1] == 2.5
