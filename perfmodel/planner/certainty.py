"""The price of certainty: what a plan costs at the expected times, how sure it is, and whether a mix of devices is surer.

All times on a device and its stack share one error, exp(sigma z) with z standard normal; errors of different devices are
independent, and the same in every period of a day. A fleet holds in a scenario if its instances, each at the operating point that
its device's error leaves, still serve the load of every period when it is routed anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pulp

from perfmodel.planner.cells import Fleet, ask, made_of
from perfmodel.planner.columns import Column
from perfmodel.planner.confidence import sigmas
from perfmodel.planner.constraints.capacity import rooms
from perfmodel.planner.explain import bought_text
from perfmodel.planner.optimum import Optimum, largest_multiple, optimise
from perfmodel.planner.program import Program, Question
from perfmodel.planner.service import Service
from perfmodel.spec.choices import Choices

SCENARIOS = 200
_GRID = (-2.0, -1.0, 0.0, 0.7, 1.4, 2.1, 2.8)
_GAP = 2e-3
_SECONDS = 10.0
_MOST_OF_ONE = 0.6
"""Share of the load that one device may carry in a hedged fleet."""
_STEPS = 3
_NEAR = 0.05
"""Layouts whose reduced cost is at most this share of the plan's cost are tried at other confidences."""


def certainty(fleet: Fleet, best: Optimum) -> dict[str, Any]:
    """The plan against the one for the expected times; its joint confidence; and the cheapest hedged fleet of the same."""
    c = fleet.spec.confidence
    if c <= 0.5:
        return {}
    judge = Judge(fleet)
    value = abs(best.solution.objective)
    found: dict[str, Any] = {"confidence": c, "slowness": dict(next(iter(fleet.slower.values()), {}))}
    found["joint_confidence"] = judge.holds(best)
    entries = best.program.question.entries
    near = [e.column for i, e in enumerate(entries) if best.relaxed.reduced.get(f"n_{i}", 0.0) <= _NEAR * value]
    expected = _at(fleet, near, 0.5)
    if expected is not None:
        before = abs(expected.solution.objective)
        found["expected"] = {
            "objective": before, "buys": bought_text(expected.program.question, expected.values),
            "joint_confidence": judge.holds(expected),
        }  # fmt: skip
        found["price_of_certainty"] = (value - before) / max(before, 1e-12)
    hedged = _hedged(fleet, near, judge, c) if len(judge.devices) > 1 else None
    if hedged is not None:
        solved, sure = hedged
        found["hedged"] = {
            "objective": abs(solved.solution.objective), "buys": bought_text(solved.program.question, solved.values),
            "joint_confidence": sure, "change": (abs(solved.solution.objective) - value) / max(value, 1e-12),
        }  # fmt: skip
    return found


def _at(fleet: Fleet, near: list[Column], confidence: float, *, mixed: bool = False) -> Optimum | None:
    """The plan at another confidence, of layouts like these on any offer."""
    other = fleet.with_(near, everywhere=True, confidence=confidence)
    if any(s.unserved() for s in other.services):
        return None
    question = ask(other)
    found = optimise(question, gap=_GAP, time_limit=_SECONDS, extra=_spread if mixed else None)
    return found if found.solution.ok else None


def _spread(p: Program) -> None:
    """For every demand and device: sum over its first-token entries of y[i,k] <= share x load (of decode entries likewise)."""
    for g in p.groups:
        total = sum(p.question.demands[g].rates)
        for roles in (("colocated", "prefill"), ("decode",), ("encode",)):
            by_device: dict[str, list[pulp.LpVariable]] = {}
            for i, c in p.of(g):
                if c.layout.role in roles:
                    mine = by_device.setdefault(c.offer.machine.device.name, [])
                    mine += [p.y[i, k] for k in c.buckets if (i, k) in p.y]
            for j, flows in enumerate(by_device.values()):
                p.problem += pulp.lpSum(flows) <= _MOST_OF_ONE * total, f"spread_{g}_{roles[0]}_{j}"


def _hedged(fleet: Fleet, near: list[Column], judge: Judge, confidence: float) -> tuple[Optimum, float] | None:
    """The mixed fleet planned at the lowest confidence of each device alone that is still as sure together.

    Devices that err independently rarely err together, so each may be planned less cautiously.
    """
    low, high = 0.5, confidence
    found = None
    for each in [confidence, *([None] * _STEPS)]:
        level = (low + high) / 2 if each is None else each
        solved = _at(fleet, near, level, mixed=True)
        sure = judge.holds(solved) if solved is not None else 0.0
        if solved is not None and sure >= confidence and (
            found is None or abs(solved.solution.objective) < abs(found[0].solution.objective)
        ):
            found = solved, sure
        if each is None:
            low, high = (low, level) if sure >= confidence else (level, high)
    return found


