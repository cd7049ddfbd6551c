"""Captions, cleaned and plain, beside what diffusers makes of them."""

import subprocess
import sys

import pytest

from sega_jax.text.caption_cleaning import clean, plain

# What diffusers 0.42.1 (ftfy 6.3, beautifulsoup4 4.15) makes of each.
CAPTIONS = {
    "": "",
    "   ": "",
    "A Photo of a CAT": "a photo of a cat",
    " plain text. ": "plain text.",
    "a portrait, smiling; with glasses!": "a portrait, smiling; with glasses!",
    "see http://example.com/a/b?c=d#e for more": "see ?c=d e for more",
    "https://x.co/abc a cat": "a cat",
    "HTTPS:cats": "ats",
    "www.shop.ru/cat-1/ best cats": "best cats",
    "www:cats.org me@example.com": "www: me",
    "a.b.example.net/path_1@x": "path_1",
    "mail me@home.edu now": "mail me now",
    "a <b>bold</b> cat &amp; <i>dog</i><br/>end": "a bold cat dogend",
    "a <person> walks": "a person walks",
    "<script>alert(1)</script>cat": "cat",
    "<!-- note -->a cat<!-- -->": "a cat",
    "1 < 2 > 0 <3": "1 < 2 > 0 <3",
    "a%20cat+and%3Cb%3Edog": "a cat anddog",
    "100% cat": "100% cat",
    "c++ cat": "c cat",
    "@nick_1 and @some.one like cats": "and one like cats",
    "a cat 猫 and a dog 犬": "a cat and a dog",
    "ㇰㇱ ㈱ ㍍ 㐀 ䷀ 一 ひらがな カタカナ": "ひらがな カタカナ",
    "long–dash—and ― ‐ ‑ 〜 ゠ － minus": "long dash and minus",
    "`a´ «b» “c” ‘d’ ¨e¨": 'a" "b" "c" \'d\' "e',
    '"quoted"': "quoted",
    "'quoted'": "quoted",
    '"it\'s"': "it's",
    "\"\"AUSVERKAUFT\"\" ''x''": 'ausverkauft" "x',
    "***SALE*** #SALE ~cat~ §1 ¿que? ¡si! ½ cup": "sale sale cat 1 que? si! cup",
    "&quot;cat&quot; &quotdog &amp;amp; &lt;b&gt; &amp;lt;i&amp;gt;": '"cat" dog ; lt;i gt;',
    "ip 192.168.0.1 here": "ip here",
    "duration 1:23 ": "duration 1:23",
    "a 1:23\n": "a 1:23",
    "line\\nbreak\nreal": "line break real",
    "#1 #12 #123 #1234 #12345 #123456x": "1234 123456x",
    "123456 12345 1234567.": "12345 .",
    "IMG_1234.jpg a cat": "a cat",
    "photo/cat.png.webp of a cat": "of a cat",
    "book.pdf": "",
    "wait... what.. ok .": "wait what ok .",
    "a . b .c": "a b c",
    ".lonely": "",
    "...": "",
    "this-is-my-cute-cat": "this is my cute cat",
    "this_is_my_cute_cat": "this is my cute cat",
    "a-b-c-d": "a-b-c-d",
    "a-b_c-d_e": "a b c d e",
    "well-known cat": "well-known cat",
    "schÃ¶n cafÃ© â€œquotedâ€\x9d": 'schã¶n cafã "quoted"',
    "ﬁne ＦＵＬＬ ｗｉｄｔｈ": "fine full width",
    "a &#65;BC &#x63;at &nbsp;x": "a abc cat x",
    "&amp;amp;quot;cat": "quot;cat",
    "jc6640 jc6640vc 6640vc231 abcd1234": "abcd1234",
    "J2D1A2A a1b2c3 1a2b3c4": "",
    "f16 b52 h2o c3po r2d2": "f16 b52",
    "free shipping": "",
    "worldwide free shipping on cats": "on cats",
    "Worldwide shipping!": "!",
    "free download": "",
    "download free cat": "cat",
    "download a cat": "a cat",
    "click for details": "",
    "click on it now": "now",
    "clicking on": "clicking on",
    "a png image": "a",
    "jpeg images of cats": "of cats",
    "pngs": "s",
    "page 12 of a book": "of a book",
    "homepage 12": "homepage 12",
    "10x20": "",
    "10.5 x 20": "10.5 x 20",
    "30x40cm canvas": "30x40cm canvas",
    "3.5х2.5 and 4×4 and 5.x6.": "and and .",
    "a : b": "a: b",
    "a :b": "a :b",
    "one,two.three/four": "one, two. three four",
    "3,4.5/6": "3,4.5 6",
    "a    b\t\tc\xa0d": "a b c d",
    "_cat_": "cat",
    "-cat-": "cat",
    ":cat:": "cat",
    ",cat,": "cat",
    "+cat+": "cat",
    ";cat;": "cat;",
    "''cat'": "cat",
    "--cat--": "cat",
    "a ~ b | c \\ d / e * f": "a b c d e f",
    "(a) [b] {c}": "a b c",
    "cat 🐱 emoji": "cat 🐱 emoji",
    "naïve İstanbul ǅ ß": "naïve i̇stanbul dž ß",
    "a\u200bb\ufeffc": "a\u200bbc",
    "٣٠٠٠٠٠ ١x٢": "",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa@b.com": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "http://http://http://http://http://": "",
    "<<<>>>": "<<<>>>",
    "<a href='x.com'>link</a> text": "link text",
    "&copy; ® ™ ©": "",
    "a cat\r\nwith a hat\x0b": "a cat with a hat",
    "“A” cat.": '"a" cat.',
    "'tis the season": "tis the season",
    "rock 'n' roll": "rock 'n' roll",
    "5 o'clock at 10:30": "5 o'clock at 10:30",
    "50% off! $9.99 only": "50% off! $9.99 only",
    "www:cats": "ats",
    "‘‘deal’’": "deal",
    "a cat 1:23 <br>": "a cat",
    "a ＆lt; cat ＆amp;eacute; <": "a < cat é <",
    "cat :_": "cat",
}


@pytest.fixture
def libraries():
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("text", CAPTIONS)
def test_clean(text):
    assert clean(text) == CAPTIONS[text]


@pytest.mark.usefixtures("libraries")
def test_no_warnings_of_captions_that_look_like_links(recwarn):
    for text in ("cat.txt", "/etc/cat", "ftp://cats"):
        clean(text)
    assert not recwarn


@pytest.mark.usefixtures("libraries")
def test_broken_declarations_stay():
    """diffusers raises bs4's ParserRejectedMarkup."""
    assert clean("A cat <![x in a hat") == "a cat <! x in a hat"


def test_plain():
    assert plain(" A Cat; http://x.com \n") == "a cat; http://x.com"


@pytest.mark.parametrize("library", ["ftfy", "bs4"])
def test_missing_libraries(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf'needs {library}: pip install "sega_jax\[if\]"'):
        clean("a cat")


def test_the_libraries_wait_until_they_are_needed():
    code = "import sega_jax, sega_jax.text.caption_cleaning, sys; print({'ftfy', 'bs4'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
