"""The optimum with its proof: relaxation, restricted master, and failures that are added until all are survived.

The relaxation over all columns gives a bound z and reduced costs r. A plan that uses column i costs at least z + r_i, so a
master over the columns of small r is optimal over all of them once every column left out has z + r_i above what it found;
before that, the bound is min(bound of the master, z + smallest r left out).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import pulp

from perfmodel.errors import Infeasible
from perfmodel.planner import constraints
from perfmodel.planner.constraints.nodes import footprint
from perfmodel.planner.constraints.survive import define_survival, lost, served_by
from perfmodel.planner.program import Program, Question
from perfmodel.planner.solver import GAP, TIME_LIMIT_S, Solution, solve

MASTER = 64
"""Columns of the first restricted master."""
_SURVIVAL_ROUNDS = 40
_ROUNDING = 1e-6

Extra = Callable[[Program], None]
"""Adds rows of one's own to a program (an exclusion, a fixed count …)."""


@dataclass
class Optimum:
    """The best solution found, the program it is of, and the relaxation that bounds it."""

    solution: Solution
    program: Program
    relaxed: Solution

    @property
    def values(self) -> dict[str, float]:
        return self.solution.values


def relaxation(question: Question, extra: Extra | None = None, *, elastic: bool = False) -> Solution:
    """The continuous program over every column: bound, shadow prices and reduced costs."""
    program = constraints.build(question, relaxed=True, elastic=elastic)
    if extra:
        extra(program)
    return solve(program.problem)


def optimise(
    question: Question, *, gap: float = GAP, time_limit: float = TIME_LIMIT_S, extra: Extra | None = None,
    relaxed: Solution | None = None, elastic: bool = False,
) -> Optimum:  # fmt: skip
    """Solve a question; an infeasible one has a solution that is not `ok`. elastic: find the least excess over its limits."""
    begun = time.perf_counter()
    every = range(len(question.entries))
    relaxed = relaxed or relaxation(question, extra, elastic=elastic)
    if not relaxed.ok:
        program = constraints.build(question, keep=[])
        return Optimum(relaxed, program, relaxed)
    order = sorted(every, key=lambda i: (relaxed.reduced.get(f"n_{i}", 0.0), -relaxed.values.get(f"n_{i}", 0.0)))
    size = MASTER
    begin = _rounded_up(relaxed)
    while True:
        keep = sorted(order[:size])
        outside = min((relaxed.reduced.get(f"n_{i}", 0.0) for i in order[size:]), default=math.inf)
        left = max(time_limit - (time.perf_counter() - begun), 1.0)
        program = constraints.build(question, keep=keep, elastic=elastic)
        if extra:
            extra(program)
        solution = _survive(program, gap=gap, time_limit=left, begin=begin)
        beyond = relaxed.objective + outside
        bound = min(solution.bound, beyond) if solution.ok else beyond
        found = replace(
            solution, bound=max(bound, relaxed.objective), seconds=time.perf_counter() - begun,
            gap=_gap(solution.objective, max(bound, relaxed.objective)),
        )  # fmt: skip
        spent = time.perf_counter() - begun > 0.8 * time_limit
        if size >= len(order) or (found.ok and (found.gap <= gap * 1.01 or bound >= solution.bound)) or (found.ok and spent):
            status = found.status if not found.ok else "optimal" if found.gap <= gap * 1.01 else "feasible"
            return Optimum(replace(found, status=status), program, relaxed)
        # Only columns that could still take part: the rest cannot beat what was found.
        need = sum(relaxed.objective + relaxed.reduced.get(f"n_{i}", 0.0) <= solution.objective for i in order)
        size = min(max(2 * size, min(need, 4 * size)), len(order))
        if solution.ok:
            begin = {name: x for name, x in solution.values.items() if name[:2] in ("n_", "y_")}


def _rounded_up(relaxed: Solution) -> dict[str, float]:
    """A plan to begin with: the relaxation's flows, and as many whole instances as they need."""
    flows = {name: x for name, x in relaxed.values.items() if name.startswith("y_")}
    return flows | {name: math.ceil(x - _ROUNDING) for name, x in relaxed.values.items() if name.startswith("n_")}


def _gap(objective: float, bound: float) -> float:
    return abs(objective - bound) / max(abs(objective), 1e-9) if math.isfinite(objective) else math.inf


def _survive(program: Program, *, gap: float, time_limit: float, begin: dict[str, float] | None = None) -> Solution:
    """Solve, look for a failure that is not survived, add it, and solve again."""
    begun = time.perf_counter()
    for _ in range(_SURVIVAL_ROUNDS):
        left = max(time_limit - (time.perf_counter() - begun), 1.0)
        solution = solve(program.problem, gap=gap, time_limit=left, begin=begin)
        if not solution.ok:
            return solution
        fatal = failures(program, solution.values)
        if not fatal:
            return solution
        for i, domain in fatal:
            define_survival(program, i, domain)
    raise Infeasible(
        f"no plan that survives every failure was found in {_SURVIVAL_ROUNDS} rounds",
        nearest="fewer failure domains under `survive`", binding=("survive",),
    )  # fmt: skip


def failures(program: Program, values: dict[str, float]) -> list[tuple[int, str]]:
    """Failures (entry that fills the lost domain, domain) that a solution does not survive."""
    resilience = program.question.resilience
    if resilience is None:
        return []
    found = []
    theta = values.get("theta", 1.0)
    for i in program.keep:
        if round(values.get(f"n_{i}", 0.0)) == 0:
            continue
        for domain in resilience.survive:
            if (i, domain) not in program.survived and not _serves_without(program, values, i, domain, theta):
                found.append((i, str(domain)))
    return found


def _serves_without(program: Program, values: dict[str, float], i: int, domain: str, theta: float) -> bool:
    """Whether the demand of entry i is still served after the worst loss of a domain."""
    group = program.entries[i].group
    counts = {j: float(round(values.get(f"n_{j}", 0.0))) for j, _ in program.of(group)}
    counts[i] = max(counts[i] - lost(program.entries[i].column, domain), 0.0)
    return largest_multiple(program.question, group, counts) >= theta * (1 - 1e-5)


def largest_multiple(question: Question, group: int, counts: dict[int, float]) -> float:
    """Largest multiple of a demand's load that so many instances of each entry serve, routed at best."""
    solution = solve(served_by(question, group, counts))
    return solution.values.get("theta", 0.0) if solution.ok else 0.0


def fewest_instances(best: Optimum) -> dict[str, float]:
    """Values of a plan with the same nodes and the same objective, and as few busy devices as that allows."""
    program, solution = best.program, best.solution
    problem, q = program.problem, program.question
    for t, m, p in {(t, m, p) for t, m, p in program.nodes}:
        node = program.nodes[t, m, p]
        problem += node <= round(solution.values[node.name]), f"bought_{t}_{m}_{p}"
    if q.objective in ("power", "carbon", "latency", "goodput") or any(o.site.electricity for o in q.offers):
        slack = max(abs(solution.objective), 1.0) * 1e-6
        problem += problem.objective <= solution.objective + slack, "as_good"
    previous = problem.objective
    problem.setObjective(pulp.lpSum(footprint(program.entries[i].column) * v for i, v in program.n.items()))
    second = _survive(program, gap=1e-3, time_limit=10.0)
    problem.setObjective(previous)
    return second.values if second.ok else solution.values
