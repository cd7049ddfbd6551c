"""Records: a table of a batch's pictures, all their settings, and how they were made, in Parquet."""

import io
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from sega_jax.sweep.description.facts import Facts
from sega_jax.sweep.description.fields import ADAPTERS, adapter_kinds, call_settings, edit_settings
from sega_jax.sweep.description.points import Point
from sega_jax.sweep.description.stages import is_own
from sega_jax.sweep.description.sweep_file import Sweep

_MADE = {
    "finite": "bool",
    "flagged": "bool",
    "digest": "string",
    "batch": "int64",
    "rows": "int64",
    "calls": "int64",
    "seconds": "float64",
    "made": "timestamp[us, tz=UTC]",
    "device": "string",
    "devices": "int64",
    "model": "string",
    "revision": "string",
    "dtype": "string",
    "sega_jax": "string",
    "jax": "string",
}


def columns(sweep: Sweep, facts: Facts) -> dict[str, str]:
    """Returns the columns and their types: the picture's name, its file, the number of its first point, its settings
    (those of a later stage after its name, as "stage2.steps"), those of the edits that act ("glasses.scale"; others
    have none), and how it was made:

    finite: False where NaN or infinity came up, flagged: True where the safety checker found something, None where
    nothing looked; then there is no file. digest: SHA-256 of the picture's bytes. batch: its number in the plan. rows:
    of the program that made it, on all `devices`; another number makes other roundings. seconds: its share of the
    batch's time, with the compilation in a program's first batch. model: null for the demo model.
    """
    call = {name: kind for one in facts.chain for name, kind in call_columns(one).items()}
    edits = {f"{edit}.{name}": one.kind.column for edit in sweep.edits for name, one in edit_settings().items()}
    own = {f"{one.prefix}{name}": "string" for one in facts.chain for name in ("scheduler", *ADAPTERS)}
    if facts.earlier is not None:
        own |= {f"{one.prefix}{name}": "string" for one in facts.chain[1:] for name in ("model", "revision")}
        own["edited"] = "string"
    return {"name": "string", "file": "string", "point": "int64", **call, **own, **edits, **_MADE}


def call_columns(facts: Facts) -> dict[str, str]:
    """Returns the columns of the settings of a stage's call, and their types."""
    found: dict[str, str] = {}
    for name, one in call_settings(facts.family.call).items():
        if name not in edit_settings() and (is_recorded(name) or not facts.prefix):
            found |= one.kind.columns(f"{facts.prefix}{name}")
    return found


def is_recorded(name: str) -> bool:
    """Tells whether the records of a later stage have a setting of the call: its own, and the size of its pictures."""
    return is_own(name) or name in ("height", "width")


def columns_without_edits(facts: Facts) -> list[str]:
    """Returns the columns that decide a picture that has no edits."""
    found: list[str] = []
    for one in facts.chain:
        settings = call_settings(one.family.call)
        known = [name for name in settings if not settings[name].of_edits and (is_recorded(name) or not one.prefix)]
        found += [column for name in known for column in settings[name].kind.columns(f"{one.prefix}{name}")]
        found += [f"{one.prefix}{name}" for name in ("scheduler", *ADAPTERS)]
    return found


def settings(point: Point, facts: Facts, scheduler: str | None) -> dict[str, Any]:
    """Returns what the columns of one stage hold for a point; `scheduler` is the class."""
    arguments, prefix = call_settings(facts.family.call), facts.prefix
    found: dict[str, Any] = {f"{prefix}scheduler": scheduler, **{f"{prefix}{name}": None for name in ADAPTERS}}
    if prefix:
        found |= {f"{prefix}model": facts.model["source"], f"{prefix}revision": facts.model.get("revision")}
    for name, value in point.settings:
        if is_recorded(name) or not prefix:
            found |= arguments[name].kind.cells(f"{prefix}{name}", value)
    for name, pairs in point.adapters:
        found |= adapter_kinds()[name].cells(f"{prefix}{name}", pairs)
    return found | {
        f"{edit}.{name}": getattr(one, name) for edit, one in point.edits.items() for name in edit_settings()
    }


def part(rows: Sequence[dict[str, Any]], sweep: Sweep, facts: Facts) -> bytes:
    """A Parquet file of rows, in which columns that a row lacks are null."""
    pyarrow = arrow()
    kinds = {"timestamp[us, tz=UTC]": pyarrow.timestamp("us", "UTC"), "bool": pyarrow.bool_()}
    fields = [(name, kinds.get(kind) or getattr(pyarrow, kind)()) for name, kind in columns(sweep, facts).items()]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), pyarrow.schema(fields)), file)
    return file.getvalue()


def read_part(data: bytes, names: list[str]) -> dict[str, list]:
    """Some columns of a part."""
    return arrow().parquet.read_table(io.BytesIO(data), columns=names).to_pydict()


def rows(data: bytes) -> list[dict[str, Any]]:
    """The rows of a part."""
    return arrow().parquet.read_table(io.BytesIO(data)).to_pylist()


def values(names: Sequence[str], numbers: Sequence[float | None]) -> bytes:
    """A Parquet file of a metric: a number, or none, by the name of the picture."""
    pyarrow = arrow()
    fields = [("name", pyarrow.string()), ("value", pyarrow.float64())]
    file = io.BytesIO()
    table = pyarrow.table({"name": list(names), "value": list(numbers)}, pyarrow.schema(fields))
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def arrow() -> ModuleType:
    """pyarrow.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            'sweeps keep their records by pyarrow, which is not installed; pip install ".[sweep]"'
        ) from None
    return pyarrow
