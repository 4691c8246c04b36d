"""Tidy measurement files: one measured value a row, with the configuration it was measured at."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from perfmodel import catalog
from perfmodel.errors import SpecError, UnknownName, did_you_mean

_REQUIRED = ("hardware", "phase", "metric", "value", "unit")
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
# Bytes/s, FLOP/s and tokens/s behind the other units rows are given in.
UNITS = TIMES | {
    "GB/s": 1e9, "MB/s": 1e6, "GiB/s": 2.0**30, "MiB/s": 2.0**20, "B/s": 1.0,
    "TFLOPS": 1e12, "TFLOP/s": 1e12, "GFLOPS": 1e9, "tok/s": 1.0, "tokens/s": 1.0, "token/s": 1.0,
}  # fmt: skip


class Refused(Exception):
    """A row that cannot be predicted. The reason is counted, so it names the kind of trouble, not the row."""


class Predicted(NamedTuple):
    """A prediction in the row's own unit: expected value and its p10 and p90."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value. Cells are as written; an empty cell means not stated or not applicable."""

    file: str
    line: int
    cells: dict[str, str]

    def text(self, name: str, default: str = "") -> str:
        """A cell, or the default where it is empty."""
        return self.cells.get(name, "") or default

    def number(self, name: str, default: float | None = None) -> float:
        """A numeric cell. Raises Refused where it is empty without a default, or not a number."""
        cell = self.cells.get(name, "")
        if not cell:
            if default is None:
                raise Refused(f"{name} not stated")
            return default
        try:
            value = float(cell)
        except ValueError:
            raise Refused(f"{name} is not a number") from None
        if not math.isfinite(value):
            raise Refused(f"{name} is not finite")
        return value

    @property
    def measured(self) -> float:
        """The measured value in the row's unit. Raises Refused where it is not a positive number."""
        value = self.number("value")
        if value <= 0:
            raise Refused("value is not positive")
        return value

    @property
    def unit(self) -> float:
        """The row's unit in base SI. Raises Refused for an unknown one."""
        name = self.text("unit")
        if name not in UNITS:
            raise Refused(f"unknown unit {name!r}{did_you_mean(name, UNITS)}")
        return UNITS[name]

    @property
    def hardware(self) -> str:
        """Catalogue name of the hardware. Raises Refused for one the catalogue does not know."""
        try:
            return catalog.load_hardware(self.text("hardware")).name
        except UnknownName:
            raise Refused(f"unknown hardware {self.text('hardware')!r}") from None


def read(path: str | Path) -> list[Row]:
    """All rows of a CSV, plain or gzipped; lines that start with # are comments.

    Raises SpecError, with the line, for a file that is not such a table.
    """
    path = Path(path)
    names, table = cells(path)
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        near = did_you_mean(missing[0], names)
        raise SpecError(
            f"no column {', '.join(missing)}{near}; a tidy file needs {', '.join(_REQUIRED)}", file=str(path), line=1
        )
    return [Row(path.name, line, dict(zip(names, row, strict=True))) for line, row in table]


def header(path: str | Path) -> list[str]:
    """Column names of a CSV."""
    return cells(Path(path))[0]


def cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Column names and (line, cells) of a CSV, plain or gzipped. Raises SpecError for a file that is no table."""
    try:
        data = path.read_bytes()
        raw = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise SpecError(f"cannot read measurements: {error}", file=str(path)) from None
    lines = [(i, line) for i, line in enumerate(raw.splitlines(keepends=True), 1) if not line.startswith("#")]
    if not lines:
        raise SpecError("no rows: a table of measurements starts with a line of column names", file=str(path))
    reader = csv.reader(io.StringIO("".join(line for _, line in lines), newline=""))
    names = [name.strip() for name in next(reader)]
    found = []
    for row in reader:
        line = lines[min(reader.line_num, len(lines)) - 1][0]
        if row and len(row) != len(names):
            raise SpecError(f"{len(row)} cells under {len(names)} columns", file=str(path), line=line)
        if row:
            found.append((line, [cell.strip() for cell in row]))
    return names, found


def scored(rows: Iterable[Row]) -> list[Row]:
    """Rows without a flag."""
    return [r for r in rows if not r.text("flag")]
