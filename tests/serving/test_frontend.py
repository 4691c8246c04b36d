"""The front end against hand arithmetic and a naive event loop."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import calibration
from perfmodel.errors import Infeasible, SpecError
from perfmodel.serving import frontend

ENGINES = ("vllm", "sglang", "trtllm", "llama.cpp")


def test_a_long_prompt_by_hand() -> None:
    """128,000 tokens at 340,000 tokens/s are 0.376 s; vLLM's rows say 4 ms + 1.6 us a token = 0.209 s, tokeniser included."""
    o = frontend.ttft_overhead(calibration.engine("vllm"), 128_000)
    assert o.tokenise == pytest.approx(128_000 / 3.4e5)
    assert o.fitted == pytest.approx(4e-3 + 1.6e-6 * 128_000, rel=0.01)
    # The larger of the two, never their sum.
    assert o.total == pytest.approx(max(o.parts, o.fitted))
    assert o.beyond_fitted == pytest.approx(0.376 + 0.0021 - 0.209, abs=0.005)


def test_short_prompts_add_nothing_to_the_fitted_latency() -> None:
    for name in ENGINES:
        assert frontend.ttft_overhead(calibration.engine(name), 500).beyond_fitted == 0, name


def test_capacity_by_hand() -> None:
    """500 requests/s and 8,000 tokens/s: a request of 200 tokens takes 2 + 25 ms, and 0.25 ms to detokenise."""
    found = frontend.capacity(calibration.engine("vllm"), 1000, 200)
    assert found.api == pytest.approx(1 / (0.002 + 0.025 + 200 * 1.25e-6), rel=1e-6)
    assert found.tokeniser == pytest.approx(340.0)
    assert (found.binding, found.processes) == ("api", 1)
    assert frontend.capacity(calibration.engine("vllm"), 1000, 200, processes=4).rate == pytest.approx(4 * found.rate)
    # A detokeniser of its own takes that share off the API process.
    assert frontend.capacity(calibration.engine("sglang"), 1000, 200).api == pytest.approx(1 / 0.027, rel=1e-6)


def test_samplers_on_the_device_are_in_the_steps_already() -> None:
    """64 sequences: 128 us of sampling on the device are less than vLLM's fitted 1.7 ms; llama.cpp's 19.2 ms on the host are not."""
    vllm = frontend.step_overhead(calibration.engine("vllm"), 64)
    assert (vllm.sampler, vllm.beyond_fitted) == (pytest.approx(128e-6), 0.0)
    host = frontend.step_overhead(calibration.engine("llama.cpp"), 64)
    assert host.beyond_fitted == pytest.approx(64 * (3.0e-4 + 1e-7 - 2e-5))


@given(st.floats(1, 1e5), st.floats(1, 4000), st.floats(1.1, 3))
@settings(max_examples=30, deadline=None)
def test_longer_requests_carry_less(prompt: float, output: float, more: float) -> None:
    for name in ENGINES:
        e = calibration.engine(name)
        assert frontend.rate_bound(e, prompt, output * more) <= frontend.rate_bound(e, prompt, output)
        assert frontend.rate_bound(e, prompt * more, output) <= frontend.rate_bound(e, prompt, output)


def test_processes_carry_the_rate_and_one_less_does_not() -> None:
    e = calibration.engine("vllm")
    n = frontend.processes_for(e, 200, 1000, 300)
    assert frontend.rate_bound(e, 1000, 300, processes=n) >= 200 > frontend.rate_bound(e, 1000, 300, processes=n - 1)


def test_a_rate_beyond_the_front_end_is_refused_with_the_change_that_helps() -> None:
    e = calibration.engine("vllm")
    with pytest.raises(Infeasible) as caught:
        frontend.waiting(e, 100, 1000, 300, 0.02)
    processes = int(str(caught.value.nearest).split()[0])
    assert frontend.waiting(e, 100, 1000, 300, 0.02, processes=processes) > 0


def _event_loop(rate: float, parse: float, piece: float, output: int, tpot: float, seed: int, requests: int = 4000) -> float:
    """Mean wait of first tokens: one loop, FIFO, requests parsed on arrival, tokens of a step handed over together."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, requests))
    events = [(float(t), i, "parse", i, 0) for i, t in enumerate(arrivals)]
    heapq.heapify(events)
    clock, waits = 0.0, dict[int, float]()
    while events:
        at, _, kind, who, done = heapq.heappop(events)
        wait = max(clock - at, 0.0)
        clock = max(clock, at) + (parse if kind == "parse" else piece)
        if kind == "parse":
            waits[who] = wait
            step = int(clock / tpot) + 1
        else:
            if done == 0:
                waits[who] += wait
            if done + 1 == output:
                continue
            step = round(at / tpot) + 1  # the engine goes on, however late its tokens are written
            done += 1
        # Equal times: the order of a step's sequences is any.
        heapq.heappush(events, (step * tpot, int(rng.integers(1 << 40)), "token", who, done))
    return float(np.mean([waits[i] for i in range(requests // 10, requests)]))


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_waiting_against_an_event_loop(load: float) -> None:
    e = calibration.engine("vllm")
    output, tpot = 60, 0.03
    rate = load * frontend.capacity(e, 1000, output).rate
    parse = frontend.busy_seconds(e, 1000, 0)
    piece = (frontend.busy_seconds(e, 1000, output) - parse) / output
    naive = _event_loop(rate, parse, piece, output, tpot, seed=1)
    assert frontend.waiting(e, rate, 1000, output, tpot) == pytest.approx(naive, rel=0.15)


def test_an_engine_without_figures_says_so() -> None:
    with pytest.raises(SpecError, match="frontend"):
        frontend.capacity(calibration.engine("deepspeed-mii"), 100, 100)


def test_defaults_follow_the_device_and_the_use() -> None:
    """vLLM: 8,192 and 1,024 on an H100, 2,048 and 256 on an A100 or L4, 16,384 on a B200; more offline (arg_utils 0.33)."""
    vllm = calibration.engine("vllm")
    gib = 2**30
    assert (vllm.limits(80 * gib, "h100-sxm").chunk_tokens, vllm.limits(80 * gib, "h100-sxm").max_sequences) == (8192, 1024)
    assert vllm.limits(80 * gib, "a100-sxm-80gb").chunk_tokens == 2048
    assert vllm.limits(24 * gib, "l4").max_sequences == 256
    assert vllm.limits(180 * gib, "b200-sxm").chunk_tokens == 16384
    assert vllm.limits(80 * gib, "h100-sxm", use="offline").chunk_tokens == 16384
    sglang = calibration.engine("sglang")
    assert [sglang.limits(n * gib, "x").chunk_tokens for n in (16, 24, 48, 80, 141, 192)] == [2048, 4096, 4096, 8192, 8192, 16384]
    assert sglang.limits(80 * gib, "x", tp=4).graph_batch == 512


def test_every_figure_says_where_it_is_from() -> None:
    for name in ENGINES:
        e = calibration.engine(name)
        assert e.frontend is not None
        assert e.supports is not None
        for key, p in e.frontend.parameters.items():
            assert p.source, (name, key)
            # An order of magnitude admits it in its spread.
            assert p.sigma >= 0.6 if "order of magnitude" in p.source else p.sigma >= 0.3, (name, key)
