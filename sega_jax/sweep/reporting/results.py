"""The results of a sweep so far: its finished points with their settings, records, metrics and pictures."""

import io
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sega_jax.method.checks import brief
from sega_jax.pipelines.messages import warn
from sega_jax.sweep.description.fields import kind_of
from sega_jax.sweep.description.points import name
from sega_jax.sweep.description.sweep_file import Sweep
from sega_jax.sweep.reporting.values import comparable, exact, find, show
from sega_jax.sweep.running.damage import damage, metric_numbers
from sega_jax.sweep.running.folder import METRICS, RECORDS, Folder

Row = Mapping[str, Any]


class Results:
    """The finished points of a sweep.

    Attributes:
        folder: the sweep's folder.
        plan: the sweep's plan.
        rows: one dictionary {column: value} for each finished point. Its columns are the columns of the records (see
            `sega_jax.sweep.running.records.columns`), the measured metrics, and the axes, whose values are written as
            in the sweep. Points that describe the same picture each have a row.
        axes: the settings that vary, {setting: values in the sweep's order}.
        probabilities: the names of the metrics whose numbers are probabilities; see `Probability`.
        problems: a sentence about each damaged or missing file that has been left out so far.

    Example:
        >>> from sega_jax import sweep
        >>> results = sweep.Results("sega-jax-out/glasses")  # made by the example of sweep.run
        >>> results.axes
        {'glasses.scale': [0.0, 8.0]}
        >>> results.picture(results.rows[1]).size
        (128, 128)
    """

    def __init__(self, folder: str | Path):
        """Reads the results from a sweep's folder, or from an address that fsspec supports.

        Raises:
            ImportError: pyarrow is not installed.
            ValueError: the folder contains no sweep.
        """
        self.folder = Folder(folder)
        self.plan = self.folder.plan()
        self.probabilities: set[str] = set()
        self.problems: list[str] = []
        recorded = self._recorded()
        self.rows: list[Row] = []
        values: dict[str, dict[Any, None]] = {axis: {} for axis in self.plan.sweep.axes}  # as ordered sets
        labels = {axis: _labels(self.plan.sweep, axis) for axis in values}
        for i, settings in enumerate(self.plan.sweep):
            shown = settings | {axis: labels[axis].get(settings[axis], settings[axis]) for axis in values}
            for axis, known in values.items():
                known[shown[axis]] = None
            row = recorded.get(name(self.plan.point(i), self.plan.facts))
            if row is not None:
                self.rows.append(row | {axis: shown[axis] for axis in values})
        self.axes: dict[str, list[Any]] = {axis: list(known) for axis, known in values.items()}

    def _recorded(self) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        parts = self.folder.store.names(RECORDS)
        for number in range(len(self.plan.batches)):
            own, problems = self.folder.recorded(self.plan, number, parts)
            rows |= own
            for problem in problems:
                self._report(f"{problem}; run the sweep again")
        for metric in self.metrics:
            measured, trouble = metric_numbers(self.folder, f"{METRICS}/{metric}.parquet")
            if measured.probability:
                self.probabilities.add(metric)
            for picture in measured.of.keys() & rows.keys():
                rows[picture][metric] = measured.of[picture]
            if trouble is not None:
                self._report(str(trouble))
        return rows

    def _report(self, problem: str) -> None:
        """Adds a problem to `problems`, with a warning."""
        if problem not in self.problems:
            self.problems.append(problem)
            warn(f"{self.folder}: {problem}. Until then, it is left out")

    @cached_property
    def metrics(self) -> list[str]:
        """The names of the measured metrics."""
        names = self.folder.store.names(METRICS)
        return sorted(name.removesuffix(".parquet") for name in names if not name.startswith("."))

    def picture(self, row: Row) -> Image.Image | None:
        """Returns a row's picture; None if it is not finite, was flagged by the safety checker, or is damaged. A
        damaged picture causes a warning."""
        if row["file"] is None:
            return None
        data, _ = self.folder.read(row["file"])
        if words := damage(row, data):
            self._report(f"{row['file']} {words}; run the sweep again")
            return None
        return Image.open(io.BytesIO(data or b"")).convert("RGB")

    def where(self, fixed: Mapping[str, Any]) -> list[Row]:
        """Returns the rows with the given column values.

        Args:
            fixed: {column: value}; see `value`.

        Raises:
            ValueError: there are no pictures yet, there is no such column, or no row has these values.
        """
        return self.with_values({column: self.value(column, given) for column, given in fixed.items()})

    def with_values(self, values: Mapping[str, Any]) -> list[Row]:
        """Returns the rows with the given values, each of which `value` has returned.

        Raises:
            ValueError: there are no pictures yet, or no row has these values.
        """
        rows = self._finished()
        for column, value in values.items():
            wanted = comparable(value)
            rows = [row for row in rows if comparable(row.get(column)) == wanted]
        if not rows:
            listed = ", ".join(f"{column}={exact(value)[:80]}" for column, value in values.items())
            raise ValueError(f"no picture has all of {listed}; leave one of them out")
        return rows

    def value(self, column: str, given: Any, *, as_text: bool = False) -> Any:
        """Returns the value of a column that a given value or text names.

        A text may be a number in any notation, true, false or never (None), a string in quotation marks, a list in
        brackets, another string, or the text that sheets and plots show for a value, such as "hat + glasses".

        Args:
            column: an axis, a metric, or another column.
            given: a value of the column, in which lists may replace tuples; or a text.
            as_text: whether the string "5" names the number 5, and '"5"' the string. Otherwise, a string names an equal
                string if the column has one.

        Raises:
            ValueError: there is no such column, or the given value names no value or several values of the column.
        """
        values = find(given, self._values(column), as_text=as_text)
        shown = given if as_text else brief(given)
        if len(values) > 1:
            listed = ", ".join(map(exact, values))
            raise ValueError(f"{column}={shown} could be any of {listed[:200]}; write one of these")
        if not values:
            known = ", ".join(dict.fromkeys(map(show, self._values(column))))
            raise ValueError(f"no picture has {column}={shown}; its values are {known[:200] or 'none'}")
        return values[0]

    def _values(self, column: str) -> list[Any]:
        rows = self._finished()
        self.check(column)
        return list({comparable(row.get(column)): row.get(column) for row in rows}.values())

    def _finished(self) -> list[Row]:
        if not self.rows:
            raise ValueError(f"{self.folder} has no pictures yet; run the sweep first")
        return self.rows

    def check(self, column: str) -> None:
        """Checks that a column exists.

        Raises:
            ValueError: the column does not exist.
        """
        if self.rows and column not in self.columns:
            raise ValueError(f"there is no column {column!r}; the columns are {', '.join(self.columns)}")

    @cached_property
    def columns(self) -> list[str]:
        """The names of all columns: first the axes, then the metrics, then the others."""
        return list(dict.fromkeys([*self.axes, *self.metrics, *itertools.chain.from_iterable(self.rows)]))

    def pages(self, shown_axes: Sequence[str], fixed: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], list[Row]]]:
        """Groups the rows with given values by the values of all other axes that a page does not show.

        Args:
            shown_axes: the axes that each page shows.
            fixed: the given values, {column: value}; see `with_values`.

        Yields:
            The values of these axes, and the rows with these values.
        """
        rows = self.with_values(fixed)
        others = [axis for axis in self.axes if axis not in (*shown_axes, *fixed)]
        groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in rows:
            groups[tuple(row[axis] for axis in others)].append(row)
        place = {axis: {value: i for i, value in enumerate(self.axes[axis])} for axis in others}

        def order(values: tuple[Any, ...]) -> tuple[int, ...]:
            return tuple(place[axis][value] for axis, value in zip(others, values, strict=True))

        for values in sorted(groups, key=order):
            yield dict(zip(others, values, strict=True)), groups[values]


def _labels(sweep: Sweep, axis: str) -> dict[Any, Any]:
    """Returns labels for the file names among an axis's values: the names without folders, if these are distinct."""
    kind = kind_of(axis)
    if kind is None or not kind.of_files:
        return {}
    values = list(dict.fromkeys(value for block in sweep.blocks for value in block.axes.get(axis, ())))
    labels = {value: kind.label(value) for value in values}
    return labels if len(set(labels.values())) == len(labels) else {}


def numbers(rows: Sequence[Row], column: str) -> np.ndarray:
    """Returns a column as float64, with NaN for missing values.

    Raises:
        ValueError: the column contains something other than numbers.
    """
    try:
        return np.array([np.nan if row.get(column) is None else row[column] for row in rows], np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{column!r} contains values that are not numbers; choose a column of numbers") from None
