"""Stores settings in picture files and reads them back, as JSON.

A PNG stores them in an iTXt chunk, a WebP in the user comment of its EXIF data, and a GIF in its comment.
"""

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

_KEY = "sega_jax"
# The EXIF tags of the camera settings and of the user comment in them, and the prefix of user comments in ASCII.
_CAMERA, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"


def save_options(format: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments for Pillow's `Image.save` that store settings in a file.

    Args:
        format: "png", "webp" or "gif".
        settings: Values that JSON can represent.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from sega_jax.pipelines.stored_settings import read, save_options
        >>> Image.new("RGB", (8, 8)).save("a.webp", **save_options("webp", {"seed": 7}))
        >>> read(Path("a.webp"))
        {'seed': 7}
    """
    if format == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(_KEY, json.dumps(settings, ensure_ascii=False))
        return {"pnginfo": info}
    # Comments of other programs do not begin with the key.
    comment = f"{_KEY} {json.dumps(settings)}".encode("ascii")
    if format == "gif":
        return {"comment": comment}
    exif = Image.Exif()
    exif.get_ifd(_CAMERA)[_USER_COMMENT] = _ASCII + comment
    return {"exif": exif}


def read(path: Path) -> dict[str, Any]:
    """Reads the settings from a picture file that was saved with `save_options`.

    Raises:
        ValueError: The file does not exist, is not a readable picture, or has no readable sega-jax settings.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = _text(image)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; correct the path") from None
    except IsADirectoryError:
        patterns = (f"{folder}*.{ending}" for folder in ("", "pictures/") for ending in ("png", "webp"))
        pictures = sorted(picture for pattern in patterns for picture in path.glob(pattern))
        example = f", such as {pictures[-1]}" if pictures else ""
        raise ValueError(f"{path} is a folder; give the file of a picture{example}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); give a file that sega-jax wrote") from None
    if text is None:
        raise ValueError(f"{path} was not made by sega-jax: it has no settings; give a file that sega-jax wrote")
    try:
        value = json.loads(text)
    except (RecursionError, TypeError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} has settings that cannot be read; give a file that sega-jax wrote")
    return value


def _text(image: Image.Image) -> str | bytes | None:
    """Returns the settings as JSON, or None if the picture has none."""
    if _KEY in image.info:
        return image.info[_KEY]
    comments = [image.info.get("comment")]
    # The EXIF data of other programs may be damaged.
    with suppress(KeyError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        comments.append(image.getexif().get_ifd(_CAMERA).get(_USER_COMMENT))
    prefix = f"{_KEY} ".encode()
    for comment in comments:
        if isinstance(comment, bytes) and comment.removeprefix(_ASCII).startswith(prefix):
            return comment.removeprefix(_ASCII).removeprefix(prefix)
    return None
