"""Request traces as files: CSV or JSON lines, in the forms public traces have or with the columns named.

Known by their header: Azure 2023/2024 (``TIMESTAMP, ContextTokens, GeneratedTokens``, date and time), BurstGPT
(``Timestamp`` in seconds, ``Request tokens, Response tokens``, ``Session ID``, ``Elapsed time``), Mooncake (JSON lines
with ``timestamp`` in milliseconds and ``hash_ids``), Bailian (the same with ``chat_id`` and seconds), vLLM and AIPerf
derivatives of these, and any file whose columns are called by common names for arrival, input and output.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel.errors import SpecError, did_you_mean
from perfmodel.serving import sharing, ticks
from perfmodel.serving.requests import Blocks, Requests
from perfmodel.spec.workload import Trace

# Names that public traces and common loggers use, lower case, words joined by _.
_NAMES = {
    "arrival_s": ("arrival_s", "arrival_time_s", "timestamp_s", "arrived_at", "arrival", "arrival_time"),
    "arrival_ms": ("arrival_ms", "arrival_time_ms", "timestamp_ms"),
    "timestamp": ("timestamp",),
    "input": ("input", "input_len", "input_length", "input_tokens", "num_input_tokens", "prompt_tokens", "prompt_len",
              "prompt_length", "contexttokens", "context_tokens", "request_tokens", "num_prefill_tokens", "isl"),
    "output": ("output", "output_len", "output_length", "output_tokens", "num_output_tokens", "completion_tokens",
               "generatedtokens", "generated_tokens", "response_tokens", "num_decode_tokens", "osl"),
    "blocks": ("blocks", "block_ids", "hash_ids", "hash_id_ranges"),
    "session": ("session", "session_id", "conversation_id"),
    "chat": ("chat_id",),
    "parent": ("parent_chat_id",),
    "think_s": ("think_s", "think_time_s"),
    "elapsed_s": ("elapsed_s", "elapsed_time"),
    "tenant": ("tenant", "tenant_id", "user_id"),
    "model": ("model", "model_name", "model_id"),
    "max_tokens": ("max_tokens", "max_new_tokens", "max_output_tokens"),
}  # fmt: skip
_LABELS = ("tenant", "model", "max_tokens")


@dataclass
class _Table:
    """A file's columns, and the line of each row for errors."""

    file: str
    columns: dict[str, Sequence[Any]]
    header_line: int
    line_of: Callable[[int], int]

    def error(self, message: str, row: int | None = None) -> SpecError:
        return SpecError(message, file=self.file, line=self.header_line if row is None else self.line_of(row))


def read_trace(trace: Trace, base: Path) -> Requests:
    """Read a trace; arrivals sorted, the first at 0 s, a coarse clock's ticks spread unless the spec says no.

    Conversations come from a session column, else from block ids: a prompt that holds an earlier prompt's full blocks and
    is long enough for its answer continues it. Think times need the seconds each answer took (BurstGPT's ``Elapsed
    time``) or a column of their own; without either they are nan, and turns arrive by the clock (`closed_loop`).
    Raises SpecError with the file and line of the first row that cannot be used.
    """
    path = Path(trace.file) if Path(trace.file).is_absolute() else base / trace.file
    table = _table(_text(path), str(path))
    names = _find_columns(table, trace)
    kept = _kept(table, trace)
    requests = _requests(table, names, kept, trace)
    order = np.argsort(requests.arrival, kind="stable")
    requests = requests.take(order).at(requests.arrival[order] - requests.arrival[order[0]])
    tick = ticks.tick_of(requests.arrival)
    return requests if not tick else ticks.on_clock(requests, tick, spread=trace.spread_ticks)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError("the trace is not text (CSV or JSON lines, plain or .gz)", file=str(path)) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"cannot read the trace: {reason}", file=str(path)) from None


def _table(text: str, file: str) -> _Table:
    lines = list(io.StringIO(text.rstrip("\r\n"), newline=""))  # ends lines where csv and json do, unlike splitlines
    kept = [n for n, line in enumerate(lines) if not line.startswith("#")]
    if not any(lines[n].strip() for n in kept):
        raise SpecError("the trace is empty", file=file)
    chosen = lines if len(kept) == len(lines) else [lines[n] for n in kept]
    if chosen[0].lstrip().startswith("{"):
        return _json_lines(chosen, kept, file)
    rows = list(csv.reader(chosen))
    header = [name.strip() for name in rows[0]]

    def line_of(row: int) -> int:
        reader = csv.reader(chosen)  # a quoted value may span lines, so rows are counted again
        for _ in range(row + 1):
            next(reader)
        before = reader.line_num
        next(reader)
        return kept[before] + 1

    table = _Table(file, {}, kept[0] + 1, line_of)
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


