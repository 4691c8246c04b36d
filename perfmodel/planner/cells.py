"""From a plan file to questions for the solver, and from its answers to pools that are replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.planner.case import WHOLE_LOAD
from perfmodel.planner.columns import Column, plain
from perfmodel.planner.confidence import slowness
from perfmodel.planner.evaluated import Running
from perfmodel.planner.offer import Offer
from perfmodel.planner.periods import Level, held, merged, profile_of
from perfmodel.planner.pools import Pool, pools
from perfmodel.planner.program import Question
from perfmodel.planner.service import Service, startup_seconds, stricter, strictest_percentile
from perfmodel.planner.verify import broken, replay
from perfmodel.serving.images import build
from perfmodel.serving.workload import buckets, read_trace
from perfmodel.spec.choices import Choices
from perfmodel.spec.plan import PlanFile

OPERATING_SHARES = (0.7, 0.45, 0.2)
"""For the objective latency: columns also at these shares of their highest rate."""


@dataclass
class Fleet:
    """What is planned at one load: the offers, every service in every period, and how the day is cut."""

    spec: PlanFile
    offers: list[Offer]
    services: list[Service]
    levels: list[Level]
    load: float
    base: Path
    built: dict[str, Any]
    choices: Choices
    profile: list[tuple[float, float]]
    """(seconds, multiple) over the day; empty without a profile."""
    slower: dict[str, dict[str, float]]
    """Per service and offer label: the factor of slowness at the asked confidence."""
    lag: float = 0.0

    def with_(self, near: Iterable[Column] = (), *, everywhere: bool = False, **changes: Any) -> Fleet:
        """The fleet of a changed plan file, enumerated afresh; estimators that do not depend on the change are reused.

        near: only layouts made of what these columns are made of, on their offers (or everywhere): much faster, and an upper
        bound of what the change costs.
        """
        spec, choices, offers = self.spec.model_copy(update=changes), self.choices, self.offers
        if near := list(near):
            choices = made_of(choices, near)
            offers = offers if everywhere else [o for o in offers if any(c.offer.item == o.item for c in near)]
        return fleet_of(spec, self.base, self.load, offers, self.built, choices, self.levels)


def made_of(choices: Choices, near: list[Column]) -> Choices:
    """Choices that only combine the roles, degrees, formats and policies of some columns."""
    kept: dict[str, Any] = {"roles": "role"}
    kept |= {name: name for name in ("tp", "pp", "ep", "dp", "cp", "weight_dtype", "policy")}
    update = {name: tuple(sorted({getattr(c.layout, field) for c in near})) for name, field in kept.items()}
    return choices.model_copy(update=update)


@dataclass
class Cell(Running):
    """One service in one period."""

    service: Service
    level: Level


def fleet_of(
    spec: PlanFile, base: Path, load: float, offers: list[Offer], built: dict[str, Any], choices: Choices,
    levels: list[Level] | None = None,
) -> Fleet:  # fmt: skip
    """Enumerate every service in every period. built: estimators by service, shared between calls."""
    profile = _profile(spec, base, load)
    given = levels
    lag = 0.0
    if levels is None:
        levels = [Level(max((m for _, m in profile), default=1.0), 1.0)]
    fleet = Fleet(spec, offers, [], levels, load, base, built, choices, profile, {})
    near: dict[str, dict[Any, float]] = built.setdefault("hints", {})

    def enumerate_at(period: int, multiple: float) -> list[Service]:
        found = []
        for served in spec.served:
            memory = built.setdefault(_cache_key(served.name, choices), {})
            workload = build(served.workload, base, load * multiple, spec.seed, served.model)
            groups = buckets(workload, choices.buckets, choices.seen)
            service = Service(
                served.name, served.model, workload, groups, served.workload.objectives, choices, offers, memory,
                spec.startup, fleet.slower.get(served.name, {}), period=period, hints=near.setdefault(served.name, {}),
            )  # fmt: skip
            near[served.name].update({k: c.state.rate for k, c in service.columns.items() if c.limited_by != WHOLE_LOAD})
            found.append(service)
        return found

    if spec.confidence > 0.5:
        for served in spec.served:
            workload = build(served.workload, base, load, spec.seed, served.model)
            memory = built.setdefault(_cache_key(served.name, choices), {})
            fleet.slower[served.name] = slowness(served.model, offers, choices, workload, memory, spec.confidence)
    fleet.services = enumerate_at(0, levels[0].multiple)
    if given is None and spec.profile is not None and spec.profile.fleet == "elastic":
        lag = max(startup_seconds(c, spec.startup) for s in fleet.services for c in s.select()) if spec.startup else 0.0
        levels = merged(held(profile, lag))
    fleet.lag, fleet.levels = lag, levels
    for period, level in enumerate(levels[1:], start=1):
        if level.multiple > 0:
            fleet.services += enumerate_at(period, level.multiple)
    return fleet


def _cache_key(service: str, choices: Choices) -> str:
    """What an estimator depends on beside its layout."""
    return f"{service}/{choices.engine}/{choices.kv_dtype}/{choices.mem_fraction}/{choices.prefix_caching}"


def _profile(spec: PlanFile, base: Path, load: float) -> list[tuple[float, float]]:
    if spec.profile is None:
        return []
    if spec.profile.window is None:
        return profile_of(spec.profile, None, 1.0)
    first = spec.served[0].workload
    if first.trace is None:
        raise SpecError("profile: window needs a trace; write `hours: [[hours, multiple], …]`", path="profile")
    arrival = read_trace(first.trace, base).arrival
    planned = build(first, base, load, spec.seed, spec.served[0].model).rate / load
    return profile_of(spec.profile, np.asarray(arrival, float), planned)


def ask(fleet: Fleet, test: Callable[[Column], bool] = lambda c: True, *, by_layout: bool = False) -> Question:
    """The question of a fleet, over the columns that pass a test; by_layout: with those of dominated layouts."""
    spec = fleet.spec
    demands = []
    for service in fleet.services:
        columns = service.select(test, by_layout=by_layout)
        if spec.objective == "latency":
            columns = columns + [c for x in columns for c in _gentler(x)]
        goal = strictest_percentile(service.objectives) if spec.objective == "latency" else None
        demands.append(service.demand(columns, goal))
    shares = tuple(level.share for level in fleet.levels)
    return Question(tuple(fleet.offers), tuple(demands), spec.objective, spec.limits, spec.resilience, shares)


def _gentler(c: Column) -> list[Column]:
    """The same column at lower rates, where requests wait less and tokens come faster."""
    result = []
    now = c.instance.state(c.state.rate, c.mix)
    for share in OPERATING_SHARES:
        s = plain(c.instance.state(c.state.rate * share, c.mix))
        if s.feasible:
            faster = s.step / now.step if c.layout.role != "prefill" and now.step > 0 else 1.0
            room = share * faster
            state = replace(s, utilisation=c.state.utilisation * share, batch=c.state.batch * room)
            result.append(replace(
                c, state=state, decode_s=c.decode_s * faster, kv_token_s=c.kv_token_s * faster, kv_limit=c.kv_limit * room,
            ))  # fmt: skip
    return result


def check(
    fleet: Fleet, question: Question, values: dict[str, float]
) -> tuple[list[Cell], list[tuple[Service, Pool, str]]]:
    """Pools of a solution, replayed; and those that break a promise, with what they break.

    Percentiles are judged region by region, because each region's round trip leaves another limit at the site.
    """
    cells = []
    misses: list[tuple[Service, Pool, str]] = []
    first = 0
    for demand, service in zip(question.demands, fleet.services, strict=True):
        columns = list(demand.columns)
        chosen: list[Pool] = []
        for offer in question.offers:
            # Instances of one layout share a router only on one offer: spot and steady ones promise different capacity.
            mine: dict[str, float] = {}
            for j, c in enumerate(columns):
                if c.offer is offer:
                    i = first + j
                    mine |= {f"n_{j}": values.get(f"n_{i}", 0.0)}
                    mine |= {f"y_{j}_{k}": values.get(f"y_{i}_{k}", 0.0) for k in c.buckets}
            goals = stricter(service.objectives, offer.site.rtt)
            chosen += pools(columns, mine, service.buckets, goals, service.workload.dispersion)
        first += len(columns)
        results = replay(chosen, service.workload, service.buckets, fleet.spec.seed, service.choices) if chosen else []
        for region, site in {o.region: o.site for o in fleet.offers}.items():
            local = [r for r in results if r.pool.column.offer.region == region]
            found = broken(local, stricter(service.objectives, site.rtt)) if local else []
            misses += [(service, pool, what) for pool, what in found]
        misses += [(service, p, f"closed form: {p.state.reason}") for p in chosen if not p.state.feasible]
        cells.append(Cell(service, chosen, results, fleet.levels[service.period]))
    return cells, misses
