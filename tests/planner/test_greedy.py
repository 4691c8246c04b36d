"""The greedy baseline: it serves what it says, and the integer program is never dearer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_plans import feasible, program_parts, write_plan

from perfmodel.planner import constraints
from perfmodel.planner.greedy import greedy, share
from perfmodel.planner.program import Question
from perfmodel.planner.solver import solve


@pytest.mark.parametrize("rate", [5.0, 30.0, 90.0])
def test_greedy_serves_the_load_and_the_program_costs_no_more(rate: float, tmp_path: Path) -> None:
    columns, fleet, rates, objective = program_parts(write_plan(tmp_path, rate=rate), 6)
    weights = [(o.price or 0.0) * 3600 for o in fleet]
    found = greedy(columns, fleet, rates, weights)
    best = solve(constraints.build(Question.single(columns, fleet, rates, objective)).problem)
    if not best.ok:
        assert found.unserved > 0
        return
    counts = tuple(found.instances.get(c, 0) for c in range(len(columns)))
    assert found.unserved > 0 or feasible(columns, counts, rates)
    assert found.cost >= best.objective - 1e-6
    assert all(n <= (o.max_nodes or 10**9) for n, o in zip(found.nodes, fleet, strict=True))


def test_greedy_by_hand(tmp_path: Path) -> None:
    """One column: the instances are its load over its scarcest resource, rounded up, on whole nodes."""
    columns, fleet, rates, _ = program_parts(write_plan(tmp_path, rate=30), 1)
    one = next(c for c in columns if len(c.buckets) == len(rates))
    found = greedy([one], fleet, rates, [(o.price or 0.0) * 3600 for o in fleet])
    instances = int(np.ceil(sum(r * share(one, k) for k, r in enumerate(rates)) - 1e-9))
    assert found.instances == {0: instances}
    per_node = one.offer.devices // one.layout.devices
    assert found.nodes[fleet.index(one.offer)] == -(-instances // per_node)


def test_greedy_says_what_it_cannot_serve(tmp_path: Path) -> None:
    columns, fleet, rates, _ = program_parts(write_plan(tmp_path, rate=4000), 4)
    found = greedy(columns, fleet, rates, [1.0 for _ in fleet])
    assert found.unserved > 0
    assert found.cost == float("inf")