def _json_lines(lines: list[str], kept: list[int], file: str) -> _Table:
    table = _Table(file, {}, kept[0] + 1, lambda row: kept[row] + 1)
    rows: list[dict[str, Any]] = []
    for n, line in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"not valid JSON: {error.msg}" if line.strip() else "empty row"
            raise table.error(what, n) from None
        if not isinstance(row, dict):
            raise table.error("expected one JSON object a line", n)
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table.columns = {name: [row.get(name) for row in rows] for name in names}
    return table


def _find_columns(table: _Table, trace: Trace) -> dict[str, str]:
    """Column of each role: those the spec names, then those found by name."""
    header = list(table.columns)
    wanted = trace.columns
    said = {role: getattr(wanted, role) for role in ("arrival_s", "arrival_ms", "input", "output", "blocks", "session",
                                                    "think_s", "elapsed_s")}  # fmt: skip
    said |= {str(label): name for label, name in wanted.labels.items()}
    named = {role: name for role, name in said.items() if name is not None}
    for name in (*named.values(), *wanted.where):
        if name not in table.columns:
            raise table.error(f"no column {name!r}{did_you_mean(name, header)}; columns: {', '.join(header)}")
    spelled: dict[str, list[str]] = {}
    for name in header:
        spelled.setdefault(name.casefold().replace(" ", "_").replace("-", "_"), []).append(name)
    found = dict(named)
    clocks = {"arrival_s", "arrival_ms", "timestamp"}
    for role, known in _NAMES.items():
        if role in found or (role in clocks and clocks & found.keys()):
            continue
        matches = [name for word in known for name in spelled.get(word, ())]
        if len(matches) > 1:
            raise table.error(f"columns {matches[0]!r} and {matches[1]!r} could both be {role}: name one under 'columns'")
        if matches:
            found[role] = matches[0]
    for role in ("input", "output"):
        if role not in found:
            raise table.error(_missing(role, _NAMES[role], header))
    if not clocks & found.keys():
        raise table.error(_missing("arrival", (*_NAMES["arrival_s"], *_NAMES["arrival_ms"]), header))
    return found


def _missing(role: str, known: Sequence[str], header: list[str]) -> str:
    near = next((hint for name in header if (hint := did_you_mean(name, known))), "")
    meant = f" ({near.strip(' ()').removeprefix('did you mean ').rstrip('?')} would be found)" if near else ""
    return f"no column for {role}{meant}: name it under 'columns'; columns: {', '.join(header)}"


def _kept(table: _Table, trace: Trace) -> np.ndarray:
    """Rows that the spec's `where` keeps."""
    rows = len(next(iter(table.columns.values())))
    keep = np.ones(rows, bool)
    for name, value in trace.columns.where.items():
        keep &= np.array([str(cell) == value for cell in table.columns[name]], bool)
    if not keep.any():
        some = ""
        for name, value in trace.columns.where.items():
            values = sorted({str(cell) for cell in table.columns[name]})
            if value not in values:
                some = f"{did_you_mean(value, values)}; {name} is one of {', '.join(values[:8])}"
        where = f" where {trace.columns.where}{some}" if trace.columns.where else ""
        raise SpecError(f"the trace has no requests{where}", file=table.file)
    return np.flatnonzero(keep)


def _requests(table: _Table, names: dict[str, str], kept: np.ndarray, trace: Trace) -> Requests:
    arrival = _arrival(table, names, kept)
    input_ = _numbers(table, names["input"], kept, least=1, whole=True)
    output = _numbers(table, names["output"], kept, least=1, whole=True)
    blocks = _blocks(table, names["blocks"], kept, input_, trace.block_tokens) if "blocks" in names else None
    labels = {name: _label(table, name, names[name], kept) for name in _LABELS if name in names}
    requests = Requests(arrival, input_, output, blocks, labels=labels)
    session = _sessions(table, names, kept)
    if session is None and blocks is not None:
        session = sharing.conversations(requests)
    if session is None:
        return requests
    if "think_s" in names:
        think = _numbers(table, names["think_s"], kept, least=0, blank=True)
        return Requests(arrival, input_, output, blocks, session, think, labels)
    requests = Requests(arrival, input_, output, blocks, session, np.full(arrival.size, np.nan), labels)
    if "elapsed_s" in names:
        return closed_loop(requests, _numbers(table, names["elapsed_s"], kept, least=0))
    return requests


