"""Metrics of a run as a table: one row per value, with its iteration and name."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping

from fastdino.files import append, atomic_write
from fastdino.training.metric_logger import Origin, Pixels

HEADER = ("iteration", "name", "value")


class CsvLogger:
    """metrics.csv in the folder of a run, with the columns iteration, name and value.

    Rows of an interrupted run after its checkpoint, and an incomplete row, are removed. A new run
    renames the table of another one to metrics.old.csv. Pictures are left out.
    """

    def __init__(self, origin: Origin) -> None:
        self._path = origin.folder / "metrics.csv"
        self.problem = f"{self._path} cannot be written"

    def restart(self, iteration: int, *, new: bool) -> None:
        """Remove the rows of `iteration` and later ones, or with `new` rename the table."""
        if new and self._path.is_file():
            os.replace(self._path, self._path.with_name("metrics.old.csv"))
        kept = self._rows_before(iteration) if self._path.is_file() else []
        with atomic_write(self._path) as file:
            file.write(_lines([HEADER, *kept]))

    def add(self, values: Mapping[str, float], iteration: int) -> None:
        """Append a row per value."""
        rows = [(str(iteration), name, repr(value)) for name, value in values.items()]
        fresh = not self._path.exists()  # the folder was replaced
        append(_lines([HEADER, *rows] if fresh else rows), self._path)

    def add_image(self, name: str, pixels: Pixels, iteration: int) -> None:
        """Do nothing."""

    def flush(self, iteration: int) -> None:
        """Do nothing: rows are written at once."""

    def close(self) -> None:
        """Do nothing: the file is closed after each row."""

    def _rows_before(self, iteration: int) -> list[tuple[str, ...]]:
        """Return the complete rows of earlier iterations."""
        content = self._path.read_bytes().rpartition(b"\n")[0].decode("utf-8", "replace")
        rows = (row for row in csv.reader(io.StringIO(content)) if len(row) == len(HEADER))
        return [tuple(row) for row in rows if row[0].isdecimal() and int(row[0]) < iteration]


def _lines(rows: Iterable[tuple[str, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
