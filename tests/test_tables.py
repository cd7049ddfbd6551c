"""Checks that the tables in markdown files and notebooks equal those generated from the benchmarks' results."""

import json
import re

import pytest
from benchmarks import tables

from sega_jax.demo.evaluate import report

FILES = {str(path.relative_to(tables.ROOT)): path for path in tables.documents() if "<!-- end -->" in path.read_text()}


@pytest.mark.parametrize("name", FILES)
def test_tables_are_what_is_printed(name):
    for text in tables.texts(FILES[name]):
        assert text == tables.refreshed(text), "run python tests/benchmarks/tables.py --write"
        assert len(tables.MARKER.findall(text)) == text.count("<!-- end -->")


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_names_its_command_and_versions(name):
    head, rule, *rows, blank, caption = tables.TABLES[name]().splitlines()
    assert rows
    assert not blank
    assert {line.count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert re.search(r"`.*python (tests/benchmarks/\w+\.py|-m [\w.]+)", caption)
    assert "jax " in caption


def test_a_changed_number_is_seen():
    text = tables.refreshed("Before\n\n<!-- speed: command -->\n<!-- end -->\n\nAfter\n")
    assert "432 ms" in text
    assert text.startswith("Before\n\n<!-- speed: python tests/benchmarks/tables.py speed -->\n\n|")
    assert tables.refreshed(text) == text
    assert tables.refreshed(text.replace("432 ms", "423 ms")) == text


@pytest.mark.parametrize(
    "path", sorted([*tables.RESULTS.glob("*.json"), *tables.EVALUATION.glob("*.json")]), ids=lambda path: path.name
)
def test_results_contain_no_absolute_paths(path):
    assert re.search(r'"(/\w|[A-Z]:\\)', path.read_text()) is None


@pytest.mark.parametrize("path", sorted(tables.EVALUATION.glob("*.json")), ids=lambda path: path.name)
def test_evaluations_are_those_of_their_results(path):
    assert path.with_suffix(".md").read_text() == report.tables(json.loads(path.read_text()))
