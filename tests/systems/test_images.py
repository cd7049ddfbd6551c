"""Input pictures look the same as in a picture viewer, whatever their mode and however they are passed in."""

import numpy as np
import pytest
from PIL import Image, ImageCms

from sega_jax.systems.images import read

RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
GREY = RGB[..., 0]
# Two columns are transparent and hide a colour that is not white.
ALPHA = np.where(np.arange(4) < 2, 0, 255).astype(np.uint8) * np.ones((6, 1), np.uint8)
VISIBLE = np.where(ALPHA[..., None] > 0, RGB, 255)


def palette(transparent=None):
    """Returns a picture of four colours, one of which may be transparent."""
    image = Image.fromarray((np.arange(24).reshape(6, 4) % 4).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 255, 0, 90, 90, 90])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def of_palette(transparent=None):
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 255, 0], [90, 90, 90]])
    if transparent is not None:
        colours[transparent] = 255
    return colours[np.arange(24).reshape(6, 4) % 4]


def grey(values):
    return np.stack([values] * 3, -1)


def lab():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return ImageCms.applyTransform(Image.fromarray(RGB // 2 + 64), to_lab)


def close_to_white(values, alpha):
    return np.round(values * (alpha / 255) + 255 - alpha)


HALF = np.full_like(GREY, 128)
HALF_GREY = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(HALF)])
HALF_RGB = Image.fromarray(np.concatenate([RGB, HALF[..., None]], -1))
GREY_ALPHA = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
# A picture, its visible colours, a file format that keeps the mode, and the tolerance for a colour.
MODES = {
    "1": (Image.fromarray(GREY > 100), grey((GREY > 100) * 255), "png", 0),
    "L": (Image.fromarray(GREY), grey(GREY), "png", 0),
    "RGB": (Image.fromarray(RGB), RGB, "png", 0),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257), grey(GREY), "png", 0),
    "dark 16 bits": (Image.fromarray(GREY.astype(np.uint16)), grey(np.round(GREY / 257)), "png", 0),
    "16 bits, big-endian": (Image.fromarray(GREY.astype(">u2") * 257), grey(GREY), "tiff", 0),
    "I": (Image.fromarray(GREY.astype(np.int32)), grey(GREY), "tiff", 0),
    "I of 16 bits": (Image.fromarray(GREY.astype(np.int32) * 257), grey(GREY), "tiff", 0),
    "F": (Image.fromarray(GREY.astype(np.float32)), grey(GREY), "tiff", 0),
    "F to 1": (Image.fromarray(GREY.astype(np.float32) / 255), grey(GREY), "tiff", 0),
    "LA": (
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]),
        np.where(ALPHA[..., None], grey(GREY), 255),
        "png",
        0,
    ),
    "RGBA": (Image.fromarray(np.concatenate([RGB, ALPHA[..., None]], -1)), VISIBLE, "png", 0),
    "half of RGBA": (HALF_RGB, close_to_white(RGB, 128), "png", 1),
    "P": (palette(), of_palette(), "png", 0),
    "P with a transparent colour": (palette(2), of_palette(2), "png", 0),
    "P with transparent colours": (palette(bytes([0, 255, 255, 255])), of_palette(0), "png", 0),
    "PA": (palette().convert("PA"), of_palette(), None, 0),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), RGB, "tiff", 1),
    "YCbCr": (Image.fromarray(RGB).convert("YCbCr"), RGB, None, 4),
    "HSV": (Image.fromarray(RGB).convert("HSV"), RGB, None, 5),
    "LAB": (lab(), RGB // 2 + 64, "tiff", 3),
    "La": (
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(HALF)]).convert("La"),
        grey(close_to_white(GREY, 128)),
        None,
        2,
    ),
    "RGBa": (
        Image.fromarray(np.concatenate([RGB, HALF[..., None]], -1)).convert("RGBa"),
        close_to_white(RGB, 128),
        None,
        2,
    ),
}


def read_colours(image):
    return (read(image)[0] + 1) * 127.5


@pytest.mark.parametrize("mode", MODES)
def test_every_pillow_mode_is_read_as_viewers_show_it(mode, tmp_path):
    image, expected, kind, tolerance = MODES[mode]
    before = image.copy()
    inputs = [image]
    if kind is not None:
        image.save(tmp_path / f"picture.{kind}")
        inputs += [tmp_path / f"picture.{kind}", Image.open(tmp_path / f"picture.{kind}")]
    for value in inputs:
        assert abs(read_colours(value) - expected).max() <= tolerance + 1e-3, value
    assert image.mode == before.mode
    assert image.tobytes() == before.tobytes()


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_first_frame_of_an_animation(kind, tmp_path):
    frames = [Image.fromarray(np.full((6, 4, 3), value, np.uint8)) for value in (40, 200)]
    lossless = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **lossless)
    assert abs(read_colours(tmp_path / f"a.{kind}") - 40).max() <= 3
    with Image.open(tmp_path / f"a.{kind}") as image:
        image.seek(1)
        assert abs(read_colours(image) - 40).max() <= 3
        assert image.tell() == 1


def test_exif_orientation(tmp_path):
    """Files and opened pictures are turned upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn the picture clockwise by 90 degrees
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    for value in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        np.testing.assert_allclose(read_colours(value), np.rot90(RGB, -1), atol=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), 70000, np.int32), "mode I has values from 70000 to 70000, expected 0 to 65535"),
        (np.full((2, 2), -1, np.int32), "mode I has values from -1 to -1"),
        (np.full((2, 2), np.nan, np.float32), "mode F has NaN or infinite values"),
    ],
)
def test_grey_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        read(Image.fromarray(values))
