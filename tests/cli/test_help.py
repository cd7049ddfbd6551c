"""The help pages of all commands: which options they list, how wide they are, and how they are worded."""

import re

import click
import pytest
from click.testing import CliRunner

from convert.__main__ import main as convert
from sega_jax.cli.main import main

PAGES = [
    *(["--help"], ["edit", "--help"], ["edit", "--help-all"], ["info", "--help"], ["verify", "--help"]),
    *(["sweep", "--help"], *(["sweep", name, "--help"] for name in main.commands["sweep"].commands)),
]
PAGES = [(main, words) for words in PAGES] + [(convert, ["--help"])]


def page(command, *words, width=80):
    # Click leaves two columns of a terminal empty.
    result = CliRunner().invoke(command, words, prog_name="sega-jax", terminal_width=width - 2)
    assert result.exit_code == 0, result.output
    return result.output


def titles(text):
    return [line.removesuffix(":") for line in text.splitlines() if re.match("[A-Z].*:$", line)]


def options(text):
    lines = text[text.index("Options:") :].splitlines()
    return [line.split()[0].rstrip(",") for line in lines if line.startswith("  -")]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("command", "words"), PAGES, ids=[" ".join(words) for _, words in PAGES])
def test_pages_fit_into_a_terminal_and_keep_words_whole(command, words, width):
    text = page(command, *words, width=min(width, 100))
    for line in text.splitlines():
        assert len(line) <= width - 2, line
        assert not re.search(r"\w-$", line), "a line ends inside a word"
    assert not set(text) - set(map(chr, range(32, 127))) - {"\n"}


@pytest.mark.parametrize(("command", "words"), PAGES, ids=[" ".join(words) for _, words in PAGES])
def test_every_option_is_explained_in_words_of_the_shell(command, words):
    context = click.Context(command)
    for name in words[:-1]:
        command = command.commands[name]
        context = click.Context(command, parent=context)
    for one in command.get_params(context):
        if isinstance(one, click.Option):
            _, text = one.get_help_record(context)
            assert re.match(r"[A-Z].*[.\]]$", text), f"{one.opts}: {text}"
            assert not re.search(r"\bNone\b|\bpipe\.|sega_jax\.|`strict`", text), f"{one.opts}: {text}"


def test_the_short_page_of_edit_lists_the_common_options():
    text = page(main, "edit", "--help")
    assert titles(text)[0] == "Options"
    assert titles(text)[1].startswith("Settings of a concept")
    assert len(titles(text)) == 2
    assert options(text)[:6] == ["--prompt", "--edit", "--seed", "--images-per-prompt", "--model", "--out"]
    assert len(options(text)) < 20
    assert "--help-all" in options(text)
    assert text.index("sega-jax edit --prompt") < text.index("Options:")


def test_the_full_page_of_edit_lists_every_option_once():
    text = page(main, "edit", "--help-all")
    assert len(titles(text)) > 9
    assert len(options(text)) == len(set(options(text)))
    names = {option.removeprefix("--").replace("-", "_") for option in options(text)}
    context = click.Context(main.commands["edit"])
    expected = {one.name for one in main.commands["edit"].get_params(context) if "--help" not in one.opts}
    assert names - {"edit", "json", "_h"} == expected - {"edits", "as_json"}
    for title, option in (("Only for Paella:", "--temperature"), ("Only for Stable Diffusion XL:", "--target-size")):
        assert f"  {option} " in text.partition(f"\n{title}\n")[2].partition("\n\n")[0]


def test_the_page_of_edit_lists_the_settings_of_concepts():
    _, _, rest = page(main, "edit", "--help").partition("Settings of a concept")
    listed = re.findall(r"^  ([a-z]\w*) ", rest, re.MULTILINE)
    assert listed == ["scale", "threshold", "warmup", "cooldown", "weight", "momentum_scale", "momentum_beta"]


def test_pages_use_the_notation_of_the_shell():
    edit = " ".join(page(main, "edit", "--help-all").split())
    assert "write a minus before the concept to remove it" in edit
    assert "a negative scale removes" not in edit
    assert "range: at least 1 or negative]" in edit
    sweep = " ".join(page(main, "sweep", "run", "--help").split())
    assert "in common only once. [default: on]" in sweep


def test_commands_are_listed_with_whole_sentences():
    text = page(main, "sweep", "--help")
    commands = text.partition("Commands:\n")[2].partition("\n\n")[0]
    assert "..." not in commands
    assert re.findall(r"^  (\w+) ", commands, re.MULTILINE)[:3] == ["run", "status", "measure"]
    assert "range: above 0 to 1]" in page(main, "verify", "--help")
