"""Experts on ranks: which rank holds which expert, and which experts are held twice or more.

One layer, one step. Expert e is asked for by l_e tokens, and C_ef tokens ask for both e and f. Replicas of an expert
share its tokens evenly, as engines with an expert balancer do (DeepSeek-V3, arXiv:2412.19437, section 3.4). With r_e
replicas and h_eg = 1 where rank g holds one:

    L_g = sum_e l_e h_eg / r_e                    tokens of a rank
    T   = max_g (a L_g + b sum_e h_eg)            a [s per token], b [s per expert whose weights are read]
    q_en = sum_{g in node n} h_eg / r_e           share of an expert that node n serves
    X   = (1 - 1/N) (sum_e l_e - 2/k sum_{e<f} C_ef sum_n min(q_en, q_fn))
    minimise T + c X                              c [s per copy of a token that crosses nodes]

subject to sum_e h_eg <= slots and 1 <= r_e <= ranks. X counts copies of tokens sent to other nodes, one per node
(arXiv:2412.19437, 3.2): k choices are k copies less those saved where choices meet. Of m choices that meet, m - 1
copies are saved, and m (m - 1)/2 pairs meet: 2/k per pair never saves too much, and is exact for top-2 and where all
k choices meet. A share 1/N of tokens starts on the node it goes to.
"""

from __future__ import annotations

import time

import numpy as np
import pulp

from perfmodel.planner.placement.expert_problem import (
    Demand,
    Placed,
    Ranks,
    contiguous,
    copies,
    evaluate,
    lower_bound,
)
from perfmodel.planner.placement.expert_search import improved, starts
from perfmodel.planner.solver import TIME_LIMIT_S, Solution, solve

__all__ = ["Demand", "Placed", "Ranks", "contiguous", "copies", "evaluate", "lower_bound", "place", "solve_program"]

# Products of experts and ranks up to which the integer program is tried after the heuristic.
_EXACT_CELLS = 640
_CLOSE = 1e-3  # gap that the program is not run for


def place(
    demand: Demand, ranks: Ranks, *, exact: bool | None = None, solver: str = "highs", time_limit: float = TIME_LIMIT_S
) -> Placed:
    """The best placement found, with its bound.

    A greedy start (most loaded replica to the least loaded rank) and swaps first; where that leaves a gap and there
    are at most `_EXACT_CELLS` experts x ranks, the integer program. exact: run it, or do not, in any case.
    """
    start = time.perf_counter()
    ranks.check(demand)
    bound = lower_bound(demand, ranks)
    fewest = -(-demand.loads.size // ranks.count)
    tries = [improved(h, demand, ranks) for s in range(fewest, ranks.slots + 1) for h in starts(demand, ranks, s)]
    best = min((evaluate(h, demand, ranks, bound, "greedy and swaps") for h in tries), key=lambda p: p.objective)
    small = demand.loads.size * ranks.count <= _EXACT_CELLS
    if exact or (exact is None and small and best.gap > _CLOSE):
        found, held = solve_program(demand, ranks, solver=solver, time_limit=time_limit)
        if found.ok and held is not None:
            bound = max(bound, found.bound)
            other = evaluate(held, demand, ranks, bound, f"integer program ({found.solver})")
            best = other if other.objective <= best.objective else evaluate(best.held, demand, ranks, bound, best.method)
    return evaluate(best.held, demand, ranks, min(bound, best.objective), best.method, time.perf_counter() - start)


def solve_program(
    demand: Demand, ranks: Ranks, *, solver: str = "highs", time_limit: float = TIME_LIMIT_S
) -> tuple[Solution, np.ndarray | None]:
    """The integer program of the module's head, and its placement.

    x_egr = 1 where rank g holds one of exactly r replicas of e, y_er = 1 where e has r. Each x counts l_e/r tokens,
    so even shares are linear. z_efn <= q_en, z_efn <= q_fn stand for the minimum.
    """
    p = pulp.LpProblem("experts", pulp.LpMinimize)
    n, spare = demand.loads.size, ranks.count * ranks.slots - demand.loads.size
    numbers = range(1, min(ranks.count, spare + 1) + 1)
    y = {(e, r): p.add_variable(f"y_{e}_{r}", cat="Binary") for e in range(n) for r in numbers}
    x = {
        (e, g, r): p.add_variable(f"x_{e}_{g}_{r}", cat="Binary")
        for e in range(n) for g in range(ranks.count) for r in numbers
    }  # fmt: skip
    slowest = p.add_variable("T", lowBound=0)
    for e in range(n):
        p += pulp.lpSum(y[e, r] for r in numbers) == 1, f"once_{e}"
        for r in numbers:
            p += pulp.lpSum(x[e, g, r] for g in range(ranks.count)) == r * y[e, r], f"replicas_{e}_{r}"
            for g in range(ranks.count):
                p += x[e, g, r] <= y[e, r], f"part_{e}_{g}_{r}"
    for g in range(ranks.count):
        here = [(e, r) for e in range(n) for r in numbers]
        p += pulp.lpSum(x[e, g, r] for e, r in here) <= ranks.slots, f"slots_{g}"
        time_of = {(e, r): ranks.per_token * demand.loads[e] / r + ranks.per_expert for e, r in here}
        p += slowest >= pulp.lpSum(time_of[e, r] * x[e, g, r] for e, r in here), f"rank_{g}"
    for e in range(n):
        share = pulp.lpSum(demand.loads[e] / r * y[e, r] for r in numbers)
        p += slowest >= ranks.per_token * share + ranks.per_expert, f"hottest_{e}"
    hot = int(np.argmax(demand.loads))
    # Ranks and nodes are interchangeable: some replica of the hottest expert may as well be on the first.
    p += pulp.lpSum(x[hot, 0, r] for r in numbers) == 1, "first"
    p.setObjective(slowest + ranks.per_copy * _crossing(p, x, demand, ranks, numbers))
    found = solve(p, solver=solver, time_limit=time_limit)
    if not found.ok:
        return found, None
    held = np.zeros((n, ranks.count), bool)
    for e, g, r in x:
        held[e, g] |= found.values[f"x_{e}_{g}_{r}"] > 0.5
    return found, held


def _crossing(p: pulp.LpProblem, x: dict, demand: Demand, ranks: Ranks, numbers: range) -> pulp.LpAffineExpression:
    """X as a linear expression; minimising it raises every z to the smaller of its two shares."""
    total = pulp.lpSum([])
    if ranks.nodes == 1 or demand.together is None or ranks.per_copy == 0:
        return total
    outward = 1 - 1 / ranks.nodes
    # A variable fixed at 1: solvers leave a constant out of the bound they report.
    total += outward * float(demand.loads.sum()) * p.add_variable("one", lowBound=1, upBound=1)
    q = {
        (e, node): pulp.lpSum(
            x[e, g, r] * (1 / r)
            for g in range(node * ranks.per_node, (node + 1) * ranks.per_node) for r in numbers
        )
        for e in range(demand.loads.size) for node in range(ranks.nodes)
    }  # fmt: skip
    for e, f in zip(*np.nonzero(np.triu(demand.together, 1)), strict=True):
        for node in range(ranks.nodes):
            z = p.add_variable(f"z_{e}_{f}_{node}", lowBound=0, upBound=1)
            p += z <= q[e, node], f"meets_{e}_{f}_{node}_a"
            p += z <= q[f, node], f"meets_{e}_{f}_{node}_b"
            total -= outward * 2 / demand.top_k * float(demand.together[e, f]) * z
    return total


