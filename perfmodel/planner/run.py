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
from perfmodel.planner import constraints, describe, infeasible
from perfmodel.planner.columns import Column, Enumerator, Layout, unserved
from perfmodel.planner.explain import Alternative, alternatives, binding
from perfmodel.planner.offer import Offer, offers
from perfmodel.planner.solver import Solution, solve
from perfmodel.planner.verify import Pool, Replayed, broken, pools, replay
from perfmodel.serving.workload import Bucket, Workload, buckets, build
from perfmodel.spec import yaml
from perfmodel.spec.plan import PlanFile

BUCKETS = 4
_ROUNDS = 10
_TIGHTER = 0.93


class LicenceWarning(UserWarning):
    """A plan uses devices whose driver licence excludes datacentres."""


@dataclass
class Plan:
    """The plan for one load factor, with everything it was made from."""

    workload: Workload
    buckets: list[Bucket]
    found: Enumerator
    columns: list[Column]
    """Those the integer program chose from."""
    offers: list[Offer]
    solution: Solution
    pools: list[Pool]
    nodes: list[int]
    replayed: list[Replayed]
    rounds: list[dict[str, Any]]
    binding: list[dict[str, Any]]
    alternatives: list[Alternative]
    seconds: float
    warnings: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


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
        return describe.text(self)


def plan(path: str | Path, *, objective: str | None = None, progress: Callable[[str], None] | None = None) -> PlanRun:
    """Plan the fleet a plan file asks for. Raises SpecError for bad input and Infeasible with the nearest change."""
    document = yaml.read(path)
    spec = yaml.validate(document, PlanFile)
    if objective is not None:
        spec = yaml.validate(
            yaml.Document({**document.data, "objective": objective}, document.file, document.lines), PlanFile
        )
    catalog.load_model(spec.model)
    lines = {i: document.line(("fleet", i)) for i in range(len(spec.fleet))}
    fleet = offers(spec.fleet, spec.objective, document.file, lines)
    cache: dict[Layout, Any] = {}
    plans = []
    for load in spec.workload.load:
        if progress:
            progress(f"planning for load x{load:g}")
        plans.append(_plan_one(spec, Path(path).parent, load, fleet, cache))
    return PlanRun(spec, str(path), plans)


def _plan_one(spec: PlanFile, base: Path, load: float, fleet: list[Offer], cache: dict[Layout, Any]) -> Plan:
    start = time.perf_counter()
    workload = build(spec.workload, base, load, spec.seed)
    groups = buckets(workload, BUCKETS)
    rates = [workload.rate * b.share for b in groups]
    rounds: list[dict[str, Any]] = []
    goals = spec.workload.objectives
    found = Enumerator(spec.model, fleet, spec.choices, goals, workload, groups, cache)
    for attempt in range(_ROUNDS):
        columns = found.select()
        solution, values = _solve(found, columns, fleet, rates, spec.objective)
        chosen = pools(columns, values, groups, goals, workload.dispersion)
        results = replay(chosen, workload, groups, spec.seed)
        misses = broken(results, goals)
        misses += [(p.column, f"closed form: {p.state.reason}") for p in chosen if not p.state.feasible]
        rounds.append({
            "round": attempt + 1, "objective": solution.objective, "bound": solution.bound,
            "missed": sorted({f"{c.layout.label}: {what}" for c, what in misses}),
        })  # fmt: skip
        if not misses:
            break
        for column in {id(c): c for c, _ in misses}.values():
            found.tighten(column, _TIGHTER)
    else:
        raise Infeasible(
            f"after {_ROUNDS} rounds the replay still misses {', '.join(rounds[-1]['missed'])}",
            nearest="a looser percentile limit or another device type",
            binding=tuple(rounds[-1]["missed"]),
        )
    used_nodes = [round(values.get(f"N_{t}", 0.0)) for t in range(len(fleet))]
    others = alternatives(found, fleet, chosen, rates, spec.objective, solution.objective)
    rows = binding(columns, fleet, chosen, values, rates, groups, spec.objective)
    result = Plan(
        workload, groups, found, columns, fleet, solution, chosen, used_nodes, results, rounds, rows, others,
        time.perf_counter() - start,
    )  # fmt: skip
    restricted = {p.column.offer.node.name for p in chosen if not p.column.offer.machine.device.datacenter_licence}
    result.warnings = [f"{name}: the GeForce driver licence excludes datacentre use" for name in sorted(restricted)]
    for text in result.warnings:
        warnings.warn(text, LicenceWarning, 2)
    result.data = describe.data(spec, result)
    return result


def _solve(
    found: Enumerator, columns: list[Column], fleet: list[Offer], rates: list[float], objective: str
) -> tuple[Solution, dict[str, float]]:
    """The integer optimum, then among plans with the same nodes the one with the fewest busy devices."""
    if unserved(columns, len(rates)):
        raise infeasible.no_column(found)
    program = constraints.build(columns, fleet, rates, objective)
    solution = solve(program.problem)
    if not solution.ok:
        raise infeasible.too_few_nodes(columns, fleet, rates, objective)
    return solution, _fewest_instances(columns, fleet, rates, objective, solution)


def _fewest_instances(
    columns: list[Column], fleet: list[Offer], rates: list[float], objective: str, best: Solution
) -> dict[str, float]:
    used = [c for c, column in enumerate(columns) if round(best.values[f"N_{fleet.index(column.offer)}"])]
    program = constraints.build([columns[c] for c in used], fleet, rates, objective)
    p = program.problem
    for t, node in enumerate(program.nodes):
        p += node <= round(best.values[f"N_{t}"]), f"bought_{t}"
    if objective == "energy":
        p += program.cost <= best.objective * (1 + 1e-6), "same_power"
    p.setObjective(sum(constraints.footprint(c) * v for c, v in zip(program.columns, program.n, strict=True)))
    second = solve(p, gap=1e-3, time_limit=10.0)
    if not second.ok:
        return best.values
    values = {f"N_{t}": best.values[f"N_{t}"] for t in range(len(fleet))}
    for i, c in enumerate(used):
        values[f"n_{c}"] = second.values.get(f"n_{i}", 0.0)
        for k in columns[c].buckets:
            values[f"y_{c}_{k}"] = second.values.get(f"y_{i}_{k}", 0.0)
    return values
