"""Fleets: routing, hand-off between pools, sessions, and what stays true however requests are dealt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.serving.replay import Affinity, Fleet, Handoff, Pool, Settings, merge, simulate
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import read_trace
from perfmodel.spec.workload import Limit, Trace

ROOT = Path(__file__).parents[2]
AMPLE = 1e9
ROUTINGS = ("random", "round-robin", "least-loaded", "prefix-affine")


def bursts(poisson, n, rate, seed):
    """Requests in clumps of about ten."""
    requests = poisson(n, rate / 10, seed)
    rng = np.random.default_rng(seed)
    return requests.at(np.sort(np.repeat(requests.arrival[: n // 10], 10) + rng.uniform(0, 0.02, n // 10 * 10)))


def test_round_robin_is_every_nth_request_on_an_instance_of_its_own(clock, poisson):
    requests = poisson(200, 20.0, 1)
    fleet = Fleet((Pool(clock, 8000.0, 3),)).run(requests)
    alone = merge([simulate(clock, 8000.0, requests.take(slice(i, None, 3))) for i in range(3)])
    order = np.argsort(alone.arrival)
    for name in ("ttft", "tpot", "finish", "longest_gap", "preemptions"):
        np.testing.assert_allclose(getattr(fleet, name), getattr(alone, name)[order], rtol=1e-9, atol=1e-12)
    assert fleet.gaps.tokens.sum() == alone.gaps.tokens.sum()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_seed_repeats_and_every_request_ends(clock, poisson, routing):
    requests = poisson(200, 30.0, 2)
    fleet = Fleet((Pool(clock, 9000.0, 3, share=0.5), Pool(clock, 20000.0, 2, share=0.5)), routing)
    one, two, other = (fleet.run(requests, seed=s) for s in (7, 7, 8))
    np.testing.assert_array_equal(one.ttft, two.ttft)
    assert not np.array_equal(one.ttft, other.ttft)
    assert np.all(np.isfinite(one.finish))
    assert one.usage.requests.sum() == 200
    assert one.gaps.tokens.sum() == (requests.output - 1).sum()


def test_shortest_queues_beat_chance_on_bursts(clock, poisson):
    requests = bursts(poisson, 600, 40.0, 3)
    tail = {
        kind: Fleet((Pool(clock, AMPLE, 6),), kind).run(requests).percentile("ttft", 0.95)
        for kind in ("random", "least-loaded")
    }
    assert tail["least-loaded"] < 0.8 * tail["random"]


def test_affinity_hits_more_and_balances_less_on_mooncakes_conversations(clock):
    """Of the trace's first 1,500 requests; the hit rate of an infinite cache bounds both."""
    whole = read_trace(Trace(file="examples/traces/mooncake-conversation.csv.gz"), ROOT).take(slice(0, 1500))
    requests = whole.at(whole.arrival * 4)
    how = Settings(prefix_caching=True, block_tokens=16, chunk=8192)
    run = {
        kind: Fleet((Pool(clock, 4e5, 4, settings=how),), kind, Affinity(load_gap=8)).run(requests)
        for kind in ("round-robin", "prefix-affine")
    }
    bound = Fleet((Pool(clock, 1e9, 1, settings=how),)).run(requests).hit_rate
    turns, affine = run["round-robin"], run["prefix-affine"]
    assert turns.hit_rate * 1.2 < affine.hit_rate <= bound
    assert np.ptp(affine.usage.requests) > np.ptp(turns.usage.requests)


def test_pools_take_the_lengths_of_their_range_and_their_share(clock, poisson):
    requests = poisson(2000, 50.0, 4)
    pools = (
        Pool(clock, AMPLE, input_tokens=(0, 500), share=0.25), Pool(clock, AMPLE, input_tokens=(0, 500), share=0.75),
        Pool(clock, AMPLE, input_tokens=(501, 2000)),
    )  # fmt: skip
    o = Fleet(pools).run(requests)
    short = requests.input <= 500
    assert np.all(o.instance[~short] == 2)
    quarter = np.mean(o.instance[short] == 0)
    assert quarter == pytest.approx(0.25, abs=0.04)
    # Prompts beyond every range go to the nearest.
    assert np.all(o.instance[requests.input > 2000] == 2)


