"""Each family of constraints against brute force over whole numbers, on columns whose arithmetic is done by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_columns import column, offer

from perfmodel.planner import constraints, solver
from perfmodel.planner.constraints.nodes import patterns
from perfmodel.planner.constraints.uptime import enough, spares
from perfmodel.planner.infeasible import nearest_change
from perfmodel.planner.offer import Offer, Tariff
from perfmodel.planner.optimum import Optimum, optimise
from perfmodel.planner.program import Demand, Question, nodes_bought
from perfmodel.spec.fleet import Limits, Region, Resilience

RATE = 100.0


def one_bucket(of: Offer, per_instance: float, **more: Any) -> Any:
    """A colocated column whose instance serves so many requests/s of the only bucket: prefill alone binds."""
    return column(of, (0,), prefill=1 / per_instance, decode=0.0, **more)


def ask(columns: list[Any], fleet: list[Offer], rates: tuple[float, ...] = (RATE,), **more: Any) -> Optimum:
    return optimise(Question(tuple(fleet), (Demand(tuple(columns), rates),), **more), gap=1e-6)


def bought(found: Optimum) -> list[int]:
    q = found.program.question
    return [sum(nodes_bought(q, found.values, t, 0)) for t in range(len(q.offers))]


@given(st.integers(1, 8), st.integers(1, 8), st.floats(1.0, 30.0), st.floats(1.0, 30.0), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_blocks_limits_and_smallest_purchases(block: int, least: int, p: float, q: float, most: int) -> None:
    # 8 instances of 1.5 requests/s on a node of the first, of 2 on the second.
    a, b = offer("a", p, block=block), offer("b", q, most, min_nodes=least if least <= most else 0, item=1)
    found = ask([one_bucket(a, 1.5), one_bucket(b, 2.0)], [a, b])
    best = math.inf
    for x, y in itertools.product(range(0, 40, block), range(most + 1)):
        # Instances are whole, and the flow may split.
        if (y == 0 or y >= b.min_nodes) and 12 * x + 16 * y >= RATE:
            best = min(best, p * x + q * y)
    assert found.solution.objective == pytest.approx(best, rel=1e-5)
    assert bought(found)[0] % block == 0


def packs(counts: dict[int, int], nodes: int, devices: int) -> bool:
    """Whether instances of these sizes fit into so many nodes: depth first over how the largest is placed."""
    sizes = sorted((d for d, n in counts.items() for _ in range(n)), reverse=True)

    def place(i: int, left: tuple[int, ...]) -> bool:
        if i == len(sizes):
            return True
        return any(
            place(i + 1, tuple(sorted((*left[:j], left[j] - sizes[i], *left[j + 1 :]))))
            for j in {left.index(x): 0 for x in left} if left[j] >= sizes[i]
        )  # fmt: skip

    return place(0, (devices,) * nodes)


@pytest.mark.parametrize("sizes", [(4, 2), (8, 4), (6, 2), (3, 2), (5, 3), (6, 1)])
def test_what_shares_a_node(sizes: tuple[int, int]) -> None:
    o = offer("a", 1.0)
    for counts in ((1, 2), (3, 1), (2, 3), (1, 5), (3, 4)):
        need = dict(zip(sizes, counts, strict=True))
        # Two buckets, each for one size alone, and one request/s per instance.
        columns = [
            column(o, (k,), prefill=1.0, decode=0.0, tp=d, buckets=2) for k, d in enumerate(sizes)
        ]  # fmt: skip
        found = ask(columns, [o], tuple(float(n) for n in counts))
        fewest = next(n for n in range(1, 12) if packs(need, n, 8))
        assert bought(found) == [fewest], (need, fewest)


def test_patterns_fill_a_node() -> None:
    for way in patterns((2, 3, 5), 8):
        used = sum(a * b for a, b in zip(way, (2, 3, 5), strict=True))
        assert 8 - used < 2
        assert used <= 8
    # By hand: 5+3, 5+2, 3+3+2, 3+2+2, 2+2+2+2.
    assert set(patterns((2, 3, 5), 8)) == {(0, 1, 1), (1, 2, 0), (2, 1, 0), (4, 0, 0), (1, 0, 1)}


@pytest.mark.parametrize(("domain", "lost"), [("device", 1), ("node", 4), ("rack", 8)])
def test_survival_by_brute_force(domain: str, lost: int) -> None:
    # tp2 on 8 devices: four instances a node, two nodes a rack. The other type carries more per instance and costs more.
    a, b = offer("a", 8.0, rack_nodes=2), offer("b", 23.0, rack_nodes=2)
    columns = [one_bucket(a, 5.0, tp=2), one_bucket(b, 12.0, tp=2)]
    found = ask(columns, [a, b], resilience=Resilience(survive=(domain,)))
    best = math.inf
    for x, y in itertools.product(range(50), range(30)):
        left_a, left_b = max(x - lost, 0), max(y - lost, 0)
        if min(5 * left_a + 12 * y, 5 * x + 12 * left_b, 5 * x + 12 * y) >= RATE:
            best = min(best, 8 * math.ceil(x / 4) + 23 * math.ceil(y / 4))
    assert found.solution.objective == pytest.approx(best)
    plain = ask(columns, [a, b])
    assert plain.solution.objective <= found.solution.objective


def test_survival_re_routes_between_prefill_and_decode() -> None:
    # Prefill instances serve 10/s, decode ones 4/s; any device may fail, so one of each is spare: 11 + 26 devices.
    o = offer("a", 8.0)
    columns = [
        column(o, (0,), prefill=0.1, decode=0.0, role="prefill", moved=1.0),
        column(o, (0,), prefill=0.0, decode=16.0, role="decode"),
    ]
    q = Question((o,), (Demand(tuple(columns), (RATE,)),), "devices", resilience=Resilience(survive=("device",)))
    found = optimise(q, gap=1e-6)
    # The objective counts nodes: ceil(37/8) of them.
    assert bought(found) == [5]
    assert bought(ask(columns, [o])) == [math.ceil((10 + 25) / 8)]


def test_spares_are_binomial() -> None:
    up, target = 0.98, 0.999
    table = spares(up, target, 60)
    for needed in (1, 2, 5, 20, 60):
        j = next(j for j, most in enumerate(table) if needed <= most)
        # Written out: the probability that at most j of needed + j nodes are down.
        n = needed + j
        p = [sum(math.comb(n, d) * (1 - up) ** d * up ** (n - d) for d in range(j + 1))]
        assert p[0] >= target
        assert j == 0 or sum(math.comb(n - 1, d) * (1 - up) ** d * up ** (n - 1 - d) for d in range(j)) < target
        assert enough(up, needed, n) == pytest.approx(p[0])
    o = offer("a", 8.0, mtbf=980.0, mttr=20.0)
    found = ask([one_bucket(o, 2.5)], [o], resilience=Resilience(availability=target))
    needed = math.ceil(RATE / 20)
    assert bought(found) == [needed + next(j for j, most in enumerate(table) if needed <= most)]


def test_budget_goodput_by_brute_force() -> None:
    a, b = offer("a", 7.0), offer("b", 11.0)
    found = ask([one_bucket(a, 1.5), one_bucket(b, 2.6)], [a, b], objective="goodput", limits=Limits(budget="60 USD/h"))
    best = max(12 * x + 20.8 * y for x, y in itertools.product(range(9), range(6)) if 7 * x + 11 * y <= 60)
    assert -found.solution.objective == pytest.approx(best, rel=1e-5)


def test_power_and_carbon_by_hand() -> None:
    # Two sites; the dirty one is cheaper. Instances draw 900 W on one device.
    dirty = offer("a", 5.0, region="d", site=Region(carbon="500 g/kWh", pue=1.2))
    clean = offer("b", 6.0, region="c", site=Region(carbon="50 g/kWh", pue=1.5, power="30 kW"), item=1)
    columns = [one_bucket(dirty, 2.0, power=900.0), one_bucket(clean, 2.0, power=900.0)]
    idle, rest = dirty.idle_power or 0.0, dirty.idle_device
    n = RATE / 2
    for objective, of in (("cost", dirty), ("carbon", clean)):
        q = Question((dirty, clean), (Demand(tuple(columns), (RATE,)),), objective)
        found = optimise(q, gap=1e-6)
        nodes = math.ceil(n / 8)
        assert bought(found)[(dirty, clean).index(of)] >= (nodes if objective == "cost" else 1)
        if objective == "carbon":
            watts = 1.5 * (nodes * idle + n * (900 - rest))
            # 30 kW at the clean site's meter hold fewer nodes; without the cap all run there, at watts x 50 g/kWh.
            assert watts > 30e3
            free = replace(clean, site=clean.site.model_copy(update={"power": None}))
            moved = replace(columns[1], offer=free)
            alone = optimise(Question((dirty, free), (Demand((columns[0], moved), (RATE,)),), objective), gap=1e-6)
            assert bought(alone) == [0, nodes]
            assert alone.solution.objective == pytest.approx(watts / 1e3 * 50)
            assert found.solution.objective > alone.solution.objective
            mine = bought(found)[1]
            used = sum(v for k, v in found.values.items() if k == "n_1")
            assert 1.5 * (mine * idle + used * (900 - rest)) <= 30e3 * (1 + 1e-6)


def test_reserved_base_and_on_demand_peak() -> None:
    # A node serves 16/s. Load 100 for a quarter of the time, 40 else: 7 and 3 nodes. Reserved nodes cost 5, others 12 while held.
    o = offer("a", 12.0, tariffs=(Tariff("on-demand", 12 / 3600, ""), Tariff("1y", 5 / 3600, "")))
    c = one_bucket(o, 2.0)
    demands = (Demand((c,), (100.0,), period=0), Demand((c,), (40.0,), period=1))
    found = optimise(Question((o,), demands, shares=(0.25, 0.75)), gap=1e-6)
    best = min(5 * r + 0.25 * 12 * max(7 - r, 0) + 0.75 * 12 * max(3 - r, 0) for r in range(8))
    assert found.solution.objective == pytest.approx(best)
    assert nodes_bought(found.program.question, found.values, 0, 0) == [4, 3]
    assert nodes_bought(found.program.question, found.values, 0, 1) == [0, 3]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_spot_share_and_quota(share: float) -> None:
    steady = offer("a", 12.0)
    spot = replace(steady, spot=True, tariffs=(Tariff("spot", 3 / 3600, "", quota=4),), price=3 / 3600)
    columns = [one_bucket(steady, 2.0), one_bucket(spot, 1.9)]
    found = ask(columns, [steady, spot], limits=Limits(spot_share=share))
    best = min(
        12 * x + 3 * y for x, y in itertools.product(range(9), range(5))
        if 16 * x + min(15.2 * y, share * RATE) >= RATE - 1e-9
    )  # fmt: skip
    assert found.solution.objective == pytest.approx(best)


def test_services_share_nodes() -> None:
    # Three instances of tp2 for one model and five of tp2 for the other: two nodes together, three if each had its own.
    o = offer("a", 8.0)
    first = Demand((column(o, (0,), prefill=1.0, decode=0.0, tp=2),), (3.0,), "one")
    second = Demand((column(o, (0,), prefill=0.5, decode=0.0, tp=2),), (10.0,), "two")
    q = Question((o,), (first, second))
    assert bought(optimise(q)) == [2]
    assert bought(optimise(q.of_service("one"))) == [1]
    assert bought(optimise(q.of_service("two"))) == [2]


def test_handover_stays_in_a_region_and_within_ports() -> None:
    near, far = offer("a", 8.0, region="x"), offer("b", 1.0, region="y", item=1)
    prefill = column(near, (0,), prefill=0.1, decode=0.0, role="prefill", moved=1.0)
    decode = column(far, (0,), prefill=0.0, decode=16.0, role="decode")
    assert not ask([prefill, decode], [near, far]).solution.ok
    here = replace(decode, offer=near)
    assert ask([prefill, here], [near, far]).solution.ok
    # A request's cache fills a port for 0.04 s: 25/s per device at both ends, though prefill alone could do 100/s.
    m = near.machine
    heavy = column(near, (0,), prefill=0.01, decode=0.0, role="prefill", moved=m.network * float(m.network_efficiency) * 0.04)
    quick = column(near, (0,), prefill=0.0, decode=0.64, role="decode")  # 100/s by its batch
    found = ask([heavy, quick], [near])
    assert [round(found.values[f"n_{i}"]) for i in (0, 1)] >= [4, 4]
    assert round(found.values["n_0"]) == round(found.values["n_1"]) == 4


@pytest.mark.parametrize(
    ("limits", "change"),
    [
        ({"budget": "20 USD/h"}, {"budget": "56 USD/h"}), ({"devices": 8}, {"devices": 56}),
        ({"power": "5 kW"}, None),
    ],
)  # fmt: skip
def test_the_nearest_change_is_feasible_and_nothing_less_is(limits: dict[str, Any], change: dict[str, Any] | None) -> None:
    o = offer("a", 8.0)
    columns = [one_bucket(o, 2.0)]  # 50 instances: 7 nodes, 56 USD/h
    q = Question((o,), (Demand(tuple(columns), (RATE,)),), limits=Limits(**limits))
    assert not optimise(q).solution.ok
    error = nearest_change(q)
    (name,) = limits
    assert name in (error.nearest or "")
    if change is not None:
        value = str(change[name]).split()[0]
        assert value in (error.nearest or "")
        assert optimise(replace(q, limits=Limits(**change))).solution.ok
    else:
        said = float((error.nearest or "").split()[2])
        assert optimise(replace(q, limits=Limits(power=f"{said} kW"))).solution.ok
        assert not optimise(replace(q, limits=Limits(power=f"{said * 0.98} kW"))).solution.ok


@given(st.floats(20.0, 200.0), st.integers(1, 12), st.integers(0, 3), st.floats(1.0, 1.5))
@settings(max_examples=10, deadline=None)
def test_looser_never_costs_more(rate: float, most: int, more: int, factor: float) -> None:
    a, b = offer("a", 7.0, most), offer("b", 11.0, item=1)

    def cost(rate: float, most: int, room: float) -> float:
        tight = replace(a, max_nodes=most)
        columns = [one_bucket(tight, 1.5 * room), one_bucket(b, 2.0)]
        return ask(columns, [tight, b], (rate,)).solution.objective

    base = cost(rate, most, 1.0)
    assert cost(rate, most + more, 1.0) <= base * (1 + 1e-6)
    assert cost(rate, most, factor) <= base * (1 + 1e-6)
    assert cost(rate / factor, most, 1.0) <= base * (1 + 1e-6)


def test_a_restricted_master_proves_the_same_optimum() -> None:
    rng = np.random.default_rng(5)
    fleet = [offer(f"n{t}", float(rng.uniform(4, 20)), item=t) for t in range(6)]
    columns = [
        column(o, tuple(range(j, 4)), prefill=rng.uniform(0.05, 0.4, 4), decode=rng.uniform(1, 20, 4), tp=int(tp), buckets=4)
        for o in fleet for tp in (1, 2, 4, 8) for j in range(4)
    ]  # fmt: skip
    rates = (30.0, 12.0, 7.0, 3.0)
    q = Question(tuple(fleet), (Demand(tuple(columns), rates),))
    whole = solver.solve(constraints.build(q).problem, gap=1e-4, time_limit=20)
    ours = optimise(q, gap=1e-3)
    assert len(ours.program.keep) < len(columns)
    assert ours.solution.objective <= whole.objective * (1 + 2e-3)
    assert ours.solution.bound <= whole.objective * (1 + 1e-6)
