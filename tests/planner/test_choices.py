"""What the planner may choose from: each choice against arithmetic by hand, against the others, and against the replay."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_files import BOTH, CHOICES, L40S, ask, busy, cost, poisson, write

from perfmodel import memory
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner.cells import ask as question_of
from perfmodel.planner.run import PlanRun
from perfmodel.serving.clock import StepClock, kv_tokens

POLICIES = ["chunked", "whole", "layered", "split"]


def first_round(run: PlanRun) -> float:
    """The optimum before the replay tightened anything."""
    return float(run.data["rounds"][0]["objective"])


def outcome(run: PlanRun) -> Any:
    return run.plans[0].replayed[0].whole


def test_every_policy_is_tried_and_the_cheapest_kept(tmp_path: Path) -> None:
    choices = {**CHOICES, "prefill_share": [0.5]}
    alone = {p: ask(tmp_path, choices={**choices, "policy": [p]}) for p in POLICIES}
    together = ask(tmp_path, choices={**choices, "policy": POLICIES})
    assert first_round(together) == min(first_round(r) for r in alone.values())
    tried = {e.column.layout.policy for e in question_of(together.plans[0].fleet, by_layout=True).entries}
    assert tried == set(POLICIES)
    for run in (together, *alone.values()):
        o = outcome(run)
        assert np.mean(o.ttft <= 1.0) >= 0.95
        assert np.mean(o.tpot <= 0.040) >= 0.95


def test_a_tight_itl_takes_smaller_chunks(tmp_path: Path) -> None:
    # A step of 8,192 tokens with a prompt of 1,024 in it lasts some 100 ms on an L40S; one of 256 tokens a third of that.
    goals = {**BOTH, "itl": {"p99": "60 ms"}}
    runs = {c: ask(tmp_path, goals, choices={**CHOICES, "chunk": [c]}) for c in (256, 8192)}
    both = ask(tmp_path, goals, choices={**CHOICES, "chunk": [256, 8192]})
    assert busy(runs[256]) < busy(runs[8192])
    assert {x.column.layout.chunk for x in both.plans[0].pools} == {256}
    assert first_round(both) == min(first_round(r) for r in runs.values())
    assert both.data["deployment"]["pools"][0]["chunk"] == 256
    # The chunk costs what it reads again: the whole model each time.
    longer = [float(np.median(outcome(r).ttft)) for r in (runs[8192], runs[256])]
    assert longer[1] > longer[0]


def test_kv_tokens_of_parallel_instances_by_hand() -> None:
    # Llama-3.1-8B: 16.06 GB of weights; a cached token is 32 layers x 2 x 8 heads x 128 x 2 B = 131,072 B.
    def tokens(**degrees: Any) -> float:
        e = Estimator("llama-3.1-8b", "l40s-server-4", **degrees)
        return kv_tokens(e, 1000.0)

    one = Estimator("llama-3.1-8b", "l40s-server-4")
    free, weights = one.kv_free, float(memory.weight_bytes(one.model, one.par, one.formats))
    assert weights == pytest.approx(16.06e9, rel=1e-3)
    assert tokens() == pytest.approx(free / 131072, rel=0.02)
    # Ranks of dp and cp hold all weights, and each its own tokens or its part of every token.
    assert tokens(dp=2) == pytest.approx(2 * free / 131072, rel=0.03)
    assert tokens(cp=2) == pytest.approx(2 * free / 131072, rel=0.03)
    # Stages of pp hold half of the weights and half of every token; so does tp, whose activations are smaller too.
    assert tokens(pp=2) == pytest.approx((free + weights / 2) / 65536, rel=0.04)
    assert tokens(tp=2) == pytest.approx((free + weights / 2) / 65536, rel=0.04)


def test_experts_over_data_parallel_ranks_by_hand() -> None:
    # OLMoE: 16 layers of 64 experts of 3 x 2,048 x 1,024 weights: 12.88 GB in 16 bits, half of it on each of two ranks.
    one, two = (Estimator("olmoe-1b-7b", "l40s-server-4", dp=n, ep=n) for n in (1, 2))
    experts = 16 * 64 * 3 * 2048 * 1024 * 2
    saved = float(memory.weight_bytes(one.model, one.par, one.formats)) - float(memory.weight_bytes(two.model, two.par, two.formats))
    assert saved == pytest.approx(experts / 2, rel=1e-3)
    per_token = 16 * 2 * 16 * 128 * 2
    gained = kv_tokens(two, 1000.0) / 2 - kv_tokens(one, 1000.0)
    assert gained == pytest.approx(experts / 2 / per_token, rel=0.03)
    assert StepClock(two, 1000.0).max_batch == 2 * StepClock(one, 1000.0).max_batch


def test_a_mixture_of_experts_over_dp_is_planned(tmp_path: Path) -> None:
    run = ask(tmp_path, model="olmoe-1b-7b", choices={"tp": [1, 2], "dp": [1, 2], "buckets": 1}, rate="100 /s")
    layouts = {(x.tp, x.dp, x.ep) for x in run.plans[0].found.layouts}
    # ep is one, or all ranks of tp and dp.
    assert layouts == {(1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 4)}
    only = ask(tmp_path, model="olmoe-1b-7b", choices={"tp": [1], "dp": [2], "ep": [2], "buckets": 1}, rate="100 /s")
    pool = only.data["deployment"]["pools"][0]
    assert (pool["tp"], pool["dp"], pool["ep"]) == (1, 2, 2)
    assert busy(only) == 2 * sum(x["replicas"] for x in only.data["pools"])
    assert first_round(run) <= first_round(only)


@pytest.mark.parametrize("degree", ["pp", "cp"])
def test_more_degrees_never_cost_more(degree: str, tmp_path: Path) -> None:
    base, wide = ask(tmp_path), ask(tmp_path, choices={**CHOICES, degree: [1, 2]})
    alone = ask(tmp_path, choices={**CHOICES, degree: [2]})
    assert first_round(wide) == min(first_round(base), first_round(alone))
    assert {getattr(x.column.layout, degree) for x in alone.plans[0].pools} == {2}


def test_a_lossy_cache_needs_leave_and_pays(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"plan.yaml:\d+: .*fp8 is lossy.*allow"):
        ask(tmp_path, choices={**CHOICES, "kv_dtype": "fp8"})
    base = ask(tmp_path)
    half = ask(tmp_path, choices={**CHOICES, "kv_dtype": "fp8", "allow": ["fp8"], "weight_dtype": ["checkpoint"]})
    # Half of the bytes per token: twice as many tokens, and less to read in every step.
    rooms = [r.plans[0].pools[0].column.instance.kv_tokens for r in (base, half)]
    assert rooms[1] == pytest.approx(2 * rooms[0], rel=0.02)
    assert busy(half) < busy(base)
    assert half.data["lossy"]
    assert not base.data["lossy"]


def test_more_buckets_never_cost_more_before_the_replay(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    inputs = np.where(rng.random(1500) < 0.8, rng.integers(100, 800, 1500), rng.integers(4000, 12000, 1500))
    write(tmp_path, zip(poisson(1500, 20.0), inputs, rng.integers(50, 300, 1500), strict=True))
    goals = {"ttft": {"p95": "1.5 s"}, "tpot": {"p95": "60 ms"}}
    runs = [ask(tmp_path, goals, trace={}, rate="mean", choices={"tp": [1], "buckets": b}) for b in (1, 2, 8)]
    # A single pool of everything stays possible, but for sample points that differ a little: at most one node.
    first = [first_round(r) for r in runs]
    assert all(more <= fewer + 4.0 for fewer, more in pairwise(first))
    assert first[-1] <= first[0]
    # What the replay adds is at most what its rounds of 7 % add up to, and a node.
    for r in runs:
        rounds = len(r.data["rounds"]) - 1
        assert cost(r) <= first_round(r) / 0.93**rounds + 4.0 * (rounds > 0) + 1e-6


def test_a_router_goes_by_labels(tmp_path: Path) -> None:
    n = 1500
    batch = np.arange(n) % 3 == 0
    rows = zip(
        poisson(n, 20.0), np.where(batch, 3000, 500), np.where(batch, 600, 30), np.where(batch, "nightly", "chat"),
        np.where(batch, 1000, 100), strict=True,
    )  # fmt: skip
    write(tmp_path, rows, "arrival_s,input,output,who,cap")
    trace = {"columns": {"labels": {"tenant": "who", "max_tokens": "cap"}}}
    for by, keys in (("tenant", {"chat", "nightly"}), ("max_tokens", {(-np.inf, 100.0), (100.0, np.inf)})):
        run = ask(tmp_path, trace=trace, rate="mean", choices={"tp": [1], "buckets": 2, "bucket_by": [by]})
        groups = run.plans[0].buckets
        assert {b.key[by][0] if by == "tenant" else b.key[by] for b in groups} == keys
        # A third of the requests, and inside a bucket every answer is as long as its tenant's.
        assert sorted(b.share for b in groups) == pytest.approx([1 / 3, 2 / 3], abs=1e-3)
        assert {float(b.output.mean()) for b in groups} == {30.0, 600.0}
    with pytest.raises(SpecError, match="no column 'model'"):
        ask(tmp_path, trace=trace, rate="mean", choices={"tp": [1], "bucket_by": ["model"]})


def test_knowing_output_lengths_never_costs(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    write(tmp_path, zip(poisson(1500, 40.0), [500] * 1500, np.where(rng.random(1500) < 0.5, 20, 600), strict=True))
    blind, oracle = (
        ask(tmp_path, trace={}, rate="mean", choices={"tp": [1], "buckets": 2, "routing": r}) for r in ("round-robin", "oracle")
    )
    assert first_round(oracle) <= first_round(blind)
    assert all("output" in b.key for b in oracle.plans[0].buckets)
    assert not any("output" in b.key for b in blind.plans[0].buckets)
    assert oracle.data["deployment"]["routing"] == "round-robin"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, str], PlanRun]:
    """Plans of 3,500-token prompts, six of whose seven blocks are one of twelve prefixes, or none is; by caching or routing."""
    found = {}
    for repeats in (True, False):
        folder = tmp_path_factory.mktemp("shared")
        groups = np.random.default_rng(4).integers(0, 12, 900)
        rows = []
        for k, (a, g) in enumerate(zip(poisson(900, 30.0), groups, strict=True)):
            own = 1000 + 10 * k
            prefix = range(10 * g, 10 * g + 6) if repeats else range(own, own + 6)
            rows.append((a, 3500, 60, ";".join(map(str, [*prefix, own + 6]))))
        write(folder, rows, "arrival_s,input,output,blocks")
        trace = {"columns": {"blocks": "blocks"}}
        for name in ("off", "round-robin", "random", "prefix-affine"):
            more = {} if name == "off" else {"prefix_caching": True, "routing": name}
            found[repeats, name] = ask(folder, trace=trace, rate="mean", choices={**CHOICES, **more})
    return found


def test_shared_prefixes_save_what_they_hold(shared: dict[tuple[bool, str], PlanRun]) -> None:
    assert cost(shared[True, "round-robin"]) < 0.6 * cost(shared[True, "off"])
    # By hand: all but the first of each prefix on each replica find 6 of 7 blocks.
    run = shared[True, "round-robin"]
    replicas = sum(x["replicas"] for x in run.data["pools"])
    found = (900 - 12 * replicas) * 6 * 512
    assert float(outcome(run).cached.sum()) == pytest.approx(found, rel=0.05)


def test_caching_changes_nothing_where_nothing_repeats(shared: dict[tuple[bool, str], PlanRun]) -> None:
    assert busy(shared[False, "round-robin"]) == busy(shared[False, "off"])
    assert float(outcome(shared[False, "round-robin"]).cached.sum()) == 0
    # An affine router without a prefix to follow takes the least loaded instance.
    assert busy(shared[False, "prefix-affine"]) == busy(shared[False, "off"])


def test_affinity_finds_more_than_chance(shared: dict[tuple[bool, str], PlanRun]) -> None:
    affine, random = (shared[True, r] for r in ("prefix-affine", "random"))
    hits = [float(outcome(r).cached.sum() / outcome(r).input.sum()) for r in (affine, random)]
    assert hits[0] >= hits[1]
    # One miss for each of twelve prefixes, and at most one more where a request is passed on.
    assert hits[0] == pytest.approx((1 - 12 / 900) * 6 * 512 / 3500, rel=0.02)


def test_random_dealing_needs_more_than_dealing_in_turn(shared: dict[tuple[bool, str], PlanRun]) -> None:
    assert busy(shared[False, "random"]) > busy(shared[False, "round-robin"])


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"choices": {"polcy": ["whole"]}}, ["polcy", "did you mean", "policy"]),
        ({"choices": {"policy": ["chunkd"]}}, ["chunkd", "did you mean", "chunked"]),
        ({"choices": {"routing": "randm"}}, ["randm", "did you mean", "random"]),
        ({"choices": {"bucket_by": ["tenent"]}}, ["tenent", "did you mean", "tenant"]),
        ({"choices": {"bucket_by": ["output"]}}, ["output"]),
        ({"choices": {"bucket_by": ["cached"]}}, ["prefix_caching"]),
        ({"choices": {"prefix_caching": True}}, ["block ids"]),
        ({"choices": {"bucket_by": ["tenant"]}}, ["tenant", "columns.labels"]),
        ({"choices": {"chunk": [0]}}, ["chunk"]),
        ({"choices": {"prefill_share": [1.5]}}, ["prefill_share"]),
        ({"choices": {"buckets": 0}}, ["buckets"]),
        ({"choices": {"kv_dtype": "fp9"}}, ["fp9", "did you mean"]),
        ({"choices": {"allow": ["fp9"]}}, ["fp9", "did you mean"]),
        ({"choices": {"engine": "vlm"}}, ["vlm", "did you mean", "vllm"]),
        ({"choices": {"roles": ["prefil"]}}, ["prefil", "did you mean", "prefill"]),
        ({"objectives": {"ttft": {"p95": "1 s + 0.3 ms/tokn"}}}, ["tokn", "/token"]),
        ({"objectives": {"tpot": {"p95": "40 ms + 1 ms/token"}}}, ["tpot", "input"]),
        ({"objectives": {"itl": {"99": "40 ms"}}}, ["99", "percentile", "p95"]),
        ({"objectives": {"longest_gp": {"p99": "1 s"}}}, ["longest_gp", "did you mean", "longest_gap"]),
        ({"objectives": {"attainment": {"share": 0.95}}}, ["attainment", "limit"]),
        ({"objectives": {"attainment": {"share": 1.5, "ttft": "1 s"}}}, ["share"]),
        ({"objectives": {"ttft": {"p95": "1 s"}, "window": "5 minits"}}, ["5 minits"]),
        ({"rate": "peek"}, ["peek", "peak"]),
        ({"rate": "percentile(120)"}, ["percentile"]),
        ({"scale": "squeeze"}, ["squeeze"]),
        ({"headroom": -1}, ["headroom"]),
    ],
)
def test_bad_input_is_one_line_with_its_place(section: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    import yaml

    from perfmodel.planner.run import plan

    workload = {"lengths": {"input": 500, "output": 50}, "rate": "2 /s", "objectives": BOTH}
    workload |= {k: v for k, v in section.items() if k != "choices"}
    path = tmp_path / "plan.yaml"
    choices = {**CHOICES, **section.get("choices", {})}
    path.write_text(yaml.safe_dump({"model": "llama-3.1-8b", "workload": workload, "fleet": L40S, "choices": choices}))
    with pytest.raises(SpecError) as caught:
        plan(path, explain=False)
    text = str(caught.value)
    assert "plan.yaml:" in text
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text