def closed_loop(requests: Requests, answer_seconds: np.ndarray) -> Requests:
    """The same requests, each session's next turn sent a think time after the answer instead of by the clock.

    answer_seconds: arrival to last token of each request where the trace was taken [s], observed or estimated. Think time
    is the gap to the previous turn beyond that, at least 0; nan for a session's first request.
    """
    if requests.session is None:
        raise ValueError("requests without sessions have no turns")
    previous = sharing.previous_turn(requests)
    later = previous >= 0
    think = np.full(len(requests), np.nan)
    before = previous[later]
    gap = requests.arrival[later] - requests.arrival[before] - np.asarray(answer_seconds, float)[before]
    think[later] = np.maximum(gap, 0.0)
    return replace(requests, think=think)


def _arrival(table: _Table, names: dict[str, str], kept: np.ndarray) -> np.ndarray:
    """Arrival seconds. A column called only `timestamp` says its unit by what stands beside it, or must be named."""
    if "arrival_s" in names or "arrival_ms" in names:
        role = "arrival_s" if "arrival_s" in names else "arrival_ms"
        name, scale = names[role], 1.0 if role == "arrival_s" else 1e-3
    else:
        name = names["timestamp"]
        words = {column.casefold() for column in table.columns}
        if {"chat_id", "hash_ids"} <= words or "request tokens" in words:
            scale = 1.0
        elif "hash_ids" in words:
            scale = 1e-3
        else:
            scale = 0.0
    cells = table.columns[name]
    if isinstance(cells[kept[0]], str) and _is_date(cells[kept[0]]):
        return _dates(table, name, kept)
    if not scale:
        hint = f"{{arrival_s: {name}}} or {{arrival_ms: {name}}}"
        raise table.error(f"column {name!r} does not say its unit: write columns: {hint}")
    return _numbers(table, name, kept, least=0) * scale


def _is_date(text: str) -> bool:
    return len(text) > 10 and text[4:5] == "-" and text[7:8] == "-"


def _dates(table: _Table, name: str, kept: np.ndarray) -> np.ndarray:
    """Seconds from dates such as ``2023-11-16 18:15:46.6805900`` or ``2024-05-10T00:00:00.1+02:00``."""
    cells = [str(table.columns[name][n]).strip() for n in kept]
    seconds, offset = np.empty(len(cells)), np.zeros(len(cells))
    zones: dict[str, float] = {}
    bare = []
    for n, text in enumerate(cells):
        zone = "Z" if text[-1:] in "Zz" else text[-6:] if text[-6:-5] in ("+", "-") and text[-3:-2] == ":" else ""
        if zone and zone not in zones:
            zones[zone] = 0.0 if zone == "Z" else (1 if zone[0] == "+" else -1) * (int(zone[1:3]) * 3600 + int(zone[4:]) * 60)
        offset[n] = zones.get(zone, 0.0)
        bare.append(text[: len(text) - len(zone)])
    try:
        stamps = np.array(bare, "datetime64[ns]")
    except ValueError:
        for n, text in enumerate(bare):
            try:
                np.datetime64(text, "ns")
            except ValueError:
                raise table.error(f"column {name!r} holds {cells[n]!r}, not a date and time", int(kept[n])) from None
        raise
    seconds = (stamps - stamps[0]) / np.timedelta64(1, "ns") * 1e-9
    seconds = seconds - offset + offset[0]
    return np.asarray(seconds - seconds.min())


