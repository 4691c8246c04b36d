"""The event simulation against a naive one that takes every step, and against laws no simulation may break."""

from __future__ import annotations

import naive_replay as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.serving.replay import merge, simulate
from perfmodel.serving.requests import Requests

AMPLE = 1e9


def both(clock, kv_tokens, requests, role):
    """Outcome of the event simulation, and (ttft, tpot, finish, preemptions) of the naive one."""
    fast = simulate(clock, kv_tokens, requests, role)
    first, finish, preempted, produced, _ = naive.simulate(clock, kv_tokens, requests, role)
    first = requests.arrival if role == "decode" else first
    more = requests.output - 1
    tpot = np.where(more > 0, (finish - first) / np.maximum(more, 1), np.nan)
    return fast, (first - requests.arrival, tpot, finish, preempted), produced


def assert_same(fast, slow):
    ttft, tpot, finish, preempted = slow
    np.testing.assert_allclose(fast.ttft, ttft, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fast.tpot, tpot, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fast.finish, finish, rtol=1e-9)
    assert fast.preempted == preempted


@pytest.mark.parametrize("role", ["colocated", "prefill", "decode"])
@pytest.mark.parametrize("rate", [2.0, 12.0])
def test_500_requests_equal_the_step_by_step_simulation(clock, poisson, role, rate):
    fast, slow, _ = both(clock, AMPLE, poisson(500, rate, 1), role)
    assert_same(fast, slow)
    assert fast.preempted == 0


@pytest.mark.parametrize("role", ["colocated", "decode"])
def test_500_requests_under_kv_pressure_equal_the_step_by_step_simulation(clock, poisson, role):
    fast, slow, _ = both(clock, 8000.0, poisson(500, 20.0, 2), role)
    assert_same(fast, slow)
    assert fast.preempted > 20


def test_prompts_of_many_chunks_equal_the_step_by_step_simulation(clock, poisson):
    requests = poisson(60, 1.0, 3, inputs=(9000, 40000), outputs=(1, 60))
    fast, slow, _ = both(clock, 60000.0, requests, "colocated")
    assert_same(fast, slow)
    assert fast.preempted > 0


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    rate=st.floats(0.5, 200.0),
    kv_tokens=st.floats(3400.0, 20000.0),
    role=st.sampled_from(["colocated", "prefill", "decode"]),
)
def test_any_load_and_cache_equals_the_step_by_step_simulation(clock, poisson, seed, rate, kv_tokens, role):
    fast, slow, _ = both(clock, kv_tokens, poisson(40, rate, seed), role)
    assert_same(fast, slow)


@pytest.mark.parametrize("kv_tokens", [AMPLE, 8000.0])
def test_every_request_finishes_once_and_gets_the_tokens_it_asked_for(clock, poisson, kv_tokens):
    requests = poisson(300, 20.0, 4)
    fast, slow, produced = both(clock, kv_tokens, requests, "colocated")
    # The naive simulator counts tokens; equal finishing times tie the event simulation to that count.
    np.testing.assert_array_equal(produced, requests.output)
    assert_same(fast, slow)
    assert np.all(np.isfinite(fast.finish))
    assert np.all(fast.ttft > 0)


def test_a_single_request_takes_its_prefill_and_its_decode_steps(clock):
    one = Requests(np.zeros(1), np.array([700.0]), np.array([5.0]))
    fast = simulate(clock, AMPLE, one)
    prefill = clock.step(0, 0.0, [(700.0, 0.0)])
    # The first decode step attends the prompt and the first output token.
    steps = sum(clock.decode(1, 701.0 + i) for i in range(4))
    assert fast.ttft[0] == pytest.approx(prefill, rel=1e-12)
    assert fast.tpot[0] == pytest.approx(steps / 4, rel=1e-12)


def test_a_one_token_request_has_no_tpot(clock):
    one = Requests(np.zeros(2), np.array([700.0, 10.0]), np.ones(2))
    fast = simulate(clock, AMPLE, one)
    assert np.all(np.isnan(fast.tpot))
    assert np.all(fast.finish == fast.ttft)


def test_preemption_by_hand(clock):
    """Two prompts of 100 tokens in a cache of 210: they fit with one token each, and overflow at 106 + 106 = 212.

    Each enters with 101 tokens; after 4 steps they hold 105 + 105 = 210, the fifth makes 212 > 210, so the second is
    dropped with 6 of its 20 tokens produced. It waits for the first (14 steps more) and recomputes 106 tokens.
    """
    two = Requests(np.zeros(2), np.full(2, 100.0), np.full(2, 20.0))
    fast = simulate(clock, 210.0, two)
    assert fast.preempted == 1
    now = clock.step(0, 0.0, [(100.0, 0.0), (100.0, 0.0)])
    now += sum(clock.decode(2, 202.0 + 2 * i) for i in range(5))
    now += sum(clock.decode(1, 106.0 + i) for i in range(14))
    assert fast.finish[0] == pytest.approx(now, rel=1e-12)
    now += clock.step(0, 0.0, [(106.0, 0.0)])
    now += sum(clock.decode(1, 107.0 + i) for i in range(13))
    assert fast.finish[1] == pytest.approx(now, rel=1e-12)


def test_littles_law_holds(clock, poisson):
    """Mean number in the instance = rate x mean residence, over the span from the first arrival to the last finish."""
    requests = poisson(400, 8.0, 5)
    _, finish, _, _, presence = naive.simulate(clock, AMPLE, requests)
    fast = simulate(clock, AMPLE, requests)
    residence = (fast.finish - requests.arrival).sum()
    # A request arrives in the middle of a step and is seen from the next on: less than one step each is not counted.
    longest_step = clock.step(clock.max_batch, 3300.0 * clock.max_batch, [(float(clock.chunk), 0.0)])
    assert presence <= residence * (1 + 1e-9)
    assert residence - presence < len(requests) * longest_step
    assert presence == pytest.approx(residence, rel=0.05)
    np.testing.assert_allclose(fast.finish, finish)


def test_a_request_larger_than_the_cache_is_refused(clock):
    one = Requests(np.zeros(1), np.array([700.0]), np.array([5.0]))
    with pytest.raises(ValueError, match="larger than the KV cache"):
        simulate(clock, 600.0, one)


def test_merge_keeps_every_request(clock, poisson):
    parts = [simulate(clock, AMPLE, poisson(30, 5.0, seed)) for seed in (1, 2)]
    whole = merge(parts)
    assert whole.ttft.size == 60
    assert whole.percentile("ttft", 1.0) == max(p.ttft.max() for p in parts)
