"""Help pages of the shell commands: options in sections, and lines that break only at spaces."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

# In characters. Longer lines are harder to read, even in wider terminals.
WIDTH = 100
_HELP_ALL = "sega_jax.help_all"
# Stand-ins for hyphens, and for spaces inside commands, so that lines do not break there.
_HYPHEN, _SPACE = "\u2011", "\u00a0"
_CLICK_RANGE = re.compile(r"([-\d.]+)(<=?)x(<=?)([-\d.]+)")  # click's notation, such as "0<x<=1"


class _Formatter(click.HelpFormatter):
    """Keeps options, names and commands in backquotes on one line, so that they can be read and copied."""

    def write_text(self, text: str) -> None:
        super().write_text(_unbroken(text))

    def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(term, _unbroken(_plain_range(text))) for term, text in rows], col_max, col_spacing)

    def getvalue(self) -> str:
        return super().getvalue().replace(_HYPHEN, "-").replace(_SPACE, " ")


class _Context(click.Context):
    formatter_class = _Formatter


class Command(click.Command):
    """A command whose help page lists its options in sections.

    Args:
        sections: {title: names of parameters}. Other options come first, under "Options".
    """

    context_class = _Context

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sections = sections or {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options in sections."""
        for title, rows in sectioned(ctx, self.get_params(ctx), self._sections).items():
            write_section(formatter, title, rows)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
    context_class = _Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the commands in the order of their definitions."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the first sentence about each command."""
        write_section(formatter, "Commands", [(name, _first_sentence(one)) for name, one in self.commands.items()])


Rows = Sequence[tuple[str, str]]


def sectioned(
    ctx: click.Context, params: Sequence[click.Parameter], sections: Mapping[str, Sequence[str]]
) -> dict[str, Rows]:
    """Returns {title: (option, help) of each option} for the sections that are not empty.

    Options that no section names come first, under "Options".
    """
    options = [one for one in params if isinstance(one, click.Option)]
    records = {one.name: record for one in options if (record := one.get_help_record(ctx)) is not None}
    named = {name for names in sections.values() for name in names}
    first = [name for name in records if name not in named]
    rows = {title: [records[name] for name in names if name in records] for title, names in sections.items()}
    return {title: listed for title, listed in {"Options": [records[name] for name in first], **rows}.items() if listed}


def write_section(formatter: click.HelpFormatter, title: str, rows: Rows) -> None:
    """Writes a section of terms and their explanations."""
    with formatter.section(title):
        formatter.write_dl(rows)


def help_all_option() -> click.Option:
    """Returns the option --help-all, which prints a help page for which `shows_all` is true."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[_HELP_ALL] = True
            click.echo(ctx.get_help())
            ctx.exit()

    options: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": show}
    return click.Option(["--help-all"], help="Show all options and exit.", **options)


def shows_all(ctx: click.Context) -> bool:
    """Returns whether the help page that is being written shows all options."""
    return bool(ctx.meta.get(_HELP_ALL))


def _first_sentence(command: click.Command) -> str:
    return command.get_short_help_str(limit=1000)


def _unbroken(text: str) -> str:
    code = re.sub(r"`[^`]*`|\b(default|range): ", lambda match: match[0].replace(" ", _SPACE), text)
    return code.replace("-", _HYPHEN)


def _plain_range(text: str) -> str:
    """Replaces click's notation for ranges with words."""

    def words(match: re.Match[str]) -> str:
        low, from_low, to_high, high = match.groups()
        return f"range: {'' if '=' in from_low else 'above '}{low} to {'' if '=' in to_high else 'below '}{high}"

    return _CLICK_RANGE.sub(words, text)
