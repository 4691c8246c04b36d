"""Prefix hits against a naive LRU, the trace's own count, simulated prefixes and sessions, and hand arithmetic."""

import csv
import gzip
import math
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.serving import prefix, prefix_laws
from perfmodel.serving.prefix_laws import Popularity, Sessions
from perfmodel.serving.requests import Blocks, Requests

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "examples" / "traces" / "mooncake-conversation.csv.gz"
HITS = ROOT / "tests" / "data" / "mooncake-prefix-hits.txt.gz"


def requests(prompts, tokens, arrival=None, lengths=None) -> Requests:
    counts = np.array([len(x) for x in prompts])
    ids = np.array([i for x in prompts for i in x], int)
    blocks = Blocks(ids, np.concatenate([[0], np.cumsum(counts)]), tokens)
    arrival = np.arange(len(prompts), dtype=float) if arrival is None else np.asarray(arrival, float)
    lengths = counts * tokens if lengths is None else lengths
    return Requests(arrival, np.asarray(lengths, float), np.ones(len(prompts)), blocks)


@pytest.fixture(scope="module")
def mooncake() -> Requests:
    """The trace as its columns say, parsed here."""
    with gzip.open(TRACE, "rt", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    ranges = [[part.partition("-") for part in row["hash_id_ranges"].split(";")] for row in rows]
    prompts = [[i for a, _, b in parts for i in range(int(a), int(b or a) + 1)] for parts in ranges]
    arrival = [float(row["timestamp_ms"]) / 1e3 for row in rows]
    return requests(prompts, 512, arrival, [float(row["input_len"]) for row in rows])


class NaiveCache:
    """LRU over blocks of unequal size, one dictionary, one look-up at a time."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.held, self.blocks = capacity, 0.0, OrderedDict()

    def serve(self, ids: list[int], tokens: list[float]) -> float:
        found = 0.0
        for j, block in enumerate(ids):
            if block not in self.blocks:
                break
            found += tokens[j] - (j == len(ids) - 1)
        for block, size in zip(reversed(ids), reversed(tokens), strict=True):
            self.held += 0 if block in self.blocks else size
            self.blocks[block] = size
            self.blocks.move_to_end(block)
        while self.held > self.capacity:
            self.held -= self.blocks.popitem(last=False)[1]
        return found


def naive_lru(r: Requests, capacity: float, homes=None) -> np.ndarray:
    homes = np.zeros(len(r), int) if homes is None else homes
    caches = {h: NaiveCache(capacity) for h in set(homes.tolist())}
    size = r.blocks.tokens
    found = []
    for i in range(len(r)):
        ids = r.blocks.of(i).tolist()
        found.append(caches[homes[i]].serve(ids, [min(size, r.input[i] - size * j) for j in range(len(ids))]))
    return np.array(found)


def trees(paths: list[list[int]]) -> list[list[int]]:
    """Prompts whose ids name whole prefixes: every path of choices gets a number of its own."""
    names: dict[tuple[int, ...], int] = {}
    return [[names.setdefault(tuple(p[: j + 1]), len(names)) for j in range(len(p))] for p in paths]


PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(PATHS, st.integers(0, 60), st.integers(1, 3))
def test_stack_distances_are_a_naive_lru_at_any_size(paths, capacity, replicas):
    r = requests(trees(paths), 4)
    homes = np.arange(len(r)) * 7 % 5 % replicas
    u = prefix.uses(r, homes)
    found = u.cached(capacity, len(r))
    assert found.tolist() == naive_lru(r, capacity, homes).tolist()
    assert np.all(found <= u.cached(capacity + 7, len(r)))
    assert u.cached(math.inf, len(r)).tolist() == naive_lru(r, 1e9, homes).tolist()
    assert np.all(u.cached(math.inf, len(r)) <= r.input - 1)


@pytest.mark.parametrize("capacity", [2e5, 3e6])
def test_real_prompts_with_partial_blocks(mooncake, capacity):
    part = mooncake.take(slice(0, 2500))
    homes = prefix.route(part, 2, "prefix-affine")
    assert prefix.uses(part, homes).cached(capacity, 2500).tolist() == naive_lru(part, capacity, homes).tolist()


def test_infinite_cache_finds_what_the_trace_says_and_quickly(mooncake):
    """The trace's own column prefix_hit_blocks_infinite_cache, request by request."""
    begin = time.process_time()
    u = prefix.uses(mooncake)
    assert time.process_time() - begin < 2
    with gzip.open(HITS, "rt") as stream:
        own = [int(line) for line in stream if not line.startswith("#")]
    hits = np.bincount(u.request[np.isfinite(u.distance)], minlength=len(mooncake))
    assert hits.tolist() == own
    size, found = u.curve()
    assert found[-1] == u.cached(math.inf, len(mooncake)).sum()
    for share in (0.1, 0.5, 0.9):
        k = int(share * size.size)
        k = int(np.searchsorted(size, size[k], "right")) - 1
        assert found[k] == pytest.approx(u.cached(size[k], len(mooncake)).sum())


def test_intervals_and_uses_by_hand():
    """Prompts AB, AC, AB at 0, 10, 30 s: A is used again after 10 and 20 s, B after 30 s."""
    u = prefix.uses(requests([[1, 2], [1, 3], [1, 2]], 4, [0, 10, 30]))
    assert u.depth.tolist() == [4, 0, 4, 0, 4, 0]
    assert u.earlier.tolist() == [0, 0, 0, 1, 1, 2]
    assert u.since.tolist() == [math.inf, math.inf, math.inf, 10, 30, 20]
    assert u.until.tolist() == [30, 10, math.inf, 20, math.inf, math.inf]
    # At the end A is the youngest (4 tokens), then C, then B: 12 tokens hold all three.
    assert u.distance.tolist() == [math.inf, math.inf, math.inf, 4, 12, 4]
    assert u.saved.tolist() == [3, 4, 3, 4, 3, 4]


def test_affinity_keeps_distinct_content_and_random_routing_copies(mooncake):
    part, size = mooncake.take(slice(0, 6000)), 1e6
    found = {
        (kind, n): prefix.cached_tokens(part, size, n, kind, 1.0).sum() / part.input.sum()
        for kind in ("random", "prefix-affine") for n in (1, 8)
    }  # fmt: skip
    assert found["random", 1] == found["prefix-affine", 1]
    # One replica per prefix: about what one cache of eight times the size would find.
    whole = prefix.uses(part).cached(8 * size, len(part)).sum() / part.input.sum()
    assert found["prefix-affine", 8] == pytest.approx(whole, rel=0.1)
    # Dealt at random among n, the chance that the last turn was here is 1/n: with endless caches, not much more.
    assert found["random", 8] < 0.5 * found["prefix-affine", 8]
    assert prefix.cached_tokens(part, size, 8, "least-loaded", 1.0).tolist() == prefix.cached_tokens(
        part, size, 8, "random", 1.0
    ).tolist()  # fmt: skip


def test_imbalance_is_that_of_popular_prefixes_and_a_guard_bounds_it():
    """40 conversations of which one brings a fifth of the work, on 4 replicas: its home gets 0.2 + 0.8/4 = 0.4 on average,
    1.6 times the mean."""
    rng = np.random.default_rng(3)
    n = 4000
    chosen = np.where(rng.random(n) < 0.2, 0, rng.integers(1, 41, n))
    r = requests([[int(c), 1000 + i] for i, c in enumerate(chosen)], 100, np.arange(n) * 0.25)
    affine = prefix.imbalance(r, 4, "prefix-affine")
    assert 1.4 < affine < 1.9
    assert prefix.imbalance(r, 4, "prefix-affine", guard=1.2) < 1.25
    assert prefix.imbalance(r, 4, "random") == 1.0
    # What is passed on finds nothing at first: the guard costs hits.
    free, guarded = (prefix.cached_tokens(r, 3000.0, 4, "prefix-affine", 1.0, guard=g).sum() for g in (None, 1.2))
    assert guarded < free
    # Many small conversations instead: no popular prefix, no imbalance to speak of.
    small = requests([[i % 400, 1000 + i] for i in range(n)], 100, np.arange(n) * 0.25)
    assert prefix.imbalance(small, 4, "prefix-affine") < 1.2


def test_a_prefix_of_all_does_not_send_everything_to_one_replica(mooncake):
    homes = prefix.route(mooncake, 8, "prefix-affine")
    load = np.bincount(homes, mooncake.input, minlength=8)
    assert load.max() / load.mean() < 1.15


def test_busiest_share_of_two_equal_groups_on_two_replicas():
    """Together with probability 1/2: (2 + 1)/2 = 1.5 on average."""
    shares = np.array([0.5, 0.5])
    assert prefix_laws.busiest_share(shares, 2, deals=4000) == pytest.approx(1.5, abs=0.03)
    assert prefix_laws.busiest_share(shares, 2, guard=1.2) == 1.2


@pytest.mark.parametrize("replicas", [1, 4])
def test_popular_prefixes_against_a_simulation(replicas):
    """Che's approximation and 60,000 requests for Zipf prefixes with prompt ends nobody repeats, dealt at random."""
    law, capacity = Popularity(rate=5.0, prefixes=500, exponent=0.9, tokens=100.0, fresh=20.0), 8000.0
    rng = np.random.default_rng(0)
    chosen = rng.choice(500, 60_000, p=law.shares)
    homes = rng.integers(replicas, size=chosen.size)
    caches = [NaiveCache(capacity) for _ in range(replicas)]
    # A prompt end is a block of its own; it is not the last block of a prompt here, so nothing is computed twice.
    found = [caches[h].serve([int(c), -i - 1], [100.0, 20.0]) for i, (c, h) in enumerate(zip(chosen, homes, strict=True))]
    expected = prefix_laws.expected(law, capacity, replicas, "random") @ law.shares
    assert expected == pytest.approx(np.mean(found[10_000:]), rel=0.02)
    affine = prefix_laws.expected(law, capacity, replicas, "prefix-affine") @ law.shares
    assert affine >= expected


def test_time_to_live_and_equal_popularity_by_hand():
    """100 prefixes used once in 100 s each; half of them fit: T = 100 ln 2 = 69.3 s. Dropped after 20 s: 1 - exp(-0.2)."""
    law = Popularity(rate=1.0, prefixes=100, exponent=0.0, tokens=10.0)
    assert prefix_laws.expected(law, 500.0, 1, "random")[0] == pytest.approx(5.0)
    brief = Popularity(1.0, 100, 0.0, 10.0, ttl=20.0)
    assert prefix_laws.expected(brief, 500.0, 1, "random")[0] == pytest.approx(10 * (1 - math.exp(-0.2)))
    assert prefix_laws.expected(law, 0.0, 1, "random").sum() == 0
    assert prefix_laws.expected(law, 1e9, 1, "random").sum() == pytest.approx(1000.0)


@pytest.mark.parametrize(("replicas", "variation"), [(1, 1.0), (3, 1.0), (1, 2.0)])
def test_sessions_against_a_simulation(replicas, variation):
    """5,000 conversations of up to 4 turns, each turn one block more, gamma intervals of 60 s, in a naive LRU."""
    follow = np.array([1.0, 0.7, 0.5, 0.2])
    prompt = np.array([100.0, 200.0, 300.0, 400.0])
    law = Sessions(2.0, prompt, prompt, follow, 60.0, variation)
    capacity = 8000.0
    rng = np.random.default_rng(1)
    turns = []
    for s in range(5000):
        at, u = s / 2.0, rng.random()
        for j in range(int((u < follow).sum())):
            turns.append((at, s, j))
            at += rng.gamma(1 / variation**2, 60.0 * variation**2)
    caches = [NaiveCache(capacity) for _ in range(replicas)]
    found, count = np.zeros(4), np.zeros(4)
    for at, s, j in sorted(turns):
        got = caches[rng.integers(replicas)].serve([10 * s + k for k in range(j + 1)], [100.0] * (j + 1))
        if 300 < at < 2400:
            found[j] += got
            count[j] += 1
    expected = prefix_laws.expected(law, capacity, replicas, "random")
    share = count / count.sum()
    assert expected @ share == pytest.approx((found / count) @ share, rel=0.05)
    assert prefix_laws.expected(law, capacity, replicas, "prefix-affine").sum() >= expected.sum()


def test_longer_think_time_loses_hits():
    turns = np.array([1000.0, 2000.0, 3000.0])
    quick, slow = (
        prefix_laws.expected(Sessions(1.0, turns, turns, np.array([1.0, 0.8, 0.6]), z), 2e5, 1, "random").sum()
        for z in (30.0, 300.0)
    )
    assert slow < 0.5 * quick


def test_closed_loop_by_hand():
    """100 users, 9 s to think, 1 s to answer: 10 turns a second. A server of rate 5 answers in 1/(5 - x): from
    30 = x (10 + 1/(5 - x)) follows 10 x^2 - 81 x + 150 = 0, x = 2.8585."""
    assert prefix_laws.turn_rate(100, 9.0, lambda rate: 1.0) == pytest.approx(10.0)
    answer = lambda x: 1 / (5 - x) if x < 5 else math.inf  # noqa: E731
    assert prefix_laws.turn_rate(30, 10.0, answer) == pytest.approx((81 - math.sqrt(81**2 - 6000)) / 20)
    assert prefix_laws.turn_rate(1e6, 10.0, answer) == pytest.approx(5.0, rel=1e-4)


def test_hits_and_turn_rate_settle_together():
    """A turn takes longer when its prefix is gone, which spaces the turns and loses more prefixes: one fixed point of rate,
    interval and hits; a smaller cache means fewer turns a second."""
    turns = np.array([4000.0, 8000.0, 12000.0])
    follow = np.array([1.0, 0.9, 0.8])

    def cached(rate: float, users: float, capacity: float) -> np.ndarray:
        sessions = Sessions(rate / follow.sum(), turns, turns, follow, users / rate)
        return prefix_laws.expected(sessions, capacity, 1, "prefix-affine")

    def solve(capacity: float) -> tuple[float, float]:
        def response(rate: float) -> float:
            found = cached(rate, 200.0, capacity) if rate > 0 else np.zeros(3)
            return 1.0 + float((turns - found) @ follow / follow.sum()) / 1000.0

        rate = prefix_laws.turn_rate(200.0, 20.0, response)
        assert rate * (20.0 + response(rate)) == pytest.approx(200.0, rel=1e-4)
        return rate, response(rate)

    (few, slow), (many, fast) = solve(2e5), solve(2e6)
    assert many > few
    assert fast < slow


def test_room_beside_the_running_batch_by_hand():
    """Free 100, running 60 - 0.2 x: x = 40 + 0.2 x = 50. Nothing is left where the batch takes everything."""
    assert prefix_laws.spare_bytes(100.0, lambda x: 60 - 0.2 * x) == pytest.approx(50.0)
    assert prefix_laws.spare_bytes(100.0, lambda x: 130 - 0.2 * x) == 0.0


def test_bad_input_is_refused():
    plain = Requests(np.zeros(2), np.ones(2), np.ones(2))
    with pytest.raises(SpecError, match="columns.blocks"):
        prefix.uses(plain)
    with pytest.raises(SpecError, match="columns.blocks"):
        prefix.route(plain, 2, "prefix-affine")
    # Ids that name a block's own content: 7 follows both 1 and 2.
    with pytest.raises(SpecError, match="block id 7 follows different blocks"):
        prefix.uses(requests([[1, 7], [2, 7]], 4))
    with pytest.raises(SpecError, match="more than 1"):
        prefix.route(requests([[1], [2]], 4), 2, "prefix-affine", guard=1.0)
    with pytest.raises(SpecError, match="at least one replica"):
        prefix.cached_tokens(requests([[1]], 4), 1.0, 0, "random", 1.0)
