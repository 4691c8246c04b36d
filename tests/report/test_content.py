"""Numbers and plots of a page against the run's data, the roofline law and arithmetic by hand."""

from __future__ import annotations

import math
import re
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfmodel import graph, prices, roofline, schedule
from perfmodel.ops.shard import Group
from perfmodel.planner.run import Plan, PlanRun
from perfmodel.report import page, series, tables

SECONDS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


def seconds(cell: str) -> float:
    """Read a printed time back."""
    value, unit = cell.split()
    return float(value.replace(",", "")) * SECONDS[unit]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_percentiles_are_the_plans(run: PlanRun, shown: Any) -> None:
    for i, p in enumerate(run.plans):
        rows = shown.tables["Latency: closed form and replay against the limits" + "+" * i][1:]
        assert len(rows) == len(p.data["percentiles"]) == 4
        for row, check in zip(rows, p.data["percentiles"], strict=True):
            assert row[0] == f"{check['metric'].upper()} {check['percentile']}"
            assert seconds(row[2]) == pytest.approx(check["promised_s"], rel=0.006)
            assert seconds(row[3]) == pytest.approx(check["replayed_s"], rel=0.006)
            assert seconds(row[4]) == pytest.approx(check["worst_s"], rel=0.006)
            if check["limit_s"] is None:
                assert row[1] == "–"
            else:
                assert seconds(row[1]) == check["limit_s"]
                assert row[6] == "PASS"


@pytest.mark.parametrize(
    ("promised", "replayed", "limit", "text", "mark"),
    [
        (1.0, 1.0, 1.0, "PASS", "pass"),
        (1.1, 0.9, 1.0, "PASS in replay, closed form above", "warn"),
        (0.9, 1.1, 1.0, "FAIL in replay", "fail"),
        (1.1, 1.1, 1.0, "FAIL", "fail"),
        (1.1, 1.1, None, "no limit", ""),
        (None, 0.9, 1.0, "PASS", "pass"),
        (None, 1.1, 1.0, "FAIL in replay", "fail"),
    ],
)
def test_verdicts_are_words(promised: float | None, replayed: float, limit: float | None, text: str, mark: str) -> None:
    cell = tables.verdict({"promised_s": promised, "replayed_s": 0.5, "worst_s": replayed, "limit_s": limit})
    assert (cell.text, cell.mark) == (text, mark)


def test_money_nodes_and_pools_are_the_plans(run: PlanRun, shown: Any) -> None:
    for i, p in enumerate(run.plans):
        d, more = p.data, "+" * i
        assert f"{d['cost_usd_per_hour']:,.2f} USD/h" in shown.text
        assert f"{d['cost_usd_per_hour'] * 720:,.0f} USD in 30 days" in shown.text  # 30 x 24 h
        for row, node in zip(shown.tables["Nodes to buy or rent" + more][1:], d["nodes"], strict=True):
            assert row[0] == node["node"]
            assert [number(c) for c in row[3:8]] == pytest.approx(
                [node["count"], node["devices"], node["max_nodes"], node["price_usd_per_hour"], node["price_usd_per_hour"] * node["count"]]
            )
            assert row[1:3] == ["–", "on-demand"]
            assert row[8] == "the plan file"
        for row, pool in zip(shown.tables["Pools" + more][1:], d["pools"], strict=True):
            assert row[1] == f"{pool['replicas']} × {pool['role']}"
            assert row[3] == pool["hardware"]
            assert number(row[6]) == pytest.approx(pool["requests_per_s"], rel=1e-3)


def test_prices_unknown_are_dashes(run: PlanRun, tmp_path: Path, read: Any) -> None:
    data = deepcopy(run.plans[0].data)
    data |= {"cost_usd_per_hour": None, "usd_per_million_output_tokens": None, "power_w": None}
    data["nodes"][0] |= {"price_usd_per_hour": None, "price_source": "no price", "max_nodes": None}
    shown = read(page.write(replace(run, plans=[replace(run.plans[0], data=data)]), tmp_path))
    assert "no price known" in shown.text
    assert shown.tables["Nodes to buy or rent"][1][5:8] == ["–", "–", "–"]


