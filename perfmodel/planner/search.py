"""The search for a plan that replay confirms: solve, replay, lower what broke its promise, solve again.

Within the closed forms' range they say what each column carries, and replay rarely disagrees. Beyond it (a dispersion that they
do not hold for, or a replay far off what they say) the order turns around: every column begins at the most its time and memory
allow, those that a solution uses are measured one by one (`sustained`), and the program is solved again until it uses measured
columns only. A column's rate then owes nothing to the rounds before it. On demand a plan of the closed forms is held against
the same program: where even columns that carry all their time and memory allow are no cheaper, it is the best there can be;
else those columns are measured in turn, for as long as the program stays cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from perfmodel.errors import Infeasible
from perfmodel.planner.cells import Cell, Fleet, ask, check, fleet_of
from perfmodel.planner.columns import Column
from perfmodel.planner.confirm import Misses, Shortfall, shortfalls
from perfmodel.planner.infeasible import nearest_change, no_column, still_broken
from perfmodel.planner.layout import Layout
from perfmodel.planner.optimum import Optimum, fewest_instances, optimise
from perfmodel.planner.program import Question
from perfmodel.planner.service import Service
from perfmodel.planner.sustained import Sustained
from perfmodel.serving.queueing import MOST_DISPERSED

ROUNDS = 14
HEURISTIC = (
    "{why}. What each chosen column carries was measured by replay on its own requests; columns that "
    "were never chosen were only estimated, and pools together may carry more"
)
BURSTS = "bursts beyond the closed forms"
_SPARE = "replay carries more than the closed forms promise"
_MEASURING = 60
"""Most solves in which unmeasured columns are looked for."""
_FAR_OFF = 1.3
"""Factor by which replay may miss a limit that the closed forms keep, before columns are measured instead."""
_TIGHTER = 0.93
_DOUBTS = 20
"""Most solves in which a plan of the closed forms is held against measured columns."""
_BETTER = 1e-6


@dataclass(frozen=True)
class Found:
    """The cheapest plan whose promises replay has confirmed."""

    fleet: Fleet
    question: Question
    best: Optimum
    values: dict[str, float]
    """Of the solution with the fewest busy devices."""
    cells: list[Cell]
    rounds: list[dict[str, Any]]
    heuristic: str = ""
    """Why the plan is not proven optimal beside its gap; empty where it is."""

    @property
    def objective(self) -> float:
        return self.best.solution.objective

    @property
    def as_good_as_at_first(self) -> bool:
        """Whether replay has cost nothing: then no program over fewer buckets is cheaper."""
        return self.objective <= float(self.rounds[0]["reached"]) + _BETTER * abs(self.objective)


@dataclass
class _Search:
    """One fleet's rounds of plan and replay."""

    fleet: Fleet
    sustained: Sustained | None
    why: str = BURSTS
    """Why columns are measured."""
    solves: int = _MEASURING
    rounds: list[dict[str, Any]] = field(default_factory=list)
    often: dict[Layout, int] = field(default_factory=dict)

    def run(self, known: float = math.inf) -> Found | None:
        """The first plan that replay confirms: columns are only ever lowered, so no later one is cheaper.

        None where the best that is left is no better than `known`. Raises Infeasible.
        """
        broken: list[tuple[list[Shortfall], list[Cell]]] = []
        for _ in range(ROUNDS):
            question, best = self._solve(known)
            if not _better(best, known):
                return None
            values = fewest_instances(best)
            cells, misses = check(self.fleet, question, values)
            short = shortfalls(cells, misses)
            self.rounds.append(_round(len(self.rounds) + 1, best, misses, short))
            if self.sustained is None and short and short[0].excess > _FAR_OFF:
                self.sustained = measuring(self.fleet)
                continue
            if not misses:
                why = HEURISTIC.format(why=self.why) if self.sustained is not None else ""
                return Found(self.fleet, question, best, values, cells, self.rounds, why)
            broken.append((short, cells))
            for service, pool in {(id(s), id(p)): (s, p) for s, p, _ in misses}.values():
                layout = pool.column.layout
                self.often[layout] = self.often.get(layout, 0) + 1
                service.tighten(pool.column, _TIGHTER ** self.often[layout], pool.filled)
        raise still_broken(self.fleet, broken, self.rounds)

    def _solve(self, known: float) -> tuple[Question, Optimum]:
        """The best plan of the columns as known, every used one measured where closed forms do not reach, or one no better
        than `known`."""
        for _ in range(self.solves):
            unserved = [c for c in self.fleet.services if c.unserved()]
            if unserved:
                raise no_column(unserved[0])
            question = ask(self.fleet)
            best = optimise(question)
            if not best.solution.ok:
                raise nearest_change(question)
            if self.sustained is None or not _better(best, known) or not self._measured_more(self.sustained, question, best):
                break
        return question, best

    def _measured_more(self, sustained: Sustained, question: Question, best: Optimum) -> bool:
        """Measure the columns that a solution uses and nobody has measured; whether there were any."""
        found = False
        for service, column in _used(self.fleet, question, best):
            if sustained.pending(service, column):
                sustained.measure(service, column)
                found = True
        return found


