"""Tests textual inversion: file formats, learned words in prompts, and files that are rejected."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import pickling

from sega_jax import CheckpointError, Edit, add_words, load
from sega_jax.nn.clip import CLIPTextModel

WORD = "<cat-toy>"


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)


def diffusers(path, vectors):
    save_file({WORD: vectors}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def diffusers_pickled(path, vectors):
    return pickling.save({WORD: vectors}, path.with_suffix(".bin"))


def web_ui(path, vectors):
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": WORD, "step": 500}
    return pickling.save(content, path.with_suffix(".pt"))


def web_ui_nameless(path, vectors):
    save_file({"emb_params": vectors}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def alone(path, vectors):
    return pickling.save(vectors, path.with_suffix(".bin"))


FORMS = {form.__name__: form for form in (diffusers, diffusers_pickled, web_ui, web_ui_nameless, alone)}
NAMED = ("diffusers", "diffusers_pickled", "web_ui")


def table(models):
    return np.asarray(models.text_encoder.embeddings.token_embedding.embedding[...])


def rows(pipe, text):
    """Returns the embeddings of a prompt's tokens, without the start and end tokens."""
    ids = pipe.tokenizer([text])[0]
    return table(pipe.models)[ids[1 : list(ids).index(57)]]


@pytest.mark.parametrize("form", FORMS)
def test_every_format(small, small_folder, tmp_path, vectors, form):
    path = FORMS[form](tmp_path / "a", vectors)
    pipe = load(small_folder, devices=small.devices, textual_inversion={WORD: path})
    np.testing.assert_array_equal(rows(pipe, WORD), vectors)
    before, letters = table(small.models), small.tokenizer(["a"])[0][1:2]
    np.testing.assert_array_equal(
        rows(pipe, f"a {WORD} a"), np.concatenate([before[letters], vectors, before[letters]])
    )
    np.testing.assert_array_equal(table(pipe.models)[:58], before[:58])
    if form in NAMED:
        unnamed = load(small_folder, devices=small.devices, textual_inversion=str(path))
        np.testing.assert_array_equal(rows(unnamed, WORD), vectors)
    else:
        with pytest.raises(CheckpointError, match="does not store its word; give the word"):
            load(small_folder, devices=small.devices, textual_inversion=path)


@pytest.mark.parametrize("shape", [(16,), (1, 16)])
def test_a_word_of_one_token(small, tmp_path, vectors, shape):
    path = diffusers(tmp_path / "a", vectors[0].reshape(shape))
    models, tokenizer = add_words(small.models, small.tokenizer, {"toy.": path})
    ids = tokenizer(["a toy. a"])[0]
    assert list(ids[1:5]) == [28, 58, 28, 57]
    np.testing.assert_array_equal(table(models)[58], vectors[0])
    assert tokenizer(["a toy, a"]).tolist() == small.tokenizer(["a toy, a"]).tolist()
    assert small.tokenizer(["toy."]).tolist() != tokenizer(["toy."]).tolist()


@pytest.mark.parametrize(
    ("word", "spellings"),
    [
        ("<cat-toy>", ["<cat-toy>", "<Cat-Toy>", "<CAT-TOY>"]),
        ("<Cat-Toy>", ["<cat-toy>", "<Cat-Toy>", "<cAT-TOY>"]),
        ("<caf\u00e9>", ["<caf\u00e9>", "<CAF\u00c9>", "<cafe\u0301>"]),
    ],
)
def test_words_match_in_any_case(small, tmp_path, vectors, word, spellings):
    """CLIP's tokenizer converts text to lower case, so every spelling of a word produces the same tokens."""
    path = diffusers(tmp_path / "a", vectors)
    models, tokenizer = add_words(small.models, small.tokenizer, {word: path})
    for spelling in spellings:
        ids = tokenizer([f"a {spelling} a"])[0]
        np.testing.assert_array_equal(table(models)[ids[2 : 2 + len(vectors)]], vectors)
        assert tokenizer.tokens(spelling) == tokenizer.tokens(word)
    with pytest.raises(ValueError, match=r"already has '.*'; choose another word"):
        add_words(models, tokenizer, {word.swapcase(): path})


def test_several_words(small, tmp_path, vectors):
    """One word is part of another, and the embedding table must grow."""
    paths = [diffusers(tmp_path / name, vectors * scale) for name, scale in (("a", 1), ("b", 2))]
    models, tokenizer = add_words(small.models, small.tokenizer, dict(zip(["<cat>", "my<cat>s"], paths, strict=True)))
    assert len(table(models)) == models.text_encoder.config.vocab_size == 64
    assert isinstance(models.text_encoder, CLIPTextModel)
    ids = tokenizer(["my<cat>s, <cat>"])[0]
    np.testing.assert_array_equal(table(models)[ids[1:4]], 2 * vectors)
    np.testing.assert_array_equal(table(models)[ids[5:8]], vectors)
    assert tokenizer.tokens("<cat> a") == [58, 59, 60, 28]
    third, extended = add_words(models, tokenizer, {"<dog>": diffusers(tmp_path / "c", vectors[0])})
    assert extended(["<dog> <cat>"])[0][1:5].tolist() == [64, 58, 59, 60]
    assert len(table(third)) == 65


