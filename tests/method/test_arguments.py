"""Declared arguments: accepted values, checks, documentation, signatures, and errors for unknown names."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sega_jax
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

    name: str = dataclasses.field(metadata=required(Words(), "the name of the camel"))
    _: dataclasses.KW_ONLY
    humps: int = argument(2, Integer(1, 3), "the number of humps", unit="humps", sweep=True, shell=True)
    wobble: Any = argument(0.5, Real(0, 1, "0 means none"), "how far it trembles", varies="row")
    path: Any = argument(None, Opaque("an array [steps, 2]"), "where it goes")
    saddle: Any = argument(None, Pair(Integer(1)), "the size of the saddle", unit="pixels", varies="row")
    note: str = "not an argument"

    def __post_init__(self):
        check_arguments(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRide(Ride):
    """A ride with more of everything."""

    humps: int = changed(Ride, "humps", 3, kind=Integer(1), varies="row")
    weather: str = argument("dry", Choice("dry", "wet"), "what the weather is like")


# Kinds: accepted and rejected values


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
REJECTED = [
    (Integer(), 1.0, TypeError, "x=1.0 should be a whole number"),
    (Integer(), True, TypeError, "x=True should be a whole number"),
    (Integer(1), 0, ValueError, "x=0 should be at least 1"),
    (Integer(1, 3), 4, ValueError, "x=4 should be from 1 to 3"),
    (Real(), "1", TypeError, "x='1' should be a finite number"),
    (Real(), float("nan"), ValueError, "x=nan should be a finite number"),
    (Real(0, 1), 1.5, ValueError, r"x=1.5 should be a number in \[0, 1\]"),
    (Real(0, 1, "0 means none"), -1, ValueError, r"x=-1 should be a number in \[0, 1\]; 0 means none"),
    (Flag(), 1, TypeError, "x=1 should be True or False"),
    (Choice("a", "b"), "c", ValueError, "x='c' should be one of a, b"),
    (Choice("a", "b"), ["a"], ValueError, r"x=\['a'\] should be one of a, b"),
    (Words(), b"a", TypeError, "x=b'a' should be a string"),
    (Pair(Integer(), "two whole numbers"), 3, TypeError, "x=3 should be two whole numbers"),
    (Pair(Integer(), "two whole numbers"), (1, 2, 3), TypeError, r"x=\(1, 2, 3\) should be two whole numbers"),
    (Pair(Integer(1)), (1, 0), ValueError, "x=0 should be at least 1"),
    (Pair(Integer()), (1, "2"), TypeError, "x='2' should be a whole number"),
    (Pair(Real(), "a number, or two", alone=True), (1, 2, 3), ValueError, r"x=\(1, 2, 3\) should be a number, or two"),
    (Pair(Real(), alone=True), np.array(1.0), TypeError, r"x=array\(1.\) should be a finite number"),
]


@pytest.mark.parametrize(("kind", "value", "expected"), ACCEPTED)
def test_accepted_values_are_converted(kind, value, expected):
    checked = kind.check("x", value)
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize(("kind", "value", "error", "message"), REJECTED)
def test_rejected_values(kind, value, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        kind.check("x", value)


def test_errors_abbreviate_long_values():
    with pytest.raises(TypeError) as raised:
        Words().check("x", list(range(1000)))
    assert len(str(raised.value)) < 120


# Kinds: parsing and printing command-line text


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
def test_parse_reads_text_and_inverts_show(kind, text, value):
    assert kind.parse("--x", text) == value
    assert kind.parse("--x", kind.show(value)) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (Integer(), "1.5", "--x 1.5 should be a whole number"),
        (Integer(0), "-1", "--x -1 should be at least 0"),
        (Real(), "many", "--x many should be a number"),
        (Real(0, 1), "2", r"--x 2 should be a number in \[0, 1\]"),
        (Flag(), "yes", "--x yes should be one of true, false"),
        (Choice("a", "b"), "c", "--x c should be one of a, b"),
        (Pair(Integer(), "two whole numbers"), "3", "--x 3 should be two whole numbers, such as"),
        (Pair(Real(), "a number, or two", alone=True), "1,2,3", "--x 1,2,3 should be a number, or two, such as"),
    ],
)
def test_parse_rejects_invalid_text(kind, text, message):
    with pytest.raises(ValueError, match=message):
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
def test_columns_and_cells_of_tables(kind, value, column, cell):
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
def test_kinds_tell_single_values_from_sequences(kind, one, several):
    assert not any(kind.several(value) for value in one)
    assert all(kind.several(value) for value in several)


# Declarations


def test_arguments_are_the_declared_fields_in_order():
    declared = arguments(Ride)
    assert list(declared) == ["name", "humps", "wobble", "path", "saddle"]
    assert [spec.name for spec in declared.values()] == list(declared)
    assert [spec.default for spec in declared.values()] == [REQUIRED, 2, 0.5, None, None]
    assert declared["humps"].kind == Integer(1, 3)
    assert (declared["humps"].sweep, declared["humps"].shell, declared["humps"].varies) == (True, True, "call")
    assert Argument(Integer(), "", name="noise_level").option == "--noise-level"


def test_subclasses_add_and_change_arguments():
    extended, base = arguments(LongRide), arguments(Ride)
    assert list(extended) == [*base, "weather"]
    assert (extended["humps"].default, extended["humps"].kind, extended["humps"].varies) == (3, Integer(1), "row")
    assert (extended["humps"].help, extended["humps"].unit) == (base["humps"].help, "humps")
    assert base["humps"].default == 2
    assert all(extended[name] == spec for name, spec in base.items() if name != "humps")
    assert LongRide(name="a").humps == 3
    with pytest.raises(KeyError):
        changed(Ride, "wheels", 4)


def test_check_accepts_none_only_as_the_default():
    declared = arguments(Ride)
    assert declared["humps"].check(np.int32(3)) == 3
    with pytest.raises(ValueError, match=r"^humps=4 should be from 1 to 3"):
        declared["humps"].check(4)
    with pytest.raises(ValueError, match=r"^Edit 'a': humps=4 should be"):
        declared["humps"].check(4, "Edit 'a': humps")
    assert declared["saddle"].check(None) is None
    with pytest.raises(TypeError, match="humps=None should be a whole number"):
        declared["humps"].check(None)


def test_check_accepts_sequences_only_for_arguments_that_vary_by_row():
    declared = arguments(Ride)
    assert declared["wobble"].check(np.array([0.0, 1.0])) == [0.0, 1.0]
    assert declared["wobble"].check((0, 0.5)) == [0.0, 0.5]
    assert declared["saddle"].check([(3, 4), [5, 6]]) == [(3, 4), (5, 6)]
    assert declared["saddle"].check((3, 4)) == (3, 4)
    with pytest.raises(ValueError, match=r"wobble=2 should be a number in \[0, 1\]; 0 means none"):
        declared["wobble"].check([0.5, 2])
    with pytest.raises(TypeError, match=r"humps=\[1, 2\] should be a whole number"):
        declared["humps"].check([1, 2])


def test_a_declaration_stores_checked_values():
    ride = Ride("a", humps=np.int64(3), wobble=[np.float32(0.5), 1], saddle=[3, 4])
    assert (type(ride.humps), ride.wobble, ride.saddle) == (int, [0.5, 1.0], (3, 4))
    with pytest.raises(TypeError, match="name=3 should be a string"):
        Ride(3)
    with pytest.raises(ValueError, match="humps=0 should be"):
        Ride("a", humps=0)
    with pytest.raises(TypeError, match="wobble=None should be"):
        Ride("a", wobble=None)
    assert Ride("a", note=3).note == 3


# Documentation


def test_documentation_of_arguments():
    sentences = {name: spec.documentation for name, spec in arguments(Ride).items()}
    assert sentences == {
        "name": "The name of the camel. A string.",
        "humps": "The number of humps. A whole number from 1 to 3, in humps. Default: 2.",
        "wobble": "How far it trembles. A number in [0, 1]."
        " One value for all pictures, or a list with a value for each prompt or picture. Default: 0.5.",
        "path": "Where it goes. An array [steps, 2].",
        "saddle": "The size of the saddle. Two numbers, in pixels."
        " One value for all pictures, or a list with a value for each prompt or picture.",
    }
    weather = arguments(LongRide)["weather"].documentation
    assert weather == """What the weather is like. "dry" or "wet". Default: 'dry'."""


def test_documentation_shows_no_path_of_this_machine():
    place = Argument(Kind(), "where it lives", name="place", default=Path.home(), default_text="your home")
    assert place.documentation == "Where it lives. Default: your home."
    assert "Default: the demo model, which draws" in " ".join(sega_jax.load.__doc__.split())
    assert str(Path(sega_jax.__file__).parent) not in sega_jax.load.__doc__


# Methods and functions that take a declaration


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


def test_decorated_methods_and_functions_take_the_arguments():
    ride = Caravan().taken("a", humps=1)
    assert isinstance(ride, Ride)
    assert (ride.name, ride.humps, ride.wobble) == ("a", 1, 0.5)
    assert Caravan().taken(name="b").name == "b"
    assert isinstance(long(name="c"), LongRide)
    for call in (Caravan().taken, long):
        with pytest.raises(ValueError, match="humps=0 should be"):
            call(name="a", humps=0)
        with pytest.raises(TypeError, match="name"):
            call()
    with pytest.raises(TypeError, match="positional"):
        Caravan().taken("a", 1)


def test_signatures_come_from_the_declaration():
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


def test_docstrings_list_all_arguments_before_errors():
    doc = inspect.getdoc(Caravan.taken)
    first, args, raises = doc.split("\n\n")[0], doc.index("Args:"), doc.index("Raises:")
    assert first == "Rides."
    assert "It is slow." in doc[:args]
    places = [doc.index(f"    {name}: ") for name in arguments(Ride)]
    assert args < places[0]
    assert places == sorted(places)
    assert places[-1] < raises
    assert "ValueError: there are too many humps." in doc[raises:]
    assert max(map(len, doc.splitlines())) <= 116
    assert inspect.getdoc(long).startswith("Rides far.\n\nArgs:\n    name: The name of the camel. A string.\n")


# Unknown names


def test_unknown_names_suggest_a_similar_name():
    for call, what in ((Caravan().taken, "a ride"), (long, "the long ride")):
        with pytest.raises(TypeError, match=f"wobbel is not an argument of {what}; did you mean wobble?"):
            call(name="a", wobbel=1)


def test_unknown_names_list_all_names_if_none_is_similar():
    with pytest.raises(TypeError, match=r"x is not an argument of a ride; it takes name, humps, wobble, path, saddle$"):
        Caravan().taken("a", x=1)


def test_unknown_names_are_reported_before_invalid_values():
    with pytest.raises(TypeError, match="legs is not an argument"):
        Caravan().taken(3, humps=0, legs=4)
    unknown_arguments(Ride, ["humps", "name"], "a ride")
