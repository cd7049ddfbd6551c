"""Declared arguments: what their kinds take, how they are checked and documented, and which names are known."""

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest

from sega_jax.method.argument_kinds import Choice, Flag, Integer, Kind, Opaque, Pair, Real, Words
from sega_jax.method.arguments import (
    REQUIRED,
    Argument,
    argument,
    arguments,
    changed,
    check_arguments,
    declared_by,
    required,
    takes,
    unknown_arguments,
)


@dataclasses.dataclass(frozen=True)
class Ride:
    """A ride on a camel."""

    name: str = dataclasses.field(metadata=required(Words(), "what the camel is called"))
    _: dataclasses.KW_ONLY
    humps: int = argument(2, Integer(1, 3), "how many there are", unit="humps", sweep=True, shell=True)
    wobble: Any = argument(0.5, Real(0, 1, "0 is none"), "how far it trembles", varies="row")
    path: Any = argument(None, Opaque("an array [steps, 2]"), "where it goes")
    saddle: Any = argument(None, Pair(Integer(1)), "its size", unit="pixels", varies="row")
    note: str = "not an argument"

    def __post_init__(self):
        check_arguments(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRide(Ride):
    """A ride with more of everything."""

    humps: int = changed(Ride, "humps", 3, kind=Integer(1), varies="row")
    weather: str = argument("dry", Choice("dry", "wet"), "what the weather is like")


# Kinds: what they take, and as what


ACCEPTED = [
    (Integer(), -3, -3),
    (Integer(0, 5), np.int64(5), 5),
    (Integer(0), 0, 0),
    (Real(), 2, 2.0),
    (Real(0, 1), np.float32(0.5), 0.5),
    (Real(0, 1), 1, 1.0),
    (Flag(), np.bool_(True), True),
    (Choice("a", "b"), "b", "b"),
    (Words(), "a cat", "a cat"),
    (Pair(Integer(0)), (1, 2), (1, 2)),
    (Pair(Real()), np.array([1.0, 2.0]), (1.0, 2.0)),
    (Pair(Real(), alone=True), 2, (2.0, 2.0)),
    (Kind(), None, None),
]
REFUSED = [
    (Integer(), 1.0, TypeError, "x=1.0 should be a whole number"),
    (Integer(), True, TypeError, "x=True should be a whole number"),
    (Integer(1), 0, ValueError, "x=0 should be at least 1"),
    (Integer(1, 3), 4, ValueError, "x=4 should be from 1 to 3"),
    (Real(), "1", TypeError, "x='1' should be a finite number"),
    (Real(), float("nan"), ValueError, "x=nan should be a finite number"),
    (Real(0, 1), 1.5, ValueError, r"x=1.5 should be a number in \[0, 1\]"),
    (Real(0, 1, "0 is none"), -1, ValueError, r"x=-1 should be a number in \[0, 1\]; 0 is none"),
    (Flag(), 1, TypeError, "x=1 should be True or False"),
    (Choice("a", "b"), "c", ValueError, "x='c' should be one of a, b"),
    (Choice("a", "b"), ["a"], ValueError, r"x=\['a'\] should be one of a, b"),
    (Words(), b"a", TypeError, "x=b'a' should be words"),
    (Pair(Integer(), "two whole numbers"), 3, TypeError, "x=3 should be two whole numbers"),
    (Pair(Integer(), "two whole numbers"), (1, 2, 3), TypeError, r"x=\(1, 2, 3\) should be two whole numbers"),
    (Pair(Integer(1)), (1, 0), ValueError, "x=0 should be at least 1"),
    (Pair(Integer()), (1, "2"), TypeError, "x='2' should be a whole number"),
    (Pair(Real(), "a number, or two", alone=True), (1, 2, 3), ValueError, r"x=\(1, 2, 3\) should be a number, or two"),
    (Pair(Real(), alone=True), np.array(1.0), TypeError, r"x=array\(1.\) should be a finite number"),
]


@pytest.mark.parametrize(("kind", "value", "wanted"), ACCEPTED)
def test_accepted_values(kind, value, wanted):
    found = kind.check("x", value)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(("kind", "value", "error", "words"), REFUSED)
def test_refused_values(kind, value, error, words):
    with pytest.raises(error, match=f"^{words}$"):
        kind.check("x", value)


def test_errors_are_short():
    with pytest.raises(TypeError) as raised:
        Words().check("x", list(range(1000)))
    assert len(str(raised.value)) < 120


# Kinds: text from the shell, and back


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Integer(0), "3", 3),
        (Real(0, 1), "0.25", 0.25),
        (Real(), "1e-3", 0.001),
        (Flag(), "true", True),
        (Flag(), "false", False),
        (Choice("a", "b"), "a", "a"),
        (Words(), "a cat", "a cat"),
        (Pair(Integer(0)), "3,4", (3, 4)),
        (Pair(Real(), alone=True), "0.5", (0.5, 0.5)),
        (Pair(Real(), alone=True), "1.2,0.2", (1.2, 0.2)),
    ],
)
def test_text_of_the_shell(kind, text, value):
    """It is read and checked, and what is written is read as the same."""
    assert kind.parse("--x", text) == value
    assert kind.parse("--x", kind.show(value)) == value


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (Integer(), "1.5", "--x='1.5' should be a whole number"),
        (Integer(0), "-1", "--x=-1 should be at least 0"),
        (Real(), "many", "--x='many' should be a number"),
        (Real(0, 1), "2", r"--x=2.0 should be a number in \[0, 1\]"),
        (Flag(), "yes", "--x='yes' should be one of true, false"),
        (Choice("a", "b"), "c", "--x='c' should be one of a, b"),
        (Pair(Integer(), "two whole numbers"), "3", "--x='3' should be two whole numbers, as"),
        (Pair(Real(), "a number, or two", alone=True), "1,2,3", "--x='1,2,3' should be a number, or two, as"),
    ],
)
def test_text_that_makes_no_sense(kind, text, words):
    with pytest.raises(ValueError, match=words):
        kind.parse("--x", text)


