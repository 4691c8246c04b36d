"""Static batches in plans: their cost by hand, where they lose, and where nothing is promised."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_files import CHOICES, ask, busy, poisson, write

from perfmodel.errors import Infeasible
from perfmodel.estimator import Estimator
from perfmodel.planner.cells import ask as question_of
from perfmodel.serving.clock import StepClock, kv_tokens

LOOSE: dict[str, Any] = {"ttft": {"p95": "200 s"}, "tpot": {"p95": "500 ms"}}


def choose(*policies: str, **more: Any) -> dict[str, Any]:
    return {**CHOICES, "policy": list(policies), **more}


def test_equal_requests_cost_what_full_batches_take(tmp_path: Path) -> None:
    """n = cached tokens / (1,024 + 256) places; a batch lasts its prefill of n x 1,024 tokens and steps 1 … 255 of n sequences
    at 1,024 + k tokens each; 85 % of that rate is as far as the closed form goes."""
    run = ask(tmp_path, LOOSE, rate="40 /s", choices=choose("static"))
    e = Estimator("llama-3.1-8b", "l40s-server-4")
    context = 1024 + 257 / 2
    clock = StepClock(e, context)
    n = min(int(kv_tokens(e, context) / 1280), clock.max_batch)
    seconds = clock.step(0, 0.0, [(1024.0, 0.0)] * n) + sum(clock.decode(n, n * (1024.0 + k)) for k in range(1, 256))
    each = 0.85 * n / seconds
    (pool,) = run.plans[0].pools
    assert pool.column.state.rate == pytest.approx(each, rel=0.04)
    assert pool.column.limited_by == "batches are within 15 % of saturation"
    assert busy(run) == math.ceil(40 / pool.column.state.rate - 1e-6)
    assert busy(run) in (math.ceil(40 / each), math.ceil(40 / each) + 1)
    assert run.data["rounds"][-1]["missed"] == []
    assert run.data["deployment"]["pools"][0]["policy"] == "static"


def test_under_a_ttft_limit_static_batches_win_nothing(tmp_path: Path) -> None:
    """Answers of 10 or 600 tokens: whoever comes meanwhile waits for the 600. Same means, other spread: chunked hardly cares."""
    goals = {"ttft": {"p95": "1 s"}, "tpot": {"p95": "60 ms"}}
    rng = np.random.default_rng(2)
    arrival = poisson(1200, 12.0)
    write(tmp_path, [(t, 1024, o) for t, o in zip(arrival, rng.choice([10, 600], 1200), strict=True)])
    given: dict[str, Any] = {"trace": {}, "rate": "mean"}
    chunked = ask(tmp_path, goals, choices=choose("chunked"), **given)
    both = ask(tmp_path, goals, choices=choose("chunked", "static"), **given)
    assert both.data["objective_value"] == chunked.data["objective_value"]
    assert {p.column.layout.policy for p in both.plans[0].pools} == {"chunked"}
    tried = {e.column.layout.policy for e in question_of(both.plans[0].fleet, by_layout=True).entries}
    tried |= {r.layout.policy for r in both.plans[0].found.rejected}
    assert tried == {"chunked", "static"}
    try:
        alone = busy(ask(tmp_path, goals, choices=choose("static"), **given))
    except Infeasible:
        alone = 10**6
    assert alone > 2 * busy(chunked)


def test_answers_of_unequal_length_cost_a_static_batch_more(tmp_path: Path) -> None:
    arrival = poisson(1500, 20.0)
    found = {}
    for name, outputs in (("equal", [256, 256]), ("spread", [12, 500])):
        write(tmp_path, [(t, 1024, outputs[k % 2]) for k, t in enumerate(arrival)])
        runs = [ask(tmp_path, LOOSE, trace={}, rate="mean", choices=choose(p)) for p in ("static", "chunked")]
        found[name] = [sum(p.column.state.rate * p.replicas for p in r.plans[0].pools) / busy(r) for r in runs]
        assert runs[0].data["rounds"][-1]["missed"] == []
    static, chunked = (found["spread"][i] / found["equal"][i] for i in (0, 1))
    assert static < 0.75
    assert chunked > 0.75


def test_no_cache_of_prefixes_behind_padding(tmp_path: Path) -> None:
    rows = [(t, 1024, 100, f"{k % 5};{100 + k}") for k, t in enumerate(poisson(400, 5.0))]
    write(tmp_path, rows, "arrival_s,input,output,blocks")
    run = ask(tmp_path, trace={}, rate="mean", choices=choose("chunked", "static", prefix_caching=True))
    assert any("no prefix cache" in r["reason"] for r in run.data["rejected"])
