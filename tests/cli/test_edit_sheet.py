"""The sheet of `sega-jax edit`: its layout, its captions, and missing pictures."""

import itertools

import numpy as np
import pytest
from PIL import Image

from sega_jax.cli.edit_sheet import Cell, Sheet
from sega_jax.pipelines import fonts

EDITS = ["+ glasses", "- smile"]
LONG_PROMPT = "few words " * 40 + "a" * 90
SCRIPTS = "Портрет, 猫の肖像画。" * 20 + "صورة لقطة תמונה एक बिल्ली ภาพเหมือน 👩🏽‍🚀 \ud800 \x07"
MANY_EDITS = [*EDITS, "+ a hat of blue velvet with many long feathers", "- " + "b" * 100, *["+ red hair"] * 12]


def drawn(count, edits=EDITS, prompt="a cat", size=(128, 128), colours=("red", "blue")):
    sheet = Sheet(prompt, edits, count)
    cells = [Cell(Image.new("RGB", size, colour)) for colour in colours][: 2 if edits else 1]
    for seed in range(count):
        sheet.add(seed, cells)
    return sheet.draw()


def is_colour(page, colour):
    return (np.asarray(page) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(-1)


@pytest.mark.parametrize("count", [1, 2, 8, 13])
@pytest.mark.parametrize(
    ("edits", "prompt"),
    [(EDITS, "a cat"), ([], "a cat"), (MANY_EDITS, LONG_PROMPT), (["+ " + SCRIPTS] * 3, SCRIPTS)],
)
@pytest.mark.filterwarnings("ignore:pictures show")
def test_captions_and_pictures_stay_inside_the_margins(count, edits, prompt):
    page = np.asarray(drawn(count, edits, prompt))
    border = np.ones(page.shape[:2], bool)
    border[14:-14, 14:-14] = False
    assert (page[border] == 255).all()
    assert page.shape[1] < 2250


@pytest.mark.parametrize(("count", "zoom"), [(1, 3), (2, 3), (4, 3), (5, 3), (6, 2), (8, 2), (13, 2)])
def test_small_pictures_are_enlarged_by_a_whole_factor(count, zoom):
    page = drawn(count)
    for colour in ("red", "blue"):
        assert is_colour(page, colour).sum() == count * (128 * zoom) ** 2


@pytest.mark.parametrize(("count", "side"), [(1, 512), (4, 512), (8, 256)])
def test_large_pictures_share_the_width(count, side):
    assert is_colour(drawn(count, size=(512, 512)), "red").sum() == count * side**2


def test_one_seed_stands_side_by_side_and_several_in_two_rows():
    for count, axis in ((1, 1), (2, 0), (8, 0)):
        first, second = (np.flatnonzero(is_colour(drawn(count), c).any(1 - axis)) for c in ("red", "blue"))
        assert first.max() < second.min()


def test_many_seeds_are_wrapped_into_rows_of_about_one_length():
    columns = {count: Sheet("", EDITS, count).columns for count in (8, 9, 13, 16, 17, 32, 33, 256)}
    assert columns == {8: 8, 9: 5, 13: 7, 16: 8, 17: 6, 32: 8, 33: 11, 256: 16}


@pytest.mark.parametrize("note", ["not finite", "flagged by the safety checker"])
def test_a_missing_picture_leaves_a_note(note):
    pages = []
    for text in (note, ""):
        sheet = Sheet("a cat", EDITS, 2)
        sheet.add(1, [Cell(Image.new("RGB", (64, 64), "red")), Cell(Image.new("RGB", (64, 64), "blue"))])
        sheet.add(2, [Cell(Image.new("RGB", (64, 64), "red")), Cell(None, text)])
        assert sheet.pictures == 3
        pages.append(np.asarray(sheet.draw()))
    assert pages[0].shape == pages[1].shape
    assert (pages[0] != pages[1]).any()
    assert is_colour(Image.fromarray(pages[0]), "blue").sum() == 384**2


def test_any_size_has_a_sheet():
    for size, count in itertools.product([(1, 1), (8, 24), (300, 20), (1024, 768)], (1, 3)):
        page = drawn(count, EDITS, LONG_PROMPT, size)
        assert page.width <= 2250


def test_captions_have_a_maximum_height():
    short, long = (drawn(1, ["+ " + word * 3000], word * 3000) for word in ("w", "word "))
    assert short.height == long.height < 384 + 400


def test_characters_without_a_font_cause_one_warning(monkeypatch):
    monkeypatch.setattr(fonts, "_announced", set())
    with pytest.warns(UserWarning, match="show Egyptian characters") as record:
        drawn(2, ["+ \U00013000"], "\U00013001 \U00013002")
    assert len(record) == 1


@pytest.mark.parametrize(("count", "edits"), [(1, EDITS), (1, []), (3, EDITS), (3, [])])
@pytest.mark.parametrize("size", [(64, 64), (300, 150), (900, 900)])
def test_the_input_picture_comes_first(count, edits, size):
    sheet = Sheet("a cat", edits, count, Image.new("RGB", size, "lime"))
    for seed in range(count):
        sheet.add(seed, [Cell(Image.new("RGB", (128, 128), colour)) for colour in ("red", "blue")][: 2 if edits else 1])
    assert sheet.compares
    page = sheet.draw()
    (y, x), (first_y, first_x) = (np.argwhere(is_colour(page, colour)).min(0) for colour in ("lime", "red"))
    assert (x < first_x) if count == 1 else (y < first_y)
    counts = [int(is_colour(page, colour).sum()) for colour in ("lime", "red", "blue")]
    assert counts[1] == count * 384**2
    assert counts[2] == (counts[1] if edits else 0)
    assert counts[0] == pytest.approx(384**2 * min(size) / max(size), rel=0.02)


@pytest.mark.parametrize(("source", "count", "compares"), [(None, 1, False), (None, 2, True), ("lime", 1, True)])
def test_one_picture_without_an_input_needs_no_sheet(source, count, compares):
    sheet = Sheet("a cat", [], count, source and Image.new("RGB", (8, 8), source))
    assert not sheet.compares
    for seed in range(count):
        sheet.add(seed, [Cell(Image.new("RGB", (8, 8), "red"))])
    assert sheet.compares == compares
