"""What to measure next: benchmarks that settle what the plan depends on, ranked by what they leave."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from perfmodel import calibration
from perfmodel.estimator import Estimator
from perfmodel.validation.measure_next import Use, rank, step


@pytest.fixture
def use() -> Use:
    return Use(Estimator("llama-3.1-8b", "l40s"), 1.0, 16.0, 1024, 256, 0.2)


def test_ranking_is_by_what_remains(use: Use) -> None:
    ranked = rank([use])
    after = [r.after for r in ranked]
    assert after == sorted(after)
    assert all(0 <= r.after < r.before for r in ranked)
    assert [r.before for r in ranked] == pytest.approx([ranked[0].before] * len(ranked))
    # Only the engine itself at the plan's own batch also shows what the law leaves unexplained.
    assert "--max-concurrency 16 " in ranked[0].candidate.command
    assert any("calibrate --measure" in r.candidate.command for r in ranked)


def test_settled_parameters_need_no_benchmark(use: Use) -> None:
    known = replace(use.estimator.machine, sigma=dict.fromkeys(use.estimator.machine.sigma, 1e-6))
    use.estimator.machine = known
    best = rank([use])[0]
    micro = next(r for r in rank([use]) if "calibrate --measure" in r.candidate.command)
    # With every parameter known only the unexplained part is left, and a micro-benchmark tells nothing of it.
    assert micro.after == pytest.approx(micro.before, rel=1e-3)
    assert best.settles.startswith("llama-3.1-8b on l40s") or "unexplained" in best.settles


def test_one_variable_by_hand(use: Use) -> None:
    # One uncertain parameter of which the step time depends with gradient g, measured once with noise 0.03:
    # the posterior variance of the step is g^2 r^2 / (g^2 + r^2).
    name = "bandwidth_efficiency"
    use.estimator.machine = replace(use.estimator.machine, sigma={name: 0.3})
    g = step(use, 16.0, is_decode=True)[f"l40s:{name}"]
    assert g == pytest.approx(-0.3, abs=0.08)  # decode at batch 16 is mostly memory traffic
    prefill = step(use, 1, is_decode=False)[f"l40s:{name}"]
    target = 0.8 * g + 0.2 * prefill
    left_decode, left_prefill = (calibration.law().residual[p] for p in ("decode", "prefill"))
    variance = target**2 + (0.8 * left_decode) ** 2 + (0.2 * left_prefill) ** 2
    before = rank([use])[0].before
    assert before == pytest.approx(math.expm1(1.2816 * variance**0.5), rel=1e-6)


def test_tensor_parallel_plans_may_ask_for_collectives() -> None:
    four = Use(Estimator("llama-3.1-70b", "l40s", tp=4), 1.0, 8.0, 512, 128, 0.1)
    assert any(r.candidate.command.startswith("all_reduce_perf") for r in rank([four]))
