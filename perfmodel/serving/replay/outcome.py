"""What a replay observed: times of every request, gaps between tokens, and how busy each instance was."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.spec.workload import Limit

_MOST_WINDOWS = 1_000_000
_GAP_RESOLUTION = 0.005  # gaps of one run of steps are told apart to this ratio


@dataclass(frozen=True)
class Gaps:
    """Gaps between tokens, in the order they ended: gap [s], how many tokens saw it, when it ended [s]."""

    seconds: np.ndarray
    tokens: np.ndarray
    at: np.ndarray

    @staticmethod
    def of_runs(at: list[float], first: list[float], last: list[float], tokens: list[int]) -> Gaps:
        """From runs of decode steps whose gaps grow evenly from `first` to `last`."""
        end, low, high, count = (np.asarray(a, float) for a in (at, first, last, tokens))
        spread = np.abs(np.log(np.maximum(high, 1e-12) / np.maximum(low, 1e-12)))
        pieces = np.maximum(np.ceil(spread / _GAP_RESOLUTION), 1).astype(int)
        run = np.repeat(np.arange(end.size), pieces)
        place = np.arange(run.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        share = (place + 0.5) / pieces[run]
        return Gaps(low[run] + (high - low)[run] * share, count[run] / pieces[run], end[run])

    def percentile(self, p: float) -> float:
        """Gap that a share p of the tokens does not exceed [s]; 0 without any."""
        if not self.tokens.size:
            return 0.0
        order = np.argsort(self.seconds, kind="stable")
        share = np.cumsum(self.tokens[order])
        return float(self.seconds[order][min(int(np.searchsorted(share, p * share[-1])), order.size - 1)])

    def between(self, start: float, end: float) -> Gaps:
        """Those that ended in [start, end)."""
        chosen = (self.at >= start) & (self.at < end)
        return Gaps(self.seconds[chosen], self.tokens[chosen], self.at[chosen])


@dataclass(frozen=True)
class Usage:
    """Per instance: how busy it was. `span` is seconds from the first arrival of the replay to its last event."""

    pool: np.ndarray
    requests: np.ndarray
    busy: np.ndarray
    """Seconds in steps."""
    prefilling: np.ndarray
    """Seconds in steps that carry prefill."""
    kv_mean: np.ndarray
    """Share of the cache that running requests hold, over the span."""
    kv_peak: np.ndarray
    span: np.ndarray


def _none() -> np.ndarray:
    return np.zeros(0)


@dataclass(frozen=True)
class Outcome:
    """One element per request. Seconds; nan where a request never got that far."""

    ttft: np.ndarray
    """Arrival to first token, front end included."""
    tpot: np.ndarray
    """(last - first token)/(output - 1); nan for one-token and rejected requests."""
    finish: np.ndarray
    """When the last token came."""
    preemptions: np.ndarray
    """Times a request lost its cache and was recomputed or swapped."""
    arrival: np.ndarray = field(default_factory=_none)
    input: np.ndarray = field(default_factory=_none)
    output: np.ndarray = field(default_factory=_none)
    longest_gap: np.ndarray = field(default_factory=_none)
    """Longest wait between two tokens."""
    rejected: np.ndarray = field(default_factory=_none)
    """True: larger than the cache, or waited longer than the timeout."""
    cached: np.ndarray = field(default_factory=_none)
    """Prompt tokens found in a prefix cache."""
    instance: np.ndarray = field(default_factory=_none)
    """Which instance computed the first token, counted over all pools; -1: none."""
    decoder: np.ndarray = field(default_factory=_none)
    """Which instance computed the others."""
    encoded: np.ndarray = field(default_factory=_none)
    """When its embeddings came from an encode pool; nan where none did."""
    encoder: np.ndarray = field(default_factory=_none)
    """Which instance made them."""
    gaps: Gaps = field(default_factory=lambda: Gaps(_none(), _none(), _none()))
    usage: Usage = field(default_factory=lambda: Usage(*[_none()] * 7))

    def __len__(self) -> int:
        return int(self.ttft.size)

    @property
    def preempted(self) -> int:
        """Preemptions of all requests together."""
        return int(self.preemptions.sum())

    @property
    def e2e(self) -> np.ndarray:
        """Arrival to last token [s]."""
        return self.finish - self.arrival

    @property
    def duration(self) -> float:
        """Seconds from the first arrival to the last token."""
        ends = self.finish[np.isfinite(self.finish)]
        return float(ends.max() - self.arrival.min()) if ends.size else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that came from a prefix cache."""
        served = ~self.rejected
        total = float(self.input[served].sum())
        return float(self.cached[served].sum()) / total if total else 0.0

    def take(self, chosen: np.ndarray) -> Outcome:
        """Some of the requests, by mask or index. Gaps and usage stay those of the whole replay."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)}
        return replace(self, **{name: a[chosen] if a.size else a for name, a in arrays.items()})

    def values(self, metric: str, per_token: float = 0.0) -> np.ndarray:
        """Seconds of one metric for the requests that have it; a rejected request counts as infinite.

        metric: ttft, tpot, e2e or longest_gap. One-token requests have no TPOT and no gap. per_token: seconds that each input
        token is granted, as a limit that grows with the input does.
        """
        seconds = np.asarray(getattr(self, metric), float)
        if per_token:
            seconds = seconds - per_token * self.input
        if self.rejected.size:
            seconds = np.where(self.rejected, np.inf, seconds)
        return seconds[self._has(metric)]

    def _has(self, metric: str) -> np.ndarray:
        if metric in ("tpot", "longest_gap"):
            return self.output > 1 if self.output.size else ~np.isnan(self.tpot)
        return np.ones(len(self), bool)

    def percentile(self, metric: str, p: float, per_token: float = 0.0) -> float:
        """What a share p of the requests (metric itl: of the tokens) does not exceed [s]; 0 where nothing has the metric."""
        return self.gaps.percentile(p) if metric == "itl" else _percentile(self.values(metric, per_token), p)

    def worst_window(self, metric: str, p: float, window: float, per_token: float = 0.0) -> tuple[float, float]:
        """(percentile, start of the window [s]) in the worst window of that length, by arrival (metric itl: by token).

        Windows start every half length. One with fewer than 1/(1 - p) requests cannot show the percentile and is left
        out; if all are, the whole replay is the window.
        """
        starts = self._windows(window)
        start = float(starts[0])
        worst = (-math.inf, start)
        if metric == "itl":
            for t in starts.tolist():
                inside = self.gaps.between(t, t + window)
                if inside.tokens.sum() >= 1 / (1 - p):
                    worst = max(worst, (inside.percentile(p), t))
        else:
            has = self._has(metric)
            values, arrival = self.values(metric, per_token), self.arrival[has]
            order = np.argsort(arrival, kind="stable")
            values, arrival = values[order], arrival[order]
            low, high = np.searchsorted(arrival, starts), np.searchsorted(arrival, starts + window)
            for t, i, j in zip(starts.tolist(), low.tolist(), high.tolist(), strict=True):
                if j - i >= 1 / (1 - p):
                    worst = max(worst, (_percentile(values[i:j], p), t))
        return worst if worst[0] > -math.inf else (self.percentile(metric, p, per_token), start)

    def worst_share(self, good: np.ndarray, p: float, window: float) -> float:
        """Smallest share of good requests over the windows that `worst_window` looks at, to be held against p."""
        if not len(self):
            return 1.0
        order = np.argsort(self.arrival, kind="stable")
        arrival, starts = self.arrival[order], self._windows(window)
        upto = np.concatenate([[0], np.cumsum(good[order])])
        low, high = np.searchsorted(arrival, starts), np.searchsorted(arrival, starts + window)
        enough = high - low >= 1 / (1 - p)
        if not enough.any():
            return float(good.mean())
        return float(((upto[high] - upto[low])[enough] / (high - low)[enough]).min())

    def _windows(self, window: float) -> np.ndarray:
        start, end = float(self.arrival.min()), float(self.arrival.max())
        count = math.ceil((end - start) / window * 2) - 1 if math.isfinite(window) else 1
        if count > _MOST_WINDOWS:
            raise SpecError(f"a window of {window:g} s is too short for {end - start:,.0f} s of requests: write 1 s or more")
        return start + (window / 2 if count > 1 else 0.0) * np.arange(max(1, count))

    def met(self, ttft: float | None = None, tpot: float | None = None, **more: float | None) -> np.ndarray:
        """Which requests meet every limit given [s]; rejected and preempted ones count as misses.

        A TTFT limit may be a `Limit` that grows with the input. A metric that a request does not have is met. `more`:
        e2e, longest_gap.
        """
        good = ~self.rejected & (self.preemptions == 0)
        for metric, limit in {"ttft": ttft, "tpot": tpot, **more}.items():
            if limit is None:
                continue
            most = limit.at(self.input) if isinstance(limit, Limit) else limit
            # Written so that nan, a request that never finished, is a miss.
            good &= ~self._has(metric) | (np.asarray(getattr(self, metric), float) <= most)
        return good

    def attainment(self, ttft: float | None = None, tpot: float | None = None, **more: float | None) -> float:
        """Share of requests that meet all limits together."""
        return float(self.met(ttft, tpot, **more).mean())

    def goodput(self, ttft: float | None = None, tpot: float | None = None, **more: float | None) -> float:
        """Requests per second that meet all limits together, over the replay's duration."""
        return float(self.met(ttft, tpot, **more).sum()) / self.duration if self.duration else 0.0


def _percentile(values: np.ndarray, p: float) -> float:
    if not values.size:
        return 0.0
    if not np.all(np.isfinite(values)):
        # Interpolation between a number and infinity has no value: take the order statistic.
        return float(np.percentile(values, p * 100, method="higher"))
    return float(np.percentile(values, p * 100))


def _join(parts: list[Any]) -> dict[str, np.ndarray]:
    names = [f.name for f in fields(parts[0]) if isinstance(getattr(parts[0], f.name), np.ndarray)]
    return {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}


def merge(outcomes: list[Outcome]) -> Outcome:
    """Requests of several instances or fleets together; their instances are numbered one after the other."""
    whole = _join(outcomes)
    before = np.cumsum([0] + [o.usage.busy.size for o in outcomes[:-1]])
    for name in ("instance", "decoder", "encoder"):
        moved = [np.where(getattr(o, name) >= 0, getattr(o, name) + n, -1) for o, n in zip(outcomes, before, strict=True)]
        whole[name] = np.concatenate(moved)
    gaps, usage = (_join([getattr(o, name) for o in outcomes]) for name in ("gaps", "usage"))
    return Outcome(**whole, gaps=Gaps(**gaps), usage=Usage(**usage))