def test_added_embeddings_have_the_models_dtype_and_devices(small_folder, tmp_path, vectors):
    path = diffusers(tmp_path / "a", vectors)
    pipe = load(small_folder, devices=jax.local_devices()[:2], dtype="bfloat16", textual_inversion=path)
    for leaf in jax.tree.leaves(pipe.models.text_encoder):
        assert leaf.dtype == "bfloat16"
        assert len(leaf.devices()) == 2
    np.testing.assert_array_equal(rows(pipe, WORD), vectors.astype("bfloat16"))


def test_pictures(small, small_folder, tmp_path, vectors):
    """A learned word with an existing word's vectors makes the same picture as that word, both in the prompt and in an
    edit."""
    letters = small.tokenizer(["a b"])[0][1:3]
    path = diffusers(tmp_path / "a", table(small.models)[letters])
    pipe = load(small_folder, devices=small.devices, textual_inversion={WORD: path})
    call = {"steps": 2, "output": "latent"}
    expected = small("c a b", Edit("a b", warmup=0), **call).images
    np.testing.assert_array_equal(pipe(f"c {WORD}", Edit(WORD, warmup=0), **call).images, expected)
    assert np.abs(pipe("c", Edit(WORD, warmup=0), **call).images - expected).max() > 1e-3
    assert np.abs(pipe(f"c {WORD}", Edit("c", warmup=0), **call).images - expected).max() > 1e-3


def save(tmp_path, content, name="a.safetensors"):
    path = tmp_path / name
    save_file(content, path) if path.suffix == ".safetensors" else pickling.save(content, path)
    return path


BROKEN = {
    "width": ({WORD: np.ones((2, 8), np.float32)}, "vectors with 8 channels, but the text_encoder has 16"),
    "two text encoders": (
        {"clip_l": np.ones((2, 16), np.float32), "clip_g": np.ones((2, 12), np.float32)},
        "has vectors for .*, expected vectors for text_encoder; it was trained for Stable Diffusion XL",
    ),
    "integers": ({WORD: np.ones((2, 16), np.int64)}, r"contains int64\(2, 16\), expected floats \[tokens, 16\]"),
    "none": ({WORD: np.ones((0, 16), np.float32)}, "expected floats"),
    "axes": ({WORD: np.ones((1, 2, 16), np.float32)}, "expected floats"),
    "infinite": ({WORD: np.full((2, 16), np.inf, np.float32)}, "has NaN or infinite entries"),
    "a LoRA": (
        {"lora_unet_x.lora_up.weight": np.ones(2, np.float32), "lora_unet_x.alpha": np.ones(2, np.float32)},
        "contains lora_unet_x.*, expected the vectors of one word .*; give a LoRA as lora",
    ),
    "nothing": ({}, "contains no tensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_rejected(small, tmp_path, name):
    content, message = BROKEN[name]
    for ending in (".safetensors", ".pt"):
        path = save(tmp_path, content, f"a{ending}")
        with pytest.raises(CheckpointError, match=message) as caught:
            add_words(small.models, small.tokenizer, {WORD: path})
        assert str(path) in str(caught.value)


def test_hostile_files_are_rejected(small, tmp_path):
    path = save(tmp_path, {WORD: pickling.call("posix.system", f"touch {tmp_path / 'canary'}")}, "a.pt")
    with pytest.raises(CheckpointError, match=r"was rejected, and none of its code was run: .*posix\.system"):
        add_words(small.models, small.tokenizer, path)
    assert not (tmp_path / "canary").exists()


def test_wrong_arguments_are_rejected(small, first, tmp_path, vectors):
    path = diffusers(tmp_path / "a", vectors)
    models, tokenizer = add_words(small.models, small.tokenizer, path)
    for error, message, arguments in [
        (ValueError, "the tokenizer already has 'a</w>'", (small.models, small.tokenizer, {"a</w>": path})),
        (ValueError, "the tokenizer already has '<cat-toy>'; choose another", (models, tokenizer, path)),
        (ValueError, "the tokenizer already has '<cat-toy>_1'", (models, tokenizer, {"<cat-toy>_1": path})),
        (ValueError, "the new word 'a b' should have no spaces", (small.models, small.tokenizer, {"a b": path})),
        (ValueError, "the new word '' should have no", (small.models, small.tokenizer, {"": path})),
        (TypeError, "should be {word: file} for textual inversion", (small.models, small.tokenizer, [path])),
        (TypeError, "should be {word: file} for textual inversion", (small.models, small.tokenizer, {3: path})),
        (TypeError, "models=Models and tokenizer=T5Tokenizer should come from", (first.models, first.tokenizer, path)),
        (TypeError, "models=int and", (3, small.tokenizer, path)),
        (CheckpointError, "none.pt is missing", (small.models, small.tokenizer, tmp_path / "none.pt")),
        (CheckpointError, r"a\.png should have one of the extensions", (small.models, small.tokenizer, "a.png")),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            add_words(*arguments)


def test_problems_are_reported_before_the_checkpoint_is_read(small, small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sega_jax.pipelines.loading.filled", lambda *_: pytest.fail("weights are read"))
    path = save(tmp_path, {WORD: np.ones((2, 8), np.float32)})
    with pytest.raises(CheckpointError, match="with 8 channels"):
        load(small_folder, devices=small.devices, textual_inversion=path)
