"""Periods, mixes and the proof at scale, on arithmetic columns; promises, prices and confidence on whole plans."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_columns import DEVICES, large

from perfmodel.errors import SpecError
from perfmodel.planner.optimum import optimise
from perfmodel.planner.periods import Level, held, merged
from perfmodel.planner.program import Question, nodes_bought
from perfmodel.planner.run import PlanRun, plan
from perfmodel.planner.service import interrupted, startup_seconds
from perfmodel.spec.deployment import Deployment
from perfmodel.spec.formats import quality

STARTUP = {"provisioning": "3 min", "weights": "2 GB/s", "engine_init": "60 s", "graph_capture": "20 s"}
BASE: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "workload": {
        "lengths": {"input": 1024, "output": 256}, "rate": "60 /s",
        "objectives": {"ttft": {"p95": "1 s"}, "tpot": {"p95": "40 ms"}},
    },
    "fleet": [
        {"node": "l40s-server-4", "max_nodes": 40, "price": "4 USD/h"},
        {"node": "hgx-a100-8", "max_nodes": 20, "price": "12 USD/h"},
    ],
    "choices": {"roles": ["colocated"], "tp": [1, 2], "buckets": 2},
}


def ask(folder: Path, explain: bool = False, **changes: Any) -> PlanRun:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**copy.deepcopy(BASE), **changes}))
    return plan(path, explain=explain)


@pytest.mark.parametrize(("multiple", "most"), [(6.0, None), (6.0, 200)])
def test_ten_types_of_twenty_buckets_to_a_thousandth_in_ten_seconds(multiple: float, most: int | None) -> None:
    columns, fleet, rates = large()
    by_name = {o.node.name: replace(o, max_nodes=most, item=i) for i, o in enumerate(fleet)}
    columns = [replace(c, offer=by_name[c.offer.node.name]) for c in columns]
    q = Question.single(columns, list(by_name.values()), [r * multiple for r in rates], "cost")
    begun = time.perf_counter()
    found = optimise(q, gap=1e-3)
    assert time.perf_counter() - begun < 10
    assert found.solution.status == "optimal"
    assert found.solution.gap <= 1e-3
    devices = sum(8 * sum(nodes_bought(q, found.values, t, 0)) for t in range(len(fleet)))
    assert 5000 < devices < 12000
    # The bound is a bound: the plan serves everything (by the rows' meaning) and costs what it says.
    served = sum(found.values.get(f"y_{i}_{k}", 0.0) for i, c in enumerate(columns) if c.layout.role != "decode" for k in c.buckets)
    assert served == pytest.approx(sum(rates) * multiple, rel=1e-6)
    prices = {name: 8 * price for name, *_, price in DEVICES}
    cost = sum(prices[o.node.name] * sum(nodes_bought(q, found.values, t, 0)) for t, o in enumerate(q.offers))
    assert found.solution.objective == pytest.approx(cost)
    assert len(fleet) == len({c.offer.node.name for c in columns})


@given(st.lists(st.tuples(st.integers(1, 6), st.floats(0.1, 1.0)), min_size=1, max_size=6), st.floats(0.0, 20.0))
@settings(max_examples=25, deadline=None)
def test_capacity_held_is_the_largest_load_to_come(periods: list[tuple[int, float]], lag: float) -> None:
    levels = held([(h * 3600.0, m) for h, m in periods], lag * 3600)
    assert sum(x.share for x in levels) == pytest.approx(1)
    # Naively, minute by minute around the cycle.
    minutes = np.concatenate([np.full(h * 60, m) for h, m in periods])
    window = min(int(lag * 60), minutes.size - 1)
    ahead = np.concatenate([minutes, minutes, minutes])
    need = np.array([ahead[i : i + window + 1].max() for i in range(minutes.size)])
    assert sum(x.share * x.multiple for x in levels) == pytest.approx(need.mean(), abs=2 * len(periods) / minutes.size)


def test_merged_levels_never_hold_less() -> None:
    levels = [Level(m, 0.1) for m in np.linspace(1.0, 0.1, 10)]
    few = merged(levels, 4)
    assert len(few) == 4
    assert sum(x.share for x in few) == pytest.approx(1)
    for m in np.linspace(0.05, 1.0, 30):
        assert sum(x.share for x in few if x.multiple >= m) >= sum(x.share for x in levels if x.multiple >= m) - 1e-9


def test_an_elastic_fleet_pays_for_what_it_holds(tmp_path: Path) -> None:
    terms = {"on-demand": {"price": "4 USD/h"}, "1y": {"price": "2.5 USD/h"}}
    fleet = [{"node": "l40s-server-4", "terms": terms}]
    profile = {"hours": [[8, 0.2], [8, 1.0], [8, 0.5]]}
    elastic = ask(tmp_path, fleet=fleet, startup=STARTUP, profile={**profile, "fleet": "elastic"}, explain=True)
    fixed = ask(tmp_path, fleet=fleet, profile={**profile, "fleet": "fixed"})
    d = elastic.data
    nodes = [(x["nodes"]["l40s-server-4"], x["share_of_time"]) for x in d["periods"]]
    reserved = sum(n["count"] for n in d["nodes"] if n["term"] == "1y")
    # By hand: reserved nodes around the clock, the rest on demand while they are held.
    assert d["cost_usd_per_hour"] == pytest.approx(2.5 * reserved + sum(s * 4 * max(n - reserved, 0) for n, s in nodes))
    assert d["objective_value"] == pytest.approx(d["cost_usd_per_hour"])
    assert d["cost_usd_per_hour"] < fixed.data["cost_usd_per_hour"]
    # 180 s, 16.06 GB of weights read once a node at 2 GB/s, and 60 + 20 s.
    assert d["lag_s"] == pytest.approx(180 + 16.06 / 2 + 80, rel=0.01)
    e = d["what_if"]["elasticity"]
    costs = [x["objective"] for x in e["by_lag"]]
    assert costs == sorted(costs)
    assert 0 < e["stops_paying_at_s"] <= 24 * 3600
    assert e["fixed"] == pytest.approx(fixed.data["cost_usd_per_hour"], rel=2e-3)


def test_spot_capacity_loses_what_interruptions_cost(tmp_path: Path) -> None:
    terms = {"on-demand": {"price": "4 USD/h"}, "spot": {"price": "1 USD/h", "interruptions": "0.5 /h"}}
    run = ask(tmp_path, fleet=[{"node": "l40s-server-4", "terms": terms}], startup=STARTUP, limits={"spot_share": 0.5})
    p = run.plans[0]
    spot = next(c for c in p.columns if c.offer.spot)
    steady = next(c for c in p.columns if not c.offer.spot and (c.layout, c.buckets) == (spot.layout, spot.buckets))
    startup = p.fleet.spec.startup
    assert startup is not None
    flight = float(steady.mix.mean(steady.state.work)) + 255 * steady.state.step
    by_hand = 0.5 / 3600 * (startup_seconds(steady, startup) + flight / 2)
    assert interrupted(steady, spot.offer, startup) == pytest.approx(by_hand)
    assert spot.state.batch == pytest.approx(steady.state.batch * (1 - by_hand))
    on_spot = sum(x.rate for x in p.pools if x.column.offer.spot)
    assert on_spot <= 0.5 * 60 * (1 + 1e-6)
    assert run.data["cost_usd_per_hour"] < ask(tmp_path, fleet=BASE["fleet"][:1]).data["cost_usd_per_hour"]


def test_distance_is_part_of_ttft(tmp_path: Path) -> None:
    near, far = ({"node": "hgx-a100-8", "price": f"{p} USD/h", "region": r} for r, p in (("near", 13), ("far", 12)))
    for rtt, region in (("50 ms", "far"), ("995 ms", "near")):
        d = ask(tmp_path, fleet=[near, far], regions={"near": {"rtt": "5 ms"}, "far": {"rtt": rtt}}).data
        assert {n["region"] for n in d["nodes"]} == {region}
        assert all(c["replayed_s"] <= c["limit_s"] for c in d["percentiles"] if c["limit_s"])
    assert min(c["promised_s"] for c in d["percentiles"] if c["metric"] == "ttft") > 5e-3


def test_what_if_prices_are_plans(tmp_path: Path) -> None:
    run = ask(tmp_path, explain=True, fleet=[BASE["fleet"][0], {**BASE["fleet"][1], "price": "30 USD/h"}])
    row = next(x for x in run.data["what_if"]["prices"] if "enters_at_usd_per_hour" in x)
    assert row["offer"] == "hgx-a100-8"
    at = row["enters_at_usd_per_hour"]
    for price, buys in ((at * 0.999, True), (at * 1.05, False)):
        other = ask(tmp_path, fleet=[BASE["fleet"][0], {**BASE["fleet"][1], "price": f"{price} USD/h"}])
        assert any(n["node"] == "hgx-a100-8" for n in other.data["nodes"]) == buys
    limit = next(x for x in run.data["what_if"]["limits"] if x["metric"] == "tpot")
    workload = copy.deepcopy(BASE["workload"])
    workload["objectives"]["tpot"]["p95"] = "50 ms"
    looser = ask(tmp_path, workload=workload, fleet=[BASE["fleet"][0], {**BASE["fleet"][1], "price": "30 USD/h"}])
    assert limit["objective"] == pytest.approx(looser.data["objective_value"], rel=3e-3)
    runners = [a for a in run.data["alternatives"] if a["name"].startswith("runner-up")]
    mains = [a["name"].split("mainly ")[1] for a in runners]
    assert len(runners) == 3
    assert len(set(mains)) == 3
    assert all(a["objective"] >= run.data["objective_value"] * (1 - 1e-3) for a in runners)


def test_certainty_costs_and_never_less_for_more(tmp_path: Path) -> None:
    choices = {"tp": [1], "buckets": 1}
    runs = {c: ask(tmp_path, confidence=c, choices=choices, explain=c == 0.9) for c in (0.5, 0.7, 0.9)}
    costs = [r.data["objective_value"] for r in runs.values()]
    assert costs == sorted(costs)
    assert costs[-1] > costs[0]
    sure = runs[0.9].data["what_if"]["certainty"]
    assert sure["price_of_certainty"] == pytest.approx(costs[-1] / costs[0] - 1, abs=5e-3)
    if len({n["node"] for n in runs[0.9].data["nodes"]}) == 1:
        # One device: its own quantile, and whole nodes only add to it.
        assert sure["joint_confidence"] >= 0.9 - 0.01
    if "hedged" in sure:
        assert sure["hedged"]["joint_confidence"] >= 0.9
        assert len(sure["hedged"]["buys"]) >= 2
    # All columns of a device share one factor.
    assert set(sure["slowness"]) == {"l40s-server-4", "hgx-a100-8"}
    assert min(sure["slowness"].values()) > 1


def test_the_deployment_is_what_runs(tmp_path: Path) -> None:
    services = [{"name": name, "model": "llama-3.1-8b", "workload": BASE["workload"]} for name in ("a", "b")]
    one = ask(tmp_path)
    whole = Deployment.model_validate(one.data["deployment"])
    assert sum(p.replicas for p in whole.pools) == sum(x["replicas"] for x in one.data["pools"])
    path = tmp_path / "two.yaml"
    base = {k: v for k, v in BASE.items() if k not in ("model", "workload")}
    path.write_text(yaml.safe_dump({**base, "services": services}))
    two = plan(path, explain=False)
    assert [s["name"] for s in two.data["services"]] == ["a", "b"]
    for s in two.data["services"]:
        Deployment.model_validate(s["deployment"])
        assert sum(x["requests_per_s"] for x in s["pools"]) == pytest.approx(60)
    # Two equal services share nodes: no dearer than two plans.
    assert two.data["objective_value"] <= 2 * one.data["objective_value"] * (1 + 1e-6)


def test_lossy_formats_need_leave_and_are_named(tmp_path: Path) -> None:
    assert quality("fp8", "bf16") == "lossy"
    assert quality("bf16", "bf16") == "checkpoint"
    assert quality("fp32", "fp16") == "exact"
    with pytest.raises(SpecError, match=r"plan.yaml:\d+: .*fp8 weights are lossy.*allow"):
        ask(tmp_path, choices={**BASE["choices"], "weight_dtype": ["fp8"]})
    allowed = ask(tmp_path, explain=True, choices={**BASE["choices"], "allow": ["fp8"]})
    plain = ask(tmp_path)
    assert allowed.data["objective_value"] <= plain.data["objective_value"]
    if allowed.data["lossy"]:
        assert allowed.data["what_if"]["lossy"][0]["without"]["objective"] == pytest.approx(
            plain.data["objective_value"], rel=3e-3
        )
        assert "Lossy" in allowed.text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "goodput"}, ["goodput", "budget"]),
        ({"fleet": [{**BASE["fleet"][0], "region": "mars"}], "regions": {"maas": {}}}, ["mars", "did you mean", "maas"]),
        ({"fleet": [{"node": "l40s-server-4", "terms": ["spto"]}]}, ["spto", "did you mean", "spot"]),
        ({"fleet": [{"node": "l40s-server-4", "terms": {"spot": {"price": "1 USD/h"}}}]}, ["interruptions"]),
        ({"fleet": [{**BASE["fleet"][0], "block": 50}]}, ["block", "max_nodes"]),
        ({"fleet": [{**BASE["fleet"][0], "mtbf": "100 h"}]}, ["mtbf", "mttr"]),
        ({"resilience": {"survive": ["rak"]}}, ["rak", "did you mean", "rack"]),
        ({"resilience": {"survive": ["rack"]}}, ["rack_nodes"]),
        ({"resilience": {"availability": 0.99}}, ["mtbf"]),
        ({"profile": {"hours": [[8, 1.0]], "fleet": "elastic"}}, ["startup"]),
        ({"profile": {"hours": [[0, 1.0]]}}, ["hours", "positive"]),
        ({"limits": {"budjet": "1 USD/h"}}, ["budjet", "did you mean", "budget"]),
        ({"limits": {"carbon": "1 kg/h"}}, ["carbon", "g/kWh"]),
        ({"regions": {"a": {"carbon": "380"}}}, ["380", "g/kWh"]),
        ({"confidence": 0.3}, ["confidence"]),
    ],
)
def test_bad_input_is_one_line_with_its_place(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        ask(tmp_path, **changes)
    assert "plan.yaml:" in str(caught.value)
    for word in words:
        assert word in str(caught.value)