# -- prefill and decode apart ------------------------------------------------------------------------------------------


def apart(clock, handoff, *, prefill_kv=AMPLE, decode_kv=AMPLE, replicas=(1, 1)):
    return Fleet((
        Pool(clock, prefill_kv, replicas[0], "prefill", handoff=handoff), Pool(clock, decode_kv, replicas[1], "decode"),
    ))  # fmt: skip


def test_hand_over_is_the_chain_of_both_instances(clock, poisson):
    """A prefill instance, a link that serves one cache after the other, a decode instance: each computed alone."""
    requests = poisson(300, 8.0, 5)
    requests = requests.take(requests.output > 1)
    per_token, latency = 2e-5, 0.01
    o = apart(clock, Handoff(per_token, latency)).run(requests)
    first = simulate(clock, AMPLE, requests, "prefill").finish
    free, ready = 0.0, np.empty(len(requests))
    for i in np.argsort(first, kind="stable"):
        free = max(free, first[i]) + per_token * requests.input[i]
        ready[i] = free + latency
    order = np.argsort(ready, kind="stable")
    later = simulate(clock, AMPLE, requests.take(order).at(ready[order]), "decode").finish
    np.testing.assert_allclose(o.arrival + o.ttft, first, rtol=1e-9)
    np.testing.assert_allclose(o.finish[order], later, rtol=1e-9)
    np.testing.assert_allclose(o.tpot, (o.finish - first) / (requests.output - 1), rtol=1e-9)
    # The second token waits for the cache.
    assert np.all(o.longest_gap >= (ready - first) * (1 - 1e-9))


def test_one_cache_over_the_link_by_hand(clock):
    """1000 tokens at 1 ms and 5 layers: with overlap the layers leave as they are computed, the first after a fifth of
    the prefill, and all take a second; without, the second begins when the prefill ends."""
    one = Requests(np.zeros(1), np.array([1000.0]), np.array([2.0]))
    step = clock.step(0, 0.0, [(1000.0, 0.0)])
    decode = clock.decode(1, 1001.0)
    for layers, ready in ((1, step + 1.0), (5, step / 5 + 1.0)):
        o = apart(clock, Handoff(1e-3, 0.25, layers=layers)).run(one)
        assert o.ttft[0] == pytest.approx(step, rel=1e-12)
        assert o.finish[0] == pytest.approx(ready + 0.25 + decode, rel=1e-9)
    # On a fast link only the last layer is left when the prefill ends, in messages of whole blocks: 1008 tokens.
    fast = Handoff(step / 1e4, block_tokens=16, layers=5)
    assert apart(clock, fast).run(one).finish[0] == pytest.approx(step + 1008 * step / 1e4 / 5 + decode, rel=1e-9)


def test_prefill_holds_its_cache_until_the_acknowledgement(clock):
    """Two prompts of 1000 tokens and a prefill cache of 1500: the second begins when the first's hand-off is through."""
    two = Requests(np.zeros(2), np.full(2, 1000.0), np.full(2, 2.0))
    step = clock.step(0, 0.0, [(1000.0, 0.0)])
    o = apart(clock, Handoff(1e-3, 0.25), prefill_kv=1500.0).run(two)
    assert o.ttft[1] == pytest.approx(step + 1.25 + step, rel=1e-9)
    assert apart(clock, Handoff(1e-3, 0.25)).run(two).ttft[1] < o.ttft[1] - 1.0


def test_decode_takes_a_cache_when_it_has_space(clock):
    """Two prompts of 1000 tokens and a decode cache of 1500: the second moves when the first has all its tokens."""
    two = Requests(np.zeros(2), np.full(2, 1000.0), np.full(2, 50.0))
    o = apart(clock, Handoff(1e-4), decode_kv=1500.0).run(two)
    assert o.finish[0] < o.finish[1]
    alone = sum(clock.decode(1, 1001.0 + i) for i in range(49))
    assert o.finish[1] - o.finish[0] == pytest.approx(0.1 + alone, rel=1e-9)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), decode_kv=st.floats(3400.0, 2e4), prefill_kv=st.floats(3400.0, 2e4), layers=st.integers(1, 8))
