"""Checks that captions are cleaned as in diffusers, for a list of difficult captions and for generated ones."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("ftfy")
pytest.importorskip("bs4")

import random
import warnings

from diffusers import IFPipeline
from support.captions import CAPTIONS

from sega_jax.text.caption_cleaning import clean, plain

pytestmark = pytest.mark.parity


def theirs(text, clean_caption):
    pipe = IFPipeline.__new__(IFPipeline)
    with warnings.catch_warnings(action="ignore"):
        (cleaned,) = pipe._text_preprocessing(text, clean_caption=clean_caption)
    return cleaned


@pytest.mark.parametrize("text", CAPTIONS)
def test_difficult_captions(text):
    assert clean(text) == theirs(text, clean_caption=True) == CAPTIONS[text]
    assert plain(text) == theirs(text, clean_caption=False)


SIGNS = "abcxyzABCÄßéİхж×一龍あ글٣٠ 0123456789.,:;-_–—~!?'\"`´«»“”‘’¨()[]{}<>|\\/*#@&%+=$€，Ｆ・ﬁ🐱\t\n\u00a0\u200b"
WORDS = r"""
http:// https: www: www. .com .co.uk .ru/x-y a.gov .org@ @nick <b> </b> <br/> <person> <!--c--> <script>
&quot; &quot &amp; &amp &lt; &amp;lt; &#65; &nbsp; ＆lt; %20 %3Cb%3E \n #12 #1234 #12345 123456 1.2.3.4
1:23 ... '' "" .png photo.jpg jpeg image images page shipping worldwide free download click for on
jc6640 jc6640vc 6640vc231 j2d1a2a 10x20 10.5х3 4×4 this-is-my-cute-cat a_b_c_d_e schÃ¶n â€œ
"""
PIECES = [*SIGNS, *WORDS.split()]


@pytest.mark.parametrize("seed", range(20))
def test_generated_captions(seed):
    rng = random.Random(seed)
    for _ in range(200):
        text = rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randint(1, 25)))
        assert clean(text) == theirs(text, clean_caption=True), repr(text)
        assert plain(text) == theirs(text, clean_caption=False)
