"""The replay that holds a plan to its promises: thinning, windows, preemption and the front end, each against counting by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from plan_files import BOTH, ask, poisson, write

from perfmodel.planner import verify
from perfmodel.planner.run import PlanRun
from perfmodel.serving import frontend
from perfmodel.serving.requests import Requests
from perfmodel.spec.workload import Objectives


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> PlanRun:
    """Eight instances of one pool, and 6,000 requests of mixed lengths."""
    folder = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(9)
    write(folder, zip(poisson(6000, 30.0), rng.integers(100, 2000, 6000), rng.integers(20, 300, 6000), strict=True))
    return ask(folder, trace={}, rate="mean")


def again(run: PlanRun, replicas: int, **changes: Any) -> list[verify.Replayed]:
    """The plan's pool with so many instances, replayed on a workload changed as told."""
    p = run.plans[0]
    workload = replace(p.workload, **changes)
    return verify.replay([replace(p.pools[0], replicas=replicas)], workload, p.buckets, 1, p.fleet.choices)


def test_thinning_by_a_common_factor_keeps_percentiles(planned: PlanRun, monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = 4 * (planned.plans[0].pools[0].replicas // 4)
    full = again(planned, replicas)[0]
    monkeypatch.setattr(verify, "MOST_REPLAYED", 1500)
    thin = again(planned, replicas)[0]
    assert (full.weight, thin.weight) == (1.0, 4.0)
    assert thin.whole.ttft.size == 1500
    assert len({*thin.whole.instance.tolist()}) == replicas // 4
    for share in (0.5, 0.95):
        for metric in ("ttft", "tpot"):
            a, b = (float(np.nanquantile(getattr(x.whole, metric), share)) for x in (full, thin))
            assert b == pytest.approx(a, rel=0.12), (metric, share)


def test_an_indivisible_fleet_is_cut_to_its_busiest_part(planned: PlanRun, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = planned.plans[0].workload.requests
    monkeypatch.setattr(verify, "MOST_REPLAYED", 1000)
    seen = again(planned, 7)[0].whole
    arrival = np.asarray(requests.arrival)
    # By hand: the thousand requests in a row that come in the shortest time.
    lasting = [arrival[i + 999] - arrival[i] for i in range(arrival.size - 999)]
    first = int(np.argmin(lasting))
    assert seen.arrival.size == 1000
    assert seen.input.tolist() == requests.input[first : first + 1000].tolist()


def test_a_promise_must_hold_in_the_worst_window(planned: PlanRun) -> None:
    # 40 minutes at 4/s with five at 24/s in between: a third of the requests. The median over the whole trace does not see
    # them, that of the worst window does.
    quiet, busy = np.arange(0, 2400, 0.25), 1200 + np.arange(0, 300, 1 / 20)
    arrival = np.sort(np.concatenate([quiet, busy]))
    requests = Requests(arrival, np.full(arrival.size, 1500.0), np.full(arrival.size, 40.0))
    result = again(planned, 2, requests=requests)
    o = result[0].whole
    # Windows of five minutes start every two and a half.
    windows = [o.ttft[(o.arrival >= t) & (o.arrival < t + 300)] for t in np.arange(0, 2100, 150)]
    by_hand = max(float(np.median(w)) for w in windows)
    worst = verify.replayed_percentile(result, "ttft", 0.5, 300.0)
    assert worst == pytest.approx(by_hand, rel=0.02)
    limit = (float(np.median(o.ttft)) + worst) / 2
    assert worst > 1.5 * float(np.median(o.ttft))
    goals = {"ttft": {"p50": f"{limit} s"}}
    assert verify.broken(result, Objectives.model_validate({**goals, "window": "300 s"}))
    assert not verify.broken(result, Objectives.model_validate({**goals, "window": "1000 h"}))


def test_a_preempted_request_is_a_miss(planned: PlanRun) -> None:
    p = planned.plans[0]
    pool, column = p.pools[0], p.pools[0].column
    # A cache for about two of the longest requests: growing answers push each other out.
    case = replace(column.case, instance=replace(column.case.instance, kv_tokens=4600.0))
    small = replace(pool, column=replace(column, case=case), replicas=40)
    few = replace(p.workload, requests=p.workload.requests.take(slice(0, 1500)))
    result = verify.replay([small], few, p.buckets, 1, p.fleet.choices)
    o = result[0].whole
    preempted = o.preemptions > 0
    assert preempted.any()
    within = o.met(ttft=1e9, tpot=1e9)
    assert not within[preempted].any()
    assert within[~preempted & ~o.rejected].all()
    share = float(within.mean())
    # Limits that no time breaks are broken by the preempted alone.
    goals = {"attainment": {"share": min(share + 0.01, 0.999), "ttft": "1000 h", "tpot": "1000 h"}, "window": "1000 h"}
    assert {what for _, what in verify.broken(result, Objectives.model_validate(goals))} == {"attainment"}


def test_the_front_end_is_part_of_ttft(planned: PlanRun, monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = planned.plans[0].pools[0].replicas
    with_it = again(planned, replicas)[0].whole
    engine = planned.plans[0].pools[0].column.estimator.engine
    alone = frontend.unloaded(engine, with_it.input)
    assert np.all(alone > 0)
    monkeypatch.setattr(frontend, "unloaded", lambda engine, tokens: np.zeros(np.shape(tokens)))
    without = again(planned, replicas)[0].whole
    assert np.mean(with_it.ttft - without.ttft) == pytest.approx(float(alone.mean()), rel=0.3)


def test_the_plan_kept_what_it_promised(planned: PlanRun) -> None:
    assert planned.data["rounds"][-1]["missed"] == []
    assert not verify.broken(planned.plans[0].replayed, Objectives.model_validate(BOTH))
    impossible = {"ttft": {"p50": "1 ms"}, "itl": {"p50": "1 ms"}, "e2e": {"p50": "1 ms"}, "longest_gap": {"p50": "1 ms"}}
    missed = {what for _, what in verify.broken(planned.plans[0].replayed, Objectives.model_validate(impossible))}
    assert missed == {"ttft p50", "itl p50", "e2e p50", "longest_gap p50"}
