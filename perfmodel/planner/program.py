"""The question put to the solver, and the program with its variables.

Indices: i column entries (a column of one demand), k buckets of its demand, t offers, m tariffs of an offer, p periods.
Variables: n[i] instances (integer), y[i,k] requests/s of bucket k served by entry i, N[t,m,p] nodes bought (integer
purchase units; reserved tariffs have one variable for all periods), theta the multiple of the load that is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pulp

from perfmodel.planner.columns import Column
from perfmodel.planner.offer import Offer
from perfmodel.spec.fleet import RESERVED, Limits, Resilience

UNITS = {
    "cost": "USD/h", "devices": "devices", "power": "W", "carbon": "g/h", "latency": "s", "goodput": "requests/s",
}  # fmt: skip
"""What each objective is counted in."""
USD_PER_HOUR = 3600.0


@dataclass(frozen=True, eq=False)
class Demand:
    """The load of one service in one period, and the columns that may serve it."""

    columns: tuple[Column, ...]
    rates: tuple[float, ...]
    """Requests per second of each bucket."""
    service: str = ""
    period: int = 0
    latency: tuple[np.ndarray, ...] = ()
    """For the objective latency: seconds a request of each bucket takes in each column, at the stated percentile."""


@dataclass(frozen=True, eq=False)
class Question:
    """Everything the integer program is built from."""

    offers: tuple[Offer, ...]
    demands: tuple[Demand, ...]
    objective: str = "cost"
    limits: Limits = field(default_factory=Limits)
    resilience: Resilience | None = None
    shares: tuple[float, ...] = (1.0,)
    """Share of time of each period; they sum to one."""

    @staticmethod
    def single(columns: list[Column], offers: list[Offer], rates: list[float], objective: str) -> Question:
        """One service in one period, with no limits beside those of the offers."""
        return Question(tuple(offers), (Demand(tuple(columns), tuple(rates)),), objective)

    @property
    def rate(self) -> float:
        """Mean requests per second of all services."""
        return sum(self.shares[d.period] * sum(d.rates) for d in self.demands)

    @property
    def entries(self) -> list[Entry]:
        """Columns of all demands, in order."""
        return [Entry(c, g, d) for g, d in enumerate(self.demands) for c in d.columns]

    def of_service(self, service: str) -> Question:
        """The same question asked for one service alone."""
        return replace(self, demands=tuple(d for d in self.demands if d.service == service))


@dataclass(frozen=True, eq=False)
class Entry:
    """One column in one demand."""

    column: Column
    group: int
    demand: Demand

    @property
    def period(self) -> int:
        return self.demand.period


@dataclass(frozen=True)
class LimitRow:
    """A limit that somebody set and could change."""

    label: str
    limit: float
    unit: str
    row: float | None = None
    """Right-hand side of the row where that is not the limit itself."""

    @property
    def step(self) -> float:
        """What one unit of excess adds to the limit: as much again, or one where the limit is nought."""
        return self.limit or 1.0


@dataclass
class Program:
    """A problem with its variables. `keep`: entries that take part (all, unless a master is restricted)."""

    question: Question
    problem: pulp.LpProblem
    entries: list[Entry]
    keep: list[int]
    n: dict[int, pulp.LpVariable | pulp.LpAffineExpression]
    y: dict[tuple[int, int], pulp.LpVariable]
    nodes: dict[tuple[int, int, int], pulp.LpVariable]
    theta: pulp.LpVariable | None
    groups: list[int]
    """Demands that must be served."""
    relaxed: bool
    elastic: bool
    """Whether limits may be exceeded, at a price in the objective: to find the nearest feasible change."""
    limits: dict[str, LimitRow] = field(default_factory=dict)
    excess: dict[str, pulp.LpVariable] = field(default_factory=dict)
    survived: set[tuple[int, str]] = field(default_factory=set)
    """Failures the program already covers: (entry, domain)."""
    suffix: str = ""
    """Ends the names of rows, so that a failure's rows differ from those of the whole fleet."""

    @property
    def integer(self) -> str:
        return str(pulp.LpContinuous if self.relaxed else pulp.LpInteger)

    def of(self, group: int) -> Iterator[tuple[int, Column]]:
        """Entries of one demand."""
        return ((i, self.entries[i].column) for i in self.keep if self.entries[i].group == group)

    def on(self, t: int, period: int) -> Iterator[tuple[int, Column]]:
        """Entries that run on an offer in a period."""
        offer = self.question.offers[t]
        return (
            (i, self.entries[i].column) for i in self.keep
            if self.entries[i].column.offer is offer and self.entries[i].period == period
        )  # fmt: skip

    def bought(self, t: int, period: int) -> pulp.LpAffineExpression:
        """Nodes of an offer in a period, all tariffs."""
        offer = self.question.offers[t]
        return pulp.lpSum(offer.block * self.nodes[t, m, period] for m in range(len(offer.paid)))

    @property
    def regions(self) -> list[str]:
        return list(dict.fromkeys(o.region for o in self.question.offers))

    @property
    def periods(self) -> range:
        return range(len(self.question.shares))

    def limit(self, expression: pulp.LpAffineExpression, row: LimitRow, name: str) -> None:
        """expression <= limit, remembered by name so that it can be explained or, when elastic, exceeded."""
        self.limits[name] = row
        if self.elastic:
            extra = self.problem.add_variable(f"excess_{name}", lowBound=0)
            self.excess[name] = extra
            expression = expression - extra * row.step
        self.problem += expression <= (row.limit if row.row is None else row.row), name


def start(question: Question, *, relaxed: bool, elastic: bool, keep: list[int] | None) -> Program:
    """Variables without any row."""
    goodput = question.objective == "goodput"
    problem = pulp.LpProblem("plan", pulp.LpMinimize)
    entries = question.entries
    keep = list(range(len(entries))) if keep is None else keep
    kind = pulp.LpContinuous if relaxed else pulp.LpInteger
    n: dict[int, pulp.LpVariable | pulp.LpAffineExpression] = {
        i: problem.add_variable(f"n_{i}", lowBound=0, cat=kind) for i in keep
    }
    y = {
        (i, k): problem.add_variable(f"y_{i}_{k}", lowBound=0)
        for i in keep for k in entries[i].column.buckets if entries[i].demand.rates[k] > 0
    }  # fmt: skip
    nodes: dict[tuple[int, int, int], pulp.LpVariable] = {}
    for t, offer in enumerate(question.offers):
        for m, tariff in enumerate(offer.paid):
            once = tariff.term in RESERVED
            for p in range(len(question.shares)):
                if once and p:
                    nodes[t, m, p] = nodes[t, m, 0]
                else:
                    nodes[t, m, p] = problem.add_variable(f"N_{t}_{m}_{p}", lowBound=0, cat=kind)
    theta = problem.add_variable("theta", lowBound=0) if goodput else None
    groups = list(range(len(question.demands)))
    return Program(question, problem, entries, keep, n, y, nodes, theta, groups, relaxed, elastic)


def nodes_bought(question: Question, values: dict[str, float], t: int, period: int) -> list[int]:
    """Nodes of an offer by tariff, read from a solution."""
    offer = question.offers[t]
    found = []
    for m, tariff in enumerate(offer.paid):
        p = 0 if tariff.term in RESERVED else period
        found.append(offer.block * round(values.get(f"N_{t}_{m}_{p}", 0.0)))
    return found
