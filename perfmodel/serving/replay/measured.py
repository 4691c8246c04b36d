"""Measured times of a trace's requests, next to which a replay can be put row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.serving import trace as files
from perfmodel.serving.replay.outcome import Outcome
from perfmodel.serving.trace_file import read_table
from perfmodel.spec.workload import Trace

METRICS = ("ttft", "tpot", "e2e")
# Columns in seconds (scale 1) or milliseconds, as common load generators call them, in lower case.
_COLUMNS = {
    "ttft": {"ttft": 1.0, "ttft_s": 1.0, "ttft_ms": 1e-3, "time_to_first_token": 1.0},
    "tpot": {"tpot": 1.0, "tpot_s": 1.0, "tpot_ms": 1e-3},
    "e2e": {"e2e": 1.0, "e2e_s": 1.0, "e2e_ms": 1e-3, "latency": 1.0, "latency_s": 1.0, "latency_ms": 1e-3,
            "elapsed time": 1.0, "e2e_latency": 1.0},
}  # fmt: skip


def measured(trace: Trace, base: Path) -> dict[str, np.ndarray]:
    """Seconds of each metric that the trace has, in the order of `read_trace`; nan in empty cells.

    Raises SpecError when it has none.
    """
    path = Path(trace.file) if Path(trace.file).is_absolute() else base / trace.file
    table = read_table(path)
    kept = files.kept_rows(table, trace)
    arrival = files.arrival_seconds(table, files.find_columns(table, trace), kept)
    order = np.argsort(arrival, kind="stable")
    found = {}
    for metric, names in _COLUMNS.items():
        name = next((c for c in table.columns if c.casefold() in names), None)
        if name is not None:
            found[metric] = files.numbers(table, name, kept, least=0, blank=True)[order] * names[name.casefold()]
    if not found:
        known = ", ".join(name for names in _COLUMNS.values() for name in names)
        raise SpecError(f"the trace has no measured times to compare with; columns looked for: {known}", file=str(path))
    return found


def errors(outcome: Outcome, found: dict[str, np.ndarray], shares: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Predicted over measured percentile less one, and the median error of single requests, by metric."""
    result: dict[str, dict[str, float]] = {}
    for metric, real in found.items():
        ours = np.asarray(getattr(outcome, metric), float)
        both = np.isfinite(real) & np.isfinite(ours) & (real > 0)
        if not both.any():
            continue
        at = {f"p{100 * p:g}": float(np.percentile(ours[both], 100 * p) / np.percentile(real[both], 100 * p)) - 1 for p in shares}
        result[metric] = {**at, "median_abs_per_request": float(np.median(np.abs(ours[both] / real[both] - 1)))}
    return result
