"""Captions: how they are wrapped, cut and drawn."""

import numpy as np
import pytest
import regex
from PIL import Image, ImageDraw, ImageFont
from support.scripts import TEXTS

from sega_jax.pipelines.captions import Font, Segment, distinct
from sega_jax.pipelines.fonts import readable

LONG = {
    **{script: f"{text} " * 12 for script, text in TEXTS.items()},
    "words": "few words " * 40,
    "word": "a" * 10_000,
    "chinese word": "猫" * 2_000,
    "arabic word": "قطة" * 700,
    "damaged": "\ud800\x07" * 500,
    "controls": "\u200d\u202e\ufe0f" * 200,
    "accents": "Z" + "\u0321" * 3000,
}


def drawn(text, width=400, most=None, size=20):
    font = Font(size)
    lines = font.lines([Segment(text)], width, most)
    image = Image.new("RGB", (width + 40, max(len(lines), 1) * font.step + 20), "white")
    for i, line in enumerate(lines):
        font.draw(ImageDraw.Draw(image), (0, i * font.step), line)
    return np.asarray(image)


def texts(lines):
    return [piece.text for line in lines for piece in line]


@pytest.mark.parametrize("width", [60, 128, 700])
@pytest.mark.parametrize("name", LONG)
def test_lines_have_a_maximum_width_and_number(name, width):
    font = Font(14)
    lines = font.lines([Segment(LONG[name])], width, 3)
    assert len(lines) <= 3
    assert font.width(lines) <= width + 1
    cut = "".join(texts(lines)).replace(" ", "")
    whole = readable(LONG[name]).replace(" ", "")
    assert cut == whole or (cut.endswith("…") and whole.startswith(cut[:-1]))
    drawn(LONG[name], width, 3)


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_divided_between_characters_that_readers_perceive(name):
    lines = Font(14).lines([Segment(TEXTS[name] * 4)], 40)
    assert regex.findall(r"\X", "".join(texts(lines)).replace(" ", "")) == regex.findall(
        r"\X", readable(TEXTS[name] * 4).replace(" ", "")
    )
    assert sum(len(regex.findall(r"\X", text)) for text in texts(lines)) == len(
        regex.findall(r"\X", "".join(texts(lines)))
    )


def test_latin_letters_are_drawn_with_the_font_of_pillow():
    image = Image.new("RGB", (440, 46), "white")
    ImageDraw.Draw(image).text((0, 0), "a portrait", "black", ImageFont.load_default(20))
    np.testing.assert_array_equal(drawn("a portrait"), image)


def test_lines_break_between_words_and_between_chinese_characters():
    assert texts(Font(14).lines([Segment("a portrait of a cat")], 70)) == ["a portrait", "of a cat"]
    pytest.importorskip("noto_cjk_sans_otc")
    # A full stop does not start a line, and an opening bracket does not end a line.
    assert texts(Font(10).lines([Segment("猫猫猫。（猫）")], 35)) == ["猫猫", "猫。", "（猫）"]


def test_short_segments_are_not_divided():
    font = Font(14)
    segments = [Segment("+ red hair", "green"), Segment("- blue eyes", "red"), Segment("+ hat", "green")]
    lines = font.lines(segments, 130)
    assert [[(piece.text, piece.colour) for piece in line] for line in lines] == [
        [segments[0]],
        [segments[1], segments[2]],
    ]
    assert lines[1][1].offset > font.length("- blue eyes")


def test_an_ellipsis_replaces_the_end():
    font = Font(14)
    assert font.shortened("a cat", 100) == "a cat"
    assert font.shortened("a cat with a hat", 60) == "a cat wi…"
    (line,) = font.lines([Segment("a cat"), Segment("a hat")], 50, 1)
    assert texts([line]) == ["a cat…"]
    assert texts(font.lines([Segment("")], 50, 1)) == []


def test_text_from_right_to_left_is_arranged_in_this_order():
    """The left end of a line shows the Latin word, which follows the Hebrew word or precedes it."""
    if readable("א") != "א":
        pytest.skip("no font has Hebrew letters, or Pillow cannot draw them")
    latin = drawn("ccc")[:, : int(Font(20).length("ccc"))]
    for text, first in (("ccc אאא", True), ("אאא ccc", True), ("אאא ccc אאא", False), ("ccc", True)):
        assert (drawn(text)[:, : latin.shape[1]] == latin).all() == first, text
    # Numbers and brackets are arranged by the direction of the letters before them.
    assert (drawn("אב (25)") != drawn("אב )25(")).any()


def test_labels_stay_distinct():
    labels = [f"a portrait of a person with a hat, number {i}" for i in range(3)]
    assert distinct(labels, lambda text: text) == labels
    assert distinct(labels, lambda text: text[:10]) == ["…0", "…1", "…2"]
    assert distinct(["cat", "cat"], lambda text: text[:1]) == ["cat", "cat"]
    assert distinct(["caa", "cab"], lambda text: text[:1]) == ["caa", "cab"]
