"""Replays of a paper's settings, against the formulas of queues, hand arithmetic and the laws their requests are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paper_files import SOME

from perfmodel.errors import SpecError
from perfmodel.papers import run
from perfmodel.papers.replayed import Replayed
from perfmodel.papers.setting import estimator

_PAPER = SOME + """\
  many: {value: 400, from: paper, source: s}
  two: {value: 2, from: paper, source: s}
  half: {value: 0.5, from: paper, source: s}
  quarter: {value: 0.25, from: paper, source: s}
  rate: {value: 1.0, from: paper, source: s}
  ttft: {value: 0.1, from: paper, source: s}
  tpot: {value: 0.02, from: paper, source: s}
settings:
  one: {model: "=model", hardware: "=device", input: "=input", output: "=output", requests: "=many", rate: "=rate", ttft: "=ttft", tpot: "=tpot"}
  queue: {like: one, system: vllm-0.2, output: 1, largest: 1, tpot: 0}
  spread: {like: one, input_spread: "=half", output_spread: "=two"}
  cut: {like: spread, longest: "=input"}
  bursty: {like: one, burst: "=two"}
  ticking: {like: one, tick: "=two"}
  full: {like: one, cache: "=two * (input + output)"}
  kinds:
    like: one
    classes: [{share: "=quarter", output: "=two", prefix: "=half * input"}, {share: "=1 - quarter"}]
  wrong: {like: one, classes: [{share: "=half"}]}
  odd: {like: one, classes: [{share: 1, inputs: "=two"}]}
  padded: {like: one, batching: static}
  pools: {like: one, roles: {prefill: {devices: 1}, decode: {devices: "=two"}}}
  slow: {like: pools, message: "=two"}
predictions:
  - {metric: m, unit: x, setting: s, predict: one.replayed_ttft}
"""


@pytest.fixture
def runner(tmp_path: Path) -> run.Runner:
    path = tmp_path / "some.yaml"
    path.write_text(_PAPER, encoding="utf-8")
    return run.Runner(run.load(str(path)))


def _replayed(runner: run.Runner, name: str, **change: Any) -> Any:
    return runner.setting(name, {**runner.given, **change}, Replayed)


def test_a_queue_of_one_server_waits_as_pollaczek_and_khinchine_say(runner: run.Runner) -> None:
    found = _replayed(runner, "queue", many=12000, rate=1.0)
    service = found._replay(1e-3).ttft[0]
    for busy in (0.3, 0.6):
        mean = _replayed(runner, "queue", many=12000, rate=busy / service).replayed_ttft
        assert mean == pytest.approx(service * (1 + busy / (2 * (1 - busy))), rel=0.04)


def test_lengths_keep_their_mean_though_long_ones_are_cut(runner: run.Runner) -> None:
    drawn = _replayed(runner, "spread")._drawn
    assert drawn.input.mean() == pytest.approx(800, rel=0.01)
    assert drawn.input.std() / drawn.input.mean() == pytest.approx(0.5, rel=0.05)
    assert drawn.output.mean() == pytest.approx(100, rel=0.01)
    cut = _replayed(runner, "cut")._drawn
    assert cut.output.max() <= 800
    assert cut.output.mean() == pytest.approx(100, rel=0.01)


def test_gaps_have_the_coefficient_of_variation_asked_for(runner: run.Runner) -> None:
    for name, spread in (("one", 1.0), ("bursty", 2.0)):
        arrival = _replayed(runner, name, many=20000)._drawn.arrival
        gaps = np.diff(arrival)
        assert gaps.mean() == pytest.approx(1.0, rel=1e-6)
        assert gaps.std() == pytest.approx(spread, rel=0.05)


def test_a_coarse_clock_brings_requests_together(runner: run.Runner) -> None:
    arrival = _replayed(runner, "ticking")._replay(1.0).arrival
    assert np.allclose(arrival % 2, 0)
    assert _replayed(runner, "ticking").replayed_ttft > _replayed(runner, "one").replayed_ttft


def test_classes_mix_by_their_shares_and_bring_what_they_have_cached(runner: run.Runner) -> None:
    kinds = _replayed(runner, "kinds")
    brief = kinds._drawn.output == 2
    assert brief.mean() == pytest.approx(0.25)
    assert set(kinds._cached[brief]) == {400}
    assert set(kinds._cached[~brief]) == {0}
    with pytest.raises(SpecError, match="add up to 0.5"):
        _replayed(runner, "wrong")._drawn  # noqa: B018
    with pytest.raises(SpecError, match="unknown field 'inputs'"):
        _replayed(runner, "odd")
    with pytest.raises(SpecError, match="static"):
        _replayed(runner, "padded").replayed_ttft  # noqa: B018


def test_an_idle_request_takes_what_the_estimator_says(runner: run.Runner) -> None:
    found = _replayed(runner, "one", rate=1e-3)
    assert found.replayed_ttft == pytest.approx(found.ttft, rel=0.03)
    assert found.replayed_tpot == pytest.approx(found.tpot, rel=0.03)
    assert found.replayed_latency == pytest.approx(found.ttft + 99 * found.tpot, rel=0.03)
    assert found.replayed_per_token == pytest.approx(found.replayed_latency / 100, rel=0.03)
    assert found.replayed_tail_ttft == pytest.approx(found.replayed_ttft, rel=0.03)


def test_limits_are_kept_up_to_the_rate_found(runner: run.Runner) -> None:
    rate = _replayed(runner, "one").replayed_goodput
    assert _replayed(runner, "one", rate=rate).replayed_scale == pytest.approx(1.0, abs=0.05)
    assert _replayed(runner, "one", rate=rate).replayed_share >= 0.9
    assert _replayed(runner, "one", rate=1.1 * rate).replayed_share < 0.9
    first = _replayed(runner, "one").replayed_first_rate
    assert _replayed(runner, "one", rate=first).replayed_ttft == pytest.approx(0.1, rel=0.06)


def test_a_told_cache_makes_requests_wait_for_memory(runner: run.Runner) -> None:
    busy = {"rate": 4.0}
    assert _replayed(runner, "full", **busy)._fleet_of.pools[0].kv_tokens == 1800
    assert _replayed(runner, "full", **busy).replayed_ttft > 3 * _replayed(runner, "one", **busy).replayed_ttft


def test_roles_share_the_rate_and_send_caches_in_messages(runner: run.Runner) -> None:
    pools = _replayed(runner, "pools")._fleet_of.pools
    assert [(p.role, p.replicas) for p in pools] == [("prefill", 1), ("decode", 2)]
    small = _replayed(runner, "slow")._fleet_of.pools[0].handoff
    assert small.block_tokens == 2
    # Posting a message of two tokens takes as long as one of a block, and there are eight times as many.
    e = estimator(_replayed(runner, "pools").setting.roles["prefill"])
    post = float(e.machine.law["transfer_message"]) * 2 * e.model.n_layers
    assert small.seconds_per_token >= 0.99 * post / 2
    assert small.seconds_per_token > pools[0].handoff.seconds_per_token
