"""What a planner wants to know of a trace before planning: rates, bursts, lengths, conversations, sharing, clock."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from perfmodel.serving import arrivals, prefix, sharing
from perfmodel.serving.requests import Requests

_PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
_PEAKS = (1.0, 10.0, 60.0, 300.0, 3600.0)
_CACHES = (0.5, 0.8, 0.9, 0.95, 0.99)  # shares of all possible hits


def summary(requests: Requests) -> dict[str, Any]:
    """Plain data, base SI: requests, span [s], rates [1/s], dispersion, percentiles of tokens, sessions, sharing.

    Peaks are of the fullest window anywhere; `index_of_dispersion` is by window, None where the trace holds fewer than
    ten. `sharing.cache` lists the LRU cache tokens, shared by all instances, that find a share of all that can be found.
    """
    r = requests
    span = float(r.arrival[-1])
    data: dict[str, Any] = {
        "requests": len(r), "span_s": span, "clock_tick_s": r.tick or None,
        "rate": {"mean": len(r) / span if span else None, "peaks": _peaks(r, span)},
        "dispersion": {
            "cv": math.sqrt(arrivals.squared_cv(r.arrival)) if len(r) > 2 and span else None,
            "index_of_dispersion": {f"{w:g}": _or_none(arrivals.index_of_dispersion(r.arrival, w)) for w in arrivals.WINDOWS},
            "peak_to_mean_1s": arrivals.peak_to_mean(r.arrival, 1.0) if span else None,
        },
        "input": _lengths(r.input), "output": _lengths(r.output),
        "correlation": _correlation(r),
        "labels": {name: _values(values) for name, values in r.labels.items()},
        "sessions": _sessions(r), "sharing": _sharing(r),
    }  # fmt: skip
    return data


def _or_none(x: float) -> float | None:
    return None if math.isnan(x) else x


def _peaks(r: Requests, span: float) -> dict[str, dict[str, float]]:
    found = {}
    for window in _PEAKS:
        if 0 < window <= span:
            start, _ = arrivals.busiest(r.arrival, span, window)
            inside = np.searchsorted(r.arrival, start + window, side="left") - np.searchsorted(r.arrival, start, side="left")
            found[f"{window:g}"] = {"rate": float(inside) / window, "start_s": start}
    return found


def _lengths(tokens: np.ndarray) -> dict[str, float]:
    shares = {f"p{p}": float(np.percentile(tokens, p)) for p in _PERCENTILES}
    return {"mean": float(tokens.mean()), "min": float(tokens.min()), **shares, "max": float(tokens.max())}


def _correlation(r: Requests) -> float | None:
    """Of the logarithms of input and output."""
    x, y = np.log(r.input), np.log(r.output)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else None


def _values(values: np.ndarray) -> dict[str, float]:
    """Shares of the commonest values of a label."""
    names, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:10]
    return {str(names[k]): float(counts[k] / values.size) for k in order}


def _sessions(r: Requests) -> dict[str, Any] | None:
    if r.session is None or not np.any(r.session >= 0):
        return None
    _, turns = np.unique(r.session[r.session >= 0], return_counts=True)
    before = sharing.previous_turn(r)
    later = np.flatnonzero(before >= 0)
    think = r.think[later] if r.think is not None else np.zeros(0)
    known = think[~np.isnan(think)]
    return {
        "sessions": int(turns.size), "turns_mean": float(turns.mean()), "turns_p95": float(np.percentile(turns, 95)),
        "further_turns": float(later.size / len(r)),
        "gap_median_s": float(np.median(r.arrival[later] - r.arrival[before[later]])) if later.size else None,
        "think_median_s": float(np.median(known)) if known.size else None,
    }  # fmt: skip


def _sharing(r: Requests) -> dict[str, Any] | None:
    if r.blocks is None:
        return None
    cache, found = prefix.uses(r).curve()
    most = float(found[-1]) if found.size else 0.0
    wanted = {f"{share:g}": cache[int(np.searchsorted(found, share * most))] for share in _CACHES} if most else {}
    return {
        "block_tokens": r.blocks.tokens, "distinct_blocks": int(np.unique(r.blocks.ids).size),
        "reusable_share": most / float(r.input.sum()), "popular_blocks": int(sharing.popular(r).size),
        "cache_tokens": {k: float(v) for k, v in wanted.items()},
    }  # fmt: skip
