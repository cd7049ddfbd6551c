"""The options of `sega-jax edit` for files that come with a checkpoint: LoRAs and textual inversion, also of the later
stages of a cascade."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.cli.stages import later_stages
from sega_jax.method.checks import check_float
from sega_jax.pipelines.cascade import FIRST
from sega_jax.pipelines.load_options import ADAPTERS
from sega_jax.systems.base import System
from sega_jax.systems.registry import adapter_refusal, check_adapters, in_words, systems
from sega_jax.weights.lora_files import on_hub, pinned

_METAVARS = {"lora": "FILE[:SCALE]", "textual_inversion": "[WORD=]FILE"}
_HELP = {
    "lora": "A LoRA to merge into the weights: a file, a folder with one, or owner/name on the hub.",
    "textual_inversion": 'A word to add, as in "<cat-toy>=cat.safetensors".',
}


def options() -> list[click.Option]:
    """Returns the options of all checkpoints, and of the later stages that take such files."""
    found = []
    for name in ADAPTERS:
        takers = [one.title for one in systems().values() if adapter_refusal(one, name) is None]
        help = f"{_HELP[name]} May be given several times. Only for {in_words(takers)}."
        found.append(_option(name, "", help))
    for stage, system in later_stages().items():
        for name in ADAPTERS:
            if adapter_refusal(system, name) is None:
                found.append(_option(name, f"{stage}-", f"As {_shown(name)}, for {system.title}."))
    return found


def _option(name: str, prefix: str, help: str) -> click.Option:
    return click.Option([f"--{prefix}{name.replace('_', '-')}"], multiple=True, metavar=_METAVARS[name], help=help)


def _shown(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def names() -> list[str]:
    """Returns the parameters of these options."""
    return [one.name or "" for one in options()]


def check_family(system: System, given: Mapping[str, Any]) -> None:
    """Checks that the family of `--model` takes the files that are given for it.

    Raises:
        ValueError: it does not.
    """
    check_adapters(system, {name: given[name] for name in ADAPTERS if name in given}, _shown)


def check(chosen: Mapping[str, Any], stages: Mapping[str, Any]) -> None:
    """Finds mistakes that need no checkpoint to be seen.

    Args:
        chosen: the options that were given, by their parameters.
        stages: the options of later stages that were given.

    Raises:
        FileNotFoundError, ValueError: no such file or folder, one that is given twice, a word that is missing, a
            folder without a LoRA or with several, or an option of a stage that is not there.
    """
    tokenizer = chosen.get("tokenizer")
    if tokenizer is not None and not Path(tokenizer).expanduser().is_dir():
        raise FileNotFoundError(f"--tokenizer {tokenizer} is no folder; correct the path")
    for name in (name for name in names() if name in chosen):
        option = _shown(name)
        stage = _stage(name)
        if stage != FIRST and stage not in stages:
            raise ValueError(f"{option} is given without --{stage}; name its checkpoint, or leave it out")
        _check_files(option, _pairs(chosen, name))


def _check_files(option: str, pairs: list[tuple[str, Any]]) -> None:
    words = [word for _, word in pairs if isinstance(word, str)]
    for path, beside in pairs:
        if not _is_file(path) and (isinstance(beside, str | None) or on_hub(path) is None):
            raise FileNotFoundError(f"{option} {path} is no file; correct the path")
        if [other for other, _ in pairs].count(path) > 1:
            raise ValueError(f"{option} {path} is given twice; leave one out")
        if beside is None and len(pairs) > 1:
            raise ValueError(f"{option} {path} should name its word, as in <word>={Path(path).name}")
        if words.count(beside) > 1:
            raise ValueError(f"{option} {beside} is given twice; leave one out")


def read(chosen: Mapping[str, Any], stage: str = FIRST) -> dict[str, Any]:
    """Returns the files that were given for a stage, as `load` takes them; an only checkpoint is the first stage."""
    found: dict[str, Any] = {}
    for option in ADAPTERS:
        name = option if stage == FIRST else f"{stage}_{option}"
        if name not in chosen:
            continue
        by_path = dict(_pairs(chosen, name))
        if option == "lora":
            found[option] = by_path
        else:
            words = {word: path for path, word in by_path.items()}
            found[option] = words.get(None, words)
    return found


def by_stage(chosen: Mapping[str, Any], stages: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the files that were given for the stages of a cascade, as `load_cascade` takes them."""
    of_stages = {stage: read(chosen, stage) for stage in stages}
    return {
        f"{option}s": {stage: files[option] for stage, files in of_stages.items() if option in files}
        for option in ADAPTERS
    }


def remembered(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that were given, as a command can repeat them anywhere."""
    found = {name: value for name, value in chosen.items() if value not in (None, ()) and value is not False}
    paths = {name: found[name] for name in ("tokenizer", "config", "unet", "vae") if name in found}
    # Anything else is a name on the hub.
    found |= {name: _whole(path) for name, path in paths.items() if Path(path).expanduser().exists()}
    for name in (name for name in names() if name in found):
        pairs = _pairs(chosen, name)
        if name.endswith("lora"):
            # A name on the hub gets the commit, so that the command always means the same file.
            found[name] = [f"{pinned(path)}:{scale!r}" for path, scale in pairs]
        else:
            found[name] = [path if word is None else f"{word}={path}" for path, word in pairs]
    return found


def command_words(known: Mapping[str, Any]) -> list[str]:
    """Returns the words of a command that give these options, as `remembered` returned them."""
    return [word for name in names() for one in known.get(name) or () for word in (_shown(name), one)]


def _stage(name: str) -> str:
    """Returns the stage that a parameter is of."""
    return next((stage for stage in later_stages() if name.startswith(f"{stage}_")), FIRST)


def _pairs(chosen: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    """Returns the files of an option, each with its scale, or with its word, which is None where it is not given."""
    read = _lora if name.endswith("lora") else _word
    return [read(_shown(name), text) for text in chosen[name]]


def _lora(option: str, text: str) -> tuple[str, float]:
    path, colon, scale = text.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(text)):
        return _located(text), 1.0
    try:
        return _located(path), check_float(f"{option} {path}: the scale", float(scale))
    except ValueError:
        raise ValueError(f"{option} {text}: {scale!r} should be a finite number like 0.8") from None


def _word(option: str, text: str) -> tuple[str, str | None]:
    del option
    word, equals, path = text.partition("=")
    return (_whole(path), word) if equals and not _is_file(text) else (_whole(text), None)


def _is_file(path: str) -> bool:
    return Path(path).expanduser().is_file()


def _located(path: str) -> str:
    """Returns the whole path of a LoRA's file, which may be in a folder; a name on the hub as it is."""
    return path if on_hub(path) is not None else pinned(_whole(path))


def _whole(path: str) -> str:
    return str(Path(path).expanduser().resolve())