def search(fleet: Fleet, *, measured: bool = False) -> Found:
    """The cheapest plan that replay confirms; measured: also among columns measured by replay. Raises Infeasible.

    Where replay changes what columns carry, a plan that tells more lengths apart may end dearer than one that tells fewer apart:
    its columns were lowered, the other's were not. So the search is made again with half the buckets, and half of those, and the
    cheapest plan counts. Where replay changed nothing the program with more buckets contains the others.
    """
    beyond = any(s.workload.dispersion > MOST_DISPERSED for s in fleet.services)
    sustained = measuring(fleet) if beyond else None
    best: Found | None = None
    failed: Exception | None = None
    for other in _coarser(fleet):
        if sustained is not None and other is not fleet:
            sustained = measuring(other, sustained)
        rounds = _Search(other, sustained)
        try:
            found = rounds.run(best.objective if best else math.inf)
        except Infeasible as error:
            failed = failed or error
            continue
        finally:
            sustained = rounds.sustained
        best = found or best
        if sustained is None and found is not None and found.as_good_as_at_first:
            break
    if best is None:
        assert failed is not None
        raise failed
    return (_measured(best) or best) if measured and sustained is None else best


def _measured(known: Found) -> Found | None:
    """A cheaper plan of columns measured by replay; None, and the fleet's columns as they were, where none is found."""
    found = [f for s in known.fleet.services for f in s.found.values()]
    before = [dict(f.columns) for f in found]
    again = _Search(known.fleet, measuring(known.fleet), _SPARE, _DOUBTS, list(known.rounds))
    try:
        cheaper = again.run(known.objective)
    except Infeasible:
        cheaper = None
    if cheaper is None:
        for f, columns in zip(found, before, strict=True):
            f.columns = columns
    return cheaper


def _better(best: Optimum, known: float) -> bool:
    return math.isinf(known) or best.solution.objective < known - _BETTER * abs(known)


def measuring(fleet: Fleet, known: Sustained | None = None) -> Sustained:
    """What measures a fleet's columns, all of which begin at the most that time and memory allow. known: rates found before."""
    sustained = Sustained(fleet.spec.seed, known.known if known else {})
    for service in fleet.services:
        sustained.begin(service)
    return sustained


def _coarser(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, and the same with half the buckets down to one, where they are told apart by input length."""
    yield fleet
    count = max(len(s.buckets) for s in fleet.services)
    while count > 1 and fleet.choices.seen == ("input",):
        count //= 2
        choices = fleet.choices.model_copy(update={"buckets": count})
        other = fleet_of(fleet.spec, fleet.base, fleet.load, fleet.offers, fleet.built, choices, fleet.levels)
        other.lag = fleet.lag
        yield other


def _used(fleet: Fleet, question: Question, best: Optimum) -> Iterator[tuple[Service, Column]]:
    """Columns that a solution has instances of, each with its service."""
    for i, e in enumerate(question.entries):
        if best.values.get(f"n_{i}", 0.0) > 0.5:
            yield fleet.services[e.group], e.column


def _round(number: int, best: Optimum, misses: Misses, short: list[Shortfall]) -> dict[str, Any]:
    """One round as data. reached: its objective with its sign, as rounds compare."""
    s = best.solution
    return {
        "round": number, "objective": abs(s.objective), "bound": abs(s.bound), "reached": s.objective,
        "missed": sorted({f"{p.column.layout.label}: {what}" for _, p, what in misses}),
        "shortfalls": [x.text for x in short],
    }  # fmt: skip