def _numbers(
    table: _Table, name: str, kept: np.ndarray, *, least: float, whole: bool = False, blank: bool = False
) -> np.ndarray:
    """A column of finite numbers of at least `least`; with `blank`, empty cells are nan."""
    cells = table.columns[name]
    chosen = cells if kept.size == len(cells) else [cells[n] for n in kept]
    if blank:
        chosen = ["nan" if cell in ("", None) else cell for cell in chosen]
    try:
        values = np.array(chosen, dtype=float)
    except (ValueError, TypeError):
        for n, cell in zip(kept, chosen, strict=True):
            try:
                float(cell)
            except (ValueError, TypeError):
                shown = "no value" if cell is None else f"{cell!r}, not a number"
                raise table.error(f"column {name!r} holds {shown}", int(n)) from None
        raise
    bad = ~(values >= least) | np.isinf(values)
    if blank:
        bad &= ~np.isnan(values)
    if whole:
        bad |= values != np.floor(values)
    if bad.any():
        n = int(np.argmax(bad))
        why = f"below {least:g}" if values[n] < least else "not a whole number" if np.isfinite(values[n]) else "not finite"
        more = " (remove requests that failed)" if values[n] == 0 and least == 1 else ""
        shown = "no value" if chosen[n] is None else chosen[n]
        raise table.error(f"column {name!r} holds {shown}, {why}{more}", int(kept[n]))
    return values


def _label(table: _Table, role: str, name: str, kept: np.ndarray) -> np.ndarray:
    if role == "max_tokens":
        return _numbers(table, name, kept, least=1, blank=True)
    cells = table.columns[name]
    return np.array(["" if cells[n] is None else str(cells[n]) for n in kept])


def _sessions(table: _Table, names: dict[str, str], kept: np.ndarray) -> np.ndarray | None:
    """Session numbers of the rows, -1 for none; None where the file has no such column."""
    if "session" in names:
        cells = table.columns[names["session"]]
        keys = ["" if cells[n] is None else str(cells[n]) for n in kept]
    elif "chat" in names and "parent" in names:
        chat, parent = table.columns[names["chat"]], table.columns[names["parent"]]
        root: dict[str, str] = {}
        keys = []
        for n in kept:
            own, before = str(chat[n]), str(parent[n])
            root[own] = root.get(before, own)
            keys.append(root[own])
    else:
        return None
    values, session = np.unique(np.array(keys), return_inverse=True)
    return np.where(np.array(keys) == "", -1, session - int(values[0] == ""))


def _blocks(table: _Table, name: str, kept: np.ndarray, input_: np.ndarray, tokens: int) -> Blocks:
    cells = table.columns[name]
    lists: list[list[Any]] = []
    for n in kept:
        try:
            lists.append(list(_ids(cells[n])))
        except (ValueError, TypeError):
            raise table.error(
                f"column {name!r} holds {cells[n]!r}: write block ids as a list [0, 14, 15] or as ranges 0;14-15", int(n)
            ) from None
    counts = np.array([len(ids) for ids in lists])
    whole = np.ceil(input_ / tokens)
    # Some engines log full blocks only, so one fewer is right too.
    wrong = (counts > whole) | (counts < np.floor(input_ / tokens))
    if wrong.any():
        n = int(np.argmax(wrong))
        fit = next((2**k for k in range(4, 14) if np.all(counts == np.ceil(input_ / 2**k))), None)
        hint = f": set block_tokens: {fit}" if fit else ""
        raise table.error(
            f"{counts[n]} blocks for {input_[n]:.0f} input tokens; at {tokens} tokens a block there are {whole[n]:.0f}{hint}",
            int(kept[n]),
        )
    flat = [value for ids in lists for value in ids]
    try:
        ids = np.array(flat, dtype=np.int64)
    except (OverflowError, ValueError, TypeError):  # hashes as text or beyond 63 bits
        number: dict[Any, int] = {}
        ids = np.array([number.setdefault(value, len(number)) for value in flat], dtype=np.int64)
    return Blocks(ids, np.concatenate([[0], np.cumsum(counts)]), tokens)


def _ids(cell: Any) -> Iterator[Any]:
    if isinstance(cell, str):
        if not cell.strip():
            return
        if cell.lstrip().startswith("["):
            cell = json.loads(cell)
        else:
            for part in cell.split(";"):
                low, _, high = part.partition("-")
                first, last = int(low), int(high or low)
                if last < first:
                    raise ValueError(part)
                yield from range(first, last + 1)
            return
    if not isinstance(cell, list) or any(isinstance(x, (bool, list, dict, float)) or x is None for x in cell):
        raise ValueError(cell)
    yield from cell
