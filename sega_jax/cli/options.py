"""Derives the shell options from the declared arguments of calls and of `load`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import click

from sega_jax.demo.settings import RECOMMENDED
from sega_jax.method.argument_kinds import Choice, Flag
from sega_jax.method.arguments import REQUIRED, Argument, arguments
from sega_jax.pipelines.load_options import ADAPTERS, LoadOptions
from sega_jax.systems.base import System
from sega_jax.systems.registry import in_words, systems

# The maximum number of seeds that fit on one readable sheet.
MOST_SEEDS = 256
# The largest number of defaults that an abridged help text lists.
_MOST_DEFAULTS = 2
# Ranges that are narrower in the shell.
_RANGES = {"images_per_prompt": f"1 to {MOST_SEEDS}"}
# Arguments of a call that have separate options in `edit`.
_OWN = ("prompt", "edits")
# Options of `load` that depend on the machine. The command that reproduces a picture omits them.
OF_THIS_MACHINE = ("devices",)


def shell_arguments(declaration: type) -> dict[str, Argument]:
    """Returns {name: argument} for the declared arguments that have a shell option."""
    return {name: one for name, one in arguments(declaration).items() if one.shell and name not in _OWN}


def load_arguments() -> dict[str, Argument]:
    """Returns the arguments of `load` that have a shell option, except those in `sega_jax.cli.adapters`."""
    return {name: one for name, one in shell_arguments(LoadOptions).items() if name not in ADAPTERS}


def option(argument: Argument, *, prefix: str = "", help: str | None = None) -> click.Option:
    """Returns the shell option for an argument. Its value stays text until the family is known.

    Args:
        prefix: the prefix of the option's name, such as "stage2-" for a stage of a cascade.
        help: the help text; if None, it is derived from the argument.
    """
    name = f"--{prefix}{argument.option.removeprefix('--')}"
    text = f"{sentence(argument)}{bracketed([default_of(argument)], argument.kind.range)}" if help is None else help
    if isinstance(argument.kind, Flag):
        if argument.default is True:
            return click.Option([f"{name}/--no-{name.removeprefix('--')}"], default=None, help=text)
        return click.Option([name], is_flag=True, default=None, help=text)
    kind = click.Choice(argument.kind.names) if isinstance(argument.kind, Choice) else None
    metavar = None if kind else argument.unit.upper() or argument.kind.metavar
    if argument.kind.flag_value is not None:
        return click.Option([name], is_flag=False, flag_value=argument.kind.flag_value, metavar=metavar, help=text)
    return click.Option([name], type=kind, metavar=metavar, help=text)


def not_empty(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Checks that a path is not empty, because it would mean the current folder. The function is a click callback."""
    if value == "":
        raise click.BadParameter("it is empty; give a path", ctx, parameter)
    return value


def call_options(every_default: bool = True) -> list[click.Option]:
    """Returns the options for all families' calls. Each help text names the families that have the option, and their
    defaults.

    Args:
        every_default: whether to name the default of every family. Otherwise, long lists are abridged.
    """
    return [_shared_option(name, having, every_default) for name, having in families().items()]


def families() -> dict[str, list[System]]:
    """Returns {argument: families that have it} for the arguments of calls that have a shell option."""
    having: dict[str, list[System]] = {}
    for system in systems().values():
        for name in shell_arguments(system.call):
            having.setdefault(name, []).append(system)
    return having


def only_for(titles: list[str]) -> str:
    """Returns a help-text sentence that names the families that have an option, or "" if all families have it."""
    others = [system.title for system in systems().values() if system.title not in titles]
    if not others:
        return ""
    return f"Not for {in_words(others)}." if len(others) < len(titles) else f"Only for {in_words(titles)}."


def sentence(*declared: Argument) -> str:
    """Returns the help texts of an argument's declarations as one sentence."""
    text = "; or ".join(dict.fromkeys(one.shell_help or one.help for one in declared))
    return f"{text[:1].upper()}{text[1:]}."


def default_of(argument: Argument) -> str:
    """Returns an argument's default for a help text; "" if an absent option needs no explanation."""
    if argument.default is True:
        return "on"
    if argument.default_text or argument.default in (None, False, REQUIRED):
        return argument.default_text
    return plain(argument.kind.show(argument.default))


