"""One planning job from file to plan: workload, columns, integer program, check by replay, explanation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfmodel import catalog
from perfmodel.errors import Infeasible
from perfmodel.planner import describe, page
from perfmodel.planner.cells import Cell, Fleet, ask, check, fleet_of
from perfmodel.planner.checks import check_plan, check_power
from perfmodel.planner.columns import Column
from perfmodel.planner.explain import Alternative, alternatives, binding, runners_up
from perfmodel.planner.infeasible import nearest_change, no_column
from perfmodel.planner.offer import Offer, offers
from perfmodel.planner.optimum import Optimum, fewest_instances, optimise
from perfmodel.planner.pools import Pool
from perfmodel.planner.program import Question, nodes_bought
from perfmodel.planner.quality import allowed, check_quality
from perfmodel.planner.service import Service
from perfmodel.planner.solver import Solution
from perfmodel.planner.verify import Replayed
from perfmodel.planner.what_if import what_if
from perfmodel.serving.workload import Bucket, Workload
from perfmodel.spec import yaml
from perfmodel.spec.plan import PlanFile

_ROUNDS = 10
_TIGHTER = 0.93


class LicenceWarning(UserWarning):
    """A plan uses devices whose driver licence excludes datacentres."""


@dataclass
class Plan:
    """The plan for one load factor, with everything it was made from."""

    fleet: Fleet
    question: Question
    best: Optimum
    values: dict[str, float]
    """Of the solution with the fewest busy devices."""
    cells: list[Cell]
    rounds: list[dict[str, Any]]
    binding: list[dict[str, Any]]
    alternatives: list[Alternative]
    what_if: dict[str, Any]
    seconds: float
    warnings: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> list[Cell]:
        """Every service in the period of the highest load."""
        return [c for c in self.cells if c.service.period == 0]

    @property
    def found(self) -> Service:
        """The first service at its highest load."""
        return self.peak[0].service

    @property
    def workload(self) -> Workload:
        return self.found.workload

    @property
    def buckets(self) -> list[Bucket]:
        return self.found.buckets

    @property
    def offers(self) -> list[Offer]:
        return self.fleet.offers

    @property
    def columns(self) -> list[Column]:
        """Those the integer program chose from."""
        return [e.column for e in self.question.entries]

    @property
    def solution(self) -> Solution:
        return self.best.solution

    @property
    def pools(self) -> list[Pool]:
        """Pools of every service at the highest load."""
        return [p for c in self.peak for p in c.pools]

    @property
    def replayed(self) -> list[Replayed]:
        return [r for c in self.peak for r in c.replayed]

    @property
    def nodes(self) -> list[int]:
        """Nodes of each offer at the highest load."""
        return [sum(nodes_bought(self.question, self.values, t, 0)) for t in range(len(self.offers))]


@dataclass
class PlanRun:
    """All plans of one file."""

    spec: PlanFile
    file: str
    plans: list[Plan]

    @property
    def data(self) -> dict[str, Any]:
        """Plain data: the first load's plan at the top level, and every plan under `plans`."""
        every = [p.data for p in self.plans]
        return {**every[0], "plans": every}

    def text(self) -> str:
        """The plan as a page for a terminal."""
        return page.text(self)


def plan(
    path: str | Path, *, objective: str | None = None, confidence: float | None = None, explain: bool = True,
    progress: Callable[[str], None] | None = None,
) -> PlanRun:  # fmt: skip
    """Plan the fleet a plan file asks for. Raises SpecError for bad input and Infeasible with the nearest change.

    objective, confidence: instead of the file's. explain: also say what other prices, limits and choices would cost, which
    takes longer than the plan itself.
    """
    document = yaml.read(path)
    changes = {k: v for k, v in (("objective", objective), ("confidence", confidence)) if v is not None}
    if changes and isinstance(document.data, dict):
        document = yaml.Document({**document.data, **changes}, document.file, document.lines)
    spec = yaml.validate(document, PlanFile)
    for service in spec.served:
        catalog.load_model(service.model)
    check_plan(spec, document)
    check_quality(spec, document)
    lines = {i: document.line(("fleet", i)) for i in range(len(spec.fleet))}
    priced = spec.limits.budget is not None
    listed = offers(spec.fleet, spec.objective, document.file, lines, spec.regions, priced=priced)
    check_power(spec, listed, document)
    built: dict[str, Any] = {}
    plans = []
    for load in spec.workload.load:
        if progress:
            progress(f"planning load x{load:g}")
        plans.append(_one(spec, Path(path).parent, load, listed, built, explain))
    return PlanRun(spec, document.file, plans)


def _one(spec: PlanFile, base: Path, load: float, listed: list[Offer], built: dict[str, Any], explain: bool) -> Plan:
    start = time.perf_counter()
    fleet = fleet_of(spec, base, load, listed, built, allowed(spec))
    rounds: list[dict[str, Any]] = []
    for attempt in range(_ROUNDS):
        question = ask(fleet)
        best = _solve(fleet, question)
        values = fewest_instances(best)
        cells, misses = check(fleet, question, values)
        rounds.append({
            "round": attempt + 1, "objective": abs(best.solution.objective), "bound": abs(best.solution.bound),
            "missed": sorted({f"{c.layout.label}: {what}" for _, c, what in misses}),
        })  # fmt: skip
        if not misses:
            break
        for service, column in {(id(s), id(c)): (s, c) for s, c, _ in misses}.values():
            service.tighten(column, _TIGHTER)
    else:
        raise Infeasible(
            f"after {_ROUNDS} rounds the replay still misses {', '.join(rounds[-1]['missed'])}",
            nearest="a looser percentile limit or another device type",
            binding=tuple(rounds[-1]["missed"]),
        )
    others = alternatives(fleet, question, best, cells)
    others += runners_up(fleet, best, cells) if explain else []
    extra = what_if(fleet, question, best) if explain else {}
    result = Plan(fleet, question, best, values, cells, rounds, binding(question, best, values, cells), others, extra, 0.0)
    result.warnings = _warnings(result)
    result.seconds = time.perf_counter() - start
    result.data = describe.data(spec, result)
    return result


def _solve(fleet: Fleet, question: Question) -> Optimum:
    unserved = [c for c in fleet.services if c.unserved()]
    if unserved:
        raise no_column(unserved[0])
    best = optimise(question)
    if not best.solution.ok:
        raise nearest_change(question)
    return best


def _warnings(p: Plan) -> list[str]:
    used = [x.column.offer for c in p.cells for x in c.pools]
    restricted = sorted({o.node.name for o in used if not o.machine.device.datacenter_licence})
    texts = [f"{name}: the GeForce driver licence excludes datacentre use" for name in restricted]
    for text in texts:
        warnings.warn(text, LicenceWarning, 3)
    return texts
