"""Spare nodes, so that enough are up with a stated probability."""

from __future__ import annotations

from functools import lru_cache

import pulp

from perfmodel.planner.constraints.nodes import most_nodes
from perfmodel.planner.program import Program


def define_uptime(p: Program) -> dict[tuple[int, int], pulp.LpAffineExpression]:
    """Nodes K[t,p] that instances may count on; without an availability target, all that are bought.

    Nodes of an offer fail independently and are up a share a = MTBF/(MTBF + MTTR) of the time. With j spares, K of K + j nodes
    are up with probability P(Binomial(K + j, 1 - a) <= j), which falls with K: j suffice up to K_j. Linearised exactly:
    N = K + sum_j j u_j, K <= sum_j K_j u_j, sum_j u_j = 1, u_j in {0, 1}. The target is split evenly over the offers that
    can fail: each meets target^(1/offers), so that together they meet it whichever are bought.
    """
    q = p.question
    target = q.resilience.availability if q.resilience else None
    failing = [t for t, o in enumerate(q.offers) if target is not None and o.up is not None]
    needed: dict[tuple[int, int], pulp.LpAffineExpression] = {}
    for t, offer in enumerate(q.offers):
        for period in p.periods:
            needed[t, period] = p.bought(t, period)
            if t not in failing or target is None or offer.up is None:
                continue
            table = spares(offer.up, target ** (1 / len(failing)), most_nodes(p, t))
            name = f"{t}_{period}"
            k = p.problem.add_variable(f"K_{name}", lowBound=0, cat=p.integer)
            u = [p.problem.add_variable(f"u_{name}_{j}", lowBound=0, upBound=1, cat=p.integer) for j in range(len(table))]
            extra = pulp.lpSum(j * v for j, v in enumerate(u))
            p.problem += p.bought(t, period) >= k + extra, f"spares_{name}"
            p.problem += k <= pulp.lpSum(most * v for most, v in zip(table, u, strict=True)), f"up_{name}"
            p.problem += pulp.lpSum(u) == 1, f"level_{name}"
            needed[t, period] = pulp.lpSum(k)
    return needed


@lru_cache(maxsize=256)
def spares(up: float, target: float, most: int) -> tuple[int, ...]:
    """Largest number of needed nodes for which 0, 1, 2 … spares suffice, up to `most`.

    >>> spares(0.99, 0.999, 100)[:3]  # of 5 nodes that are up 99 % of the time each, at least 4 are 99.902 % of the time
    (0, 4, 17)
    """
    from scipy.stats import binom

    table: list[int] = []
    while not table or table[-1] < most:
        j = len(table)
        low, high = table[-1] if table else 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if binom.cdf(j, middle + j, 1 - up) >= target:
                low = middle
            else:
                high = middle - 1
        table.append(low)
    return tuple(table)


def enough(up: float, needed: int, bought: int) -> float:
    """Probability that at least `needed` of `bought` nodes are up (binomial)."""
    from scipy.stats import binom

    return float(binom.sf(needed - 1, bought, up))
