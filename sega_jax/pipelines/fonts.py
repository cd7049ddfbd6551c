"""Finds fonts for the characters of captions.

Pillow's own font draws Latin letters. For other characters, the search continues in the font packages of the extra
`fonts`, in matplotlib, and among the fonts of the operating system. Characters without a font are replaced.
"""

import io
import itertools
import os
import unicodedata
from collections.abc import Container, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import regex
from fontTools.ttLib import TTFont
from PIL import ImageFont, features

from sega_jax.pipelines.messages import warn
from sega_jax.pipelines.progress import printable

_PACKAGES = {"manimgx_fonts": "*.ttf", "noto_cjk_sans_otc": "*.ttc", "matplotlib": "mpl-data/fonts/ttf/DejaVuSans.ttf"}
_FOLDERS = (
    *("~/.fonts", "~/.local/share/fonts", "/usr/local/share/fonts", "/usr/share/fonts"),
    *("~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts"),
    *(r"$LOCALAPPDATA\Microsoft\Windows\Fonts", r"$WINDIR\Fonts"),
)
# Fonts of these styles are used only if no regular font has a character.
_STYLES = ("black", "bold", "condensed", "italic", "light", "medium", "mono", "oblique", "semi", "serif", "thin")
# Tables of coloured glyphs, which Pillow and matplotlib draw in few sizes or not at all.
_COLOURED = {"CBDT", "COLR", "SVG ", "sbix"}

# A letter with its accents, a composed emoji, or an escape sequence.
_CLUSTER = regex.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})|\X")
_WORD = regex.compile(r"\s+|\S+")
_INVISIBLE = regex.compile(r"[\p{Cf}\p{Variation_Selector}]")
_EMOJI = regex.compile(r"[\p{Emoji_Presentation}\uFE0F]")
_ACCENTS = regex.compile(r"(\p{Mn}{4})\p{Mn}+")  # more than four accents would reach other lines

_announced: set[str] = set()


class Span(NamedTuple):
    """A part of a text, and the file of the font that draws it, or None for Pillow's own font."""

    text: str
    file: Path | None


def readable(text: str) -> str:
    """Replaces characters that cannot be drawn: emoji with names such as "[grinning face]", other characters with
    escape sequences. White space becomes single spaces.

    Example:
        >>> from sega_jax.pipelines.fonts import readable
        >>> print(readable("a  cat" + chr(7)))
        a cat\\x07
    """
    text = printable(" ".join(text.split()))
    return text if text.isascii() else "".join(map(_drawable, clusters(_normal(text))))


def clusters(text: str) -> list[str]:
    """Splits a text into the characters that readers perceive, such as letters with accents and composed emoji. Escape
    sequences are not split."""
    return _CLUSTER.findall(text)


def spans(text: str) -> list[Span]:
    """Splits the result of `readable` into parts that are each drawn with one font, if possible word by word."""
    if text.isascii():
        return [Span(text, None)]
    parts = itertools.groupby(_files_of(text), key=lambda one: one.file)
    return [Span("".join(one.text for one in part), file) for file, part in parts]


def files(texts: Iterable[str]) -> list[Path]:
    """Returns the files of the fonts that draw texts, without Pillow's own font."""
    return list(dict.fromkeys(file for text in texts for _, file in spans(readable(text)) if file is not None))


