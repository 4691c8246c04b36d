"""The cheapest numbers of whole devices that carry kinds of requests, each kind divided among the types at will."""

from __future__ import annotations

import numpy as np
import pulp

from perfmodel.errors import Infeasible
from perfmodel.planner.solver import solve


def cheapest(prices: np.ndarray, load: np.ndarray) -> tuple[float, np.ndarray]:
    """(cost, devices of each type) of the cheapest mix.

    prices: of one device [type]. load: devices of a type that all requests of a kind would keep busy [type, kind]; infinite
    where it cannot serve them. min sum p_g n_g over whole n_g >= sum_k x_gk load_gk with sum_g x_gk = 1 (Melange,
    arXiv:2404.14527, equations 1-4 with slices of any size).

    >>> cheapest(np.array([1.0, 2.9]), np.array([[0.6, 1.6], [0.3, 0.4]]))
    (2.9, array([0, 1]))
    """
    types, kinds = load.shape
    if not np.isfinite(load).any(axis=0).all():
        raise Infeasible("no type serves every kind of request within the limits", binding=("latency",))
    problem = pulp.LpProblem("mix", pulp.LpMinimize)
    count = [problem.add_variable(f"n{g}", 0, cat="Integer") for g in range(types)]
    share = {
        (g, k): problem.add_variable(f"x{g}_{k}", 0)
        for g in range(types) for k in range(kinds) if np.isfinite(load[g, k])
    }  # fmt: skip
    problem += pulp.lpSum(float(p) * n for p, n in zip(prices, count, strict=True))
    for k in range(kinds):
        problem += pulp.lpSum(x for (_, kind), x in share.items() if kind == k) == 1
    for g in range(types):
        problem += pulp.lpSum(float(load[g, k]) * x for (own, k), x in share.items() if own == g) <= count[g]
    found = solve(problem, gap=1e-6)
    devices = np.array([round(found.values[f"n{g}"]) for g in range(types)])
    return float(prices @ devices), devices
