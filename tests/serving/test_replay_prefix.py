"""Prefix cache of the event simulation: equal to the naive one, by hand, and moving the right way."""

from __future__ import annotations

from dataclasses import replace

import naive_replay as naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.serving.replay import Affinity, Fleet, Handoff, Pool, Settings, Tier, simulate
from perfmodel.serving.replay.prefix import answer_ids
from perfmodel.serving.requests import Blocks, Requests

TOKENS = 64
CACHED = Settings(prefix_caching=True, block_tokens=16)


def conversations(users, turns, seed, *, rate=4.0, system=3):
    """Users whose every prompt is a shared system prompt of `system` blocks, all they and the model said, and new text."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        at, length, next_id = rng.uniform(0, users / rate), system * TOKENS, 1000 * (user + 1)
        ids = list(range(system))
        for _ in range(turns):
            length += int(rng.integers(10, 300))
            answer = int(rng.integers(1, 200))
            while len(ids) * TOKENS < length:
                ids.append(next_id + len(ids))
            rows.append((at, length, answer, user, list(ids)))
            # The partial last block is another one in the next prompt, where it is full.
            ids = ids[: length // TOKENS]
            next_id += 500
            length += answer
            at += rng.exponential(users / rate)
    rows.sort(key=lambda r: r[0])
    start = np.concatenate([[0], np.cumsum([len(r[4]) for r in rows])])
    arrival, input_, output, session = (np.array([r[k] for r in rows], float) for k in range(4))
    blocks = Blocks(np.concatenate([r[4] for r in rows]), start, TOKENS)
    return Requests(arrival - arrival[0], input_, output, blocks, session.astype(int))


def assert_same(clock, kv_tokens, requests, how):
    answers = answer_ids(requests)
    fast = simulate(clock, kv_tokens, requests, settings=how)
    slow = naive.simulate(
        clock, kv_tokens, requests, block=how.block_tokens, caching=True, answers=answers, policy=how.policy,
        swap=how.swap_seconds_per_token, overlap=how.fetch_overlaps,
        lower=[(t.tokens, t.seconds_per_token) for t in how.tiers],
    )  # fmt: skip
    np.testing.assert_array_equal(fast.cached, slow.cached)
    np.testing.assert_allclose(fast.finish, slow.finish, rtol=1e-9)
    np.testing.assert_allclose(fast.ttft, slow.first - requests.arrival, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(fast.preemptions, slow.preempted)
    return fast


@pytest.mark.parametrize("kv_tokens", [1e6, 8000.0])
def test_500_requests_with_a_prefix_cache_equal_the_step_by_step_simulation(clock, kv_tokens):
    requests = conversations(100, 5, 1)
    fast = assert_same(clock, kv_tokens, requests, CACHED)
    assert fast.hit_rate > 0.1
    assert (fast.preempted > 0) == (kv_tokens < 1e4)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    kv_tokens=st.floats(3400.0, 30000.0),
    lower=st.lists(st.floats(0.0, 9000.0), max_size=2),
    policy=st.sampled_from(["chunked", "whole"]),
    block=st.sampled_from([1, 16, 48]),
    swap=st.sampled_from([None, 1e-6]),
    overlap=st.booleans(),
)
def test_any_cache_equals_the_step_by_step_simulation(clock, seed, kv_tokens, lower, policy, block, swap, overlap):
    tiers = tuple(Tier(f"tier {n}", room, 1e-5 * (n + 1)) for n, room in enumerate(lower))
    how = Settings(policy, block_tokens=block, swap_seconds_per_token=swap, prefix_caching=True, tiers=tiers,
                   fetch_overlaps=overlap)  # fmt: skip
    assert_same(clock, kv_tokens, conversations(12, 4, seed, rate=20.0), how)


def two(second, *, output=1.0, gap=5.0):
    """Two requests, the second with the given block ids; the first has blocks 0 to 3 of 64 tokens and 10 tokens more."""
    ids = [0, 1, 2, 3, 4]
    blocks = Blocks(np.array(ids + second), np.array([0, 5, 5 + len(second)]), TOKENS)
    return Requests(np.array([0.0, gap]), np.array([266.0, TOKENS * len(second)]), np.array([output, 1.0]), blocks,
                    np.array([0, 0]))  # fmt: skip


def test_hits_by_hand(clock):
    """Of blocks 0 1 7 8 the first two are found, 128 tokens; of 0 1 2 3 all, but one token is always computed."""
    for second, hit in (([0, 1, 7, 8], 128), ([0, 1, 2, 3], 255), ([7, 0, 1, 2], 0)):
        fast = simulate(clock, 1e6, two(second), settings=CACHED)
        assert fast.cached.tolist() == [0, hit]
        n = TOKENS * len(second)
        assert fast.ttft[1] == pytest.approx(clock.step(0, 0.0, [(n - hit, hit)]), rel=1e-9)


def test_the_partial_last_block_is_nobodys_prefix(clock):
    fast = simulate(clock, 1e6, two([0, 1, 2, 3, 4]), settings=CACHED)
    assert fast.cached.tolist() == [0, 256]


def test_the_answers_blocks_are_found_by_the_next_turn(clock):
    """266 + 60 tokens fill five blocks; the fifth, called 9 by the next prompt, holds the rest of the prompt and answer."""
    fast = simulate(clock, 1e6, two([0, 1, 2, 3, 9, 10], output=60.0), settings=CACHED)
    assert fast.cached[1] == 5 * TOKENS
    # An answer of 20 tokens does not complete it.
    fast = simulate(clock, 1e6, two([0, 1, 2, 3, 9, 10], output=20.0), settings=CACHED)
    assert fast.cached[1] == 4 * TOKENS


def test_a_block_in_the_making_is_not_found(clock):
    for gap, hit in ((0.0, 0), (1e-4, 255)):  # in the same step, and in the one after
        assert simulate(clock, 1e6, two([0, 1, 2, 3], gap=gap), settings=CACHED).cached.tolist() == [0, hit]


def test_slower_memories_give_back_what_was_evicted(clock):
    """A cache of 384 tokens cannot keep both prompts: the third request finds the first's blocks in host memory, for 256
    tokens x 1 ms, which is longer than its step."""
    blocks = Blocks(np.array([0, 1, 2, 3, 10, 11, 12, 13, 0, 1, 2, 3]), np.array([0, 4, 8, 12]), TOKENS)
    requests = Requests(np.array([0.0, 5.0, 10.0]), np.full(3, 256.0), np.ones(3), blocks, np.array([0, 1, 2]))

    def cached(*tiers, overlaps=True):
        how = Settings(block_tokens=16, prefix_caching=True, tiers=tiers, fetch_overlaps=overlaps)
        return simulate(clock, 384.0, requests, settings=how)

    step = clock.step(0, 0.0, [(1.0, 255.0)])
    none, host, waits = cached(), cached(Tier("dram", 1e4, 1e-3)), cached(Tier("dram", 1e4, 1e-3), overlaps=False)
    ssd = cached(Tier("dram", 0.0, 1e-3), Tier("ssd", 1e4, 4e-3))
    # The tail was evicted first, so that the head is still there: 266 - 64 x 4 + 1 blocks of 64 tokens had to go.
    kept = int(none.cached[2])
    assert 0 < kept < 255
    moved = 256 - kept
    assert host.cached.tolist() == [0, 0, 255]
    assert host.ttft[2] == pytest.approx(max(step, moved * 1e-3), rel=1e-9)
    assert waits.ttft[2] == pytest.approx(step + moved * 1e-3, rel=1e-9)
    assert ssd.ttft[2] == pytest.approx(moved * 4e-3, rel=1e-9)


def test_more_memory_and_popular_prompts_raise_the_hit_rate(clock):
    requests = conversations(60, 6, 3)
    rates = [simulate(clock, kv, requests, settings=CACHED).hit_rate for kv in (6000.0, 20000.0, 1e6)]
    assert rates[0] < rates[1] < rates[2]
    assert simulate(clock, 1e6, conversations(60, 6, 3, system=8), settings=CACHED).hit_rate > rates[2]
    without = simulate(clock, 1e6, requests)
    assert without.hit_rate == 0
    assert without.percentile("ttft", 0.5) > simulate(clock, 1e6, requests, settings=CACHED).percentile("ttft", 0.5)


def test_an_unlimited_cache_hits_what_earlier_prompts_had(clock):
    """Without answers and with time between requests the hits are the longest heads that some earlier prompt had."""
    requests = conversations(30, 5, 4, rate=0.2)
    n = len(requests)
    alone = Requests(requests.arrival * 20, requests.input, np.ones(n), requests.blocks, np.full(n, -1))
    fast = simulate(clock, 1e9, alone, settings=CACHED)
    seen: set[int] = set()
    expected = []
    for i in range(len(alone)):
        ids = alone.blocks.of(i)[: int(alone.input[i] // TOKENS)].tolist()
        head = next((k for k, b in enumerate(ids) if b not in seen), len(ids))
        expected.append(min(head * TOKENS, alone.input[i] - 1))
        seen.update(ids)
    np.testing.assert_array_equal(fast.cached, expected)


def test_affine_routing_hits_more_and_balances_less(clock):
    requests = conversations(120, 6, 5, rate=12.0)
    pool = Pool(clock, 30000.0, 4, settings=CACHED)
    guard = Affinity(load_gap=4, load_ratio=1.2)
    turns, affine = (Fleet((pool,), kind, guard).run(requests) for kind in ("round-robin", "prefix-affine"))
    assert affine.hit_rate > turns.hit_rate + 0.1
    assert np.ptp(affine.usage.requests) > np.ptp(turns.usage.requests)


def test_a_cache_and_padded_batches_exclude_each_other(clock):
    with pytest.raises(SpecError, match="static"):
        Pool(clock, 1e5, settings=Settings("static", prefix_caching=True))


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), apart=st.booleans(), kv_tokens=st.sampled_from([3500.0, 9000.0, 1e6]),
       routing=st.sampled_from(["random", "round-robin", "least-loaded", "prefix-affine"]))  # fmt: skip
def test_sessions_caches_and_hand_over_together_serve_every_token_once(clock, seed, apart, kv_tokens, routing):
    requests = conversations(12, 4, seed, rate=30.0)
    later = np.array([np.any(requests.session[:i] == s) for i, s in enumerate(requests.session)])
    closed = replace(requests, think=np.where(later, 0.3, np.nan))
    pools = (Pool(clock, kv_tokens, 2, "prefill", CACHED, handoff=Handoff(1e-5, 1e-3, 16, 32)), Pool(clock, kv_tokens, 2, "decode"))
    o = Fleet(pools if apart else (Pool(clock, kv_tokens, 3, settings=CACHED),), routing).run(closed, seed=seed)
    assert np.all(np.isfinite(o.finish))
    assert o.gaps.tokens.sum() == (closed.output - 1).sum()
    assert float(o.gaps.seconds @ o.gaps.tokens) == pytest.approx((o.e2e - o.ttft).sum(), rel=2e-3)
    # Every later turn came 0.3 s after its predecessor's answer.
    for s in range(12):
        turns = np.flatnonzero(closed.session == s)
        np.testing.assert_allclose(o.arrival[turns[1:]], o.finish[turns[:-1]] + 0.3)