def test_an_old_price_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(node: str) -> prices.NodePrice:
        warnings.warn("price of x is 400 days old (2025-01-01)", prices.StalePrice, 2)
        return prices.NodePrice(0.01, "list x, 2025-01-01")

    monkeypatch.setattr(prices, "on_demand", asked)
    assert tables.stale_price("hgx-h100-8", "list x, 2025-01-01") == "price of x is 400 days old (2025-01-01)"
    # The user's own price does not age.
    assert tables.stale_price("hgx-h100-8", "the plan file") == ""


def lowered(p: Plan, is_decode: bool) -> tuple[Any, Any]:
    """Estimator and the phase a step of the first pool stands for, built here from the pool's state and mix."""
    pool = p.pools[0]
    e = pool.column.estimator
    if is_decode:
        context = round(pool.mix.context)
        return e, graph.Phase((Group(float(max(1, round(pool.state.batch))), 1.0, float(context - 1), decode=True),))
    return e, graph.Phase((Group(1.0, 2000.0, 0.0),))  # every prompt has 2,000 tokens, below the chunk


@pytest.mark.parametrize("is_decode", [False, True])
def test_roofline_points_are_the_law(run: PlanRun, shown: Any, is_decode: bool) -> None:
    """x = FLOPs over bytes of device memory, y = FLOPs over seconds, straight from the operators and op_cost."""
    e, phase = lowered(run.plans[0], is_decode)
    x, y = [], []
    for op, _, _ in schedule.operators(e.lower(phase).schedule):
        flops = sum(float(v) for unit, v in op.flops.items() if unit not in ("vector", "exp"))
        if flops:
            x.append(flops / float(op.bytes()))
            y.append(flops / float(roofline.op_cost(op, e.machine).seconds) / 1e12)
    name = "A decode" if is_decode else "A prefill"
    trace = next(t for t in shown.chart("load-1-roofline")["data"] if t.get("name") == name)
    assert trace["x"] == pytest.approx(x, rel=1e-5)
    assert trace["y"] == pytest.approx(y, rel=1e-5)


def test_roofs_are_the_datasheets(split_shown: Any) -> None:
    """H100 SXM: 3.35 TB/s and 989 TFLOP/s in bf16, so the ridge is 989/3.35 = 295 FLOP/byte."""
    figure = split_shown.chart("load-1-roofline")
    roof = next(t for t in figure["data"] if "bf16 roof" in t["name"])
    (x0, bend, x1), (y0, flat, y1) = roof["x"], roof["y"]
    assert y0 / x0 == pytest.approx(3.35, rel=1e-3)
    assert flat == y1 == pytest.approx(989, rel=1e-3)
    assert bend == pytest.approx(295, rel=2e-3)
    assert x0 < bend < x1
    assert any("bf16 989 TFLOP/s, ridge 295" in n["text"] for n in figure["layout"]["annotations"])
    # Nothing is faster than its roof.
    for trace in figure["data"]:
        if trace["mode"] == "markers":
            for x, y in zip(trace["x"], trace["y"], strict=True):
                assert y <= min(989, 3.35 * x)


def test_breakdowns_add_up_to_the_step(run: PlanRun, split: PlanRun) -> None:
    for p in (*run.plans, *split.plans):
        for s in series.steps(p.pools):
            e = p.pools[s.pool].column.estimator
            whole = float(e.decode(s.batch, s.context + 1) if s.is_decode else e.prefill(s.batch, s.new))
            for parts in (series.by_group(s), series.by_resource(s)):
                assert sum(parts.values()) == pytest.approx(whole, rel=1e-9)
                assert min(parts.values()) >= 0


def test_breakdown_bars_reach_one(shown: Any) -> None:
    for nth in (0, 1):
        bars = shown.chart("load-1-breakdown", nth)["data"]
        assert np.sum([t["x"] for t in bars], axis=0) == pytest.approx([1.0, 1.0], rel=1e-5)


def test_memory_is_weights_by_hand_and_fills_the_device(split: PlanRun, split_shown: Any) -> None:
    """Llama 3.1 8B in bf16: 8.03 billion parameters x 2 byte = 16.06 GB; the H100's driver shows 85.5 GB.

    vLLM also keeps cosines and sines of 131,072 positions x 64 frequencies in bf16: 33.6 MB.
    """
    bars = {t["name"]: t["x"] for t in split_shown.chart("load-1-memory")["data"]}
    assert bars["weights"] == pytest.approx([16.0605 + 0.0336] * 2, rel=1e-4)
    assert np.sum(list(bars.values()), axis=0) == pytest.approx([85.5, 85.5], rel=2e-3)
    shares = [p.state.kv_share for p in split.plans[0].pools]
    used, free = bars["keys and values in use (mean + 2σ)"], bars["free for keys and values"]
    assert [u / (u + f) for u, f in zip(used, free, strict=True)] == pytest.approx(shares, rel=1e-4)


