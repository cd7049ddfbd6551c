"""Text conditioning as pytrees: repr, indexing, saving to files, and joining."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sega_jax import ClipText, PaellaText, SDXLText, T5Text
from sega_jax.systems import clip_text, paella_text
from sega_jax.systems.conditioning import stacked


def states(texts, tokens=3, channels=4, seed=0):
    return np.random.default_rng(seed).standard_normal((texts, tokens, channels), np.float32)


def paella(texts=2, clip=True):
    rng = np.random.default_rng(1)
    embedding = rng.standard_normal((texts, 6), np.float32) if clip else None
    return PaellaText(states(texts), np.arange(3) < [[2]] * texts, embedding, np.full(texts, clip))


TEXTS = {
    "clip": (ClipText(states(2)), ["states"]),
    "t5": (T5Text(states(2, 7)), ["states"]),
    "sdxl": (SDXLText(states(2), states(2, 1)[:, 0]), ["states", "pooled"]),
    "paella": (paella(), ["byt5", "mask", "clip", "has_clip"]),
    "paella without CLIP": (paella(clip=False), ["byt5", "mask", "has_clip"]),
}


@pytest.fixture(params=TEXTS)
def text(request):
    return TEXTS[request.param][0]


def same(first, second):
    """Returns whether two texts are equal bit for bit."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


# A pytree


@pytest.mark.parametrize("name", TEXTS)
def test_leaves_are_the_fields_in_order(name):
    text, fields = TEXTS[name]
    leaves, structure = jax.tree.flatten_with_path(text)
    assert [path[0].name for path, _ in leaves] == fields
    assert all(leaf is getattr(text, field) for (_, leaf), field in zip(leaves, fields, strict=True))
    again = structure.unflatten([leaf for _, leaf in leaves])
    assert type(again) is type(text)
    assert same(again, text)


def test_text_passes_through_jit(text):
    flipped = jax.jit(lambda text: jax.tree.map(lambda leaf: leaf[::-1], text))(text)
    assert type(flipped) is type(text)
    for actual, original in zip(jax.tree.leaves(flipped), jax.tree.leaves(text), strict=True):
        np.testing.assert_array_equal(actual, original[::-1])


def test_text_is_immutable(text):
    with pytest.raises(AttributeError):
        text.states = None


# Printing


def test_repr_shows_dtypes_and_shapes():
    assert repr(ClipText(states(2))) == "ClipText(states=float32[2, 3, 4])"
    assert repr(ClipText(jnp.zeros((1, 3, 4), jnp.bfloat16))) == "ClipText(states=bfloat16[1, 3, 4])"
    shown = "byt5=float32[2, 3, 4], mask=bool[2, 3], clip=None, has_clip=bool[2], image=None"
    assert repr(paella(clip=False)) == f"PaellaText({shown})"


# Indexing


@pytest.mark.parametrize("i", [0, 1, -1, -2, np.int64(1), jnp.asarray(1)])
def test_indexing_keeps_the_first_axis(text, i):
    one = text[i]
    assert type(one) is type(text)
    assert len(one) == 1
    for actual, original in zip(jax.tree.leaves(one), jax.tree.leaves(text), strict=True):
        np.testing.assert_array_equal(actual, original[[int(i)]])


def test_slices_and_iteration(text):
    assert len(text) == 2
    assert len(text[:1]) == 1
    assert same(text[::-1][0], text[1])
    assert same(stacked(list(text)), text)


@pytest.mark.parametrize("i", [2, -3])
def test_index_out_of_range(text, i):
    """An index error also ends iteration over the texts."""
    with pytest.raises(IndexError, match=f"text index {i} is out of range for 2 texts"):
        text[i]
    assert len(list(text)) == 2


@pytest.mark.parametrize("i", ["a", [0], 0.5, None])
def test_invalid_indices(text, i):
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        text[i]


# On disk


