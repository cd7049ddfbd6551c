"""The options of `sega-jax edit` for files that come with a checkpoint: LoRAs and textual inversion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.cli.stages import later_stages
from sega_jax.method.checks import check_float
from sega_jax.systems.base import System
from sega_jax.systems.registry import systems

OPTIONS = [
    click.Option(
        ["--lora"],
        multiple=True,
        metavar="FILE[:SCALE]",
        help="A LoRA to merge into the weights. May be given several times.",
    ),
    click.Option(
        ["--textual-inversion"],
        multiple=True,
        metavar="[WORD=]FILE",
        help='A word to add, as in "<cat-toy>=cat.safetensors". May be given several times.',
    ),
]


def families(option: str) -> list[System]:
    """Returns the families that a command may give a LoRA ("lora") or a word ("textual_inversion"); a cascade takes
    none."""
    later = [system.name for system in later_stages().values()]
    alone = [system for system in systems().values() if not system.stages and system.name not in later]
    field = {"lora": "lora", "textual_inversion": "words"}[option]
    return [system for system in alone if getattr(system.checkpoint.adapters, field, None)]


def check(chosen: Mapping[str, Any]) -> None:
    """Finds mistakes that need no checkpoint to be seen.

    Raises:
        FileNotFoundError, ValueError: no such file or folder, one that is given twice, or a word that is missing.
    """
    tokenizer = chosen.get("tokenizer")
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
    """Returns the options that were given, as `load` takes them."""
    found = remembered(chosen)
    if "lora" in found:
        found["lora"] = dict(_loras(chosen))
    if "textual_inversion" in found:
        words = {word: path for path, word in _words(chosen)}
        found["textual_inversion"] = words.get(None, words)
    return found


def remembered(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that were given, as a command can repeat them anywhere."""
    found = {name: value for name, value in chosen.items() if value not in (None, ()) and value is not False}
    folders = {name: found[name] for name in ("tokenizer", "config") if name in found}
    # Anything else is a name on the hub.
    found |= {name: _whole(path) for name, path in folders.items() if Path(path).expanduser().is_dir()}
    if "lora" in found:
        found["lora"] = [f"{path}:{scale!r}" for path, scale in _loras(chosen)]
    if "textual_inversion" in found:
        found["textual_inversion"] = [path if word is None else f"{word}={path}" for path, word in _words(chosen)]
    return found


def _loras(chosen: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns the file and scale of each LoRA."""
    found = []
    for text in chosen.get("lora", ()):
        path, colon, scale = text.rpartition(":")
        if not colon or _is_file(text):
            found.append((_whole(text), 1.0))
            continue
        try:
            found.append((_whole(path), check_float(f"--lora {path}: the scale", float(scale))))
        except ValueError:
            raise ValueError(f"--lora {text}: {scale!r} should be a finite number like 0.8") from None
    return found


def _words(chosen: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Returns the file of each word, and the word where it is given."""
    found = []
    for text in chosen.get("textual_inversion", ()):
        word, equals, path = text.partition("=")
        found.append((_whole(path), word) if equals and not _is_file(text) else (_whole(text), None))
    return found


def _is_file(path: str) -> bool:
    return Path(path).expanduser().is_file()


def _whole(path: str) -> str:
    return str(Path(path).expanduser().resolve())
