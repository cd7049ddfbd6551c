"""Defines the `sega-jax edit` options that add adapters (LoRAs and textual inversions) to a model or to any stage of a
cascade."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.cli.options import only_for
from sega_jax.cli.stages import later_stages
from sega_jax.method.checks import check_float
from sega_jax.method.naming import assignment
from sega_jax.pipelines.cascade import FIRST
from sega_jax.pipelines.load_options import ADAPTERS
from sega_jax.systems.base import System
from sega_jax.systems.registry import adapter_refusal, check_adapters, systems
from sega_jax.weights.lora_files import on_hub, pinned

_METAVARS = {"lora": "FILE[:SCALE]", "textual_inversion": "[WORD=]FILE"}
_HELP = {
    "lora": "A LoRA (a small change of the weights) to apply: a file, its folder, or owner/name on the hub. SCALE is"
    " its strength, by default 1.",
    "textual_inversion": 'A textual inversion (a learned word) for prompts, as in "<cat-toy>=cat.safetensors".',
}


def options() -> list[click.Option]:
    """Returns the adapter options for the --model checkpoint, and for the later stages that support adapters."""
    listed = []
    for name in ADAPTERS:
        titles = [one.title for one in systems().values() if adapter_refusal(one, name) is None]
        help = f"{_HELP[name]} May be given several times. {only_for(titles)}".strip()
        listed.append(_option(name, "", help))
    for stage, system in later_stages().items():
        for name in ADAPTERS:
            if adapter_refusal(system, name) is None:
                listed.append(_option(name, f"{stage}-", f"Like {_option_name(name)}, for this stage."))
    return listed


def _option(name: str, prefix: str, help: str) -> click.Option:
    return click.Option([f"--{prefix}{name.replace('_', '-')}"], multiple=True, metavar=_METAVARS[name], help=help)


def _option_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def names() -> list[str]:
    """Returns the names of the parameters that this module's options provide."""
    return [one.name or "" for one in options()]


def check_family(system: System, given: Mapping[str, Any]) -> None:
    """Checks that the family of the --model checkpoint supports the adapters that were given for it.

    Raises:
        ValueError: the family does not support these adapters.
    """
    check_adapters(system, {name: given[name] for name in ADAPTERS if name in given}, _option_name)


def check(chosen: Mapping[str, Any], stages: Mapping[str, Any]) -> None:
    """Checks adapters as far as possible without reading a checkpoint.

    Args:
        chosen: {parameter: value} for the options that were given.
        stages: {parameter: value} for the given options that belong to later stages.

    Raises:
        FileNotFoundError, ValueError: a file or folder is missing or is given twice; a folder does not contain exactly
            one LoRA; several textual inversions are given, but one has no word; or an option belongs to a stage that
            was not given.
    """
    tokenizer = chosen.get("tokenizer")
    if tokenizer is not None and not (tokenizer and Path(tokenizer).expanduser().is_dir()):
        raise FileNotFoundError(f"{assignment('--tokenizer', tokenizer)} is not a folder; correct the path")
    for name in (name for name in names() if name in chosen):
        option = _option_name(name)
        stage = _stage(name)
        if stage != FIRST and stage not in stages:
            raise ValueError(
                f"{option} is given without --{stage}; name that stage's checkpoint, or leave {option} out"
            )
        _check_files(option, _pairs(chosen, name))


def _check_files(option: str, pairs: list[tuple[str, Any]]) -> None:
    # For LoRAs, the second entry of a pair is a scale instead of a word.
    words = [word for _, word in pairs if isinstance(word, str)]
    for path, word in pairs:
        if not _is_file(path) and (isinstance(word, str | None) or on_hub(path) is None):
            raise FileNotFoundError(f"{option} {path} is not a file; correct the path")
        if [other for other, _ in pairs].count(path) > 1:
            raise ValueError(f"{option} {path} is given twice; leave one out")
        if word is None and len(pairs) > 1:
            raise ValueError(f"{option} {path} needs a word, as in <word>={Path(path).name}")
        if words.count(word) > 1:
            raise ValueError(f"{option} {word} is given twice; leave one out")


def read(chosen: Mapping[str, Any], stage: str = FIRST) -> dict[str, Any]:
    """Returns the adapters of a stage as arguments for `load`. Without a cascade, the checkpoint is the first stage."""
    adapters: dict[str, Any] = {}
    for option in ADAPTERS:
        name = option if stage == FIRST else f"{stage}_{option}"
        if name not in chosen:
            continue
        by_path = dict(_pairs(chosen, name))
        if option == "lora":
            adapters[option] = by_path
        else:
            words = {word: path for path, word in by_path.items()}
            adapters[option] = words.get(None, words)
    return adapters


def by_stage(chosen: Mapping[str, Any], stages: list[str]) -> dict[str, dict[str, Any]]:
    """Returns the adapters of a cascade's stages as arguments for `load_cascade`."""
    of_stages = {stage: read(chosen, stage) for stage in stages}
    return {
        f"{option}s": {stage: files[option] for stage, files in of_stages.items() if option in files}
        for option in ADAPTERS
    }


def located(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the given options in a form that works in any folder, with absolute paths and with commits for hub
    names."""
    located = {name: value for name, value in chosen.items() if value not in (None, ()) and value is not False}
    paths = {name: located[name] for name in ("tokenizer", "config", "unet", "vae") if name in located}
    # A path that does not exist is treated as a name on the hub.
    located |= {name: _absolute(path) for name, path in paths.items() if Path(path).expanduser().exists()}
    for name in (name for name in names() if name in located):
        pairs = _pairs(chosen, name)
        if name.endswith("lora"):
            # `pinned` adds the commit to a name on the hub, so that the command always loads the same file.
            located[name] = [f"{pinned(path)}:{scale!r}" for path, scale in pairs]
        else:
            located[name] = [path if word is None else f"{word}={path}" for path, word in pairs]
    return located


def command_words(known: Mapping[str, Any]) -> list[str]:
    """Returns the command-line arguments that set the given options, which must come from `located`."""
    return [word for name in names() for one in known.get(name) or () for word in (_option_name(name), one)]


def _stage(name: str) -> str:
    """Returns the stage that a parameter belongs to."""
    return next((stage for stage in later_stages() if name.startswith(f"{stage}_")), FIRST)


def _pairs(chosen: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    """Returns (file, scale) for each LoRA in an option's value, or (file, word or None) for each textual inversion."""
    read = _lora if name.endswith("lora") else _word
    if "" in chosen[name]:
        raise ValueError(f"{_option_name(name)} '' is empty; give a file, or leave the option out")
    return [read(_option_name(name), text) for text in chosen[name]]


def _lora(option: str, text: str) -> tuple[str, float]:
    path, colon, scale = text.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(text)):
        return _located(text), 1.0
    try:
        return _located(path), check_float(f"{option} {path}: the scale", float(scale))
    except ValueError:
        raise ValueError(f"{option} {text}: the scale {scale!r} should be a finite number like 0.8") from None


def _word(option: str, text: str) -> tuple[str, str | None]:
    del option
    word, equals, path = text.partition("=")
    return (_absolute(path), word) if equals and not _is_file(text) else (_absolute(text), None)


def _is_file(path: str) -> bool:
    return Path(path).expanduser().is_file()


def _located(path: str) -> str:
    """Returns the absolute path of a LoRA file, given the file or its folder. Hub names are returned unchanged."""
    return path if on_hub(path) is not None else pinned(_absolute(path))


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())