def test_save_and_load(text, tmp_path):
    path = tmp_path / "text.safetensors"
    text.save(path)
    assert same(type(text).load(str(path)), text)
    text[0].save(path)
    assert same(type(text).load(path), text[0])
    assert [file.name for file in tmp_path.iterdir()] == ["text.safetensors"]


def test_save_and_load_bfloat16_from_a_device(tmp_path):
    half = ClipText(jnp.asarray(states(2), jnp.bfloat16))
    half.save(tmp_path / "half.safetensors")
    again = ClipText.load(tmp_path / "half.safetensors")
    assert again.states.dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.states, half.states)


def test_paths_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ClipText(states(1)).save("~/text.safetensors")
    assert len(ClipText.load("~/text.safetensors")) == 1


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
        ClipText.load(tmp_path / "nowhere.safetensors")
    for path in (tmp_path, tmp_path / "nowhere" / "text.safetensors"):
        with pytest.raises(OSError, match=f"{path} cannot be written"):
            ClipText(states(1)).save(path)


def test_files_with_other_contents(tmp_path):
    path = tmp_path / "x.safetensors"
    TEXTS["sdxl"][0].save(path)
    with pytest.raises(ValueError, match=r"x\.safetensors holds SDXLText, expected ClipText"):
        ClipText.load(path)
    save_file({"states": states(1)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors holds no text conditioning, expected ClipText"):
        ClipText.load(path)
    for arrays, held in (({"states": states(1), "more": states(1)}, "more, states"), ({}, "nothing")):
        save_file(arrays, path, {"sega_jax_text": "ClipText"})
        with pytest.raises(ValueError, match=f"holds {held}, expected the arrays states of ClipText"):
            ClipText.load(path)


@pytest.mark.parametrize("content", [b"", b"junk", json.dumps({}).encode()])
def test_damaged_files(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x\.safetensors cannot be read as text conditioning .*; give a file that `save` wrote"
    ):
        ClipText.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="cannot be read as text conditioning"):
        ClipText.load(tmp_path)


# Joining


def test_join_equal_shapes(text):
    joined = stacked([text, text[1]])
    assert len(joined) == 3
    assert same(joined[:2], text)
    assert same(joined[2], text[1])


def test_join_rejects_different_shapes():
    with pytest.raises(ValueError, match=r"different shapes: T5Text\(states=float32\[1, 3, 4\]\) and .*\[1, 5, 4\]\);"):
        stacked([T5Text(states(1)), T5Text(states(1, 5))])
    with pytest.raises(ValueError, match="different shapes"):
        stacked([paella(1), paella(1, clip=False)])


def test_shorter_clip_texts_are_padded_with_empty_chunks():
    short, long, blank = ClipText(states(1)), ClipText(states(1, 9)), ClipText(states(1, seed=1))
    joined = clip_text.join([short, long], lambda: blank)
    np.testing.assert_array_equal(joined.states[0], np.concatenate([short.states[0], *[blank.states[0]] * 2]))
    np.testing.assert_array_equal(joined.states[1], long.states[0])

    def never():
        pytest.fail("texts of one length need no words")

    assert same(clip_text.join([short, short], never), stacked([short, short]))


def test_paella_texts_are_padded_and_masked():
    """Lengths are padded to multiples of 64 bytes; texts without a CLIP embedding are marked."""
    joined = paella_text.join([paella(1), paella(1, clip=False)], lambda: pytest.fail("no words are needed"))
    assert repr(joined) == (
        "PaellaText(byt5=float32[2, 64, 4], mask=bool[2, 64], clip=float32[2, 6], has_clip=bool[2], image=None)"
    )
    assert joined.mask.sum(1).tolist() == [2, 2]
    np.testing.assert_array_equal(joined.byt5[:, :3], paella(2).byt5[[0, 0]])
    assert not joined.byt5[:, 3:].any()
    assert joined.has_clip.tolist() == [True, False]
    assert not joined.clip[1].any()
    alone = paella_text.join([paella(1, clip=False)] * 2, lambda: pytest.fail("no words are needed"))
    assert alone.clip is None
