"""A replay as plain data: percentiles, worst windows, goodput, use; and one row per request."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from perfmodel.serving.replay.outcome import Outcome
from perfmodel.spec.workload import Limit

PERCENTILES = (0.5, 0.9, 0.95, 0.99)
METRICS = ("ttft", "tpot", "itl", "longest_gap", "e2e")


def summary(
    o: Outcome, devices: int, *, ttft: Limit | None = None, tpot: float | None = None, window: float = 300.0
) -> dict[str, Any]:
    """JSON-able description in base units."""
    result: dict[str, Any] = {
        "requests": len(o), "duration_s": o.duration, "devices": devices,
        "requests_per_s": len(o) / o.duration if o.duration else None,
        "output_tokens_per_s": float(o.output[~o.rejected].sum()) / o.duration if o.duration else None,
        "rejected": int(o.rejected.sum()), "preempted_requests": int((o.preemptions > 0).sum()), "preemptions": o.preempted,
        "hit_rate": o.hit_rate, "window_s": window, "percentiles": {}, "worst_window": {},
    }  # fmt: skip
    for metric in METRICS:
        names = {p: f"p{100 * p:g}" for p in PERCENTILES}
        result["percentiles"][metric] = {name: o.percentile(metric, p) for p, name in names.items()}
        worst = {name: o.worst_window(metric, p, window) for p, name in names.items()}
        result["worst_window"][metric] = {name: {"value": v, "start_s": t} for name, (v, t) in worst.items()}
    if ttft is not None or tpot is not None:
        rate = o.goodput(ttft, tpot)
        result["limits"] = {"ttft_s": None if ttft is None else str(ttft), "tpot_s": tpot}
        result |= {
            "attainment": o.attainment(ttft, tpot), "goodput_per_s": rate, "goodput_per_s_per_device": rate / devices,
        }  # fmt: skip
    result["pools"] = [_use(o, n) for n in np.unique(o.usage.pool).tolist()]
    return result


def _use(o: Outcome, pool: int) -> dict[str, Any]:
    """Means over the instances of a pool, and how unevenly they were loaded."""
    u, mine = o.usage, o.usage.pool == pool
    requests = u.requests[mine]
    return {
        "instances": int(mine.sum()), "requests": int(requests.sum()),
        "busiest_over_mean": float(requests.max() / requests.mean()) if requests.sum() else None,
        "busy": float(np.mean(u.busy[mine] / u.span[mine])) if u.span[mine].all() else 0.0,
        "prefilling": float(np.mean(u.prefilling[mine] / u.span[mine])) if u.span[mine].all() else 0.0,
        "kv_mean": float(u.kv_mean[mine].mean()), "kv_peak": float(u.kv_peak[mine].max()),
    }  # fmt: skip


def write_rows(
    o: Outcome, stream: IO[str], measured: dict[str, np.ndarray] | None = None, met: np.ndarray | None = None
) -> None:
    """One CSV row per request, in order of arrival in the trace. Measured times stand next to the predicted ones."""
    columns: dict[str, Sequence[Any]] = {
        "arrival_s": _rounded(o.arrival), "input": o.input.astype(int).tolist(), "output": o.output.astype(int).tolist(),
        "cached": o.cached.tolist(),
    }  # fmt: skip
    for metric in ("ttft", "tpot", "e2e"):
        columns[f"{metric}_s"] = _rounded(getattr(o, metric))
        if measured is not None and metric in measured:
            columns[f"measured_{metric}_s"] = _rounded(measured[metric])
    columns["longest_gap_s"] = _rounded(np.where(o.output > 1, o.longest_gap, np.nan))
    columns |= {
        "finish_s": _rounded(o.finish), "preemptions": o.preemptions.tolist(), "rejected": o.rejected.astype(int).tolist(),
        "instance": o.instance.tolist(), "decoder": o.decoder.tolist(),
    }  # fmt: skip
    if met is not None:
        columns["met"] = met.astype(int).tolist()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def _rounded(values: np.ndarray) -> list[str]:
    """Microseconds; empty where there is no value."""
    return ["" if x != x else f"{x:.6f}" for x in np.asarray(values, float).tolist()]
