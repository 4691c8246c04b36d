"""Numbers a placement starts from: matrices and tables in small files."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel.errors import SpecError, did_you_mean


def read_matrix(path: str | Path) -> np.ndarray:
    """Non-negative numbers of a JSON list (of lists) or of a CSV without header, as an array (rows, columns).

    Raises SpecError with file and line for anything that is not a rectangle of such numbers.
    """
    file = str(path)
    rows = _json_rows(file) if file.endswith(".json") else _csv_rows(file)
    if not rows or not rows[0][1]:
        raise SpecError("the file holds no numbers", file=file)
    width = len(rows[0][1])
    for line, row in rows:
        if len(row) != width:
            raise SpecError(f"a row of {len(row)} numbers among rows of {width}", file=file, line=line)
        for value in row:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise SpecError(f"expected a number of 0 or more, got {value!r}", file=file, line=line)
    return np.array([row for _, row in rows], float)


def read_table(path: str | Path, needs: tuple[str, ...], may: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV whose header names the columns `needs`, and of `may` what it likes."""
    file = str(path)
    reader = csv.DictReader(io.StringIO(_text(file)))
    header = [h.strip() for h in reader.fieldnames or ()]
    reader.fieldnames = header
    missing = [n for n in needs if n not in header]
    if missing:
        hint = did_you_mean(missing[0], header)
        raise SpecError(f"no column {missing[0]!r}{hint}; there are: {', '.join(header)}", file=file, line=1)
    unknown = [h for h in header if h not in (*needs, *may)]
    if unknown:
        raise SpecError(f"unknown column {unknown[0]!r}{did_you_mean(unknown[0], (*needs, *may))}", file=file, line=1)
    rows = [(reader.line_num, row) for row in reader]
    if not rows:
        raise SpecError("the file has a header and no rows", file=file)
    return rows


def number(text: str | None, what: str, file: str, line: int) -> float:
    """A cell as a finite number of 0 or more."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise SpecError(f"{what}: expected a number of 0 or more, got {text!r}", file=file, line=line)
    return value


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the file: {getattr(error, 'strerror', None) or error}", file=file) from None


def _json_rows(file: str) -> list[tuple[int | None, list[Any]]]:
    try:
        data = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise SpecError(f"not valid JSON: {error.msg}", file=file, line=error.lineno) from None
    if not isinstance(data, list):
        raise SpecError("expected a list of numbers, or a list of such lists", file=file)
    nested = data if data and all(isinstance(row, list) for row in data) else [data]
    return [(None, row) for row in nested]


def _csv_rows(file: str) -> list[tuple[int | None, list[Any]]]:
    rows: list[tuple[int | None, list[Any]]] = []
    for line, cells in enumerate(csv.reader(io.StringIO(_text(file))), start=1):
        if not any(c.strip() for c in cells):
            continue
        row = [number(c, "a cell", file, line) for c in cells]
        rows.append((line, row))
    return rows
