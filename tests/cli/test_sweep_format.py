"""The description of sweep files in `sega-jax sweep --help`, and the file that `sega-jax sweep --example` prints."""

import re
import tomllib

import pytest
from click.testing import CliRunner

from sega_jax import sweep
from sega_jax.cli.main import main
from sega_jax.sweep.description import fields

TABLES = ("model", "call", "edits", "grid", "zip", "sample")


def run(*words):
    result = CliRunner().invoke(main, ["sweep", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(run("--example"))
    return path


def test_the_example_has_every_table_and_every_form_of_an_axis(example):
    content = tomllib.loads(example.read_text())
    assert content.keys() == {"format", *TABLES}
    for form in ("{ from =", "{ file =", "{ glob =", "{ low =", '"never"', "[[zip]]"):
        assert form in example.read_text()
    assert example.read_text().isascii()
    assert max(map(len, example.read_text().splitlines())) <= 80


def test_the_example_is_valid_and_small(example):
    described = sweep.Sweep.read(example)
    assert len(described) == 16
    plan = sweep.plan(described, sweep.Facts.of(described), rows=4)
    assert plan.counts.evaluations < plan.counts.alone


@pytest.mark.slow
def test_the_example_runs_on_the_demo_model(example, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = example.read_text()
    assert text.count("steps = 12\n") == 1
    example.write_text(text.replace("steps = 12\n", "steps = 4\n"))  # to save time
    assert "Made 16 pictures" in run(example, "--out", tmp_path / "out")


def test_lines_of_the_example_without_a_comment_sign_are_valid(example, tmp_path):
    """Every setting that is commented out works if its comment sign is removed and it replaces the other lines."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "photos").mkdir()
    settings = re.findall(r"^# (\w+ = [^#\n]+)", example.read_text(), re.MULTILINE)
    assert len(settings) == 5
    edits = {"glasses": {}, "serious": {"concept": "smile"}}
    for line in settings:
        ((name, value),) = tomllib.loads(line).items()
        if name in ("source", "dtype"):
            sweep.Sweep(model={name: value}, call={"prompt": "a cat"})
        elif name == "image":
            assert value == {"glob": "photos/*.png"}
        else:
            call = {} if name == "prompt" else {"prompt": "a cat"}
            assert len(sweep.Sweep(call=call, edits=edits, grid={name: value}, folder=tmp_path)) > 1


def test_the_help_page_describes_the_format(example):
    text = run("--help")
    for part in ("format =", "[model]", "[call]", "[edits.NAME]", "[grid]", "[zip]", "[[zip]]", "[sample]", "`count`"):
        assert part in text
    for part in ("{ from = 0, count = 8 }", "{ file =", "{ glob =", "{ low =", '"never"', "`key`", "`step`"):
        assert part in text
    for name in [*fields.names(), *fields.edit_settings()]:
        assert re.search(rf"\b{name}\b", text), name


def test_a_file_named_like_an_option_is_not_hidden_by_the_example():
    result = CliRunner().invoke(main, ["sweep", "--dry-run", "nowhere.toml"])
    assert "nowhere.toml does not exist" in result.output
