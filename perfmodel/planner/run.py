"""One planning job from file to plan: workload, columns, integer program, check by replay, explanation."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfmodel import catalog
from perfmodel.errors import Infeasible, SpecError
from perfmodel.planner import describe, page
from perfmodel.planner.cells import Cell, Fleet, ask, check, fleet_of
from perfmodel.planner.checks import check_plan, check_power
from perfmodel.planner.columns import Column, Enumerator
from perfmodel.planner.evaluated import Evaluated, Run
from perfmodel.planner.explain import Alternative, alternatives, binding, runners_up
from perfmodel.planner.infeasible import nearest_change, no_column
from perfmodel.planner.layout import Layout
from perfmodel.planner.offer import Offer, offers
from perfmodel.planner.optimum import Optimum, fewest_instances, optimise
from perfmodel.planner.program import Question, nodes_bought
from perfmodel.planner.quality import allowed, check_quality
from perfmodel.planner.service import Service
from perfmodel.planner.solver import Solution
from perfmodel.planner.what_if import what_if
from perfmodel.serving.queueing import MOST_DISPERSED
from perfmodel.spec import yaml
from perfmodel.spec.plan import PlanFile

_ROUNDS = 14
_TIGHTER = 0.93
_LOOSER = 1.3
_BETTER = 1e-6


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
    load: float | None = None, explain: bool = True, progress: Callable[[str], None] | None = None,
) -> PlanRun:  # fmt: skip
    """Plan the fleet a plan file asks for. Raises SpecError for bad input and Infeasible with the nearest change.

    objective, confidence, budget ("60 USD/h"), load: instead of the file's.
    explain: also say what other prices, limits and choices would cost, which
    takes longer than the plan itself.
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
        try:
            plans.append(_one(spec, Path(path).parent, load, listed, built, explain))
        except SpecError as error:
            raise _placed(error, document) from None
    return PlanRun(spec, document.file, plans, document.data, listing=Path(path).read_text(encoding="utf-8"))


def _placed(error: SpecError, document: yaml.Document) -> SpecError:
    """An error that only the trace brought to light, with the line of the key it names."""
    if error.file or not error.path:
        return error
    line = document.line(tuple(error.path.split(".")))
    return SpecError(str(error).removeprefix(f"{error.path}: "), file=document.file, line=line, path=error.path)


def _one(spec: PlanFile, base: Path, load: float, listed: list[Offer], built: dict[str, Any], explain: bool) -> Plan:
    start = time.perf_counter()
    fleet = fleet_of(spec, base, load, listed, built, allowed(spec))
    rounds: list[dict[str, Any]] = []
    often: dict[Layout, int] = {}
    kept: _Kept | None = None

    def raise_all() -> None:
        for found in _enumerators(fleet):
            found.loosen(_LOOSER, often)

    for attempt in range(_ROUNDS):
        question = ask(fleet)
        best = _solve(fleet, question)
        known = math.inf if kept is None else kept.best.solution.objective
        if best.solution.objective >= known - _BETTER * abs(known):
            raise_all()
            continue
        values = fewest_instances(best)
        cells, misses = check(fleet, question, values)
        rounds.append({
            "round": attempt + 1, "objective": abs(best.solution.objective), "bound": abs(best.solution.bound),
            "missed": sorted({f"{p.column.layout.label}: {what}" for _, p, what in misses}),
        })  # fmt: skip
        if not misses:
            kept = _Kept(question, best, values, cells, [dict(e.columns) for e in _enumerators(fleet)])
            if all(s.workload.dispersion <= MOST_DISPERSED for s in fleet.services):
                break
            # Closed forms do not hold for such bursts: let replay say how much more the columns can carry.
            raise_all()
        for service, pool in {(id(s), id(p)): (s, p) for s, p, _ in misses}.values():
            layout = pool.column.layout
            often[layout] = often.get(layout, 0) + 1
            service.tighten(pool.column, _TIGHTER ** often[layout], pool.filled)
    if kept is None:
        raise Infeasible(
            f"after {_ROUNDS} rounds the replay still misses {', '.join(rounds[-1]['missed'])}",
            nearest="a looser percentile limit or another device type",
            binding=tuple(rounds[-1]["missed"]),
        )
    question, best, values, cells = kept.question, kept.best, kept.values, kept.cells
    for found, columns in zip(_enumerators(fleet), kept.columns, strict=True):
        found.columns = columns
    others = alternatives(fleet, question, best, cells)
    others += runners_up(fleet, best, cells) if explain else []
    extra = what_if(fleet, question, best) if explain else {}
    result = Plan(
        offers=fleet.offers, peak=[c for c in cells if c.service.period == 0], data={}, fleet=fleet, question=question,
        nodes=[sum(nodes_bought(question, values, t, 0)) for t in range(len(fleet.offers))], best=best, values=values,
        cells=cells, rounds=rounds, binding=binding(question, best, values, cells), alternatives=others, what_if=extra,
        seconds=0.0,
    )  # fmt: skip
    result.warnings = _warnings(result)
    result.seconds = time.perf_counter() - start
    result.data = describe.data(spec, result)
    return result


def _nested(data: dict[str, Any], section: str, key: str, value: Any) -> dict[str, Any]:
    """A section with one key changed; nothing without a value, or where the section is no mapping."""
    old = data.get(section) or {}
    return {section: {**old, key: value}} if value is not None and isinstance(old, dict) else {}


@dataclass(frozen=True)
class _Kept:
    """The best plan so far whose promises replay has confirmed, and the columns it was chosen from."""

    question: Question
    best: Optimum
    values: dict[str, float]
    cells: list[Cell]
    columns: list[dict[tuple[Layout, tuple[int, ...]], Column]]


def _enumerators(fleet: Fleet) -> list[Enumerator]:
    return [found for service in fleet.services for found in service.found.values()]


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
