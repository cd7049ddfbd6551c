"""Records: one Parquet table for each batch, with the pictures' settings and facts about how they were made.

Every file contains the SHA-256 of its other bytes, so that a changed byte is noticed.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from sega_jax.sweep.description.facts import Facts
from sega_jax.sweep.description.fields import ADAPTERS, adapter_kinds, call_settings, edit_settings
from sega_jax.sweep.description.points import Point
from sega_jax.sweep.description.stages import is_own
from sega_jax.sweep.description.sweep_file import Sweep

# A file's digest. It is computed while its own place in the file contains zeros.
_DIGEST = re.compile(rb"sha256:([0-9a-f]{64})")
_BLANK = b"sha256:" + b"0" * 64

_MADE = {
    "finite": "bool",
    "flagged": "bool",
    "digest": "string",
    "file_bytes": "int64",
    "file_digest": "string",
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
    """Returns the types of the columns, {column: type}.

    The columns are the picture's name, its file, the index of its first point, its settings (settings of a later stage
    start with its name, such as "stage2.steps"), the settings of its edits ("glasses.scale"; null for edits that are
    not active), and the following facts about how it was made:

        finite: whether all pixels are finite; a picture with NaN or infinity has no file.
        flagged: whether the safety checker flagged the picture, which then has no file; null without a checker.
        digest: the SHA-256 of the pixels.
        file_bytes, file_digest: the size of the picture's file and its SHA-256; null without a file.
        batch: the batch's index in the plan.
        rows: the number of rows of the program on all `devices` together. Rounding depends on this number.
        calls: the number of model calls.
        seconds: the batch's time divided by the number of pictures made in this time; the time of a program's first
            batch includes compilation.
        made: the time at which the record was written, in UTC.
        model: the checkpoint; null for the demo model.
    """
    call = {name: kind for one in facts.chain for name, kind in call_columns(one).items()}
    edits = {f"{edit}.{name}": one.kind.column for edit in sweep.edits for name, one in edit_settings().items()}
    own = {f"{one.prefix}{name}": "string" for one in facts.chain for name in ("scheduler", *ADAPTERS)}
    if facts.earlier is not None:
        own |= {f"{one.prefix}{name}": "string" for one in facts.chain[1:] for name in ("model", "revision")}
        own["edited"] = "string"
    return {"name": "string", "file": "string", "point": "int64", **call, **own, **edits, **_MADE}


def call_columns(facts: Facts) -> dict[str, str]:
    """Returns the columns of a stage's call settings, {column: type}."""
    types: dict[str, str] = {}
    for name, one in call_settings(facts.family.call).items():
        if name not in edit_settings() and (is_recorded(name) or not facts.prefix):
            types |= one.kind.columns(f"{facts.prefix}{name}")
    return types


def is_recorded(name: str) -> bool:
    """Returns whether a later stage's call setting is recorded. Only the stage's own settings and the size of its
    pictures are recorded.
    """
    return is_own(name) or name in ("height", "width")


def columns_without_edits(facts: Facts) -> list[str]:
    """Returns the columns of settings that affect a picture even without edits."""
    names: list[str] = []
    for one in facts.chain:
        settings = call_settings(one.family.call)
        known = [name for name in settings if not settings[name].of_edits and (is_recorded(name) or not one.prefix)]
        names += [column for name in known for column in settings[name].kind.columns(f"{one.prefix}{name}")]
        names += [f"{one.prefix}{name}" for name in ("scheduler", *ADAPTERS)]
    return names


def settings(point: Point, facts: Facts, scheduler: str | None) -> dict[str, Any]:
    """Returns the values of one stage's columns for a point.

    Args:
        scheduler: the name of the scheduler's class.
    """
    arguments, prefix = call_settings(facts.family.call), facts.prefix
    cells: dict[str, Any] = {f"{prefix}scheduler": scheduler, **{f"{prefix}{name}": None for name in ADAPTERS}}
    if prefix:
        cells |= {f"{prefix}model": facts.model["source"], f"{prefix}revision": facts.model.get("revision")}
    for name, value in point.settings:
        if is_recorded(name) or not prefix:
            cells |= arguments[name].kind.cells(f"{prefix}{name}", value)
    for name, pairs in point.adapters:
        cells |= adapter_kinds()[name].cells(f"{prefix}{name}", pairs)
    return cells | {
        f"{edit}.{name}": getattr(one, name) for edit, one in point.edits.items() for name in edit_settings()
    }


def part(rows: Sequence[dict[str, Any]], sweep: Sweep, facts: Facts) -> bytes:
    """Returns a Parquet file of rows. A column that is missing in a row is null."""
    pyarrow = arrow()
    kinds = {"timestamp[us, tz=UTC]": pyarrow.timestamp("us", "UTC"), "bool": pyarrow.bool_()}
    fields = [(name, kinds.get(kind) or getattr(pyarrow, kind)()) for name, kind in columns(sweep, facts).items()]
    return _file(pyarrow.Table.from_pylist(list(rows), pyarrow.schema(fields)))


class Numbers(NamedTuple):
    """The numbers of a metric."""

    of: dict[str, float | None]  # {picture name: number}
    probability: bool = False  # whether all numbers are probabilities


def metric(numbers: Numbers) -> bytes:
    """Returns a metric as a Parquet file, which holds each picture's name and number. A number may be null."""
    pyarrow = arrow()
    fields = [("name", pyarrow.string()), ("value", pyarrow.float64())]
    schema = pyarrow.schema(fields, {"probability": str(numbers.probability).lower()})
    return _file(pyarrow.table({"name": list(numbers.of), "value": list(numbers.of.values())}, schema))


def rows(data: bytes) -> list[dict[str, Any]]:
    """Reads the rows of a file that `part` wrote.

    Raises:
        ValueError: the file is damaged. The message completes a sentence that begins with the file's name.
    """
    return _table(data).to_pylist()


def numbers(data: bytes) -> Numbers:
    """Reads a file that `metric` wrote.

    Raises:
        KeyError: the file is a table of something else.
        ValueError: the file is damaged. The message completes a sentence that begins with the file's name.
    """
    table = _table(data)
    values = {row["name"]: row["value"] for row in table.to_pylist()}
    return Numbers(values, (table.schema.metadata or {}).get(b"probability") == b"true")


def _table(data: bytes) -> Any:
    if not data:
        raise ValueError("is empty")
    found = list(_DIGEST.finditer(data))
    blank = data[: found[-1].start()] + _BLANK + data[found[-1].end() :] if found else b""
    if not found or hashlib.sha256(blank).hexdigest().encode() != found[-1][1]:
        raise ValueError("is damaged: its content does not match its checksum")
    pyarrow = arrow()
    # pyarrow's threads can abort the process when the interpreter exits.
    return pyarrow.parquet.read_table(pyarrow.BufferReader(data), use_threads=False, pre_buffer=False)


def _file(table: Any) -> bytes:
    """Returns a table as a Parquet file that contains the digest of its other bytes."""
    file = io.BytesIO()
    metadata = {**(table.schema.metadata or {}), "digest": _BLANK}
    arrow().parquet.write_table(table.replace_schema_metadata(metadata), file)
    data = file.getvalue()
    start = data.rindex(_BLANK)
    digest = hashlib.sha256(data).hexdigest().encode()
    return data[:start] + b"sha256:" + digest + data[start + len(_BLANK) :]


def arrow() -> ModuleType:
    """Imports and returns pyarrow.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            'sweeps need pyarrow for their records, but it is not installed; pip install ".[sweep]"'
        ) from None
    return pyarrow
