"""The event simulation of one instance against a naive one that takes every step, and against hand arithmetic."""

from __future__ import annotations

import naive_replay as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.serving.layered import LayeredClock
from perfmodel.serving.modes import policy_clock
from perfmodel.serving.replay import Settings, merge, simulate
from perfmodel.serving.requests import Requests

AMPLE = 1e9


def both(clock, kv_tokens, requests, role="colocated", *, policy="chunked", block=1, swap=None):
    """Outcomes of the event simulation and of the naive one."""
    how = Settings(policy=policy, block_tokens=block, swap_seconds_per_token=swap)
    fast = simulate(clock, kv_tokens, requests, role, how)
    slow = naive.simulate(clock, kv_tokens, requests, role, block=block, policy=policy, swap=swap)
    return fast, slow


def assert_same(fast, slow, requests):
    np.testing.assert_allclose(fast.ttft, slow.first - requests.arrival, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fast.finish, slow.finish, rtol=1e-9)
    more = requests.output - 1
    tpot = np.where(more > 0, (slow.finish - slow.first) / np.maximum(more, 1), np.nan)
    np.testing.assert_allclose(fast.tpot, tpot, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fast.longest_gap, slow.longest, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(fast.preemptions, slow.preempted)
    np.testing.assert_array_equal(fast.cached, slow.cached)
    assert fast.gaps.tokens.sum() == len(slow.gaps)
    if slow.gaps:
        for p in (0.01, 0.5, 0.9, 0.99):
            # Gaps of one run of steps are told apart to half a per cent.
            assert fast.percentile("itl", p) == pytest.approx(
                float(np.percentile(slow.gaps, p * 100, method="inverted_cdf")), rel=0.006
            )


@pytest.mark.parametrize("policy", ["chunked", "whole", "static"])
@pytest.mark.parametrize("rate", [2.0, 12.0])
def test_500_requests_equal_the_step_by_step_simulation(clock, poisson, policy, rate):
    requests = poisson(500, rate, 1)
    fast, slow = both(clock, AMPLE, requests, policy=policy)
    assert_same(fast, slow, requests)
    assert fast.preempted == 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_500_requests_of_one_phase_equal_the_step_by_step_simulation(clock, poisson, role):
    requests = poisson(500, 12.0, 1)
    fast, slow = both(clock, AMPLE, requests, role)
    assert_same(fast, slow, requests)


@pytest.mark.parametrize(
    ("role", "policy", "block", "swap"),
    [("colocated", "chunked", 16, None), ("colocated", "chunked", 1, 1e-6), ("colocated", "whole", 16, None),
     ("decode", "chunked", 16, None), ("decode", "chunked", 16, 1e-6)],
)  # fmt: skip
def test_500_requests_under_kv_pressure_equal_the_step_by_step_simulation(clock, poisson, role, policy, block, swap):
    requests = poisson(500, 20.0, 2)
    fast, slow = both(clock, 8000.0, requests, role, policy=policy, block=block, swap=swap)
    assert_same(fast, slow, requests)
    assert fast.preempted > 20
    assert fast.usage.kv_peak[0] == pytest.approx(1.0, abs=0.01)


def test_static_batches_under_kv_pressure_equal_the_step_by_step_simulation(clock, poisson):
    requests = poisson(200, 5.0, 2)
    fast, slow = both(clock, 8000.0, requests, policy="static", block=16)
    assert_same(fast, slow, requests)
    assert fast.preempted == 0
    assert slow.most <= 8000 // 16


def test_prompts_of_many_chunks_equal_the_step_by_step_simulation(clock, poisson):
    requests = poisson(60, 1.0, 3, inputs=(9000, 40000), outputs=(1, 60))
    fast, slow = both(clock, 60000.0, requests, block=16)
    assert_same(fast, slow, requests)
    assert fast.preempted > 0


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    rate=st.floats(0.5, 200.0),
    kv_tokens=st.floats(3400.0, 20000.0),
    role=st.sampled_from(["colocated", "prefill", "decode"]),
    policy=st.sampled_from(["chunked", "whole", "static"]),
    block=st.sampled_from([1, 7, 16]),
    swap=st.sampled_from([None, 1e-6]),
)
def test_any_load_and_cache_equals_the_step_by_step_simulation(
    clock, poisson, seed, rate, kv_tokens, role, policy, block, swap
):
    role = "colocated" if policy == "static" else role
    requests = poisson(40, rate, seed)
    fast, slow = both(clock, kv_tokens, requests, role, policy=policy, block=block, swap=swap)
    assert_same(fast, slow, requests)
    assert slow.most <= kv_tokens // block


