"""One planning job from file to plan: workload, columns, integer program, check by replay, explanation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfmodel import catalog
from perfmodel.errors import SpecError
from perfmodel.planner import describe, page
from perfmodel.planner.cells import Cell, Fleet, fleet_of
from perfmodel.planner.checks import check_plan, check_power
from perfmodel.planner.columns import Column
from perfmodel.planner.evaluated import Evaluated, Run
from perfmodel.planner.explain import Alternative, alternatives, binding, confirmed, runners_up
from perfmodel.planner.offer import offers
from perfmodel.planner.optimum import Optimum
from perfmodel.planner.program import Question, nodes_bought
from perfmodel.planner.quality import allowed, check_quality
from perfmodel.planner.search import search
from perfmodel.planner.service import Service
from perfmodel.planner.solver import Solution
from perfmodel.planner.what_if import what_if
from perfmodel.spec import yaml
from perfmodel.spec.plan import PlanFile


class LicenceWarning(UserWarning):
    """A plan uses devices whose driver licence excludes datacentres."""


@dataclass(kw_only=True)
class Plan(Evaluated):
    """The plan for one load factor, with everything it was made from."""

    peak: list[Cell]
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
    heuristic: str = ""
    """Why the plan is not proven optimal beside its gap."""
    replay_all: bool = False
    """Whether alternatives and what-ifs were replayed too."""
    asked_buckets: int = 0
    """More than the plan has where one with fewer turned out cheaper."""
    warnings: list[str] = field(default_factory=list)

    @property
    def found(self) -> Service:
        """The first service at its highest load."""
        return self.cells[0].service

    @property
    def columns(self) -> list[Column]:
        """Those the integer program chose from."""
        return [e.column for e in self.question.entries]

    @property
    def solution(self) -> Solution:
        return self.best.solution


@dataclass
class PlanRun(Run):
    """All plans of one file."""

    plans: list[Plan]

    def text(self) -> str:
        """The plan as a page for a terminal."""
        return page.text(self)


def plan(
    path: str | Path, *, objective: str | None = None, confidence: float | None = None, budget: str | None = None,
    load: float | None = None, explain: bool = True, replay_all: bool = False, measured: bool = False,
    progress: Callable[[str], None] | None = None,
) -> PlanRun:  # fmt: skip
    """Plan the fleet a plan file asks for. Raises SpecError for bad input and Infeasible with the nearest change.

    objective, confidence, budget ("60 USD/h"), load: instead of the file's.
    explain: also say what other prices, limits and choices would cost, which takes longer than the plan itself.
    replay_all: replay these too, and say which of them break a promise.
    measured: look also for a cheaper plan among columns whose rates are measured by replay.
    """
    document = yaml.read(path)
    changes = {k: v for k, v in (("objective", objective), ("confidence", confidence)) if v is not None}
    if isinstance(document.data, dict):
        changes |= _nested(document.data, "limits", "budget", budget)
        changes |= _nested(document.data, "workload", "load", None if load is None else [load])
    if changes and isinstance(document.data, dict):
        document = yaml.Document({**document.data, **changes}, document.file, document.lines)
    spec = yaml.validate(document, PlanFile)
    for service in spec.served:
        catalog.load_model(service.model).require_next_token()
    check_plan(spec, document)
    check_quality(spec, document)
    lines = {i: document.line(("fleet", i)) for i in range(len(spec.fleet))}
    priced = spec.limits.budget is not None
    listed = offers(spec.fleet, spec.objective, document.file, lines, spec.regions, priced=priced)
    check_power(spec, listed, document)
    built: dict[str, Any] = {}
    plans: dict[float, Plan] = {}
    # The highest load first: what columns carry at most there tells the others where to look.
    for load in sorted(set(spec.workload.load), reverse=True):
        if progress:
            progress(f"planning load x{load:g}")
        try:
            fleet = fleet_of(spec, Path(path).parent, load, listed, built, allowed(spec))
            plans[load] = _one(spec, fleet, explain, replay_all, measured)
        except SpecError as error:
            raise _placed(error, document) from None
    done = [plans[load] for load in spec.workload.load]
    return PlanRun(spec, document.file, done, document.data, listing=Path(path).read_text(encoding="utf-8"))


def _placed(error: SpecError, document: yaml.Document) -> SpecError:
    """An error that only the trace brought to light, with the line of the key it names."""
    if error.file or not error.path:
        return error
    line = document.line(tuple(error.path.split(".")))
    return SpecError(str(error).removeprefix(f"{error.path}: "), file=document.file, line=line, path=error.path)


def _one(spec: PlanFile, asked: Fleet, explain: bool, replay_all: bool, measured: bool) -> Plan:
    start = time.perf_counter()
    found = search(asked, measured=measured)
    fleet, question, best, values, cells = found.fleet, found.question, found.best, found.values, found.cells
    others = alternatives(fleet, question, best, cells)
    others += runners_up(fleet, best, cells) if explain else []
    extra = what_if(fleet, question, best, replay_all=replay_all) if explain else {}
    if replay_all:
        others = [confirmed(a, fleet) for a in others]
    result = Plan(
        offers=fleet.offers, peak=[c for c in cells if c.service.period == 0], data={}, fleet=fleet, question=question,
        nodes=[sum(nodes_bought(question, values, t, 0)) for t in range(len(fleet.offers))], best=best, values=values,
        cells=cells, rounds=found.rounds, binding=binding(question, best, values, cells), alternatives=others, what_if=extra,
        seconds=0.0, heuristic=found.heuristic, replay_all=replay_all, asked_buckets=allowed(spec).buckets,
    )  # fmt: skip
    result.warnings = _warnings(result)
    result.seconds = time.perf_counter() - start
    result.data = describe.data(spec, result)
    return result


def _nested(data: dict[str, Any], section: str, key: str, value: Any) -> dict[str, Any]:
    """A section with one key changed; nothing without a value, or where the section is no mapping."""
    old = data.get(section) or {}
    return {section: {**old, key: value}} if value is not None and isinstance(old, dict) else {}


def _warnings(p: Plan) -> list[str]:
    used = [x.column.offer for c in p.cells for x in c.pools]
    restricted = sorted({o.node.name for o in used if not o.machine.device.datacenter_licence})
    texts = [f"{name}: the GeForce driver licence excludes datacentre use" for name in restricted]
    for text in texts:
        warnings.warn(text, LicenceWarning, 3)
    return texts