def plain(number: str) -> str:
    """Removes the decimals of whole numbers."""
    return re.sub(r"\.0\b", "", number)


def bracketed(defaults: list[str], range: str) -> str:
    """Returns the end of a help text, such as "  [default: 0.1; range: 0 to 1]"."""
    listed = "; ".join(filter(None, defaults))
    parts = [f"default: {listed}" if listed else "", f"range: {range}" if range else ""]
    return f"  [{'; '.join(filter(None, parts))}]" if any(parts) else ""


def _shared_option(name: str, having: list[System], every_default: bool) -> click.Option:
    declared = {system.title: arguments(system.call)[name] for system in having}
    first = next(iter(declared.values()))
    hints = dict.fromkeys(one.kind.shell_hint for one in declared.values())
    # The help page of `edit` lists the options of a single family in a section of their own.
    limits = only_for(list(declared)) if len(declared) > 1 else ""
    text = " ".join(filter(None, [sentence(*declared.values()), *hints, limits]))
    defaults: dict[str, list[str]] = {}
    for title, one in declared.items():
        if default := default_of(one):
            defaults.setdefault(default, []).append(title)
    listed = [f"{value} for {in_words(titles)}" for value, titles in defaults.items()]
    listed = list(defaults) if len(defaults) == 1 else listed
    recommended = RECOMMENDED.call
    if len(listed) > _MOST_DEFAULTS and not every_default:
        listed = [f"{next(iter(defaults))} for {next(iter(declared))}", "for others, see --help-all"]
    if name in recommended and recommended[name] != first.default:
        demo = f"{plain(first.kind.show(recommended[name]))} for the demo model"
        listed = [f"{demo}, otherwise {listed[0]}"] if len(listed) == 1 else [demo, *listed]
    return option(first, help=text + bracketed(listed, _RANGES.get(name, first.kind.range)))


def parsed(declaration: type, given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Converts the values of the given options to arguments for a call or for `load`.

    Raises:
        FileNotFoundError, TypeError, ValueError: a value has the wrong type or is out of range; the message names the
            option.
    """
    declared, values = arguments(declaration), {}
    for name, value in given.items():
        one = declared[name]
        label = f"--{prefix}{one.option.removeprefix('--')}"
        values[name] = value if isinstance(value, bool) else one.kind.parse(label, value)
    return values


def check_early(given: Mapping[str, Any]) -> None:
    """Checks, without reading a checkpoint, that each value is valid for at least one family.

    Raises:
        FileNotFoundError, TypeError, ValueError: a value is not valid for any family.
    """
    for name, value in given.items():
        errors = []
        for system in systems().values():
            if name in shell_arguments(system.call):
                try:
                    parsed(system.call, {name: value})
                    break
                except (OSError, TypeError, ValueError) as error:
                    errors.append(error)
        else:
            raise errors[0]


def check_family(system: System, model: str, given: Iterable[str]) -> None:
    """Checks that a family's calls accept the given options.

    Args:
        model: the checkpoint's name, for error messages.

    Raises:
        ValueError: an option is not available for this family.
    """
    known = shell_arguments(system.call)
    for name in given:
        if name not in known:
            having = [one.title for one in systems().values() if name in shell_arguments(one.call)]
            option = name.replace("_", "-")
            raise ValueError(f"--{option} applies to {in_words(having)}, but {model} is {system.title}; leave it out")


def command_words(declaration: type, known: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> list:
    """Returns the command-line arguments that set all values that differ from the defaults."""
    words: list[str] = []
    for name, one in shell_arguments(declaration).items():
        value = known.get(f"{prefix}{name}".replace("-", "_"))
        label = f"--{prefix}{one.option.removeprefix('--')}"
        if value is None or value == defaults.get(name, one.default):
            continue
        if isinstance(one.kind, Flag) or (value is True and one.kind.flag_value is not None):
            words.append(label if value else f"--no-{label.removeprefix('--')}")
        else:
            words += [label, value if isinstance(value, str) else one.kind.show(value)]
    return words