@pytest.mark.parametrize("kv_tokens", [AMPLE, 8000.0])
def test_every_request_finishes_once_and_gets_the_tokens_it_asked_for(clock, poisson, kv_tokens):
    requests = poisson(300, 20.0, 4)
    fast, slow = both(clock, kv_tokens, requests)
    # The naive simulator counts tokens; equal finishing times tie the event simulation to that count.
    np.testing.assert_array_equal(slow.produced, requests.output)
    assert_same(fast, slow, requests)
    assert np.all(np.isfinite(fast.finish))
    assert np.all(fast.ttft > 0)
    assert fast.gaps.tokens.sum() == (requests.output - 1).sum()


def test_gaps_add_up_to_the_time_from_first_to_last_token(clock, poisson):
    """Every sequence is in exactly one gap at any time between its first and last token."""
    requests = poisson(300, 12.0, 4)
    for policy in ("chunked", "whole"):
        fast = simulate(clock, 8000.0, requests, settings=Settings(policy=policy))
        assert float(fast.gaps.seconds @ fast.gaps.tokens) == pytest.approx((fast.e2e - fast.ttft).sum(), rel=1e-4)


def test_a_single_request_takes_its_prefill_and_its_decode_steps(clock):
    one = Requests(np.zeros(1), np.array([700.0]), np.array([5.0]))
    fast = simulate(clock, AMPLE, one)
    prefill = clock.step(0, 0.0, [(700.0, 0.0)])
    # The first decode step attends the prompt and the first output token.
    steps = [clock.decode(1, 701.0 + i) for i in range(4)]
    assert fast.ttft[0] == pytest.approx(prefill, rel=1e-12)
    assert fast.tpot[0] == pytest.approx(sum(steps) / 4, rel=1e-12)
    assert fast.longest_gap[0] == pytest.approx(max(steps), rel=1e-12)
    assert fast.usage.busy[0] == pytest.approx(fast.finish[0], rel=1e-12)


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
    fast = simulate(clock, 210.0, two, settings=Settings(block_tokens=1))
    assert fast.preemptions.tolist() == [0, 1]
    now = clock.step(0, 0.0, [(100.0, 0.0), (100.0, 0.0)])
    now += sum(clock.decode(2, 202.0 + 2 * i) for i in range(5))
    dropped = now
    now += sum(clock.decode(1, 106.0 + i) for i in range(14))
    assert fast.finish[0] == pytest.approx(now, rel=1e-12)
    now += clock.step(0, 0.0, [(106.0, 0.0)])
    assert fast.longest_gap[1] == pytest.approx(now - dropped, rel=1e-12)
    now += sum(clock.decode(1, 107.0 + i) for i in range(13))
    assert fast.finish[1] == pytest.approx(now, rel=1e-12)


def test_swapping_by_hand(clock):
    """As above, but the second's 105 computed tokens move out and back at 1 us each, and nothing is computed twice."""
    two = Requests(np.zeros(2), np.full(2, 100.0), np.full(2, 20.0))
    fast = simulate(clock, 210.0, two, settings=Settings(block_tokens=1, swap_seconds_per_token=1e-6))
    now = clock.step(0, 0.0, [(100.0, 0.0), (100.0, 0.0)])
    now += sum(clock.decode(2, 202.0 + 2 * i) for i in range(5))
    now += 105e-6 + sum(clock.decode(1, 106.0 + i) for i in range(14))
    assert fast.finish[0] == pytest.approx(now, rel=1e-12)
    now += 105e-6 + sum(clock.decode(1, 106.0 + i) for i in range(14))
    assert fast.finish[1] == pytest.approx(now, rel=1e-12)


def test_whole_blocks_leave_room_for_fewer_sequences(clock):
    """Prompts of 17 tokens with one more need 18 tokens, or two blocks of 16: in 64 tokens fit 3 of them, or 2."""
    many = Requests(np.zeros(6), np.full(6, 17.0), np.full(6, 2.0))
    single, blocks = (simulate(clock, 64.0, many, settings=Settings(block_tokens=b)) for b in (1, 16))
    assert np.unique(single.ttft.round(9)).size == 2
    assert np.unique(blocks.ttft.round(9)).size == 3


