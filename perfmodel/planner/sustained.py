"""Rates that a column sustains under the requests themselves, where bursts are beyond the closed forms.

One column at a time: instances take an even share of the requests of its buckets, as a router deals them in turn, and the
largest share that keeps every promise is sought by bisection. No other column matters, so each is measured once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from perfmodel.planner.case import WHOLE_LOAD, Case
from perfmodel.planner.columns import Column, Enumerator, column_at
from perfmodel.planner.pools import pool_of
from perfmodel.planner.promise import MOST_PREFILL
from perfmodel.planner.service import Service, stricter
from perfmodel.planner.verify import broken, replay
from perfmodel.serving import frontend
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import bucket_of

_REPLAYED = 3000
"""Requests of one trial: instances beyond those that they keep busy see the same."""
_PRECISION = 1.04
_HALVINGS = 12
_LEAST = 1e-4
_SPARE = 1.1
"""What another bucket set of a measured layout is first thought to carry, over what the measured set did."""

Key = tuple[Any, ...]


@dataclass
class Sustained:
    """Measures columns, and remembers them."""

    seed: int
    known: dict[Key, tuple[float, str]] = field(default_factory=dict)
    """(requests/s of one instance, what stops it), by layout and the requests of its buckets."""
    measured: set[Key] = field(default_factory=set)
    """Columns (service, period, layout, buckets) whose rate was found by replay."""

    def begin(self, service: Service) -> None:
        """Raise every column to the most that its time and memory allow: nothing carries more, bursts or not."""
        for found in service.found.values():
            for key, c in list(found.columns.items()):
                rate = _most(c.case) if alone(c) else 0.0
                found.columns[key] = column_at(c.layout, c.offer, c.case, rate, c.limited_by) if rate > 0 else c

    def pending(self, service: Service, c: Column) -> bool:
        """Whether a column of a solution has not been measured yet."""
        return alone(c) and (service.name, service.period, *c.key) not in self.measured

    def measure(self, service: Service, c: Column) -> None:
        """Set the column's rate to what it sustains, and expect as much of the layout's other bucket sets."""
        found = service.found[service.home(c.offer).label]
        column = found.columns[c.key]
        rate, limited = self._rate(service, column, service.slower.get(found.offers[0].label, 1.0))
        before = column.state.rate
        self.measured.add((service.name, service.period, *c.key))
        if rate <= 0:
            del found.columns[c.key]
            return
        now = found.columns[c.key] = column_at(column.layout, column.offer, column.case, rate, limited)
        if rate < before:
            self._expect(service, found, now)

    def _expect(self, service: Service, found: Enumerator, now: Column) -> None:
        """Bring the layout's other sets down to what the measured one makes likely; they are measured once they are chosen."""
        for key, c in list(found.columns.items()):
            if c.layout == now.layout and self.pending(service, c):
                rate = _SPARE * now.rate_of(c.buckets) if set(c.buckets) <= set(now.buckets) else math.inf
                if rate < c.state.rate:
                    found.columns[key] = column_at(c.layout, c.offer, c.case, rate, now.limited_by)

    def _rate(self, service: Service, c: Column, slower: float) -> tuple[float, str]:
        mine = np.isin(bucket_of(service.buckets, service.workload.requests, service.workload.cached()), c.buckets)
        key = (service.name, service.period, c.layout, c.offer.site.rtt, slower, mine.tobytes())
        if key not in self.known:
            self.known[key] = _bisect(Trial(service, c, service.workload.requests.take(mine), slower, self.seed))
        return self.known[key]


def alone(c: Column) -> bool:
    """Whether a column can be tried by itself; those fed by encode pools, and static batches, keep their closed forms' rate."""
    return c.layout.policy != "static" and c.layout.role != "encode" and not c.layout.fed


@dataclass(frozen=True)
class Trial:
    """One column and the requests of its buckets."""

    service: Service
    column: Column
    requests: Requests
    slower: float
    """Factor by which times may exceed the expected ones at the asked confidence: the clock of arrivals runs as much faster."""
    seed: int

    @property
    def whole(self) -> bool:
        """Whether every instance must be there: what is shared meets only then."""
        return self.service.choices.prefix_caching or self.service.choices.dealt == "prefix-affine"

    def breaks(self, share: float) -> str:
        """The promise that breaks when one instance takes this share of the requests; empty where all are kept."""
        most = max(1, math.floor(1 / share + 1e-9))
        if self.whole:
            instances, some = max(1, round(1 / share)), self.requests
        else:
            instances = min(most, max(1, math.ceil(_REPLAYED / (len(self.requests) * share))))
            count = np.arange(len(self.requests))
            taken = min(instances * share, 1.0)
            some = self.requests.take(np.floor((count + 1) * taken + 1e-9) > np.floor(count * taken + 1e-9))
        if not len(some):
            return ""
        s, c = self.service, self.column
        faster = some.at(some.arrival / self.slower)
        workload = replace(s.workload, requests=faster)
        rates = np.array([float(k in c.buckets) * b.share for k, b in enumerate(s.buckets)])
        rates *= c.case.most * min(instances * share, 1.0) / rates.sum()
        pool = pool_of(c, instances, rates, s.buckets)
        seen = replay([pool], workload, s.buckets, self.seed, s.choices)
        goals = stricter(s.objectives, c.offer.site.rtt, self.slower)
        return next((what for _, what in broken(seen, goals)), "")


def _bisect(trial: Trial) -> tuple[float, str]:
    """(highest rate of one instance, what breaks beyond): first over whole fleets of n that share all requests, as small fleets
    are; then between n and n - 1."""
    case = trial.column.case
    cap = min(_most(case) / case.most, 1.0)
    if cap <= 0:
        return 0.0, ""
    low, high = 0, max(1, math.ceil(1 / cap - 1e-9))
    least, why = high, ""
    # Fleets of `high` instances keep every promise, those of `low` do not.
    while what := trial.breaks(1 / high):
        why, low, high = what, high, 2 * high
        if 1 / high < _LEAST:
            return 0.0, why
    while high - low > max(1, int(low * (_PRECISION - 1))) and high > least:
        middle = (low + high) // 2
        what = trial.breaks(1 / middle)
        why, low, high = (what, middle, high) if what else (why, low, middle)
    share, above = 1.0 / high, min(1 / max(high - 1, 1), cap) if high > 1 else cap
    if high == 1 or above <= share * _PRECISION or trial.whole:
        return case.most * min(share, cap), f"{_name(why)} in replay" if why else WHOLE_LOAD if high == 1 else "prefill time"
    for _ in range(2):
        between = math.sqrt(share * above)
        what = trial.breaks(between)
        why, share, above = (what, share, between) if what else (why, between, above)
    return case.most * share, f"{_name(why)} in replay" if why else "prefill time"


def _name(what: str) -> str:
    """``ttft p95`` as TTFT p95."""
    metric, _, at = what.partition(" ")
    return f"{metric.upper() if len(metric) <= 4 else metric.replace('_', ' ')} {at}".rstrip()


def _most(case: Case) -> float:
    """Highest rate at which one instance has a steady state and its front end keeps up, whatever the promises."""
    high = case.most
    if case.instance.role != "decode" and case.estimator.engine.frontend is not None:
        mix = case.mix(0.0)
        high = min(high, frontend.rate_bound(case.estimator.engine, mix.mean(mix.input), mix.mean(mix.output)))

    def lasts(rate: float) -> bool:
        s = case.instance.state(rate, case.mix(rate))
        return bool(s.feasible and s.utilisation <= MOST_PREFILL)

    if lasts(high):
        return high
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if lasts(middle) else (low, middle)
    return low