@pytest.mark.parametrize(
    ("kind", "value", "column", "cell"),
    [
        (Integer(), 3, "int64", 3),
        (Real(), 0.5, "float64", 0.5),
        (Flag(), True, "bool", True),
        (Choice("a", "b"), "a", "string", "a"),
        (Pair(Integer()), (3, 4), "string", "3,4"),
        (Pair(Integer()), None, "string", None),
    ],
)
def test_columns_of_tables(kind, value, column, cell):
    assert kind.columns("x") == {"x": column}
    assert kind.cells("x", value) == {"x": cell}


@pytest.mark.parametrize(
    ("kind", "one", "several"),
    [
        (Real(), [3, np.float32(3)], [[3], (3, 4), np.array([3.0])]),
        (Words(), ["a cat"], [["a", "b"]]),
        (Pair(Integer()), [(3, 4), [3, 4], np.array([3, 4])], [[(3, 4), (5, 6)], np.array([[3, 4]])]),
    ],
)
def test_one_value_or_one_for_each_row(kind, one, several):
    assert not any(kind.several(value) for value in one)
    assert all(kind.several(value) for value in several)


# Declarations


def test_arguments_are_the_declared_fields_in_order():
    found = arguments(Ride)
    assert list(found) == ["name", "humps", "wobble", "path", "saddle"]
    assert [one.name for one in found.values()] == list(found)
    assert [one.default for one in found.values()] == [REQUIRED, 2, 0.5, None, None]
    assert found["humps"].kind == Integer(1, 3)
    assert (found["humps"].sweep, found["humps"].shell, found["humps"].varies) == (True, True, "call")
    assert Argument(Integer(), "", name="noise_level").option == "--noise-level"


def test_a_family_extends_and_changes_arguments():
    found, before = arguments(LongRide), arguments(Ride)
    assert list(found) == [*before, "weather"]
    assert (found["humps"].default, found["humps"].kind, found["humps"].varies) == (3, Integer(1), "row")
    assert (found["humps"].help, found["humps"].unit) == (before["humps"].help, "humps")
    assert before["humps"].default == 2
    assert all(found[name] == one for name, one in before.items() if name != "humps")
    assert LongRide(name="a").humps == 3
    with pytest.raises(KeyError):
        changed(Ride, "wheels", 4)


def test_check_of_an_argument():
    found = arguments(Ride)
    assert found["humps"].check(np.int32(3)) == 3
    with pytest.raises(ValueError, match=r"^humps=4 should be from 1 to 3"):
        found["humps"].check(4)
    with pytest.raises(ValueError, match=r"^Edit 'a': humps=4 should be"):
        found["humps"].check(4, "Edit 'a': humps")
    # None only where it is the default.
    assert found["saddle"].check(None) is None
    with pytest.raises(TypeError, match="humps=None should be a whole number"):
        found["humps"].check(None)


def test_check_of_a_value_for_each_row():
    """Entry by entry; where all rows have one value a list is none."""
    found = arguments(Ride)
    assert found["wobble"].check(np.array([0.0, 1.0])) == [0.0, 1.0]
    assert found["wobble"].check((0, 0.5)) == [0.0, 0.5]
    assert found["saddle"].check([(3, 4), [5, 6]]) == [(3, 4), (5, 6)]
    assert found["saddle"].check((3, 4)) == (3, 4)
    with pytest.raises(ValueError, match=r"wobble=2 should be a number in \[0, 1\]; 0 is none"):
        found["wobble"].check([0.5, 2])
    with pytest.raises(TypeError, match=r"humps=\[1, 2\] should be a whole number"):
        found["humps"].check([1, 2])