def test_a_static_batch_by_hand(clock):
    """Prompts of 50 and 100 tokens are prefilled as two of 100; both slots run until the longer answer ends. The third
    comes a moment later and waits for that."""
    three = Requests(np.array([0.0, 0.0, 1e-3]), np.array([50.0, 100.0, 30.0]), np.array([3.0, 6.0, 2.0]))
    fast = simulate(clock, AMPLE, three, settings=Settings(policy="static"))
    prefill = clock.step(0, 0.0, [(100.0, 0.0), (100.0, 0.0)])
    steps = [clock.decode(2, 202.0 + 2 * i) for i in range(5)]
    assert fast.finish[0] == pytest.approx(prefill + sum(steps[:2]), rel=1e-12)
    assert fast.finish[1] == pytest.approx(prefill + sum(steps), rel=1e-12)
    assert fast.finish[2] - fast.arrival[2] - fast.ttft[2] == pytest.approx(clock.decode(1, 31.0), rel=1e-9)
    assert fast.ttft[2] == pytest.approx(fast.finish[1] + clock.step(0, 0.0, [(30.0, 0.0)]) - 1e-3, rel=1e-12)


def test_whole_prompts_make_others_wait_in_one_piece(clock):
    """One sequence decodes when a prompt of 4000 tokens comes: whole, its next token waits for the pass and its own step;
    in chunks of 512 no gap is that long."""
    two = Requests(np.array([0.0, 0.1]), np.array([100.0, 4000.0]), np.array([200.0, 2.0]))
    whole = simulate(clock, AMPLE, two, settings=Settings(policy="whole"))
    chunks = simulate(clock, AMPLE, two, settings=Settings(chunk=512))
    pass_ = clock.step(0, 0.0, [(4000.0, 0.0)])
    assert pass_ < whole.longest_gap[0] < pass_ + 2 * clock.decode(1, 300.0)
    assert chunks.longest_gap[0] < whole.longest_gap[0] / 3
    assert whole.ttft[1] < chunks.ttft[1]


def test_layers_instead_of_chunks_take_the_clock_of_whole_prompts(estimator, poisson):
    """A prompt of 1000 tokens in a budget of 513 beside one sequence: two steps of half the layers each."""
    clock = LayeredClock(estimator, 1000.0, 5000.0)
    two = Requests(np.array([0.0, 0.1]), np.array([100.0, 1000.0]), np.array([50.0, 2.0]))
    fast = simulate(clock, AMPLE, two, settings=Settings(policy="layered", chunk=501))
    decoded = int(np.searchsorted(np.cumsum([clock.step(0, 0.0, [(100.0, 0.0)], [100.0])]
                                           + [clock.decode(1, 101.0 + i) for i in range(40)]), 0.1)) * 1.0
    began = clock.step(0, 0.0, [(100.0, 0.0)], [100.0]) + sum(clock.decode(1, 101.0 + i) for i in range(int(decoded)))
    first = clock.step(1, 101.0 + decoded, [(500.0, 0.0)], [1000.0])
    second = clock.step(1, 102.0 + decoded, [(500.0, 500.0)], [1000.0])
    assert fast.ttft[1] == pytest.approx(began + first + second - 0.1, rel=1e-9)


@pytest.fixture(scope="module")
def split_clock(estimator):
    return policy_clock(estimator, 1000.0, "split", prefill_share=0.5)


def test_side_by_side_decoding_goes_on_during_a_prompt_by_hand(split_clock):
    """One sequence decodes when a prompt of 4000 tokens comes: its pass begins with the next decode step, decode steps keep
    their length, and the prompt's token comes at the end of the pass."""
    two = Requests(np.array([0.0, 0.5]), np.array([100.0, 4000.0]), np.array([200.0, 3.0]))
    fast = simulate(split_clock, AMPLE, two, settings=Settings("split"))
    first = split_clock.prefill_side.step(0, 0.0, [(100.0, 0.0)])
    ends = first + np.cumsum([split_clock.decode(1, 101.0 + i) for i in range(199)])
    start = ends[np.searchsorted(ends, 0.5)]
    pass_ = split_clock.prefill_side.step(0, 0.0, [(4000.0, 0.0)])
    assert fast.ttft.tolist() == pytest.approx([first, start + pass_ - 0.5], rel=1e-9)
    # While the pass runs the other gets its tokens as before; with both decoding a step is a little longer.
    assert fast.longest_gap[0] < split_clock.decode(2, 4500.0) < pass_ / 5
    joins = ends[np.searchsorted(ends, start + pass_)]
    steps = int(np.searchsorted(ends, joins))
    assert fast.longest_gap[1] == pytest.approx(joins + split_clock.decode(2, 102.0 + steps + 4001.0) - start - pass_, rel=1e-6)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), rate=st.floats(0.5, 100.0), kv_tokens=st.floats(3400.0, 20000.0), swap=st.sampled_from([None, 1e-6]))
