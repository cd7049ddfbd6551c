"""`sega-jax info`: prints the settings of a picture and the command that reproduces it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sega_jax.cli import adapters, animation, stages
from sega_jax.cli.concepts import complete, format_edit
from sega_jax.cli.options import command_words, load_arguments, shell_arguments
from sega_jax.cli.terminal import echo, json_on_stdout, json_option, quoted
from sega_jax.method.arguments import arguments
from sega_jax.method.guidance import Edit
from sega_jax.pipelines import stored_settings
from sega_jax.pipelines.help_pages import Command
from sega_jax.pipelines.load_options import LoadOptions
from sega_jax.pipelines.progress import plainly
from sega_jax.pipelines.recommended import recommendable
from sega_jax.systems.call import Call, Seeds
from sega_jax.systems.images import Pictures
from sega_jax.systems.registry import named


@click.command("info", cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@json_option("settings (as they are stored in the file) and command (the list of its words)")
def info(file: Path, as_json: bool) -> None:
    """Prints a picture's settings and command.

    FILE is a picture, a sheet or an animation that `sega-jax edit` wrote, or a picture that a sweep wrote. The last
    line is the command that reproduces the file.

    \b
    Example:
      sega-jax info sega-jax-out/0001-edited.png
    """
    with plainly(), json_on_stdout(as_json) as write_json:
        known = stored_settings.read(file)
        stored = dict(known)
        try:
            edits = [Edit(**one) for one in known["edits"]]
            known["edits"] = [format_edit(one) for one in edits]
            words = _words(known)
            if isinstance(known.get("seed"), list):
                known["seed"] = arguments(Call)["seed"].kind.show(known["seed"])
            known["edits"] = [complete(one, known) for one in edits]
            if not all(isinstance(word, str) for word in words):
                raise TypeError("the command has arguments that are not strings")
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
            raise ValueError(
                f"{file} has settings that this version of sega-jax cannot read; was it written by a later version?"
            ) from None
        write_json({"settings": stored, "command": words})
        if as_json:
            return
        if known["model"] is None:
            known["model"] = "the demo model"
        shown = {name: value for name, value in known.items() if value is not None}
        width = max(map(len, shown)) + 1
        for name, value in shown.items():
            if name == "edits":
                for number, line in enumerate(value or ["none"]):
                    echo(f"{name if number == 0 else '':{width}}{line}")
            else:
                echo(f"{name:{width}}{_shown(value)}")
        echo(f"\n{quoted(words)}")


def _words(known: Mapping[str, Any]) -> list[str]:
    """Returns the shell command, as a list of arguments, that makes a picture with the given settings.

    The command names all settings that a checkpoint can recommend, so that it does not depend on recommendations.
    """
    words = ["sega-jax", "edit"]
    for name in ("model", "revision"):
        words += [] if known.get(name) is None else [f"--{name}", known[name]]
    words += ["--prompt", known["prompt"]]
    for one in known["edits"]:
        words += ["--edit", one]
    system = named(known.get("system", "stable_diffusion"))
    defaults = {"seed": 0} | dict.fromkeys(recommendable(system))
    call = {name: _tuples(value) for name, value in known.items()}
    for name, one in shell_arguments(system.call).items():
        # A picture's file may be missing, but the other values should be valid.
        if call.get(name) is not None and not isinstance(one.kind, Pictures | Seeds):
            one.kind.check_one(name, call[name])
    words += command_words(system.call, call, defaults)
    words += animation.words(known)
    words += stages.words(known)
    load = {name: value for name, value in known.items() if name != "revision"}
    words += command_words(LoadOptions, {name: value for name, value in load.items() if name in load_arguments()}, {})
    return words + adapters.command_words(known)


def _shown(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tuples(value: Any) -> Any:
    # JSON stores tuples as lists.
    return tuple(value) if isinstance(value, list) else value
