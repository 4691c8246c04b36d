"""What replay says of a solution: promises that it breaks, by how much, and the rate at which its fleet would keep them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perfmodel.planner.cells import Cell, Fleet, check
from perfmodel.planner.pools import Pool
from perfmodel.planner.program import Question
from perfmodel.planner.promise import percentile
from perfmodel.planner.service import Service, stricter
from perfmodel.planner.verify import broken, replay, replayed_percentile, together
from perfmodel.spec.workload import Limit, Objectives

_PRECISION = 0.02
_SHOWN = {"longest_gap": "longest gap", "e2e": "end to end"}
Misses = list[tuple[Service, Pool, str]]


@dataclass(frozen=True)
class Shortfall:
    """A promise that a service's replay breaks: `measured` against `limit`, in seconds, or as a share of its requests."""

    service: str
    layout: str
    metric: str
    percentile: str
    measured: float
    limit: float
    per_token: float = 0.0
    """Seconds that each input token is granted beside the limit, which both values leave out."""
    is_share: bool = False

    @property
    def excess(self) -> float:
        """Factor by which it is missed: of seconds, or of the requests that may miss."""
        if self.is_share:
            return (1 - self.measured) / max(1 - self.limit, 1e-9)
        return self.measured / max(self.limit, 1e-12)

    @property
    def name(self) -> str:
        """TTFT p95, or attainment."""
        known = _SHOWN.get(self.metric, self.metric.upper() if len(self.metric) <= 4 else self.metric)
        return f"{known} {self.percentile}".rstrip()

    @property
    def text(self) -> str:
        if self.is_share:
            return f"{self.name}: {self.measured:.2%} of the requests in the worst window, {self.limit:.2%} promised"
        more = f" + {self.per_token * 1e3:g} ms per input token" if self.per_token else ""
        return f"{self.name} {self.measured * 1e3:,.0f} ms in the worst window, limit {self.limit * 1e3:,.0f} ms{more}"


def shortfalls(cells: Iterable[Cell], misses: Misses) -> list[Shortfall]:
    """Each broken promise of a replayed solution once, at the client, with the layout that misses it; the worst first."""
    found: dict[tuple[str, str], Shortfall] = {}
    for cell in cells:
        for service, pool, what in misses:
            if service is cell.service and not what.startswith("closed form"):
                one = _shortfall(cell, pool, what)
                key = (service.name, one.name)
                if key not in found or one.excess > found[key].excess:
                    found[key] = one
    return sorted(found.values(), key=lambda x: -x.excess)


def _shortfall(cell: Cell, pool: Pool, what: str) -> Shortfall:
    """One miss as `verify.broken` names it ("ttft p95", "attainment"), measured over the pools of its region."""
    site = pool.column.offer.site
    goals = cell.service.objectives
    parts = [x for x in cell.replayed if x.pool.column.offer.region == pool.column.offer.region]
    label, name = pool.column.layout.label, cell.service.name
    if what == "attainment":
        joint, near = goals.attainment, stricter(goals, site.rtt).attainment
        every = together(parts)
        assert joint is not None
        assert near is not None
        assert every is not None
        measured = every.worst_share(every.met(near.ttft, near.tpot), joint.share, goals.window)
        return Shortfall(name, label, what, "", measured, joint.share, is_share=True)
    metric, _, at = what.partition(" ")
    limit: Limit = getattr(goals, metric)[at]
    p = percentile(at)
    far = site.rtt if metric in ("ttft", "e2e") else 0.0
    measured = replayed_percentile(parts, metric, p, goals.window, limit.per_token) + far
    if measured > float(limit):
        return Shortfall(name, label, metric, at, measured, float(limit), limit.per_token)
    # Requests that were preempted or rejected count as misses, however soon they were answered.
    every = together([x for x in parts if x.answers_for(metric)])
    assert every is not None
    near_limit = getattr(stricter(goals, site.rtt), metric)[at]
    share = every.worst_share(every.met(**{metric: near_limit}), p, goals.window)
    return Shortfall(name, label, metric, at, share, p, is_share=True)


@dataclass(frozen=True)
class Confirmed:
    """Whether a solution keeps every promise in replay, and what it breaks."""

    missed: tuple[str, ...]

    @property
    def data(self) -> dict[str, Any]:
        return {"kept": not self.missed, "missed": list(self.missed)}


def confirm(fleet: Fleet, question: Question, values: dict[str, float]) -> Confirmed:
    """Replay a solution on the requests it was made for."""
    cells, misses = check(fleet, question, values)
    named = [f"{x.text} ({x.layout})" for x in shortfalls(cells, misses)]
    named += sorted({f"{p.column.layout.label}: {what}" for _, p, what in misses if what.startswith("closed form")})
    return Confirmed(tuple(named))


def kept_rate(cells: list[Cell], fleet: Fleet) -> float:
    """Largest share of the load at which the same pools keep every promise in replay, to 2 %; 0 where none does."""
    low, high = 0.0, 1.0
    while high - low > _PRECISION:
        middle = (low + high) / 2
        held = all(_keeps(c, middle, fleet) for c in cells)
        low, high = (middle, high) if held else (low, middle)
    return low


def _keeps(cell: Cell, share: float, fleet: Fleet) -> bool:
    s = cell.service
    requests = s.workload.requests
    count = np.arange(len(requests))
    some = requests.take(np.floor((count + 1) * share) > np.floor(count * share))
    if not len(some):
        return False
    results = replay(cell.pools, replace(s.workload, requests=some), s.buckets, fleet.spec.seed, s.choices)
    goals: Objectives = s.objectives
    regions = {x.pool.column.offer.region: x.pool.column.offer.site for x in results}
    return not any(
        broken([x for x in results if x.pool.column.offer.region == name], stricter(goals, site.rtt))
        for name, site in regions.items()
    )
