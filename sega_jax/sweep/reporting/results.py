"""What a sweep has made so far: its points with their settings, records, metrics and pictures."""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sega_jax.method.checks import brief
from sega_jax.sweep.description.fields import kind_of
from sega_jax.sweep.description.points import name
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.sweep.running import records
from sega_jax.sweep.running.folder import METRICS, RECORDS, Folder

Row = Mapping[str, Any]


class Results:
    """The points of a sweep that are made.

    Attributes:
        rows: a table's row of each point, as `sega_jax.sweep.running.records.columns` says it, with the metrics that
            were
            measured, and with what the sweep says of the axes. Points that mean the same picture have its row each.
        axes: what differs from point to point, and its values in the sweep's order.

    Example:
        >>> from sega_jax import sweep
        >>> results = sweep.Results("sega-jax-out/glasses")  # made by the example of sweep.run
        >>> results.axes
        {'glasses.scale': [0.0, 8.0]}
        >>> results.picture(results.rows[1]).size
        (128, 128)
    """

    def __init__(self, folder: str | Path):
        """Of a sweep's folder, or an address.

        Raises:
            ImportError: pyarrow is not installed.
            ValueError: the folder has no sweep.
        """
        self.folder = Folder(folder)
        self.plan = self.folder.plan()
        recorded = self._recorded()
        self.rows: list[Row] = []
        self.axes: dict[str, list[Any]] = {axis: [] for axis in self.plan.sweep.axes}
        labels = {axis: _labels(self.plan.sweep, axis) for axis in self.axes}
        for i, settings in enumerate(self.plan.sweep):
            said = settings | {axis: labels[axis].get(settings[axis], settings[axis]) for axis in self.axes}
            for axis, values in self.axes.items():
                if said[axis] not in values:
                    values.append(said[axis])
            row = recorded.get(name(self.plan.point(i), self.plan.facts))
            if row is not None:
                self.rows.append(row | {axis: said[axis] for axis in self.axes})

    def _recorded(self) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for part in sorted(self.folder.store.names(RECORDS)):
            if part.endswith(".parquet") and not part.startswith("."):
                rows |= {row["name"]: row for row in self._table(f"{RECORDS}/{part}")}
        for metric in self.metrics:
            for one in self._table(f"{METRICS}/{metric}.parquet"):
                if one["name"] in rows:
                    rows[one["name"]][metric] = one["value"]
        return rows

    def _table(self, file: str) -> list[dict[str, Any]]:
        data = self.folder.store.read(file)
        assert data is not None
        return records.rows(data)

    @cached_property
    def metrics(self) -> list[str]:
        """The names of those that were measured."""
        names = self.folder.store.names(METRICS)
        return sorted(name.removesuffix(".parquet") for name in names if not name.startswith("."))

    def picture(self, row: Row) -> Image.Image | None:
        """A row's; None where it is not finite or was flagged."""
        data = None if row["file"] is None else self.folder.store.read(row["file"])
        return None if data is None else Image.open(io.BytesIO(data)).convert("RGB")

    def where(self, fixed: Mapping[str, Any]) -> list[Row]:
        """The rows with these settings.

        Raises:
            ValueError: a column that there is none of, or a value that no row has.
        """
        rows = self.rows
        for key, value in fixed.items():
            self.check(key)
            rows = [row for row in rows if row.get(key) == value]
            if not rows:
                had = ", ".join(dict.fromkeys(show(row.get(key)) for row in self.rows))
                raise ValueError(f"no picture has {key}={brief(value)} with the rest; there are {had[:200] or 'none'}")
        return rows

    def check(self, column: str) -> None:
        """ValueError for a column that there is none of."""
        if self.rows and column not in self.columns:
            raise ValueError(f"{column!r} is no column; there are {', '.join(self.columns)}")

    @cached_property
    def columns(self) -> list[str]:
        """Of the rows: the axes, the metrics, then the others."""
        return list(dict.fromkeys([*self.axes, *self.metrics, *itertools.chain.from_iterable(self.rows)]))

    def pages(self, apart: Sequence[str], fixed: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], list[Row]]]:
        """The rows by the axes that are neither apart nor fixed: what these are, and the rows."""
        rows = self.where(fixed)
        others = [axis for axis in self.axes if axis not in (*apart, *fixed)]
        for values in itertools.product(*(self.axes[axis] for axis in others)):
            page = dict(zip(others, values, strict=True))
            if some := [row for row in rows if all(row[axis] == value for axis, value in page.items())]:
                yield page, some


def _labels(sweep: Sweep, axis: str) -> dict[Any, Any]:
    """Returns what stands for the values of an axis that name files: without their folders, where these can be told
    apart."""
    kind = kind_of(axis)
    if kind is None or not kind.of_files:
        return {}
    values = list(dict.fromkeys(value for block in sweep.blocks for value in block.axes.get(axis, ())))
    labels = {value: kind.label(value) for value in values}
    return labels if len(set(labels.values())) == len(labels) else {}


def show(value: Any) -> str:
    """A setting's value for people.

    Example:
        >>> from sega_jax import sweep
        >>> sweep.show(4.0), sweep.show(None), sweep.show(["hat", "glasses"])
        ('4', 'never', 'hat + glasses')
    """
    if value is None:
        return "never"
    if isinstance(value, tuple | list):
        # Names of edits, or a setting of several numbers.
        words = all(isinstance(one, str) for one in value)
        return (" + " if words else ", ").join(map(show, value)) or "none"
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def numbers(rows: Sequence[Row], column: str) -> np.ndarray:
    """A column as float64, NaN where there is nothing.

    Raises:
        ValueError: it holds no numbers.
    """
    try:
        return np.array([np.nan if row.get(column) is None else row[column] for row in rows], np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{column!r} holds no numbers") from None