def test_circles_are_the_pools_operating_points(run: PlanRun, shown: Any) -> None:
    """6 USD/h for eight L40S is 0.75 USD/h each: r requests/s on one device are 3600 r/0.75 requests per USD."""
    for p, load in zip(run.plans, ("1", "4"), strict=True):
        pool = p.data["pools"][0]
        assert (pool["hardware"], pool["tp"]) == ("l40s-server-8", 1)
        trace = next(t for t in shown.chart(f"load-{load}-frontier")["data"] if t["name"] == "pool A")
        assert trace["y"] == pytest.approx([pool["requests_per_s"] / pool["replicas"] * 3600 / 0.75], rel=1e-4)
        x = p.pools[0]
        assert trace["x"] == pytest.approx([x.column.instance.tpot_quantile(0.95, x.state, x.mix, 1 / x.replicas)], rel=1e-4)


def test_curves_follow_the_closed_form(run: PlanRun) -> None:
    """Bisection to a percent, against the exact inversion."""
    p = run.plans[0]
    curves = series.curves(p.peak[0].service, "cost")
    assert {c.layout for c in curves} == {x for x, b in p.found.built.items() if not isinstance(b, str)}
    c = next(c for c in curves if c.layout == p.pools[0].column.layout)
    instance, mix = p.pools[0].column.instance, p.pools[0].mix
    for q in c.points[:: max(1, len(c.points) // 4)]:
        s = instance.state(q.rate, mix)
        assert s.feasible
        dealt = math.floor(p.workload.rate / q.rate)  # Poisson arrivals dealt in turn to so many instances
        assert q.tpot == pytest.approx(instance.tpot_quantile(0.95, s, mix, 1 / max(1, dealt)), rel=0.015)
    worths = [q.worth for q in c.points]
    assert max(worths) / min(worths) > 10


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 7.0), (1.0, 3.0), (4.0, 7.0), (5.0, 8.0)]
    assert series.front(points) == [(1.0, 5.0), (3.0, 7.0), (5.0, 8.0)]


def test_cumulative_weighs_requests() -> None:
    """Values 1 and 3 stand for one request each, 2 for two: shares 1/4, 3/4, 1."""
    x, y = series.cumulative([(np.array([1.0, 3.0]), 1.0), (np.array([2.0]), 2.0)])
    assert x == [1.0, 2.0, 3.0]
    assert y == [0.25, 0.75, 1.0]


def test_thinning_keeps_the_distribution() -> None:
    values = np.random.default_rng(3).exponential(1.0, 20_000)
    x, y = series.cumulative([(np.sort(values), 1.0)])
    assert len(x) <= 300
    assert x[-1] == values.max()
    assert y[-1] == pytest.approx(1.0)
    # An exponential law reaches 95% at ln 20.
    assert float(np.interp(0.95, y, x)) == pytest.approx(math.log(20), rel=0.03)


def test_distributions_pass_through_the_percentiles(run: PlanRun, shown: Any) -> None:
    for metric, nth in (("ttft", 0), ("tpot", 1)):
        figure = shown.chart("load-1-replay", nth)
        curves = {t["name"]: t for t in figure["data"]}
        for check in (c for c in run.plans[0].data["percentiles"] if c["metric"] == metric):
            share = float(check["percentile"][1:]) / 100
            for name, key, tolerance in (("replayed", "replayed_s", 0.02), ("closed form", "promised_s", 1e-4)):
                trace = curves[f"all requests, {name}"]
                assert float(np.interp(share, trace["y"], trace["x"])) == pytest.approx(check[key], rel=tolerance)
        limit = 2.0 if metric == "ttft" else 0.06
        assert any(s["x0"] == s["x1"] == limit for s in figure["layout"]["shapes"])


def test_arrivals_and_lengths_count_every_request(run: PlanRun, shown: Any) -> None:
    w = run.plans[0].workload
    starts, rates = series.arrivals(w, 25)
    assert float(np.sum(rates) * (starts[1] - starts[0])) == pytest.approx(len(w.requests))
    for trace in shown.chart("load-1-workload", 1)["data"]:
        assert sum(trace["y"]) == pytest.approx(1.0, abs=1e-4)