def test_a_declaration_checks_its_values_and_keeps_them_checked():
    ride = Ride("a", humps=np.int64(3), wobble=[np.float32(0.5), 1], saddle=[3, 4])
    assert (type(ride.humps), ride.wobble, ride.saddle) == (int, [0.5, 1.0], (3, 4))
    with pytest.raises(TypeError, match="name=3 should be words"):
        Ride(3)
    with pytest.raises(ValueError, match="humps=0 should be"):
        Ride("a", humps=0)
    with pytest.raises(TypeError, match="wobble=None should be"):
        Ride("a", wobble=None)
    assert Ride("a", note=3).note == 3


# Documentation


def test_sentences():
    found = {name: one.documentation for name, one in arguments(Ride).items()}
    assert found == {
        "name": "What the camel is called. Words.",
        "humps": "How many there are. A whole number from 1 to 3 in humps. Default: 2.",
        "wobble": "How far it trembles. A number in [0, 1]. One for all pictures, or one for each prompt or picture."
        " Default: 0.5.",
        "path": "Where it goes. An array [steps, 2].",
        "saddle": "Its size. Two numbers in pixels. One for all pictures, or one for each prompt or picture.",
    }
    weather = arguments(LongRide)["weather"].documentation
    assert weather == """What the weather is like. "dry" or "wet". Default: 'dry'."""


# Methods and functions of a declaration


class Caravan:
    def ride(self, ride: Ride) -> Ride:
        """Rides.

        It is slow.

        Raises:
            ValueError: there are too many humps.
        """
        return ride

    taken = takes(Ride, "a ride")(ride)


@declared_by(LongRide, "the long ride")
def long(ride: LongRide) -> LongRide:
    """Rides far."""
    return ride


def test_a_method_takes_the_arguments():
    found = Caravan().taken("a", humps=1)
    assert isinstance(found, Ride)
    assert (found.name, found.humps, found.wobble) == ("a", 1, 0.5)
    assert Caravan().taken(name="b").name == "b"
    assert isinstance(long(name="c"), LongRide)
    for call in (Caravan().taken, long):
        with pytest.raises(ValueError, match="humps=0 should be"):
            call(name="a", humps=0)
        with pytest.raises(TypeError, match="name"):
            call()
    with pytest.raises(TypeError, match="positional"):
        Caravan().taken("a", 1)


def test_signatures_are_the_declarations():
    names = ["name", "humps", "wobble", "path", "saddle", "note"]
    method, function = inspect.signature(Caravan().taken), inspect.signature(long)
    assert list(method.parameters) == names
    assert list(inspect.signature(Caravan.taken).parameters) == ["self", *names]
    assert method.parameters["humps"].default == 2
    assert method.parameters["humps"].kind is inspect.Parameter.KEYWORD_ONLY
    assert method.return_annotation is Ride
    assert list(function.parameters) == [*names, "weather"]
    assert function.return_annotation is LongRide
    assert (Caravan.taken.__name__, long.__name__) == ("ride", "long")


def test_docstrings_have_every_argument_before_what_is_raised():
    doc = inspect.getdoc(Caravan.taken)
    first, listed, raised = doc.split("\n\n")[0], doc.index("Args:"), doc.index("Raises:")
    assert first == "Rides."
    assert "It is slow." in doc[:listed]
    places = [doc.index(f"    {name}: ") for name in arguments(Ride)]
    assert listed < places[0]
    assert places == sorted(places)
    assert places[-1] < raised
    assert "ValueError: there are too many humps." in doc[raised:]
    assert max(map(len, doc.splitlines())) <= 116
    assert inspect.getdoc(long).startswith("Rides far.\n\nArgs:\n    name: What the camel is called. Words.\n")


# Unknown names


def test_a_similar_name_is_proposed():
    for call, what in ((Caravan().taken, "a ride"), (long, "the long ride")):
        with pytest.raises(TypeError, match=f"wobbel is not an argument of {what}; did you mean wobble?"):
            call(name="a", wobbel=1)


def test_all_names_are_listed_where_none_is_similar():
    with pytest.raises(TypeError, match=r"x is not an argument of a ride; it takes name, humps, wobble, path, saddle$"):
        Caravan().taken("a", x=1)


def test_an_unknown_name_comes_before_wrong_values():
    with pytest.raises(TypeError, match="legs is not an argument"):
        Caravan().taken(3, humps=0, legs=4)
    unknown_arguments(Ride, ["humps", "name"], "a ride")
