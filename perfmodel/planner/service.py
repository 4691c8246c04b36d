"""One service at one load: its workload, and its columns on every offer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from perfmodel.planner.columns import Column, Enumerator, Hints, Rejected, unserved
from perfmodel.planner.evaluated import Served
from perfmodel.planner.layout import Layout
from perfmodel.planner.offer import Offer
from perfmodel.planner.program import Demand
from perfmodel.planner.promise import percentile
from perfmodel.serving.encode import tower_bytes
from perfmodel.spec.fleet import Startup
from perfmodel.spec.workload import Joint, Limit, Objectives


@dataclass
class Service(Served):
    """Columns of one service at one load.

    slower: by offer label, the factor by which all its times may exceed the expected ones at the asked confidence. Scaling every
    time by f is the same as scaling the rate by f and the limits by 1/f, which is how columns at that factor are found.
    """

    startup: Startup | None = None
    slower: Mapping[str, float] = field(default_factory=dict)
    found: dict[str, Enumerator] = field(default_factory=dict)
    period: int = 0
    hints: Hints = field(default_factory=dict)
    """Rates of like columns, near which the search begins."""

    def __post_init__(self) -> None:
        for offer in self.offers:
            if not offer.spot and offer.label not in self.found:
                self.found[offer.label] = self._enumerate(offer)
        # Spot capacity runs the same layouts; without steady terms it is enumerated for itself.
        for offer in self.offers:
            if offer.spot and self.steady(offer) is None:
                self.found[offer.label] = self._enumerate(offer)

    def _enumerate(self, offer: Offer) -> Enumerator:
        f = self.slower.get(offer.label, 1.0)
        return Enumerator(
            self.model, [offer], self.choices, self.seen_by(self.objectives, offer),
            replace(self.workload, rate=self.workload.rate * f), self.buckets, self.built, self.hints,
        )  # fmt: skip

    def home(self, offer: Offer) -> Offer:
        """The offer whose columns an offer runs: spot nodes those of their steady terms, where there are any."""
        return (self.steady(offer) if offer.spot else None) or offer

    def seen_by(self, goals: Objectives, offer: Offer) -> Objectives:
        """Limits as an offer's columns must keep them."""
        return stricter(goals, offer.site.rtt, self.slower.get(offer.label, 1.0))

    @property
    def rates(self) -> list[float]:
        """Requests per second of each bucket."""
        return [self.workload.rate * b.share for b in self.buckets]

    @property
    def rejected(self) -> list[Rejected]:
        return [x for e in self.found.values() for x in e.rejected]

    @property
    def columns(self) -> dict[tuple[Layout, tuple[int, ...]], Column]:
        return {k: c for e in self.found.values() for k, c in e.columns.items()}

    def select(self, test: Callable[[Column], bool] = lambda c: True, *, by_layout: bool = False) -> list[Column]:
        """Columns worth choosing from, on steady and on spot offers, at the asked confidence.

        by_layout: keep what is worth choosing within each layout, even where another layout is better in everything.
        """
        result = []
        for offer in self.offers:
            home = self.home(offer)
            enumerator = self.found[home.label]
            f = self.slower.get(home.label, 1.0)
            kept = enumerator.select(test)
            if by_layout:
                kept = [c for x in enumerator.layouts for c in enumerator.select(lambda c, x=x: c.layout == x and test(c))]  # type: ignore[misc]
            for column in kept:
                c = slowed(column, f)
                result.append(self._on_spot(c, offer) if offer.spot else c)
        return [c for c in result if c is not None]

    def _on_spot(self, c: Column, offer: Offer) -> Column | None:
        """The column on spot nodes, its capacity less what interruptions cost; None where nothing is left."""
        assert self.startup is not None
        left = 1 - interrupted(c, offer, self.startup)
        if left <= 0:
            return None
        state = replace(c.state, utilisation=c.state.utilisation * left, batch=c.state.batch * left, rate=c.state.rate * left)
        return replace(c, offer=offer, state=state, kv_limit=c.kv_limit * left)

    def unserved(self) -> list[int]:
        """Buckets that nothing on the fleet list serves."""
        return unserved(self.select(), len(self.buckets))

    def tighten(self, column: Column, factor: float, filled: float = 1.0) -> None:
        """Lower the operating point of a column's layout."""
        self.found[self.home(column.offer).label].tighten(column, factor, filled)

    def demand(self, columns: list[Column], goal: float | None = None) -> Demand:
        """What the integer program is asked to serve. goal: percentile whose latency is minimised."""
        latency = tuple(self._latency(c, goal) for c in columns) if goal is not None else ()
        return Demand(tuple(columns), tuple(self.rates), self.name, self.period, latency)

    def _latency(self, c: Column, p: float) -> np.ndarray:
        """Seconds to the last token of a request of each bucket, each part at its percentile, at the operating point."""
        ttft = tpot = 0.0
        if c.layout.role != "decode":
            pooled = c.case.dispersion(max(1.0, math.floor(self.workload.rate / max(c.state.rate, 1e-9))))
            ttft = c.instance.ttft_quantile(p, c.instance.state(c.state.rate, c.mix), c.mix, pooled)
            # The way to the client counts once, at the pool that ends the wait.
            ttft += c.offer.site.rtt if c.layout.role != "encode" else 0.0
        if c.layout.role != "prefill":
            tpot = c.instance.tpot_quantile(p, c.instance.state(c.state.rate, c.mix), c.mix)
        return np.array([ttft + tpot * float(np.mean(b.output - 1)) for b in self.buckets])