def test_no_memory_blocks_a_fleet_for_ever(clock, poisson, seed, decode_kv, prefill_kv, layers):
    requests = poisson(60, 30.0, seed)
    o = apart(clock, Handoff(1e-5, 1e-3, layers=layers), prefill_kv=prefill_kv, decode_kv=decode_kv, replicas=(2, 2)).run(requests)
    assert np.all(np.isfinite(o.finish))
    assert np.all(o.usage.kv_peak <= 1.0)
    assert o.gaps.tokens.sum() == (requests.output - 1).sum()
    assert float(o.gaps.seconds @ o.gaps.tokens) == pytest.approx((o.e2e - o.ttft).sum(), rel=1e-3)


def test_a_slower_link_lengthens_every_answer(clock, poisson):
    requests = poisson(200, 10.0, 6)
    times = [apart(clock, Handoff(s)).run(requests).percentile("tpot", 0.5) for s in (0.0, 2e-5, 2e-4)]
    assert times[0] < times[1] < times[2]


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_a_turn_comes_when_its_user_has_thought(clock):
    """Three turns 2 s of thought apart, the trace's own times of the later ones notwithstanding."""
    r = Requests(np.array([0.0, 0.1, 0.2]), np.full(3, 500.0), np.full(3, 20.0), session=np.zeros(3, int),
                 think=np.array([np.nan, 2.0, 2.0]))  # fmt: skip
    o = simulate(clock, AMPLE, r)
    np.testing.assert_allclose(o.arrival[1:], o.finish[:-1] + 2.0)
    np.testing.assert_allclose(o.ttft, o.ttft[0], rtol=1e-9)


def test_closed_loops_slow_down_with_the_server_and_open_ones_do_not(clock):
    n = 200
    rng = np.random.default_rng(1)
    r = Requests(np.sort(rng.uniform(0, 20, n)), np.full(n, 1500.0), np.full(n, 100.0), session=np.arange(n) % 40,
                 think=np.where(np.arange(n) < 40, np.nan, 0.2))  # fmt: skip
    closed = simulate(clock, AMPLE, r, settings=Settings(max_batch=4))
    opened = simulate(clock, AMPLE, Requests(r.arrival, r.input, r.output), settings=Settings(max_batch=4))
    assert closed.arrival.max() > opened.arrival.max()
    # 40 users wait for at most 39 others.
    assert closed.ttft.max() < opened.ttft.max()
    assert np.all(np.isfinite(closed.finish))


# -- outcomes ----------------------------------------------------------------------------------------------------------


def test_attainment_and_goodput_by_hand(clock):
    """Four requests far apart: TTFT of prompts of 100, 1000, 2000, 3000 tokens against a limit of the third's."""
    r = Requests(np.array([0.0, 10.0, 20.0, 30.0]), np.array([100.0, 1000.0, 2000.0, 3000.0]), np.array([1.0, 9.0, 9.0, 9.0]))
    o = simulate(clock, AMPLE, r)
    limit = float(o.ttft[2]) * 1.001
    assert o.met(ttft=limit).tolist() == [True, True, True, False]
    assert o.attainment(ttft=limit) == 0.75
    assert o.goodput(ttft=limit) == pytest.approx(3 / (o.finish[3] - o.arrival[0]))
    # Every TPOT misses a limit of nothing, but the request of one token has none.
    assert o.met(ttft=limit, tpot=1e-9).tolist() == [True, False, False, False]
    # A limit that grows with the input lets the last one in.
    assert o.attainment(ttft=Limit(limit, 1e-3)) == 1.0
    assert o.percentile("ttft", 0.5) == pytest.approx(float(np.median(o.ttft)))