def test_alternatives_are_sorted_and_complete(run: PlanRun, shown: Any) -> None:
    d = run.plans[0].data
    rows = shown.tables["Alternatives, each solved anew"][1:]
    assert {r[0] for r in rows} == {a["name"] for a in d["alternatives"]}
    costs = [number(r[1]) for r in rows if r[1] != "cannot"]
    assert costs == sorted(costs)
    assert costs[0] >= d["cost_usd_per_hour"]
    bars = shown.chart("load-1-why")["data"][0]["x"]
    assert bars == [d["objective_value"], *costs]
    for a in d["alternatives"]:
        assert a["reason"] in shown.text


def test_proof_rounds_and_refusals_are_the_plans(run: PlanRun, shown: Any) -> None:
    for i, p in enumerate(run.plans):
        assert len(shown.tables["Rounds of plan and replay" + "+" * i]) == 1 + len(p.data["rounds"])
        assert p.data["optimal_over"] in shown.text
        for row in p.data["binding"]:
            assert row["text"] in shown.text
        refused = shown.tables.get("Layouts refused before the integer program" + "+" * i, [[]])[1:]
        assert {r[0] for r in refused} == {r["layout"] for r in p.data["rejected"]}


def test_error_bands_are_the_estimators(run: PlanRun, shown: Any) -> None:
    row = shown.tables["Steps, their error bands and what the bands come from"][1]
    e, _ = lowered(run.plans[0], False)
    parts = e.parts(1, 2000, 0, is_decode=False)
    assert seconds(row[1]) == pytest.approx(parts.seconds, rel=0.006)
    low, high = (seconds(x) for x in row[2].split("–"))
    assert low <= seconds(row[1]) <= high
    assert math.log(high / low) == pytest.approx(2 * 1.2816 * parts.sigma, rel=0.02)
    assert re.match(r"[a-z_]+ \([+-]\d", row[5])


def test_another_state_makes_other_plots(run: PlanRun, shown: Any, tmp_path: Path, read: Any) -> None:
    """Twice the batch and cache and times in a pool must show in every chart that claims to show them."""
    p = run.plans[0]
    pool = p.pools[0]
    state = replace(pool.state, batch=pool.state.batch * 2, kv_share=pool.state.kv_share * 2)
    other = replace(pool, state=state)
    whole = p.replayed[0].whole
    slower = replace(p.replayed[0], pool=other, whole=replace(whole, ttft=whole.ttft * 2, tpot=whole.tpot * 2))
    changed = read(page.write(replace(run, plans=[replace(p, peak=[replace(p.peak[0], pools=[other], replayed=[slower])])]), tmp_path))

    def trace(s: Any, chart: str, nth: int, name: str) -> Any:
        return next(t for t in s.chart(f"load-1-{chart}", nth)["data"] if t["name"] == name)

    used = "keys and values in use (mean + 2σ)"
    assert trace(changed, "memory", 0, used)["x"][0] == pytest.approx(2 * trace(shown, "memory", 0, used)["x"][0], rel=1e-4)
    for nth in (0, 1):
        before, after = (trace(s, "replay", nth, "all requests, replayed")["x"] for s in (shown, changed))
        assert after == pytest.approx([2 * x for x in before], rel=1e-4)
    before, after = (trace(s, "roofline", 0, "A decode") for s in (shown, changed))
    place = {name: next(i for i, t in enumerate(before["hovertext"]) if f"<b>{name}</b>" in t) for name in ("gate_up_proj", "attention")}
    # A product reads the same weights for twice the sequences: nearly twice the intensity.
    assert 1.5 < after["x"][place["gate_up_proj"]] / before["x"][place["gate_up_proj"]] <= 2.0
    # Attention reads keys and values for each: 4 query heads a KV head x 4 d FLOP over 2 x 2 d byte = 4, whatever the batch.
    for figure in (before, after):
        assert figure["x"][place["attention"]] == pytest.approx(4.0, rel=0.01)
    assert trace(changed, "breakdown", 0, "attention")["x"][1] > trace(shown, "breakdown", 0, "attention")["x"][1]
    assert trace(changed, "frontier", 0, "pool A")["x"] != trace(shown, "frontier", 0, "pool A")["x"]
