"""Pools of a paper's settings under load: shared between limits, full pipelines, factors on limits, steps of both phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paper_files import SOME

from perfmodel.papers import run
from perfmodel.papers.served import Served
from perfmodel.serving.clock import StepClock
from perfmodel.serving.modes import policy_clock
from perfmodel.serving.split import Sides

_PAPER = SOME + """\
  two: {value: 2, from: paper, source: s}
  half: {value: 0.5, from: paper, source: s}
  rate: {value: 1.5, from: paper, source: s}
  ttft: {value: 0.4, from: paper, source: s}
  tpot: {value: 0.05, from: paper, source: s}
settings:
  one: {model: "=model", hardware: "=device", input: "=input", output: "=output", rate: "=rate", ttft: "=ttft", tpot: "=tpot"}
  strict: {like: one, ttft: "=ttft / two"}
  unlike: {like: one, batch: max, output_spread: "=half"}
  alike: {like: one, batch: max}
  together: {like: unlike, batching: static}
  staged: {like: one, pp: "=two"}
  whole: {like: staged, policy: whole}
  pools: {like: one, roles: {prefill: {devices: 1}, decode: {devices: 1}}}
predictions:
  - {metric: m, unit: x, setting: s, predict: PREDICTED}
"""


def _runner(tmp_path: Path, predict: str = "one.goodput / strict.goodput") -> run.Runner:
    path = tmp_path / "some.yaml"
    path.write_text(_PAPER.replace("PREDICTED", predict), encoding="utf-8")
    return run.Runner(run.load(str(path)))


def _measured(runner: run.Runner, name: str) -> Any:
    return runner.setting(name, runner.given, Served)


def test_settings_that_differ_in_limits_share_a_pool(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    one, strict = _measured(runner, "one"), _measured(runner, "strict")
    assert one._together is strict._together
    assert one.goodput >= strict.goodput
    assert _measured(runner, "staged")._together is not one._together


def test_a_factor_on_limits_is_where_the_share_is_just_met(tmp_path: Path) -> None:
    runner = _runner(tmp_path, "one.limit_scale")
    one = _measured(runner, "one")
    scale = one.limit_scale
    pool = one._together
    goals = one._goals(0.9)
    tighter = type(goals)(goals.ttft * scale * 0.99, goals.tpot * scale * 0.99, 0.9)
    looser = type(goals)(goals.ttft * scale * 1.01, goals.tpot * scale * 1.01, 0.9)
    assert pool.met(1.5, tighter) < 0.9 <= pool.met(1.5, looser)
    # Pools of their own: the chance of both limits is the product of one each.
    assert _measured(runner, "pools").limit_scale > 0


def test_a_full_pipeline_prefills_as_many_chunks_a_pass_as_it_has_stages(tmp_path: Path) -> None:
    runner = _runner(tmp_path, "staged.saturation")
    staged, whole = _measured(runner, "staged"), _measured(runner, "whole")
    assert staged._together.instance.clock.chunk == 2 * whole._together.instance.clock.estimator.engine.chunk_tokens
    assert staged._together.fill.min() > 0 == whole._together.fill.max()
    # Two stages of half the layers each and half the memory traffic per step: twice the rate of one device, less what host time costs.
    one = _measured(runner, "one")
    assert staged.saturation == pytest.approx(2 * one.saturation, rel=0.25)
    e = staged._estimator
    plain, full = StepClock(e, 800.0), policy_clock(e, 800.0, lanes=2)
    prompts = np.array([4096.0])
    assert full.prefill_work(prompts, 0.0, 0.0)[0] == pytest.approx(plain.prefill_work(prompts, 0.0, 0.0)[0] / 2, rel=0.15)


def test_prefill_work_is_that_of_its_chunks_one_after_the_other(tmp_path: Path) -> None:
    clock = _measured(_runner(tmp_path), "one")._together.instance.clock
    inputs, cached = np.array([300.0, 5000.0, 9000.0]), np.array([0.0, 100.0, 8999.0])
    batch, context = 12.5, 12.5 * 700
    room = clock.chunk - batch
    saved = clock.decode(batch, context) - clock.decode_slope[12] * context
    by_hand = []
    for prompt, held in zip(inputs, cached, strict=True):
        total = 0.0
        while held < prompt:
            q = min(prompt - held, room)
            total += clock.tokenwise(batch + q) + clock._floor + clock.host(batch + 1) + clock.attention(q, held) - saved
            held += q
        by_hand.append(total)
    assert clock.prefill_work(inputs, batch, context, cached) == pytest.approx(by_hand, rel=1e-9)


def test_a_side_without_company_may_have_all_units(tmp_path: Path) -> None:
    e = _measured(_runner(tmp_path), "one")._estimator
    own, free, device = Sides(e, 800.0, 0.5), Sides(e, 800.0, 0.5, 1.0), StepClock(e, 800.0)
    assert free.prefill(0.7, 0.0).tokenwise(2000) == pytest.approx(device.tokenwise(2000))
    assert free.prefill(0.7, 1.0).tokenwise(2000) == pytest.approx(own.prefill(0.7, 1.0).tokenwise(2000))
    half = free.prefill(1.0, 0.5).tokenwise(2000)
    assert half == pytest.approx((device.tokenwise(2000) + own.prefill(1.0, 0.0).tokenwise(2000)) / 2)


def test_a_mixed_step_carries_each_sequence_s_share_of_prefill(tmp_path: Path) -> None:
    one = _measured(_runner(tmp_path, "one.mixed_throughput"), "one")
    # One sequence decodes: a hundredth of a prompt of 800 tokens rides along, 396 tokens behind its beginning on average.
    step = float(one._estimator.mixed(1.0, 850.0, 8.0, 396.0, 1.0))
    assert one.mixed_throughput == pytest.approx(1 / 100 * 900 / step)


def test_long_answers_are_at_work_longer(tmp_path: Path) -> None:
    runner = _runner(tmp_path)
    unlike, alike, together = (_measured(runner, name) for name in ("unlike", "alike", "together"))
    # Half of the answers have 50 tokens, half 150: mean 100, coefficient of variation 1/2. Of the tokens a quarter are of short
    # ones and three quarters of long ones, so those at work have 50 / 4 + 150 * 3 / 4 tokens.
    assert unlike.working_output == pytest.approx(50 / 4 + 150 * 3 / 4)
    assert unlike.context == pytest.approx(800 + 62.5)
    assert alike.context == pytest.approx(850)
    assert unlike.max_batch == pytest.approx(alike.max_batch * 850 / 862.5, abs=2)
    assert unlike.tpot * alike.batch / unlike.batch > alike.tpot
    # A static batch holds everyone's room until its end.
    assert together.working_output == 100


def test_the_highest_rate_is_bracketed_as_closely_with_and_without_a_limit(tmp_path: Path) -> None:
    pool = _measured(_runner(tmp_path), "one")._together
    stable = pool.highest(lambda _: True)
    assert pool.state(stable).feasible
    assert not pool.state(stable * 1.01).feasible
    half = pool.highest(lambda s: s.rate <= stable / 2)
    assert half == pytest.approx(stable / 2, rel=0.01)
    assert pool.highest(lambda _: False) == 0


def test_a_blend_is_the_weighted_mean_of_its_clocks(tmp_path: Path) -> None:
    estimator = _measured(_runner(tmp_path), "one")._estimator
    sides = Sides(estimator, 900.0, 0.5)
    fast, slow = sides.decode(1.0), sides.decode(0.5)
    between = sides.decode(0.5, often=0.25)
    assert between.decode(8, 7200.0) == pytest.approx(0.75 * fast.decode(8, 7200.0) + 0.25 * slow.decode(8, 7200.0))
    assert isinstance(between.decode_base, list)
    assert between.chunk == fast.chunk
