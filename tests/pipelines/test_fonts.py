"""Fonts for captions: which one draws a character, and how characters without a font are shown."""

import shutil
import unicodedata
import warnings

import pytest
from PIL import features
from support.scripts import TEXTS

from sega_jax.pipelines import fonts


@pytest.fixture
def fresh(monkeypatch):
    """Forgets which fonts and warnings were needed before, and does so again after the test."""
    cached = (fonts._obstacle, fonts._file, fonts._characters, fonts._installed)
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(fonts, "_announced", set())
    yield monkeypatch
    for function in cached:
        function.cache_clear()


@pytest.fixture
def bare(fresh):
    """Simulates a computer without fonts."""
    fresh.setattr(fonts, "_PACKAGES", {})
    fresh.setattr(fonts, "_FOLDERS", ())
    return fresh


@pytest.mark.parametrize("script", TEXTS)
def test_the_extra_has_fonts_for_many_scripts(script):
    pytest.importorskip("manimgx_fonts")
    pytest.importorskip("noto_cjk_sans_otc")
    text = unicodedata.normalize("NFC", TEXTS[script])
    assert fonts.readable(text) == text
    (file,) = fonts.files([text.replace(" ", "")])
    assert "Noto" in file.name


def test_latin_letters_need_no_other_font():
    assert fonts.files(["a portrait of a sad woman, 25 % “old” …"]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tcat \n and\u3000a dog", "a cat and a dog"),
        ("bell\x07 and \ud800", r"bell\x07 and \ud800"),
        ("\u202egnorw", r"\u202egnorw"),
        ("\u200d\ufe0f", ""),
        ("кот \U0001f600", r"\u043a\u043e\u0442 [grinning face]"),
        ("e\u0301", r"\xe9"),
        ("\ue000\U0010ffff", r"\ue000\U0010ffff"),
        ("", ""),
    ],
)
def test_characters_without_a_font_are_replaced(bare, text, expected):
    assert fonts.readable(text) == expected


def test_a_warning_names_all_scripts_once(bare):
    with pytest.warns(UserWarning, match="pictures show") as record:
        fonts.announce(["a cat", "кот и 猫", "кошка 😀"])
    (message,) = (str(one.message) for one in record)
    assert message.startswith("pictures show CJK, Cyrillic and emoji or other characters as text such as \\u732b")
    assert message.endswith("install a font that has them")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fonts.announce(["кот"])


def test_no_warning_for_characters_that_are_escaped_on_purpose(bare):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fonts.announce(["bell\x07 \ud800 \u202e", "\u200d"])


def test_scripts_that_need_shaping_are_replaced_without_raqm(fresh):
    fresh.setattr(features, "check", lambda name: False)
    assert fonts.readable("קט") == r"\u05e7\u05d8"
    assert fonts.readable("cafe\u0301") == fonts.readable("café")
    with pytest.warns(UserWarning, match=r"show Arabic characters .* install it, for example with apt install libfrib"):
        fonts.announce(["قطة"])


def test_many_accents_are_cut(bare):
    bare.setattr(fonts, "_has", lambda *_: True)
    assert fonts.readable("x" + "\u0320" * 50) == "x" + "\u0320" * 4


def test_unusable_fonts_are_ignored(bare, tmp_path):
    dejavu = next(iter(_dejavu()))
    (tmp_path / "a.ttf").write_bytes(b"no font")
    (tmp_path / "b.ttf").write_bytes(dejavu.read_bytes()[:5000])
    shutil.copy(dejavu, tmp_path / "Bold.ttf")
    shutil.copy(dejavu, tmp_path / "Regular.ttf")
    bare.setattr(fonts, "_FOLDERS", (str(tmp_path), str(tmp_path / "missing")))
    fonts._installed.cache_clear()
    assert fonts.files(["кот"]) == [tmp_path / "Regular.ttf"]


def test_a_word_has_one_font(bare, tmp_path):
    shutil.copy(next(iter(_dejavu())), tmp_path)
    bare.setattr(fonts, "_FOLDERS", (str(tmp_path),))
    fonts._installed.cache_clear()
    assert [span.text for span in fonts.spans("a café, 25 cats")] == ["a ", "café, 25 ", "cats"]


def _dejavu():
    from matplotlib import get_data_path

    yield from fonts.Path(get_data_path(), "fonts/ttf").glob("DejaVuSans.ttf")