class Judge:
    """Probability that a fleet holds, over joint errors of its devices."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.devices = list(dict.fromkeys(o.machine.device.name for o in fleet.offers))
        self._columns: dict[tuple[str, int, int, Choices], dict[Any, Column]] = {}
        # The band that the plan was made for is a point of its own: its columns exist there, whatever they do beyond.
        asked = NormalDist().inv_cdf(fleet.spec.confidence)
        self.grid = tuple(sorted({*_GRID, round(asked, 6)}))
        self._sigma: dict[str, dict[str, float]] = {}
        for s in fleet.services:
            self._sigma[s.name] = sigmas(s.model, fleet.offers, fleet.choices, s.workload, s.built)

    def holds(self, plan: Optimum) -> float:
        """Share of scenarios in which every service's load is served. One device: exact, by the error at which it just is."""
        q = plan.program.question
        used = [i for i, e in enumerate(q.entries) if round(plan.values.get(f"n_{i}", 0.0))]
        devices = list(dict.fromkeys(q.entries[i].column.offer.machine.device.name for i in used))
        theta = plan.values.get("theta", 1.0) * (1 - 1e-4)
        if len(devices) == 1:
            low, high = self.grid[0], self.grid[-1]
            for _ in range(12):
                middle = (low + high) / 2
                low, high = (middle, high) if self._multiple(q, plan, used, {devices[0]: middle}) >= theta else (low, middle)
            return NormalDist().cdf(high) if high < self.grid[-1] - 1e-3 else NormalDist().cdf(self.grid[-1])
        z = np.random.default_rng(self.fleet.spec.seed).standard_normal((SCENARIOS // 2, len(devices)))
        held = [
            self._multiple(q, plan, used, dict(zip(devices, row, strict=True))) >= theta for row in np.concatenate([z, -z])
        ]
        return float(np.mean(held))

    def _multiple(self, q: Question, plan: Optimum, used: Sequence[int], z: dict[str, float]) -> float:
        """Smallest multiple of its load that any service can serve in any period at these errors."""
        worst = math.inf
        theta = plan.values.get("theta", 1.0) * (1 - 1e-4)
        for g, demand in enumerate(q.demands):
            service = next(s for s in self.fleet.services if (s.name, s.period) == (demand.service, demand.period))
            mine = [i for i in used if q.entries[i].group == g]
            narrow = made_of(service.choices, [q.entries[i].column for i in mine]) if mine else service.choices
            columns = [self._column(service, narrow, q.entries[i].column, z) for i in mine]
            asked = Question(q.offers, (replace(demand, columns=tuple(columns)),), q.objective)
            counts = {j: float(round(plan.values[f"n_{i}"])) for j, i in enumerate(mine)}
            worst = min(worst, largest_multiple(asked, 0, counts))
            if worst < theta:
                break  # this scenario is lost
        return worst

    def _column(self, service: Service, narrow: Choices, c: Column, z: dict[str, float]) -> Column:
        """A column at an error between two of the grid: shares of an instance per request are interpolated."""
        at = float(np.clip(z[c.offer.machine.device.name], self.grid[0], self.grid[-1]))
        j = min(int(np.searchsorted(self.grid, at, side="right")) - 1, len(self.grid) - 2)
        weight = (at - self.grid[j]) / (self.grid[j + 1] - self.grid[j])
        low, high = (_shares(self._at(service, narrow, n).get(_key(c))) for n in (j, j + 1))
        if low is None or high is None:
            # Beyond the error at which the layout meets its limits at all it serves nothing.
            none = np.full(c.prefill_s.shape, 1e9)
            return _unit(c, {"prefill": none, "decode": none, "cache": none})
        return _unit(c, {name: low[name] * (1 - weight) + high[name] * weight for name in low})

    def _at(self, service: Service, narrow: Choices, n: int) -> dict[Any, Column]:
        key = (service.name, service.period, n, narrow)
        if key not in self._columns:
            slower = {label: math.exp(s * self.grid[n]) for label, s in self._sigma[service.name].items()}
            other = replace(service, slower=slower, found={}, choices=narrow)
            self._columns[key] = {_key(c): c for c in other.select(by_layout=True)}
        return self._columns[key]


def _key(c: Column) -> Any:
    return c.offer.label, c.layout, c.buckets


def _shares(c: Column | None) -> dict[str, np.ndarray] | None:
    """Instances that one request/s of each bucket takes, by capacity row; None where the column does not exist."""
    return None if c is None else {name: need / room if room > 0 else need * np.inf for name, need, room in rooms(c)}


def _unit(c: Column, shares: dict[str, np.ndarray]) -> Column:
    """The column with capacities of one, so that its demands are those shares."""
    zero = np.zeros(c.prefill_s.shape)
    return replace(
        c, state=replace(c.state, utilisation=1.0, batch=1.0), kv_limit=1.0, prefill_s=shares.get("prefill", zero),
        decode_s=shares.get("decode", zero), kv_token_s=shares.get("cache", zero),
    )  # fmt: skip
