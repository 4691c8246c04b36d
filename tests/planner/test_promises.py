"""Every kind of promise binds when it is tightened, the replay keeps it, and one nobody can keep names what could be kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_files import BOTH, CHOICES, ask, busy, poisson, write

from perfmodel.errors import Infeasible
from perfmodel.planner.run import PlanRun

A100 = [{"node": "hgx-a100-8", "price": "12 USD/h"}]
APART = {"tp": [1], "buckets": 1, "roles": ["prefill", "decode"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PlanRun:
    return ask(tmp_path_factory.mktemp("base"))


def whole(run: PlanRun) -> Any:
    """What the replay saw of all requests."""
    return run.plans[0].replayed[0].whole


def share_in_worst_window(run: PlanRun, good: np.ndarray, window: float = 300.0) -> float:
    """By hand: the least share of good requests among those that arrive in [k w/4, k w/4 + w)."""
    o = whole(run)
    arrival = o.arrival - o.arrival.min()
    starts = np.arange(0.0, max(arrival.max() - window, 0.0) + 1e-9, window / 4)
    return min(float(good[(arrival >= t) & (arrival < t + window)].mean()) for t in starts)


@pytest.mark.parametrize(
    ("more", "limit"),
    [
        ({"itl": {"p99": "40 ms"}}, ("itl", 0.99, 0.040)),
        ({"longest_gap": {"p50": "99 ms"}}, ("gap", 0.5, 0.099)),
        ({"e2e": {"p95": "8.5 s"}}, ("e2e", 0.95, 8.5)),
        ({"ttft": {"p99": "0.02 s + 0.09 ms/token"}}, ("ttft", 0.99, 0.02 + 0.09e-3 * 1024)),
        ({"attainment": {"share": 0.99, "ttft": "200 ms", "tpot": "33 ms"}}, ("joint", 0.99, 0.0)),
    ],
    ids=["itl", "longest_gap", "e2e", "ttft growing with the input", "attainment"],
)
def test_a_tight_promise_costs_and_is_kept(more: dict[str, Any], limit: tuple[str, float, float], base: PlanRun, tmp_path: Path) -> None:
    run = ask(tmp_path, {**BOTH, **more})
    assert busy(run) > busy(base)
    o, (metric, share, seconds) = whole(run), limit
    if metric == "itl":
        assert o.gaps.percentile(share) <= seconds
        return
    seen = {"gap": o.longest_gap, "e2e": o.e2e, "ttft": o.ttft, "joint": np.maximum(o.ttft / 0.2, o.tpot / 0.033) - 1}[metric]
    assert share_in_worst_window(run, seen <= seconds) >= share
    loose = whole(base)
    before = {"gap": loose.longest_gap, "e2e": loose.e2e, "ttft": loose.ttft,
              "joint": np.maximum(loose.ttft / 0.2, loose.tpot / 0.033) - 1}[metric]  # fmt: skip
    assert np.mean(before <= seconds) < share


def test_itl_by_hand(tmp_path: Path) -> None:
    # A prompt of 1,024 tokens fits one chunk, so each request makes one step longer than 40 ms for every sequence that decodes
    # when it comes. A request has 255 gaps, and 1 % allows 2.55 long ones on average. At random arrivals as many come while it
    # decodes as decode beside it on average: a batch of 2.55. Dealt to n instances in turn, requests come almost evenly, in
    # gaps of sd 1/sqrt(n): a batch B < 3 then makes two long gaps, and beyond that a third with probability
    # P(3 + sqrt(3/n) Z < B), which may be 0.55: B = 3.02 at n = 135. The plan lies between; 5 % for the closed form.
    run = ask(tmp_path, {**BOTH, "itl": {"p99": "40 ms"}})
    pool = run.plans[0].pools[0]
    assert pool.replicas > 100
    assert 0.95 * 2.55 < pool.state.batch < 1.05 * 3.02
    gaps = whole(run).gaps
    long = float(gaps.tokens[gaps.seconds > 0.04].sum() / gaps.tokens.sum())
    assert 0.9 * 2 / 255 < long <= 0.01  # the first and the last of the replay have less company


@pytest.mark.parametrize("policy", ["split", "whole"])
def test_other_policies_promise_the_same_things(policy: str, tmp_path: Path) -> None:
    choices = {**CHOICES, "policy": [policy], "prefill_share": [0.5]}
    goals = {"itl": {"p99": "60 ms"}, "attainment": {"share": 0.95, "ttft": "250 ms", "tpot": "33 ms"}, "e2e": {"p95": "8.6 s"}}
    run, loose = ask(tmp_path, goals, choices=choices), ask(tmp_path, choices=choices)
    assert busy(run) > busy(loose)
    o = whole(run)
    assert len(run.data["rounds"]) <= 4
    assert share_in_worst_window(run, (o.ttft <= 0.25) & (o.tpot <= 0.033)) >= 0.95
    assert share_in_worst_window(run, o.e2e <= 8.6) >= 0.95
    assert o.gaps.percentile(0.99) <= 0.06


def test_an_end_to_end_limit_over_a_hand_off(tmp_path: Path) -> None:
    loose = ask(tmp_path, fleet=A100, choices=APART)
    run = ask(tmp_path, {**BOTH, "e2e": {"p95": "4 s"}}, fleet=A100, choices=APART)
    assert {x.column.layout.role for x in run.plans[0].pools} == {"prefill", "decode"}
    assert busy(run) > busy(loose)
    assert share_in_worst_window(run, whole(run).e2e <= 4.0) >= 0.95
    assert np.mean(whole(loose).e2e <= 4.0) < 0.95


@pytest.mark.parametrize(
    ("goals", "binding", "metric"),
    [
        ({"itl": {"p99.9": "1 ms"}}, "itl.p99.9", "itl"),
        ({"longest_gap": {"p99": "1 ms"}}, "longest gap.p99", "longest_gap"),
        ({"e2e": {"p95": "1 ms"}}, "end to end.p95", "e2e"),
        ({"ttft": {"p99.9": "1 ms + 0.01 ms/token"}}, "ttft.p99.9", "ttft"),
        ({"attainment": {"share": 0.95, "ttft": "1 ms + 0.01 ms/token", "tpot": "1 ms"}}, "attainment", "attainment"),
    ],
)
def test_following_the_advice_works(goals: dict[str, Any], binding: str, metric: str, tmp_path: Path) -> None:
    with pytest.raises(Infeasible) as caught:
        ask(tmp_path, goals, rate="1 /s")
    assert caught.value.binding == (binding,)
    assert len(str(caught.value).splitlines()) == 2
    advice = str(caught.value.nearest)
    wanted: dict[str, Any]
    if metric == "attainment":
        found = re.search(r"TTFT (\S+ \S+ \+ \S+ \S+/token) and TPOT (\S+ \S+)", advice)
        assert found
        wanted = {"attainment": {"share": 0.95, "ttft": found[1], "tpot": found[2]}}
    else:
        found = re.search(r"of ([\d,]+) ms( \+ \S+ \S+/token)?", advice)
        assert found
        wanted = {metric: {binding.partition(".")[2]: f"{found[1].replace(',', '')} ms{found[2] or ''}"}}
    run = ask(tmp_path, wanted, rate="0.05 /s")
    assert run.data["pools"]


def test_advice_is_for_the_requests_that_are_hardest(tmp_path: Path) -> None:
    # Nine prompts in ten are short, and could be answered 40 times as fast as the long ones.
    arrival = poisson(800, 2.0)
    write(tmp_path, ((a, 8000 if k % 10 == 0 else 200, 50) for k, a in enumerate(arrival)))
    choices = {"tp": [1], "buckets": 2}
    with pytest.raises(Infeasible) as caught:
        ask(tmp_path, {"ttft": {"p95": "5 ms"}}, trace={}, rate="mean", choices=choices)
    found = re.search(r"TTFT p95 of ([\d,]+) ms", str(caught.value.nearest))
    assert found
    wanted = int(found[1].replace(",", ""))
    assert wanted > 400
    assert ask(tmp_path, {"ttft": {"p95": f"{wanted} ms"}}, trace={}, rate="0.02 /s", choices=choices).data["pools"]


def test_limits_that_grow_with_the_input_spare_short_requests(tmp_path: Path) -> None:
    # Half of the prompts are ten times as long. One limit for all is as tight for the long ones as 100 ms + 0.1 ms/token
    # only at 4,096 tokens: 0.51 s; for short ones the growing limit is the tighter, 0.14 s.
    arrival = poisson(1500, 20.0)
    write(tmp_path, ((a, 4096 if k % 2 else 400, 60) for k, a in enumerate(arrival)))
    flat = ask(tmp_path, {"ttft": {"p95": "510 ms"}}, trace={}, rate="mean")
    grows = ask(tmp_path, {"ttft": {"p95": "100 ms + 0.1 ms/token"}}, trace={}, rate="mean")
    assert busy(grows) > busy(flat)
    o = whole(grows)
    assert share_in_worst_window(grows, o.ttft <= 0.1 + 0.1e-3 * o.input) >= 0.95
    assert np.mean(o.ttft <= 0.1 + 0.1e-3 * o.input) > np.mean(whole(flat).ttft <= 0.1 + 0.1e-3 * whole(flat).input)


def test_percentiles_are_laws_and_not_multiples_of_the_mean(tmp_path: Path) -> None:
    # The same means, three spreads of prompts: p99 over p50 must follow the spread.
    ratios = []
    for spread in (0, 500, 950):
        signs = np.random.default_rng(1).permutation(np.repeat([-1, 1], 750))
        write(tmp_path, ((a, 1000 + spread * sign, 100) for a, sign in zip(poisson(1500, 10.0), signs, strict=True)))
        run = ask(tmp_path, {"ttft": {"p99": "2 s", "p50": "2 s"}}, trace={}, rate="mean")
        row = {c["percentile"]: c for c in run.data["percentiles"] if c["metric"] == "ttft"}
        ratios.append(row["p99"]["promised_s"] / row["p50"]["promised_s"])
        assert row["p99"]["promised_s"] == pytest.approx(row["p99"]["replayed_s"], rel=0.35)
    assert ratios[0] < ratios[1] < ratios[2]


def test_the_plan_follows_the_distribution_at_equal_means(tmp_path: Path) -> None:
    # 1,500 requests of 800 and 100 tokens at 25/s in the mean, every time.
    n, rate = 1500, 25.0
    goals = {"ttft": {"p99": "250 ms"}, "tpot": {"p99": "45 ms"}, "e2e": {"p99": "60 s"}}
    even = [(round(k / rate, 4), 800, 100) for k in range(n)]
    bursty = [(round(k // 25 * 1.0 + (k % 25) * 1e-3, 4), 800, 100) for k in range(n)]
    rng = np.random.default_rng(5)
    tail = rng.pareto(1.6, n)
    outputs = np.maximum((tail / tail.mean() * 90 + 10).round(), 1).astype(int)
    heavy = [(a, 800, o) for (a, *_), o in zip(even, outputs, strict=True)]
    assert np.mean(outputs) == pytest.approx(100, rel=0.01)
    runs = []
    for rows in (even, bursty, heavy):
        write(tmp_path, rows)
        runs.append(ask(tmp_path, goals, trace={}, rate="mean"))
    smooth, burst, long = runs
    assert busy(burst) > busy(smooth)
    # Long answers hold their places long: the spread shows in the promised end-to-end times, not in their means.
    late = [next(c["promised_s"] for c in r.data["percentiles"] if (c["metric"], c["percentile"]) == ("e2e", "p99")) for r in runs]
    assert late[2] > 2 * late[0]
    assert busy(long) >= busy(smooth)


def test_random_dealing_keeps_a_poisson_stream_poisson(tmp_path: Path) -> None:
    # Dealt in turn among n instances, n gaps add up to one: a squared CV of 1/n. Dealt at random, it stays 1, and requests wait.
    goals = {"ttft": {"p99": "250 ms"}, "tpot": {"p95": "60 ms"}}
    plans = {r: ask(tmp_path, goals, rate="300 /s", choices={**CHOICES, "routing": r}) for r in ("round-robin", "random")}
    assert busy(plans["random"]) > busy(plans["round-robin"])
    # The closed form knows: the replay has no more to mend than where requests are dealt in turn.
    assert len(plans["random"].data["rounds"]) <= 2