def stricter(goals: Objectives, rtt: float, slower: float = 1.0) -> Objectives:
    """Limits as a site sees them: those that start at the client less the round trip, and all over a factor of slowness."""

    def near(limit: Limit) -> Limit:
        return Limit(max((float(limit) - rtt) / slower, 1e-9), limit.per_token / slower)

    def all_of(limits: dict[str, Limit], change: Callable[[Limit], Limit]) -> dict[str, Limit]:
        return {name: change(limit) for name, limit in limits.items()}

    def scaled(limit: Limit) -> Limit:
        return Limit(float(limit) / slower, limit.per_token / slower)

    joint = goals.attainment
    if joint is not None:
        joint = Joint(
            share=joint.share, ttft=near(joint.ttft) if joint.ttft is not None else None,
            tpot=scaled(joint.tpot) if joint.tpot is not None else None,
        )  # fmt: skip
    changed: dict[str, Any] = {
        "ttft": all_of(goals.ttft, near), "e2e": all_of(goals.e2e, near), "attainment": joint,
        "tpot": all_of(goals.tpot, scaled), "itl": all_of(goals.itl, scaled),
        "longest_gap": all_of(goals.longest_gap, scaled),
    }  # fmt: skip
    return goals.model_copy(update=changed)


def slowed(c: Column, f: float) -> Column:
    """A column found at f times the rate and 1/f of the limits, in true seconds."""
    if f == 1.0:
        return c
    state = replace(c.state, rate=c.state.rate / f, step=c.state.step * f, pure_step=c.state.pure_step * f)
    return replace(
        c, state=state, prefill_s=c.prefill_s * f, decode_s=c.decode_s * f, kv_token_s=c.kv_token_s * f
    )  # fmt: skip


def startup_seconds(c: Column, startup: Startup) -> float:
    """Seconds until an instance of a column serves on a new node.

    Provisioning, then the weights over the slowest of where they come from (each node reads its part once, whatever number of
    instances shares it) and the devices' host links, then engine initialisation and graph capture.
    """
    from perfmodel import memory

    e = c.estimator
    each = tower_bytes(e) if c.layout.role == "encode" else float(memory.weight_bytes(e.model, e.par, e.formats))
    on_node = min(c.layout.devices, c.offer.devices)
    paths = [each * on_node / startup.weights]
    if c.offer.machine.host_link:
        paths.append(each / c.offer.machine.host_link)
    return startup.provisioning + max(paths) + startup.engine_init + startup.graph_capture


def interrupted(c: Column, offer: Offer, startup: Startup) -> float:
    """Share of time an instance on spot nodes loses: interruptions/s of its nodes x (reload + lost work).

    Lost work is what its requests in flight had done, on average half of their time in the instance.
    """
    nodes = max(1, -(-c.layout.devices // offer.devices))
    shares = c.mix.weight
    seconds = float(shares @ c.state.work) if c.state.work.size == shares.size else 0.0
    flight = seconds + float(c.mix.mean(c.mix.steps)) * (c.state.step if c.layout.role != "prefill" else 0.0)
    return offer.interruptions * nodes * (startup_seconds(c, startup) + flight / 2)


def strictest_percentile(goals: Objectives) -> float:
    """The highest percentile that any limit names: what the objective `latency` minimises."""
    names = [*goals.ttft, *goals.tpot, *goals.e2e]
    return max((percentile(n) for n in names), default=0.95)
