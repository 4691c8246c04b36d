"""A trace's file as a table: CSV (commas, semicolons or tabs) or JSON lines, plain or gzipped, and the line of each row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfmodel.errors import SpecError

_DELIMITERS = ",;\t"
_MOST_NAMES, _LONGEST_NAME = 20, 40  # columns shown in a message, and characters of each


@dataclass
class Table:
    """A file's columns, and the line of each row for errors."""

    file: str
    columns: dict[str, Sequence[Any]]
    header_line: int
    line_of: Callable[[int], int]

    def error(self, message: str, row: int | None = None) -> SpecError:
        return SpecError(message, file=self.file, line=self.header_line if row is None else self.line_of(row))


def read_table(path: Path) -> Table:
    """The columns of a trace's file, as text (CSV) or as JSON has them. Lines that begin with # are left out.

    Raises SpecError with the file and line of the first row that is not read.
    """
    return _table(_text(path), str(path))


def names_of(columns: Sequence[str]) -> str:
    """Column names for a message: the first few, clipped."""
    shown = [name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…" for name in columns[:_MOST_NAMES]]
    return ", ".join(shown + ["…"] * (len(columns) > _MOST_NAMES))


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError("the trace is not text (CSV or JSON lines, plain or .gz)", file=str(path)) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"cannot read the trace: {reason}", file=str(path)) from None


def _table(text: str, file: str) -> Table:
    lines = list(io.StringIO(text.rstrip("\r\n"), newline=""))  # ends lines where csv and json do, unlike splitlines
    kept = [n for n, line in enumerate(lines) if not line.startswith("#")]
    if not any(lines[n].strip() for n in kept):
        raise SpecError("the trace is empty", file=file)
    chosen = lines if len(kept) == len(lines) else [lines[n] for n in kept]
    first = chosen[0].lstrip()
    if first.startswith("{"):
        return _json_lines(chosen, kept, file)
    if first.startswith("["):
        raise SpecError("one JSON array: write one object a line instead (`jq -c '.[]'`)", file=file, line=kept[0] + 1)
    delimiter = max(_DELIMITERS, key=chosen[0].count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # logs may hold whole prompts
    rows = list(csv.reader(chosen, delimiter=delimiter))
    header = [name.strip() for name in rows[0]]

    def line_of(row: int) -> int:
        reader = csv.reader(chosen, delimiter=delimiter)  # a quoted value may span lines, so rows are counted again
        for _ in range(row + 1):
            next(reader)
        before = reader.line_num
        next(reader)
        return kept[before] + 1

    table = Table(file, {}, kept[0] + 1, line_of)
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise table.error(f"column {twice!r} appears twice")
    body = rows[1:]
    wrong = next((n for n, row in enumerate(body) if len(row) != len(header)), None)
    if wrong is not None:
        found = len(body[wrong])
        message = f"{found} values where the header has {len(header)} columns" if found else "empty row"
        raise table.error(message, wrong)
    table.columns = dict(zip(header, zip(*body, strict=True), strict=True)) if body else dict.fromkeys(header, ())
    return table


def _json_lines(lines: list[str], kept: list[int], file: str) -> Table:
    table = Table(file, {}, kept[0] + 1, lambda row: kept[row] + 1)
    rows: list[dict[str, Any]] = []
    for n, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError of its own
            reason = getattr(error, "msg", error)
            raise table.error(f"not valid JSON: {reason}" if line.strip() else "empty row", n) from None
        if not isinstance(row, dict):
            raise table.error("expected one JSON object a line", n)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table.columns = {name: [row.get(name) for row in rows] for name in names}
    return table