def own_font(size: float) -> ImageFont.FreeTypeFont:
    """Returns Pillow's own font in a size in pixels."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # without FreeType, Pillow raises an error above
    return font


def can_shape() -> bool:
    """Returns whether Pillow can join letters, place accents, and draw scripts from right to left."""
    return bool(features.check("raqm"))


def announce(texts: Iterable[str]) -> None:
    """Warns about the characters in texts that cannot be drawn, once for each script."""
    examples: dict[tuple[str, str], str] = {}  # {(obstacle, script): an example}
    characters = (one for text in texts if not text.isascii() for one in clusters(_normal(printable(text))))
    for cluster in dict.fromkeys(characters):
        if obstacle := _obstacle(cluster):
            examples.setdefault((obstacle, _script(cluster)), _drawable(cluster))
    for obstacle in dict.fromkeys(one for one, _ in examples):
        scripts = sorted(script for one, script in examples if one == obstacle and script not in _announced)
        _announced.update(scripts)
        if scripts:
            listed = " and ".join(", ".join(scripts).rsplit(", ", 1))
            example = examples[obstacle, scripts[0]]
            warn(f"pictures show {listed} characters as text such as {example}, because {obstacle}")


def _normal(text: str) -> str:
    return _ACCENTS.sub(r"\1", unicodedata.normalize("NFC", text))


def _files_of(text: str) -> Iterator[Span]:
    """Yields the clusters of a text with their fonts."""
    file: Path | None = None
    for word in _WORD.findall(text):
        parts = clusters(word)
        if not file or _is_emoji(file) or any(map(str.isalpha, word)) or not all(_has(file, part) for part in parts):
            own = {part: _file(part) for part in parts}
            # If a font for one of the letters has all of them, the word looks better in that font.
            whole = next((one for one in own.values() if one and all(_has(one, part) for part in parts)), None)
            yield from (Span(part, whole or own[part]) for part in parts)
            file = whole or own[parts[-1]]
        else:  # spaces and numbers have the font of the word before them
            yield Span(word, file)


def _drawable(cluster: str) -> str:
    """Returns a cluster, or its replacement if it cannot be drawn."""
    if not _visible(cluster):
        return ""
    if not _obstacle(cluster):
        return cluster if can_shape() else _visible(cluster)
    if unicodedata.category(cluster[0]) == "So":
        return f"[{unicodedata.name(cluster[0]).lower()}]"
    return cluster.encode("ascii", "backslashreplace").decode()


@cache
def _obstacle(cluster: str) -> str | None:
    """Returns why a cluster cannot be drawn, with the remedy, or None if it can be drawn."""
    visible = _visible(cluster)
    if not can_shape() and any(
        unicodedata.bidirectional(c) in ("R", "AL", "AN") or unicodedata.category(c) in ("Mn", "Mc") for c in visible
    ):
        return "Pillow did not find FriBiDi, which arranges them; install it, for example with apt install libfribidi0"
    if _file(cluster) is None and not _has(None, cluster):
        package = "" if find_spec("manimgx_fonts") else 'pip install ".[fonts]", or '
        return f"no font has them; {package}install a font that has them"
    return None


def _script(cluster: str) -> str:
    if not unicodedata.category(cluster[0]).startswith("L"):
        return "emoji or other"
    name = unicodedata.name(cluster[0]).split()[0]
    return name if name == "CJK" else name.title()


def _visible(cluster: str) -> str:
    return _INVISIBLE.sub("", cluster)


def _has(file: Path | None, cluster: str) -> bool:
    return all(ord(c) in _characters(file) for c in _visible(cluster))


def _is_emoji(file: Path) -> bool:
    return "Emoji" in file.name


@cache
def _file(cluster: str) -> Path | None:
    """Returns the first font that has a cluster, or None if Pillow's own font or no font has it."""
    emoji = _EMOJI.search(cluster) is not None
    if _has(None, cluster) and not emoji:
        return None
    files = sorted(_installed(), key=lambda file: _is_emoji(file) != emoji)
    return next((file for file in files if _has(file, cluster)), None)


@cache
def _characters(file: Path | None) -> Container[int]:
    """Returns the code points of a font. Fonts that cannot be used have none."""
    source = io.BytesIO(own_font(10).font_bytes) if file is None else file
    try:
        ImageFont.truetype(source, 10)
        with TTFont(source, fontNumber=0, lazy=True) as font:
            usable = not _COLOURED & set(font.keys()) and "LastResort" not in str(file)
            return (font.getBestCmap() if usable else None) or ()
    except Exception:  # damaged fonts raise many kinds of errors
        return ()


@cache
def _installed() -> list[Path]:
    """Returns the files of fonts in packages, then those of the operating system."""
    packages = [
        sorted(Path(folder).glob(pattern), key=_preference)
        for package, pattern in _PACKAGES.items()
        if (spec := find_spec(package)) is not None
        for folder in spec.submodule_search_locations or ()
    ]
    folders = [Path(os.path.expanduser(os.path.expandvars(folder))) for folder in _FOLDERS]
    return [*itertools.chain(*packages), *sorted(_fonts(folders), key=_preference)]


def _fonts(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from (file for file in folder.rglob("*") if file.suffix.lower() in (".otc", ".otf", ".ttc", ".ttf"))


def _preference(file: Path) -> tuple[bool, bool, int, Path]:
    """Sorts fonts: regular ones first, then Noto fonts, then short names such as NotoSans, which has many scripts."""
    styled = any(style in file.stem.lower() for style in _STYLES)
    return styled, "Noto" not in file.stem, len(file.name), file
