"""What a plan says of itself beside its price: runners-up with proof, unkept promises with numbers, what was replayed and what not."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_files import BOTH, CHOICES, ask, busy, cost, write
from small_plans import program_parts, write_plan

from perfmodel.errors import Infeasible
from perfmodel.planner import constraints, search, solver, what_if
from perfmodel.planner.greedy import share
from perfmodel.planner.pools import pool_of
from perfmodel.planner.program import Question
from perfmodel.planner.run import PlanRun
from perfmodel.planner.verify import broken, replay

TWO = [{"node": "l40s-server-4", "price": "4 USD/h"}, {"node": "hgx-a100-8", "price": "12 USD/h"}]
WIDER = {"tp": [1, 2, 4], "buckets": 1}


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> PlanRun:
    return ask(tmp_path_factory.mktemp("explained"), explain=True, fleet=TWO, choices=WIDER, replay_all=True)


def runners(run: PlanRun) -> list[dict[str, Any]]:
    return [a for a in run.data["alternatives"] if a["name"].startswith("runner-up")]


def test_runners_up_come_in_order_with_their_own_bounds(explained: PlanRun) -> None:
    found = runners(explained)
    assert len(found) == 3
    values = [a["objective"] for a in found]
    assert values == sorted(values)
    for a in found:
        assert a["bound"] <= a["objective"] * (1 + 1e-9)
        assert a["gap"] == pytest.approx((a["objective"] - a["bound"]) / a["objective"], abs=1e-9)
        assert a["proven"] == (a["gap"] <= 5e-3 * 1.01)
        assert a["proven"] or "not proven" in a["reason"]


def test_the_first_runner_up_is_the_best_without_one_main_layout(explained: PlanRun) -> None:
    # By hand: leave out each main layout of the plan in turn, and take the cheapest of what is left.
    p = explained.plans[0]
    devices: dict[Any, float] = {}
    for pool in p.pools:
        devices[pool.column.layout] = devices.get(pool.column.layout, 0.0) + pool.devices
    mains = [x for x, n in devices.items() if n >= 0.1 * sum(devices.values())]
    values = []
    for layout in mains:
        columns = p.found.select(lambda c, x=layout: c.layout != x, by_layout=True)
        asked = Question.single(columns, p.offers, p.found.rates, "cost")
        values.append(solver.solve(constraints.build(asked).problem, gap=1e-6).objective)
    assert runners(explained)[0]["objective"] == pytest.approx(min(values), rel=5e-3)


def test_a_start_changes_nothing_but_the_time(tmp_path: Path) -> None:
    # One column: as many instances as its scarcest resource needs, on whole nodes.
    columns, fleet, rates, objective = program_parts(write_plan(tmp_path), 1)
    one = next(c for c in columns if len(c.buckets) == len(rates))
    instances = math.ceil(sum(r * share(one, k) for k, r in enumerate(rates)) - 1e-9)
    by_hand = math.ceil(instances / (one.offer.devices // one.layout.devices)) * (one.offer.price or 0.0) * 3600
    asked = Question.single([one], fleet, rates, objective)
    for begin in ({}, {"n_0": instances + 0.0}, {"n_0": -7.0}, {"n_0": instances + 1.0, "N_0_0_0": 99.0}):
        found = solver.solve(constraints.build(asked).problem, gap=1e-6, begin=begin)
        assert found.objective == pytest.approx(by_hand, rel=1e-5), begin


def test_everything_is_replayed_on_request_and_said_so_otherwise(explained: PlanRun, tmp_path: Path) -> None:
    d = explained.data
    for a in d["alternatives"]:
        assert ("replayed" in a) == (a["objective"] is not None)
    assert all("replayed" in x for x in d["what_if"]["limits"] if x["objective"] is not None)
    assert "not: add --replay-all" not in explained.text()
    # The chosen plan under another name keeps what that keeps.
    one = ask(tmp_path, explain=True, replay_all=True).data["alternatives"]
    chosen = next(a for a in one if a["name"] == "only l40s-server-4")
    assert chosen["replayed"] == {"kept": True, "missed": []}
    plain = ask(tmp_path, explain=True, fleet=TWO, choices=CHOICES)
    assert plain.text().count("add --replay-all") == 1
    assert not any("replayed" in a for a in plain.data["alternatives"])


def test_limits_are_loosened_over_all_layouts_unless_time_is_short(
    explained: PlanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for x in explained.data["what_if"]["limits"]:
        assert not x["restricted"]
        goals = {m: dict(limits) for m, limits in BOTH.items()}
        goals[x["metric"]][x["percentile"]] = f"{x['looser_s']} s"
        again = ask(tmp_path, goals, fleet=TWO, choices=WIDER)
        assert x["objective"] == pytest.approx(again.data["objective_value"], rel=5e-3)
    monkeypatch.setattr(what_if, "BUDGET_S", -1.0)
    short = ask(tmp_path, explain=True, fleet=TWO, choices=WIDER)
    for full, near in zip(explained.data["what_if"]["limits"], short.data["what_if"]["limits"], strict=True):
        assert near["restricted"]
        # Fewer columns are raised, so it saves no more.
        assert near["objective"] >= full["objective"] * (1 - 5e-3)
    assert "over the layouts nearest to the plan" in short.text()


def test_rounds_without_a_plan_say_by_how_much_and_what_would_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten seconds at 40 requests/s, then ninety at 0.6: gaps vary no more than the closed forms allow, but they do not see that
    # one short gap follows another for so long.
    rng = np.random.default_rng(4)
    busy_gaps, calm_gaps = (rng.exponential(1 / r, (3, n)) for r, n in ((40.0, 400), (0.6, 54)))
    arrival = np.cumsum(np.concatenate([busy_gaps, calm_gaps], axis=1).ravel())
    write(tmp_path, ((round(float(a), 4), 1500, 60) for a in arrival))
    monkeypatch.setattr(search, "ROUNDS", 1)
    monkeypatch.setattr(search, "_FAR_OFF", math.inf)
    goals = {"ttft": {"p95": "500 ms"}}
    with pytest.raises(Infeasible) as caught:
        ask(tmp_path, goals, trace={}, rate="mean")
    reason, nearest = caught.value.reason, str(caught.value.nearest)
    measured = re.search(r"TTFT p95 ([\d,]+) ms in the worst window, limit 500 ms", reason)
    assert measured
    seen = int(measured[1].replace(",", ""))
    wanted = re.search(r"TTFT p95 of ([\d,]+) ms", nearest)
    assert wanted
    limit = int(wanted[1].replace(",", ""))
    assert 500 < seen <= limit <= 1.06 * seen + 1
    assert caught.value.binding == ("ttft.p95",)
    monkeypatch.undo()
    assert ask(tmp_path, {"ttft": {"p95": f"{limit} ms"}}, trace={}, rate="mean").data["pools"]
    rate = re.search(r"a rate of ([\d.]+) requests/s", nearest)
    assert rate
    assert float(rate[1]) < arrival.size / float(arrival[-1])


def test_spot_prices_do_not_keep_more_columns_than_there_are(tmp_path: Path) -> None:
    terms = {"on-demand": {"price": "4 USD/h"}, "spot": {"price": "1 USD/h", "interruptions": "0.5 /h"}}
    startup = {"provisioning": "3 min", "weights": "2 GB/s", "engine_init": "60 s"}
    run = ask(tmp_path, fleet=[{"node": "l40s-server-4", "terms": terms}], startup=startup, choices=WIDER)
    kept, every = (int(x) for x in re.findall(r"(\d+) columns kept of (\d+)", run.data["optimal_over"])[0])
    assert kept == len(run.plans[0].columns)
    assert kept <= every
    # Every layout that holds the model, on each of both terms.
    assert every == 2 * len(run.plans[0].found.found["l40s-server-4"].columns)
    gentle = ask(tmp_path, fleet=TWO, objective="latency", limits={"budget": "60 USD/h"})
    kept, every = (int(x) for x in re.findall(r"(\d+) columns kept of (\d+)", gentle.data["optimal_over"])[0])
    assert kept <= every < len(gentle.plans[0].columns)
    assert f"at {len(gentle.plans[0].columns)} operating points" in gentle.data["optimal_over"]


def test_a_fixed_fleet_costs_the_same_every_hour(tmp_path: Path) -> None:
    plain = ask(tmp_path)
    fixed = ask(tmp_path, profile={"hours": [[8, 0.2], [8, 1.0], [8, 0.5]]})
    # One fleet for the highest load, paid for 24 hours: the price of an hour is that of the peak's fleet.
    assert cost(fixed) == cost(plain)
    # The day serves (0.2 + 1 + 0.5)/3 of what 24 hours at the highest load would.
    mean = (0.2 + 1.0 + 0.5) / 3
    assert fixed.data["fixed_fleet"] == {"highest_multiple": 1.0, "mean_over_highest": pytest.approx(mean)}
    tokens = 60 * 256 * 3600 * mean
    assert fixed.data["usd_per_million_output_tokens"] == pytest.approx(cost(fixed) / tokens * 1e6)
    assert "paid all day" in fixed.text()
    assert "paid all day" not in plain.text()


def test_certainty_of_an_elastic_fleet_is_that_of_its_worst_period(tmp_path: Path) -> None:
    startup = {"provisioning": "3 min", "weights": "2 GB/s", "engine_init": "60 s"}
    profile = {"hours": [[12, 1.0], [12, 0.4]], "fleet": "elastic"}
    run = ask(tmp_path, explain=True, profile=profile, startup=startup, confidence=0.8)
    sure = run.data["what_if"]["certainty"]
    assert len(run.data["periods"]) == 2
    # Planned at the 80 % band in both periods; whole nodes only add to it.
    assert 0.8 - 0.01 <= sure["joint_confidence"] <= 1
    assert sure["expected"]["joint_confidence"] <= sure["joint_confidence"]
    assert sure["price_of_certainty"] >= 0
    expected = ask(tmp_path, profile=profile, startup=startup)
    assert sure["expected"]["objective"] == pytest.approx(cost(expected), rel=5e-3)


def bursty(folder: Path, size: int = 90, seed: int = 2) -> None:
    """Bursts of one to `size` requests within a tenth of a second, eight seconds apart, of mixed prompts: dispersion above 20."""
    rng = np.random.default_rng(seed)
    sizes = itertools.accumulate([0, *rng.integers(1, size, 40).tolist()])
    edges = list(sizes)
    arrival = np.concatenate([8.0 * i + np.sort(rng.uniform(0, 0.1, b - a)) for i, (a, b) in enumerate(itertools.pairwise(edges))])
    inputs = rng.integers(100, 3500, arrival.size)
    write(folder, zip(arrival.round(4), inputs, rng.integers(5, 60, arrival.size), strict=True))


@pytest.fixture(scope="module")
def by_buckets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, PlanRun]:
    folder = tmp_path_factory.mktemp("bursts")
    bursty(folder)
    goals = {"ttft": {"p95": "1500 ms"}, "tpot": {"p95": "60 ms"}}
    return {n: ask(folder, goals, trace={}, rate="mean", choices={"tp": [1, 2], "buckets": n}) for n in (1, 2)}


def test_more_buckets_cost_no_more_in_bursts(by_buckets: dict[int, PlanRun]) -> None:
    costs = [cost(r) for r in by_buckets.values()]
    assert costs == sorted(costs, reverse=True)
    for run in by_buckets.values():
        assert run.data["workload"]["beyond_closed_forms"]
        assert "heuristic: bursts beyond the closed forms" in run.text()
        assert run.data["rounds"][-1]["missed"] == []


def test_the_rate_of_a_bursty_column_is_the_highest_that_replay_keeps(by_buckets: dict[int, PlanRun]) -> None:
    # By hand: one pool of the plan's layout with all requests, counted up until every promise is kept.
    p = by_buckets[1].plans[0]
    pool = p.pools[0]
    s = p.found

    def keeps(n: int) -> bool:
        seen = replay([pool_of(pool.column, n, np.array(s.rates), s.buckets)], s.workload, s.buckets, 1, s.choices)
        return not broken(seen, s.objectives)

    fewest = next(n for n in range(1, 400) if keeps(n))
    column = next(c for c in s.columns.values() if c.layout == pool.column.layout)
    assert (len(p.pools), len(by_buckets[1].data["rounds"])) == (1, 1)  # else other requests decide the rate
    assert 1 / fewest - 1e-9 <= column.state.rate / s.workload.rate <= 1 / max(fewest - 1, 0.5)
    assert busy(by_buckets[1]) > 0


def rates(found: search.Found) -> dict[Any, float]:
    return {k: c.state.rate for s in found.fleet.services for e in s.found.values() for k, c in e.columns.items()}


def pessimistic(planned: PlanRun, factor: float, *, measured: bool) -> search.Found:
    """The search of a plan's own question, its columns lowered first by a factor, as closed forms that promise too little."""
    fleet = planned.plans[0].fleet.with_()
    for s in fleet.services:
        for c in [c for e in s.found.values() for c in e.columns.values()]:
            s.tighten(c, factor)
    return search.search(fleet, measured=measured)


def test_rates_measured_by_replay_find_what_timid_closed_forms_miss(tmp_path: Path) -> None:
    planned = ask(tmp_path, rate="200 /s")
    timid, measured = (pessimistic(planned, 0.5, measured=m) for m in (False, True))
    assert timid.objective > 1.5 * cost(planned)
    assert measured.objective <= 1.1 * cost(planned)
    assert not measured.rounds[-1]["missed"]
    assert "replay carries more" in measured.heuristic
    assert not timid.heuristic


def test_a_plan_that_measured_rates_do_not_improve_stays_as_it_was(tmp_path: Path) -> None:
    planned = ask(tmp_path, rate="10 /s")  # one node, which no rates can halve
    before, after = (pessimistic(planned, 1.0, measured=m) for m in (False, True))
    assert after.objective == before.objective
    assert rates(after) == rates(before)
    assert not after.heuristic
