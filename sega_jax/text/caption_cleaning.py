"""Prompts as DeepFloyd-IF's text encoder knows them: in lower case, and where asked for, cleaned of what captions from
the web carry beside their words.

The rules are those of the captions that DeepFloyd-IF was trained on, in their order and with their quirks, as
diffusers' IF pipelines apply them with `clean_caption=True`: the strings are equal.
"""

import html
import io
import re
from collections.abc import Callable
from urllib.parse import unquote_plus

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)


def plain(text: str) -> str:
    """The text in lower case, without spaces around it: what a prompt is without cleaning."""
    return text.lower().strip()


def check() -> None:
    """Whether what `clean` needs is installed.

    Raises:
        ImportError: ftfy or beautifulsoup4 is missing.
    """
    try:
        import bs4  # noqa: F401
        import ftfy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'cleaning captions needs {error.name}: pip install "sega_jax[if]"; or go without: clean_caption=False of'
            " SemanticIFPipeline, clean=False of a cascade, no --clean-captions"
        ) from None


def clean(text: str) -> str:
    """The text in lower case without links, markup, numbers of articles, file names, words of web shops and the like.

    All rules are applied twice, since one uncovers what another takes away. A text with a broken declaration
    ("<![x"), at which diffusers raises, keeps its markup here.

    Raises:
        ImportError: ftfy or beautifulsoup4 is missing (diffusers would leave the text as `plain` does).
    """
    check()
    for rule in _RULES * 2:
        text = rule(text)
    return text


def _replace(pattern: str, by: str = "") -> Callable[[str], str]:
    return lambda text: re.sub(pattern, by, text)


def _link(scheme: str) -> str:
    """A pattern of a scheme with what follows its colon at once, or of a host and its path, unless an @ follows."""
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@))"


def _without_tags(text: str) -> str:
    import bs4

    try:
        # From a file, it does not warn of captions that look like a link or a path.
        return bs4.BeautifulSoup(io.StringIO(text), "html.parser").text
    except bs4.ParserRejectedMarkup:
        return text


def _spaced(text: str) -> str:
    """With spaces for hyphens and underscores, where they are so many that they join the words."""
    joints = re.compile("[-_]")
    return joints.sub(" ", text) if len(joints.findall(text)) > 3 else text


def _mended(text: str) -> str:
    import ftfy

    return ftfy.fix_text(text)


_RULES: tuple[Callable[[str], str], ...] = (
    unquote_plus,
    lambda text: text.strip().lower(),
    # From the web
    _replace("<person>", "person"),
    _replace(_link("https?")),
    _replace(_link("www")),
    _without_tags,
    _replace(r"@\w+\b"),
    # Scripts and signs
    _replace("[\u31c0-\u9fff]+"),  # Chinese characters, phonetic extensions, letters in circles, hexagrams
    _replace(f"[{_DASHES}]+", "-"),
    _replace("[`´«»“”¨]", '"'),
    _replace("[‘’]", "'"),
    _replace("&quot;?"),
    _replace("&amp"),
    # Numbers and files
    _replace(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses
    _replace(r"\d:\d\d\s+$"),
    _replace(r"\\n", " "),
    _replace(r"#\d{1,3}\b"),
    _replace(r"#\d{5,}\b"),
    _replace(r"\b\d{6,}\b"),
    _replace(rf"\S+\.(?:{_ENDINGS})"),
    # Ornaments
    _replace("[\"']{2,}", '"'),
    _replace(r"\.{2,}", " "),
    _replace(r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    _replace(r"\s+\.\s+", " "),
    _spaced,
    _mended,
    lambda text: html.unescape(html.unescape(text)),
    # Codes: jc6640, jc6640vc, 6640vc231
    _replace(r"\b[a-zA-Z]{1,3}\d{3,15}\b"),
    _replace(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"),
    _replace(r"\b\d+[a-zA-Z]+\d+\b"),
    # Words of web shops
    _replace(r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    _replace(r"(?:free\s)?download(?:\sfree)?"),
    _replace(r"\bclick\b\s(?:for|on)\s\w+"),
    _replace(rf"\b(?:{_ENDINGS})(?:\simages?)?"),
    _replace(r"\bpage\s+\d+\b"),
    # Longer codes, and sizes, with an x in Latin, in Cyrillic or the sign
    _replace(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    _replace(r"\b\d+\.?\d*[xх×]\d+\.?\d*\b"),
    # Spaces
    _replace(r"\b\s+:\s+", ": "),
    _replace(r"(\D[,./])\b", r"\1 "),
    _replace(r"\s+", " "),
    # What is left at the ends
    _replace(r"^[\"']([\w\W]+)[\"']$", r"\1"),
    _replace("^['_,:;-]"),
    _replace("['_,:+-]$"),
    _replace(r"^\.\S+$"),
    str.strip,
)
