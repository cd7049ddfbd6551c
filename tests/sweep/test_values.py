"""Tests how values are found by equal values and by texts."""

import numpy as np
import pytest

from sega_jax.sweep.reporting.values import exact, find, show

VALUES = [
    5.0,
    "5",
    None,
    "never",
    True,
    "true",
    False,
    1,
    ("hat", "glasses"),
    "hat + glasses",
    (),
    (64, 32),
    "",
    "A cat",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("5", 5.0), ("5.0", 5.0), ("5e0", 5.0), ("05", 5.0), ('"5"', "5"), ("1", 1), ("1.0", 1)),
        *(("never", None), ('"never"', "never"), ("true", True), ('"true"', "true"), ("True", True), ("false", False)),
        *(('["hat", "glasses"]', ("hat", "glasses")), ("hat + glasses", "hat + glasses"), ("none", ()), ("[]", ())),
        *(("64, 32", (64, 32)), ("[64, 32.0]", (64, 32)), ("", ""), ("A cat", "A cat")),
    ],
)
def test_texts_name_values(text, value):
    (found,) = find(text, VALUES, as_text=True)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["TRUE", "Never", "a cat", "50", "5.01", "nan", "[", '["hat"]', '"A cat', "None"])
def test_other_texts_name_nothing(text):
    assert find(text, VALUES, as_text=True) == []


def test_displayed_lists_name_lists():
    assert find("hat + glasses", [("hat",), ("hat", "glasses")], as_text=True) == [("hat", "glasses")]
    assert find("a + b + c", [("a + b", "c"), ("a", "b + c")], as_text=True) == [("a + b", "c"), ("a", "b + c")]


def test_rounded_numbers_name_all_numbers_that_are_displayed_like_them():
    values = [0.12345671, 0.12345672, 0.5]
    assert show(values[0]) == show(values[1])
    assert find(show(values[0]), values, as_text=True) == values[:2]
    assert find("0.12345671", values, as_text=True) == values[:1]


@pytest.mark.parametrize("value", VALUES)
def test_exact_texts_name_a_single_value(value):
    (found,) = find(exact(value), VALUES, as_text=True)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        *((5, 5.0), ("5", "5"), ("5.0", 5.0), (np.int64(1), 1), (np.True_, True), (None, None), ("never", "never")),
        *((["hat", "glasses"], ("hat", "glasses")), ("none", ()), ([], ()), (np.array([64, 32]), (64, 32))),
    ],
)
def test_equal_values_come_before_texts(given, value):
    (found,) = find(given, VALUES)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("given", [0, 2, [5], {}, object(), float("nan"), b"5"])
def test_unknown_values_are_not_found(given):
    assert find(given, VALUES) == []
