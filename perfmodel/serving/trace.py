"""Request traces as files: CSV or JSON lines, in the forms public traces have or with the columns named.

Known by their header: Azure 2023/2024 (``TIMESTAMP, ContextTokens, GeneratedTokens``, date and time), BurstGPT
(``Timestamp`` in seconds, ``Request tokens, Response tokens``, ``Session ID``, ``Elapsed time``), Mooncake (JSON lines
with ``timestamp`` in milliseconds and ``hash_ids``), Bailian (the same with ``chat_id`` and seconds), vLLM and AIPerf
derivatives of these, and any file whose columns are called by common names for arrival, input and output.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel.errors import SpecError, did_you_mean
from perfmodel.serving import sharing, ticks
from perfmodel.serving.requests import Blocks, Requests
from perfmodel.serving.trace_file import Table, names_of, read_table
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
    "images": ("images", "num_images", "numimages", "image_count"),
    "max_tokens": ("max_tokens", "max_new_tokens", "max_output_tokens"),
}  # fmt: skip
_ZONE = re.compile(r"[+-]\d\d:?\d\d$")
_LABELS = ("tenant", "model", "max_tokens", "images")
_LONGEST_DAYS = 366  # longer logs are milliseconds read as seconds, or one stray row
_LAST_EPOCH = 1e11  # seconds since 1970: the year 5138, or 1973 in milliseconds




def read_trace(trace: Trace, base: Path) -> Requests:
    """Read a trace; arrivals sorted, the first at 0 s, a coarse clock's ticks spread unless the spec says no.

    Conversations come from a session column, else from block ids: a prompt that holds an earlier prompt's full blocks and
    is long enough for its answer continues it. Think times need the seconds each answer took (BurstGPT's ``Elapsed
    time``) or a column of their own; without either they are nan, and turns arrive by the clock (`closed_loop`).
    Raises SpecError with the file and line of the first row that cannot be used.
    """
    path = Path(trace.file) if Path(trace.file).is_absolute() else base / trace.file
    table = read_table(path)
    names = find_columns(table, trace)
    kept = kept_rows(table, trace)
    requests = _requests(table, names, kept, trace)
    order = np.argsort(requests.arrival, kind="stable")
    requests = requests.take(order).at(requests.arrival[order] - requests.arrival[order[0]])
    days = requests.arrival[-1] / 86400
    if days > _LONGEST_DAYS:
        hint = "if they are milliseconds, write columns: {arrival_ms: …}"
        raise SpecError(f"arrivals span {days:,.4g} days, over {_LONGEST_DAYS}: {hint}", file=table.file)
    tick = ticks.tick_of(requests.arrival)
    return requests if not tick else ticks.on_clock(requests, tick, spread=trace.spread_ticks)


def find_columns(table: Table, trace: Trace) -> dict[str, str]:
    """Column of each role: those the spec names, then those found by name."""
    header = list(table.columns)
    wanted = trace.columns
    said = {role: getattr(wanted, role) for role in ("arrival_s", "arrival_ms", "input", "output", "blocks", "session",
                                                    "think_s", "elapsed_s", "images")}  # fmt: skip
    said |= {str(label): name for label, name in wanted.labels.items()}
    named = {role: name for role, name in said.items() if name is not None}
    for name in (*named.values(), *wanted.where):
        if name not in table.columns:
            raise table.error(f"no column {name!r}{did_you_mean(name, header)}; columns: {names_of(header)}")
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
    return f"no column for {role}{meant}: name it under 'columns'; columns: {names_of(header)}"


def kept_rows(table: Table, trace: Trace) -> np.ndarray:
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


def _requests(table: Table, names: dict[str, str], kept: np.ndarray, trace: Trace) -> Requests:
    arrival = arrival_seconds(table, names, kept)
    input_ = numbers(table, names["input"], kept, least=1, whole=True)
    output = numbers(table, names["output"], kept, least=1, whole=True)
    blocks = _blocks(table, names["blocks"], kept, input_, trace.block_tokens) if "blocks" in names else None
    labels = {name: _label(table, name, names[name], kept) for name in _LABELS if name in names}
    requests = Requests(arrival, input_, output, blocks, labels=labels)
    session = _sessions(table, names, kept)
    if session is None and blocks is not None:
        session = sharing.conversations(requests)
    if session is None:
        return requests
    if "think_s" in names:
        think = numbers(table, names["think_s"], kept, least=0, blank=True)
        return Requests(arrival, input_, output, blocks, session, think, labels)
    requests = Requests(arrival, input_, output, blocks, session, np.full(arrival.size, np.nan), labels)
    if "elapsed_s" in names:
        return closed_loop(requests, numbers(table, names["elapsed_s"], kept, least=0))
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


def arrival_seconds(table: Table, names: dict[str, str], kept: np.ndarray) -> np.ndarray:
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
    seconds = numbers(table, name, kept, least=0) * scale
    if seconds.max() > _LAST_EPOCH:
        hint = f"write columns: {{arrival_ms: {name}}}"
        raise table.error(f"column {name!r} holds {seconds.max() / scale:.6g}, too late for seconds: {hint}")
    return seconds


def _is_date(text: str) -> bool:
    return len(text) > 10 and text[4:5] == "-" and text[7:8] == "-"


def _dates(table: Table, name: str, kept: np.ndarray) -> np.ndarray:
    """Seconds from dates such as ``2023-11-16 18:15:46.6805900`` or ``2024-05-10T00:00:00.1+02:00``."""
    cells = [str(table.columns[name][n]).strip() for n in kept]
    seconds, offset = np.empty(len(cells)), np.zeros(len(cells))
    zones: dict[str, float] = {}
    bare = []
    for n, text in enumerate(cells):
        zone = "Z" if text[-1:] in ("Z", "z") else found[0] if (found := _ZONE.search(text)) else ""
        if zone and zone not in zones:
            zones[zone] = 0.0 if zone == "Z" else (1 if zone[0] == "+" else -1) * (int(zone[1:3]) * 3600 + int(zone[-2:]) * 60)
        offset[n] = zones.get(zone, 0.0)
        bare.append(text[: len(text) - len(zone)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # NumPy's of a time zone, which none of these has any more
        try:
            stamps = np.array(bare, "datetime64[ns]")
        except (ValueError, UserWarning):
            stamps = np.array([_stamp(text) for text in bare])
    if np.isnat(stamps).any():
        n = int(np.argmax(np.isnat(stamps)))
        raise table.error(f"column {name!r} holds {cells[n]!r}, not a date and time", int(kept[n]))
    seconds = (stamps - stamps[0]) / np.timedelta64(1, "ns") * 1e-9
    seconds = seconds - offset + offset[0]
    return np.asarray(seconds - seconds.min())


def _stamp(text: str) -> np.datetime64:
    """NaT for what is no date."""
    try:
        return np.datetime64(text, "ns")
    except (ValueError, UserWarning):
        return np.datetime64("NaT", "ns")


def numbers(
    table: Table, name: str, kept: np.ndarray, *, least: float, whole: bool = False, blank: bool = False
) -> np.ndarray:
    """A column of finite numbers of at least `least`; with `blank`, empty cells are nan."""
    cells = table.columns[name]
    chosen = cells if kept.size == len(cells) else [cells[n] for n in kept]
    if blank:
        chosen = ["nan" if cell in ("", None) else cell for cell in chosen]
    if any(isinstance(cell, (bool, list)) for cell in chosen):  # JSON's, which NumPy would read as numbers
        n, cell = next((n, c) for n, c in zip(kept, chosen, strict=True) if isinstance(c, (bool, list)))
        raise table.error(f"column {name!r} holds {json.dumps(cell)}, not a number", int(n))
    try:
        values = np.array(chosen, dtype=float)
    except (ValueError, TypeError, OverflowError):
        for n, cell in zip(kept, chosen, strict=True):
            try:
                float(cell)
            except (ValueError, TypeError, OverflowError):
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


def _label(table: Table, role: str, name: str, kept: np.ndarray) -> np.ndarray:
    if role == "images":
        return numbers(table, name, kept, least=0, whole=True)
    if role == "max_tokens":
        return numbers(table, name, kept, least=1, blank=True)
    cells = table.columns[name]
    return np.array(["" if cells[n] is None else str(cells[n]) for n in kept])


def _sessions(table: Table, names: dict[str, str], kept: np.ndarray) -> np.ndarray | None:
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


def _blocks(table: Table, name: str, kept: np.ndarray, input_: np.ndarray, tokens: int) -> Blocks:
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
