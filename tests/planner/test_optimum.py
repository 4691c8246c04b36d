"""The integer program against brute force, a second solver, and the estimator's own numbers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pulp
import pytest
from small_plans import feasible, program_parts, write_plan

from perfmodel import memory
from perfmodel.planner import constraints, solver
from perfmodel.planner.columns import Column
from perfmodel.planner.offer import Offer
from perfmodel.planner.program import Question
from perfmodel.planner.run import plan


def idle(offer: Offer) -> float:
    """Watts of a device at rest: its board limit times the idle share of the law."""
    return offer.machine.tdp * float(offer.machine.law["power_idle"])


def brute_force(columns: list[Column], fleet: list[Offer], rates: list[float], objective: str) -> float:
    """Smallest objective over every combination of node and instance counts."""
    best = math.inf
    limits = [o.max_nodes or 0 for o in fleet]
    for nodes in itertools.product(*(range(m + 1) for m in limits)):
        if objective == "power":
            fixed = sum((o.machine.node_overhead_power + o.devices * idle(o)) * n for o, n in zip(fleet, nodes, strict=True))
        else:
            fixed = sum(((o.price or 0) * 3600 if objective == "cost" else o.devices) * n for o, n in zip(fleet, nodes, strict=True))
        if fixed >= best:
            continue
        room = [o.devices * n for o, n in zip(fleet, nodes, strict=True)]
        most = [room[fleet.index(c.offer)] // c.layout.devices for c in columns]
        for counts in itertools.product(*(range(m + 1) for m in most)):
            used = [sum(n * c.layout.devices for n, c in zip(counts, columns, strict=True) if c.offer is o) for o in fleet]
            if any(u > r for u, r in zip(used, room, strict=True)):
                continue
            total = fixed
            if objective == "power":
                total += sum(n * ((c.power_w or 0) - c.layout.devices * idle(c.offer)) for n, c in zip(counts, columns, strict=True))
            if total < best - 1e-9 and feasible(columns, counts, rates):
                best = total
    return best


@pytest.mark.parametrize("objective", ["cost", "devices", "power"])
def test_brute_force_agrees(objective: str, tmp_path: Path) -> None:
    keep = 1 if objective == "power" else 2
    columns, fleet, rates, _ = program_parts(write_plan(tmp_path, objective), keep)
    assert len({c.layout.node for c in columns}) == 2
    ours = solver.solve(constraints.build(Question.single(columns, fleet, rates, objective)).problem, gap=1e-6)
    assert ours.status == "optimal"
    assert ours.objective == pytest.approx(brute_force(columns, fleet, rates, objective), rel=1e-5)
    assert ours.bound <= ours.objective * (1 + 1e-9)


@pytest.mark.parametrize("roles", ["[colocated]", "[colocated, prefill, decode]"])
def test_cbc_agrees_with_highs(roles: str, tmp_path: Path) -> None:
    try:
        solver.cbc()
    except pulp.PulpSolverError as error:
        pytest.skip(str(error))
    columns, fleet, rates, objective = program_parts(write_plan(tmp_path, roles=roles), 6)
    one = solver.solve(constraints.build(Question.single(columns, fleet, rates, objective)).problem)
    two = solver.solve(constraints.build(Question.single(columns, fleet, rates, objective)).problem, solver="cbc")
    assert one.objective == pytest.approx(two.objective, rel=1e-3)


def test_objective_is_what_the_estimator_and_the_prices_say(tmp_path: Path) -> None:
    run = plan(write_plan(tmp_path))
    p, d = run.plans[0], run.data
    # Prices of the file times the nodes bought.
    prices = {"l40s-server-4": 4.0, "hgx-a100-8": 12.0}
    assert d["cost_usd_per_hour"] == pytest.approx(sum(prices[n["node"]] * n["count"] for n in d["nodes"]))
    assert d["objective_value"] == pytest.approx(d["cost_usd_per_hour"], rel=1e-4)
    assert d["bound"] <= d["objective_value"] * (1 + 1e-6)
    assert sum(x.rate for x in p.pools) == pytest.approx(p.workload.rate, rel=1e-6)
    for pool in p.pools:
        e = pool.column.estimator
        # The step time at the pool's batch, from the estimator itself.
        batch = max(round(pool.state.batch), 1)
        step = float(e.decode(batch, pool.mix.context))
        assert pool.column.instance.clock.decode(batch, batch * pool.mix.context) == pytest.approx(step, rel=0.03)
        assert pool.state.pure_step == pytest.approx(step, rel=0.1)
        held = float(memory.cache_bytes(e.model, e.par, e.formats, pool.state.batch, pool.mix.context))
        assert held <= e.kv_free
        # Little's law: requests in decode = rate x steps x seconds per step.
        rate = pool.rate / pool.replicas
        assert pool.state.batch == pytest.approx(rate * pool.mix.mean(pool.mix.steps) * pool.state.step, rel=0.02)
    for node in d["nodes"]:
        used = sum(x["devices"] for x in d["pools"] if x["hardware"] == node["node"])
        assert used <= node["devices"]
        assert node["count"] <= node["max_nodes"]


def test_flows_are_conserved_between_prefill_and_decode(tmp_path: Path) -> None:
    path = write_plan(tmp_path, roles="[prefill, decode]")
    p = plan(path).plans[0]
    inflow = sum(x.rates for x in p.pools if x.column.layout.role == "prefill")
    outflow = sum(x.rates for x in p.pools if x.column.layout.role == "decode")
    assert np.allclose(inflow, outflow, rtol=1e-5)
    assert float(np.sum(inflow)) == pytest.approx(p.workload.rate, rel=1e-6)


def test_shadow_price_is_the_slope_of_the_relaxed_cost(tmp_path: Path) -> None:
    columns, fleet, rates, objective = program_parts(write_plan(tmp_path, rate=10), 6)
    base = solver.solve(constraints.build(Question.single(columns, fleet, rates, objective), relaxed=True, linked=False).problem)
    for k in range(len(rates)):
        more = [r + (1e-3 if i == k else 0.0) for i, r in enumerate(rates)]
        moved = solver.solve(constraints.build(Question.single(columns, fleet, more, objective), relaxed=True, linked=False).problem)
        assert (moved.objective - base.objective) / 1e-3 == pytest.approx(base.duals[f"serve_0_{k}"], rel=1e-3)


def test_alternatives_carry_a_price_or_a_reason(tmp_path: Path) -> None:
    d = plan(write_plan(tmp_path)).data
    assert {a["name"] for a in d["alternatives"]} >= {"only l40s-server-4", "only hgx-a100-8"}
    for a in d["alternatives"]:
        if a["objective"] is None:
            assert any(ch.isdigit() for ch in a["reason"]), a
        else:
            assert a["objective"] >= d["objective_value"] * (1 - 1e-3)
