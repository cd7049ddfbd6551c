"""Functions that convert prompts for DeepFloyd-IF to lower case and can remove clutter typical of web captions.

The rules, including their order and quirks, are the ones that were applied to DeepFloyd-IF's training captions. The
results equal those of diffusers' IF pipelines with `clean_caption=True`.
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
    """Returns the text in lower case, without surrounding spaces. All prompts get at least this processing."""
    return text.lower().strip()


def check() -> None:
    """Checks that the libraries that `clean` needs are installed.

    Raises:
        ImportError: ftfy or beautifulsoup4 is missing.
    """
    try:
        import bs4  # noqa: F401
        import ftfy  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'caption cleaning needs {error.name}; run pip install "sega_jax[if]", or turn cleaning off'
        ) from None


def clean(text: str) -> str:
    """Converts a text to lower case and removes links, markup, article numbers, file names and similar clutter.

    All rules run twice, because one rule can expose text that another rule removes. If a text contains a broken
    declaration ("<![x"), its markup is kept, whereas diffusers raises an error.

    Raises:
        ImportError: ftfy or beautifulsoup4 is missing. diffusers would then only strip the text and convert it to lower
            case.
    """
    check()
    for rule in _RULES * 2:
        text = rule(text)
    return text


def _replace(pattern: str, by: str = "") -> Callable[[str], str]:
    return lambda text: re.sub(pattern, by, text)


def _link(scheme: str) -> str:
    """Returns a pattern that matches links with the given scheme.

    The pattern also matches a host and path without a scheme, unless "@" follows.
    """
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.-]+\.(?:{_DOMAINS})[\w/-]*\b/?(?!@))"


def _without_tags(text: str) -> str:
    import bs4

    try:
        # BeautifulSoup warns about strings that look like links or paths, but not about file objects.
        return bs4.BeautifulSoup(io.StringIO(text), "html.parser").text
    except bs4.ParserRejectedMarkup:
        return text


def _spaced(text: str) -> str:
    """Replaces hyphens and underscores with spaces if there are more than three, because then they stand for spaces."""
    hyphens = re.compile("[-_]")
    return hyphens.sub(" ", text) if len(hyphens.findall(text)) > 3 else text


def _fixed_encoding(text: str) -> str:
    import ftfy

    return ftfy.fix_text(text)


_RULES: tuple[Callable[[str], str], ...] = (
    unquote_plus,
    lambda text: text.strip().lower(),
    # Web markup
    _replace("<person>", "person"),
    _replace(_link("https?")),
    _replace(_link("www")),
    _without_tags,
    _replace(r"@\w+\b"),
    # Scripts and punctuation
    _replace("[\u31c0-\u9fff]+"),  # CJK characters, phonetic extensions, enclosed letters, hexagrams
    _replace(f"[{_DASHES}]+", "-"),
    _replace("[`´«»“”¨]", '"'),
    _replace("[‘’]", "'"),
    _replace("&quot;?"),
    _replace("&amp"),
    # Numbers and file names
    _replace(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
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
    _fixed_encoding,
    lambda text: html.unescape(html.unescape(text)),
    # Article codes: jc6640, jc6640vc, 6640vc231
    _replace(r"\b[a-zA-Z]{1,3}\d{3,15}\b"),
    _replace(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"),
    _replace(r"\b\d+[a-zA-Z]+\d+\b"),
    # Phrases from web shops
    _replace(r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    _replace(r"(?:free\s)?download(?:\sfree)?"),
    _replace(r"\bclick\b\s(?:for|on)\s\w+"),
    _replace(rf"\b(?:{_ENDINGS})(?:\simages?)?"),
    _replace(r"\bpage\s+\d+\b"),
    # Longer codes, and sizes with a Latin x, a Cyrillic x or a multiplication sign
    _replace(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    _replace(r"\b\d+\.?\d*[xх×]\d+\.?\d*\b"),
    # Spaces
    _replace(r"\b\s+:\s+", ": "),
    _replace(r"(\D[,./])\b", r"\1 "),
    _replace(r"\s+", " "),
    # Leftovers at both ends
    _replace(r"^[\"']([\w\W]+)[\"']$", r"\1"),
    _replace("^['_,:;-]"),
    _replace("['_,:+-]$"),
    _replace(r"^\.\S+$"),
    str.strip,
)
