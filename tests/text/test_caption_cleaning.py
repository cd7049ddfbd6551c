"""Compares cleaned and uncleaned captions with diffusers' results."""

import subprocess
import sys

import pytest
from support.captions import CAPTIONS

from sega_jax.text.caption_cleaning import clean, plain


@pytest.fixture
def libraries():
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("text", CAPTIONS)
def test_clean(text):
    assert clean(text) == CAPTIONS[text]


@pytest.mark.usefixtures("libraries")
def test_no_warnings_about_captions_that_look_like_links(recwarn):
    for text in ("cat.txt", "/etc/cat", "ftp://cats"):
        clean(text)
    assert not recwarn


@pytest.mark.usefixtures("libraries")
def test_text_with_a_broken_declaration_is_cleaned():
    """In diffusers, cleaning such a text raises bs4's ParserRejectedMarkup."""
    assert clean("A cat <![x in a hat") == "a cat <! x in a hat"


def test_plain():
    assert plain(" A Cat; http://x.com \n") == "a cat; http://x.com"


@pytest.mark.parametrize("library", ["ftfy", "bs4"])
def test_missing_libraries(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'needs {library}; run pip install "sega_jax\[if\]"'):
        clean("a cat")


@pytest.mark.slow
def test_libraries_are_imported_lazily():
    code = "import sega_jax, sega_jax.text.caption_cleaning, sys; print({'ftfy', 'bs4'} & sys.modules.keys())"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"
