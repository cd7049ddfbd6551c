"""Settings in PNG, WebP and GIF files, and files that have none."""

import random
import re
from contextlib import suppress

import pytest
from PIL import Image, PngImagePlugin

from sega_jax.pipelines.stored_settings import read, save_options

FORMATS = ["png", "webp", "gif"]
SETTINGS = {
    "prompt": '猫 👩\u200d🚀 "a" \\ b\n\x1b',
    "edits": [{"concept": "hat", "scale": -5.5}],
    "seed": None,
    "long": "a" * 3000,
}


def save(path, settings, frames=1, **options):
    images = [Image.new("RGB", (16, 16), (40 * i, 0, 0)) for i in range(frames)]
    many = {"save_all": True, "append_images": images[1:], "duration": 100, "loop": 0} if frames > 1 else {}
    images[0].save(path, **many, **save_options(path.suffix[1:], settings), **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("frames", [1, 3])
def test_settings_are_read_as_they_were_stored(tmp_path, format, frames):
    path = tmp_path / f"a.{format}"
    save(path, SETTINGS, frames)
    assert read(path) == SETTINGS
    # Renaming a file keeps its settings.
    path.rename(tmp_path / "b.png")
    assert read(tmp_path / "b.png") == SETTINGS


@pytest.mark.parametrize("format", FORMATS)
def test_files_of_other_programs_are_refused(tmp_path, format):
    plain, foreign = tmp_path / f"plain.{format}", tmp_path / f"foreign.{format}"
    image = Image.new("RGB", (8, 8))
    image.save(plain)
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a comment"
    text.add_itxt("parameters", "a cat")
    image.save(
        foreign, **{"png": {"pnginfo": text}, "webp": {"exif": exif}, "gif": {"comment": "made by hand"}}[format]
    )
    for path in (plain, foreign):
        with pytest.raises(ValueError, match="was not made by sega-jax: it has no settings"):
            read(path)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "pictures/a.webp"])
def test_the_message_about_a_folder_names_a_picture_in_it(tmp_path, name):
    (tmp_path / "pictures").mkdir()
    (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=re.escape(f"is a folder; give the file of a picture, such as {tmp_path / name}")
    ):
        read(tmp_path)


@pytest.mark.parametrize("value", ["{", "[1]", "7", "[" * 5000], ids=["cut off", "list", "number", "nested"])
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_settings_are_refused(tmp_path, monkeypatch, format, value):
    monkeypatch.setattr("sega_jax.pipelines.stored_settings.json.dumps", lambda *_, **__: value)
    save(tmp_path / f"a.{format}", {})
    with pytest.raises(ValueError, match="has settings that cannot be read; give a file that sega-jax wrote"):
        read(tmp_path / f"a.{format}")


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_read_or_refused(tmp_path, format):
    rng, path = random.Random(0), tmp_path / f"a.{format}"
    save(path, SETTINGS, frames=2)
    good = path.read_bytes()
    for _ in range(200):
        data = bytearray(good[: rng.randrange(len(good))] if rng.random() < 0.3 else good)
        for _ in range(rng.randrange(6)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        with suppress(ValueError):
            assert isinstance(read(path), dict)