def test_side_by_side_serves_every_token_once(split_clock, poisson, seed, rate, kv_tokens, swap):
    requests = poisson(40, rate, seed)
    fast = simulate(split_clock, kv_tokens, requests, settings=Settings("split", swap_seconds_per_token=swap))
    assert np.all(np.isfinite(fast.finish))
    assert fast.gaps.tokens.sum() == (requests.output - 1).sum()
    assert float(fast.gaps.seconds @ fast.gaps.tokens) == pytest.approx((fast.e2e - fast.ttft).sum(), rel=1e-3, abs=1e-6)
    assert fast.usage.kv_peak[0] <= 1


def test_littles_law_holds(clock, poisson):
    """Mean number in the instance = rate x mean residence, over the span from the first arrival to the last finish."""
    requests = poisson(400, 8.0, 5)
    fast, slow = both(clock, AMPLE, requests)
    residence = fast.e2e.sum()
    # A request arrives in the middle of a step and is seen from the next on: less than one step each is not counted.
    longest_step = clock.step(clock.max_batch, 3300.0 * clock.max_batch, [(float(clock.chunk), 0.0)])
    assert slow.presence <= residence * (1 + 1e-9)
    assert residence - slow.presence < len(requests) * longest_step
    assert slow.presence == pytest.approx(residence, rel=0.05)


def test_mean_cache_use_is_the_blocks_times_seconds_of_all_requests(clock, poisson):
    """Against the naive clock of one request at a time: prompts held during prefill, then growing by a token a step."""
    one = Requests(np.zeros(1), np.array([640.0]), np.array([200.0]))
    fast = simulate(clock, 1000.0, one, settings=Settings(block_tokens=1))
    times = [clock.step(0, 0.0, [(640.0, 0.0)]), *(clock.decode(1, 641.0 + i) for i in range(199))]
    held = [641.0, *(641.0 + i + 0.5 for i in range(199))]
    expected = float(np.dot(times, held)) / sum(times) / 1000.0
    # The simulation takes the mean of a run's ends for the run.
    assert fast.usage.kv_mean[0] == pytest.approx(expected, rel=0.02)


def test_a_request_larger_than_the_cache_is_rejected_and_the_others_go_on(clock):
    two = Requests(np.zeros(2), np.array([700.0, 100.0]), np.array([5.0, 5.0]))
    fast = simulate(clock, 600.0, two)
    assert fast.rejected.tolist() == [True, False]
    assert np.isnan(fast.finish[0])
    assert np.isfinite(fast.finish[1])
    assert fast.attainment(ttft=1e9) == 0.5
    assert fast.percentile("ttft", 0.99) == np.inf


def test_what_waits_longer_than_the_timeout_is_rejected(clock, poisson):
    requests = poisson(300, 60.0, 6)
    patient = simulate(clock, AMPLE, requests)
    hasty = simulate(clock, AMPLE, requests, settings=Settings(timeout=0.5, max_batch=8))
    assert not patient.rejected.any()
    assert 0 < hasty.rejected.sum() < 300
    # Whoever was served had begun within the limit, but for the step that ran and the own prefill.
    longest = clock.step(8, 8 * 3300.0, [(float(clock.chunk), 0.0)])
    assert np.nanmax(hasty.ttft) < 0.5 + 2 * longest


def test_fewer_places_in_the_batch_lengthen_the_wait_and_shorten_the_gaps(clock, poisson):
    requests = poisson(300, 30.0, 6)
    wide, narrow = (simulate(clock, AMPLE, requests, settings=Settings(max_batch=b)) for b in (64, 8))
    assert narrow.percentile("ttft", 0.5) > wide.percentile("ttft", 0.5)
    assert narrow.percentile("tpot", 0.5) < wide.percentile("tpot", 0.5)


def test_merge_keeps_every_request(clock, poisson):
    parts = [simulate(clock, AMPLE, poisson(30, 5.0, seed)) for seed in (1, 2)]
    whole = merge(parts)
    assert len(whole) == 60
    assert whole.percentile("ttft", 1.0) == max(p.ttft.max() for p in parts)
    assert whole.instance.tolist() == [0] * 30 + [1] * 30
    assert whole.gaps.tokens.sum() == sum(p.gaps.tokens.sum() for p in parts)
    assert whole.usage.requests.tolist() == [30, 30]