def test_preempted_requests_are_misses(clock, poisson):
    o = simulate(clock, 8000.0, poisson(300, 20.0, 2))
    assert (o.preemptions > 0).sum() > 0
    assert o.attainment(ttft=1e9, tpot=1e9) == 1 - np.mean(o.preemptions > 0)


def test_the_worst_window_sees_the_burst_that_the_whole_hides(clock, poisson):
    """A calm hour with a burst of 5 s in its middle: two per cent of the requests, all of the worst window's tail."""
    calm, burst = poisson(2000, 1.0, 7), poisson(60, 60.0, 8)
    both = Requests.join([calm, burst.at(burst.arrival + 1000.0)])
    o = simulate(clock, AMPLE, both)
    worst, start = o.worst_window("ttft", 0.9, 60.0)
    assert abs(start - 1000.0) <= 60.0
    assert worst > 2 * o.percentile("ttft", 0.9)
    assert o.worst_window("itl", 0.9, 60.0)[0] > o.percentile("itl", 0.9)
    # A window as long as the replay is the replay.
    assert o.worst_window("ttft", 0.9, 1e9)[0] == pytest.approx(o.percentile("ttft", 0.9))


def test_seconds_before_the_engine_count_in_the_first_token(clock, poisson):
    requests = poisson(100, 5.0, 9)
    fleet = Fleet((Pool(clock, AMPLE),))
    plain, late = fleet.run(requests), fleet.run(requests, front=np.full(100, 0.3))
    np.testing.assert_allclose(late.ttft, plain.ttft + 0.3, rtol=1e-6)
    np.testing.assert_allclose(late.tpot, plain.tpot, rtol=1e-6, equal_nan=True)


def test_progress_ends_with_all_requests(clock, poisson):
    seen: list[tuple[int, int]] = []
    Fleet((Pool(clock, AMPLE),)).run(poisson(150, 5.0, 9), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (150, 150)
    assert [a for a, _ in seen] == sorted({a for a, _ in seen})


def test_what_cannot_be_simulated_is_refused(clock):
    with pytest.raises(SpecError, match=r"'chunkd' \(did you mean 'chunked'\?\)"):
        Pool(clock, AMPLE, settings=Settings("chunkd"))
    with pytest.raises(SpecError, match="static"):
        Pool(clock, AMPLE, role="decode", settings=Settings("static"))
    with pytest.raises(SpecError, match="LayeredClock"):
        Pool(clock, AMPLE, settings=Settings("layered"))


def test_what_is_found_is_not_computed_and_is_fetched_beside_the_step(clock):
    """A prompt whose cache is there but for 100 tokens prefills those behind the rest, and no faster than it is fetched."""
    requests = Requests(np.zeros(1), np.array([1000]), np.array([1]))
    found = np.array([900])
    for fetch, seconds in ((0.0, clock.step(0, 0.0, [(100, 900)])), (1e-3, 0.9)):
        fleet = Fleet((Pool(clock, 1e6, settings=Settings(fetch_seconds_per_token=fetch)),))
        assert fleet.run(requests, found=found).ttft[0] == pytest.approx(seconds)
    whole = Fleet((Pool(clock, 1e6),)).run(requests)
    assert whole.ttft[0] == pytest.approx(clock.step(0, 0.0, [(1000, 0)]))


def test_requests_with_more_in_the_cache_pass_so_many_others(clock):
    """Behind one that runs wait three; the two that are half cached pass the one that is not, at most so often."""
    long = int(clock.chunk)
    requests = Requests(np.array([0.0, 1e-6, 2e-6, 3e-6]), np.full(4, long), np.ones(4, int))
    found = np.array([0, 0, long // 2, long // 2])

    def order(most: int) -> list[int]:
        fleet = Fleet((Pool(clock, 1e6, settings=Settings(max_batch=1, overtaken=most)),))
        return np.argsort(fleet.run(requests, found=found).ttft, kind="stable").tolist()

    assert order(0) == [0, 1, 2, 3]
    assert order(1) == [0, 2, 1, 3]
    assert order(2) == [0, 2, 3, 1]
