"""What `sega-jax edit` has for files of Stable Diffusion: what a single file does not hold, LoRAs, and learnt words."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.pipelines.batch import number
from sega_jax.pipelines.loading import PREDICTIONS

_OPTIONS = [
    click.option("--tokenizer", metavar="FOLDER", help="Of a single file: a folder `tokenizer` of any checkpoint."),
    click.option(
        "--config", metavar="MODEL", help="Of a single file: a folder or owner/name on the hub whose configs it has."
    ),
    click.option(
        "--prediction-type",
        type=click.Choice(PREDICTIONS),
        help="What the UNet predicts, in place of what the checkpoint says or, in a single file, shows.",
    ),
    click.option("--ema", is_flag=True, help="Of a single file: the moving average of its UNet, where it has that."),
    click.option(
        "--lora",
        multiple=True,
        metavar="FILE[:SCALE]",
        help="Stable Diffusion: a LoRA to merge into the weights. May be given several times.",
    ),
    click.option(
        "--textual-inversion",
        multiple=True,
        metavar="[WORD=]FILE",
        help='Stable Diffusion: a word to add, as in "<cat-toy>=cat.safetensors". May be given several times.',
    ),
]


def options(command: Callable) -> Callable:
    """Adds these options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


NAMES = [parameter.name for parameter in reversed(options(lambda: None).__click_params__)]


def check(chosen: Mapping[str, Any]) -> None:
    """Finds mistakes that need no checkpoint to be seen.

    Raises:
        FileNotFoundError, ValueError: no such file or folder, one that is given twice, or a word that is missing.
    """
    tokenizer = chosen["tokenizer"]
    if tokenizer is not None and not Path(tokenizer).expanduser().is_dir():
        raise FileNotFoundError(f"--tokenizer {tokenizer} is no folder; correct the path")
    for option, pairs in (("lora", _loras(chosen)), ("textual-inversion", _words(chosen))):
        for path, beside in pairs:
            if not _is_file(path):
                raise FileNotFoundError(f"--{option} {path} is no file; correct the path")
            if [other for other, _ in pairs].count(path) > 1:
                raise ValueError(f"--{option} {path} is given twice; leave one out")
            if beside is None and len(pairs) > 1:
                raise ValueError(f"--{option} {path} should name its word, as in <word>={Path(path).name}")
    words = [word for _, word in _words(chosen)]
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"--textual-inversion {word} is given twice; leave one out")


def read(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as `load` takes them."""
    found = remembered(chosen)
    if "lora" in found:
        found["lora"] = dict(_loras(chosen))
    if "textual_inversion" in found:
        words = {word: path for path, word in _words(chosen)}
        found["textual_inversion"] = words.get(None, words)
    return found


def remembered(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as a command can repeat them anywhere."""
    found = {name: value for name, value in chosen.items() if value not in (None, ()) and value is not False}
    folders = {name: found[name] for name in ("tokenizer", "config") if name in found}
    # What is no folder is a name on the hub.
    found |= {name: _whole(path) for name, path in folders.items() if Path(path).expanduser().is_dir()}
    if "lora" in found:
        found["lora"] = [f"{path}:{scale!r}" for path, scale in _loras(chosen)]
    if "textual_inversion" in found:
        found["textual_inversion"] = [path if word is None else f"{word}={path}" for path, word in _words(chosen)]
    return found


def _loras(chosen: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Of each its file and scale."""
    found = []
    for text in chosen["lora"]:
        path, colon, scale = text.rpartition(":")
        if not colon or _is_file(text):
            found.append((_whole(text), 1.0))
            continue
        try:
            found.append((_whole(path), number(f"--lora {path}: the scale", float(scale))))
        except ValueError:
            raise ValueError(f"--lora {text}: {scale!r} should be a finite number like 0.8") from None
    return found


def _words(chosen: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Of each its file, and the word where it is said."""
    found = []
    for text in chosen["textual_inversion"]:
        word, equals, path = text.partition("=")
        found.append((_whole(path), word) if equals and not _is_file(text) else (_whole(text), None))
    return found


def _is_file(path: str) -> bool:
    return Path(path).expanduser().is_file()


def _whole(path: str) -> str:
    return str(Path(path).expanduser().resolve())
