"""Tests the portraits that the demo models are trained on: drawing, captions and tokenizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import CLIPTokenizer

from sega_jax.demo.training import draw_parts, portraits, wording
from sega_jax.demo.training.portraits import ATTRIBUTES, COLUMN, WORDS, captions, labels, sample, visible
from sega_jax.text.tokenizers import Tokenizer

render = jax.jit(portraits.render)
# The rows and columns of pixels that each attribute may change.
REGIONS = {
    "glasses": np.s_[36:72, 26:102],
    "mouth": np.s_[64:96, 44:84],
    "facial hair": np.s_[36:112, 28:100],
    "hat": np.s_[:80],
    "clothes": np.s_[80:],
    "clothes colour": np.s_[80:],
}


@pytest.fixture(scope="module")
def attributes():
    return np.asarray(sample(jax.random.key(0), 4000))


@pytest.fixture(scope="module")
def pictures(attributes):
    return np.asarray(render(jnp.asarray(attributes[:8]), jax.random.key(1)))


@pytest.fixture(scope="module")
def texts(attributes):
    return captions(attributes, np.random.default_rng(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "tokenizer"
    portraits.tokenizer(folder)
    return folder


def test_parts_are_small():
    assert portraits._parts()[1].dtype == np.uint8
    assert draw_parts.PARTS.stat().st_size < 200_000


def test_render_gives_pictures(attributes, pictures):
    assert pictures.shape == (8, 128, 128, 3)
    assert pictures.dtype == np.float32
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    np.testing.assert_array_equal(render(jnp.asarray(attributes[:8]), jax.random.key(1)), pictures)


def test_the_key_chooses_only_variants(attributes, pictures):
    others = np.asarray(render(jnp.asarray(attributes[:8]), jax.random.key(2)))
    assert (others != pictures).any()
    rows, tints = portraits.layers(jnp.asarray(attributes), jax.random.key(2))
    names = np.array(portraits._parts()[0])[np.asarray(rows)]
    beards = np.array([any("beard/beard" in name for name in row) for row in names])
    np.testing.assert_array_equal(beards, attributes[:, COLUMN["facial hair"]] == 1)
    np.testing.assert_array_equal(tints, portraits.layers(jnp.asarray(attributes), jax.random.key(3))[1])


def test_samples_are_independent(attributes):
    assert attributes.dtype == np.int32
    np.testing.assert_array_equal(sample(jax.random.key(0), 4000), attributes)
    for name, values in ATTRIBUTES.items():
        shares = np.bincount(attributes[:, COLUMN[name]], minlength=len(values)) / len(attributes)
        assert len(shares) == len(values)
        assert shares.min() > 0.1, name
        assert shares.max() < 0.7, name
    assert np.abs(np.corrcoef(attributes.T) - np.eye(len(ATTRIBUTES))).max() < 0.08


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_change_only_their_region(name):
    """Any two values of an attribute differ visibly, and only within its region. The other attributes are chosen so
    that they hide nothing."""
    base = np.array(sample(jax.random.key(4), 1))
    for other, value in [("hat", 0), ("facial hair", 0), ("glasses", 0), ("hair", 1)]:
        base[:, COLUMN[other]] = value
    rows = np.repeat(base, 8, 0)
    rows[: len(ATTRIBUTES[name]), COLUMN[name]] = np.arange(len(ATTRIBUTES[name]))
    key = jax.random.key(5)
    drawn = np.concatenate([np.asarray(render(jnp.asarray(row[None]), key)) for row in rows[: len(ATTRIBUTES[name])]])
    change = np.abs(drawn[:, None] - drawn[None]).max(-1)
    for i in range(len(drawn)):
        for k in range(i):
            assert (change[i, k] > 0.2).sum() > 40, (ATTRIBUTES[name][i], ATTRIBUTES[name][k])
    if name in REGIONS:
        change[(slice(None), slice(None), *np.index_exp[REGIONS[name]])] = 0
        assert change.max() == 0


def test_colours_are_distinct():
    """Any two colours of an attribute are at least 0.2 apart in RGB, scaled to [0, 1]."""
    for colours in portraits._COLOURS.values():
        table = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in dict.fromkeys(colours)])
        distance = np.linalg.norm(table[:, None] - table[None], axis=-1) + np.eye(len(table))
        assert distance.min() > 0.2


def test_hats_and_bald_heads_hide_attributes():
    row = np.zeros((3, len(ATTRIBUTES)), np.int32)
    row[1:, COLUMN["hair"]] = 1, 2
    row[:, COLUMN["hat"]] = 0, 1, 1
    seen = visible(row)
    assert seen[:, COLUMN["hair"]].tolist() == [True, False, True]
    assert seen[:, COLUMN["hair colour"]].tolist() == [False, False, True]
    np.testing.assert_array_equal(visible(jnp.asarray(row)), seen)


def test_labels_match_attributes(attributes):
    true = labels(attributes)
    assert true.shape == (len(attributes), len(WORDS))
    assert true.dtype == bool
    assert true.mean(0).min() > 0.04
    bald, red = (list(WORDS).index(word) for word in ("bald", "red hair"))
    assert not (true[:, bald] & true[:, red]).any()


def test_captions_are_true(attributes, texts):
    """A word that names one value of an attribute occurs only in captions of portraits that show this value."""
    true = labels(attributes)
    mentioned = np.array([[f" {word} " in f" {text} ".replace(",", " ") for word in WORDS] for text in texts])
    assert not (mentioned & ~true).any()
    assert mentioned.any(0).all()


def test_captions_vary_in_length(attributes, texts):
    assert captions(attributes, np.random.default_rng(0)) == texts
    counts = wording._mentioned(attributes, np.random.default_rng(0)).sum(1)
    shares = np.bincount(counts, minlength=4) / len(counts)
    np.testing.assert_allclose(shares[:3], (0.05, 0.25, 0.12), atol=0.04)
    assert len(set(texts)) > 0.7 * len(texts)
    assert not any("  " in text or text != text.strip() or not text for text in texts)


def test_every_word_is_one_token(texts, folder):
    tokens = CLIPTokenizer.from_pretrained(folder)
    ids = tokens(texts).input_ids
    assert tokens.model_max_length == wording.LENGTH >= max(map(len, ids))
    assert len(tokens) < 1000
    words = sorted(wording._words())
    assert all(len(row) == 3 and tokens.unk_token_id not in row[1:-1] for row in tokens(words).input_ids)
    assert set(" ".join(texts).replace(",", " ").replace("-", " ").split()) <= set(words)
    unknown = tokens.decode(tokens("a zebra's été 東").input_ids, skip_special_tokens=True)
    assert "".join(unknown.split()) == "azebra'sété東"


def test_tokenizers_agree(texts, folder):
    tokens = CLIPTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder, wording.LENGTH, len(tokens))
    ids = tokens(texts[:50], padding="max_length").input_ids
    np.testing.assert_array_equal(ours(texts[:50]), ids)
    assert ids[0][0] == len(tokens) - 2
    assert ids[0][-1] == len(tokens) - 1


def test_layers_compose_as_one_drawing():
    """Compares composed layers with one SVG of all parts. Edges that two parts share may differ slightly."""
    pytest.importorskip("resvg_py")
    pytest.importorskip("python_avatars")
    markup = {"": "", **draw_parts.drawings()}
    assert list(markup) == portraits._parts()[0]
    chosen = sample(jax.random.key(7), 12)
    rows, tints = portraits.layers(chosen, jax.random.key(8))
    background = portraits._tint("background", chosen)
    drawn = np.asarray(jax.jit(portraits.compose)(rows, tints, background))
    for i in range(len(chosen)):
        parts = [
            list(markup.values())[row].replace("TINT", _hex(tint)) for row, tint in zip(rows[i], tints[i], strict=True)
        ]
        expected = draw_parts.draw(f'<rect width="264" height="280" fill="{_hex(background[i])}"/>' + "".join(parts))
        error = np.abs(drawn[i] - expected[..., :3])
        assert error.mean() < 2e-3
        assert (error > 0.03).mean() < 0.02


def _hex(colour):
    return "#" + "".join(f"{round(255 * float(c)):02x}" for c in colour)
