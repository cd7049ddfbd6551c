"""Records: a table of a batch's pictures, all their settings, and how they were made, in Parquet."""

import io
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from sega_jax.method.schedules.spacing import NAMED
from sega_jax.sweep.description.fields import EDIT
from sega_jax.sweep.description.points import Point
from sega_jax.sweep.description.sweep_file import Sweep

_CALL = {
    "prompt": "string",
    "negative_prompt": "string",
    "seed": "int64",
    "steps": "int64",
    "step_list": "string",
    "guidance_scale": "float64",
    "eta": "float64",
    "height": "int64",
    "width": "int64",
    "semantics": "string",
    "support": "string",
    "scheduler": "string",
}
_EDIT = {name: "int64" if name in ("warmup", "cooldown") else "float64" for name in EDIT} | {"concept": "string"}
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


def columns(sweep: Sweep) -> dict[str, str]:
    """The columns and their types: the picture's name, its file, the number of its first point, its settings, those of
    the edits that act ("glasses.scale"; others have none), and how it was made:

    finite: False where NaN or infinity came up, flagged: True where the safety checker found something, None where
    nothing looked; then there is no file. digest: SHA-256 of the picture's bytes. batch: its number in the plan. rows:
    of the program that made it, on all `devices`; another number makes other roundings. seconds: its share of the
    batch's time, with the compilation in a program's first batch. model: null for the demo model.
    """
    edits = {f"{edit}.{name}": kind for edit in sweep.edits for name, kind in _EDIT.items()}
    return {"name": "string", "file": "string", "point": "int64", **_CALL, **edits, **_MADE}


def settings(point: Point, scheduler: str) -> dict[str, Any]:
    """Those columns that a point says; `scheduler` is the class."""
    steps = {"steps": point.steps, "step_list": None}
    if isinstance(point.steps, str):
        steps = {"steps": sum(NAMED[point.steps]), "step_list": point.steps}
    said = {name: getattr(point, name) for name in _CALL if name in point._fields} | steps | {"scheduler": scheduler}
    return said | {f"{edit}.{name}": getattr(one, name) for edit, one in point.edits.items() for name in EDIT}


def part(rows: Sequence[dict[str, Any]], sweep: Sweep) -> bytes:
    """A Parquet file of rows, in which columns that a row lacks are null."""
    pyarrow = arrow()
    kinds = {"timestamp[us, tz=UTC]": pyarrow.timestamp("us", "UTC"), "bool": pyarrow.bool_()}
    fields = [(name, kinds.get(kind) or getattr(pyarrow, kind)()) for name, kind in columns(sweep).items()]
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
