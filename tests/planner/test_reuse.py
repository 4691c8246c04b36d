"""What columns believe their prefix caches hold, against a plain LRU dictionary and against the event simulation."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perfmodel.errors import SpecError
from perfmodel.planner.case import Case
from perfmodel.planner.reuse import Reuse
from perfmodel.serving.requests import Blocks, Requests
from perfmodel.serving.workload import Workload, buckets, build
from perfmodel.spec.workload import Objectives, Trace
from perfmodel.spec.workload import Workload as Spec

ROOT = Path(__file__).parents[2]


def conversations(users: int = 200, turns: int = 6, block: int = 64, seed: int = 3) -> Workload:
    """Users whose every turn repeats the last prompt and adds two blocks; turns 20-60 s apart."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        at = rng.uniform(0, 600)
        for turn in range(turns):
            count = 2 * (turn + 1)
            rows.append((at, count * block, [user * 1000 + i for i in range(count)]))
            at += rng.uniform(20, 60)
    rows.sort(key=lambda row: row[0])
    ids = np.concatenate([row[2] for row in rows])
    start = np.concatenate([[0], np.cumsum([len(row[2]) for row in rows])])
    arrival = np.array([row[0] for row in rows]) - rows[0][0]
    inputs = np.array([float(row[1]) for row in rows])
    r = Requests(arrival, inputs, np.full(len(rows), 50.0), Blocks(ids, start, block))
    span = float(arrival[-1])
    return Workload(r, len(rows) / span, span, 1.0)


def lru(workload: Workload, tokens: float) -> float:
    """Prompt tokens found by an LRU cache of so many tokens, one block at a time; a prompt's last token is always computed."""
    r = workload.requests
    assert r.blocks is not None
    cache: OrderedDict[int, None] = OrderedDict()
    room, found = int(tokens // r.blocks.tokens), 0.0
    for i in range(len(r)):
        ids = r.blocks.of(i).tolist()
        hits = next((k for k, x in enumerate(ids) if x not in cache), len(ids))
        found += min(hits * r.blocks.tokens, r.input[i] - 1)
        for x in reversed(ids):
            cache[x] = None
            cache.move_to_end(x)
        while len(cache) > room:
            cache.popitem(last=False)
    return found


@pytest.mark.parametrize("share_of_all", [0.05, 0.2, 0.6])
def test_one_replica_finds_what_a_dictionary_finds(share_of_all: float) -> None:
    workload = conversations()
    groups = buckets(workload, 1)
    tokens = share_of_all * float(workload.requests.input.sum())
    ideal = lru(workload, math.inf if share_of_all > 1 else 1e12)
    expected = lru(workload, tokens) / ideal
    assert Reuse(workload, groups, "round-robin").share(tokens, 1)[0] == pytest.approx(expected, abs=0.05)


def test_more_cache_and_affinity_find_more() -> None:
    workload = conversations()
    groups = buckets(workload, 2)
    blind, affine = Reuse(workload, groups, "random"), Reuse(workload, groups, "prefix-affine")
    sizes = np.geomspace(1e3, 1e7, 9)
    for reuse in (blind, affine):
        found = np.array([reuse.share(x, 4) for x in sizes])
        assert np.all(np.diff(found, axis=0) >= -1e-9)
        assert np.all((found >= 0) & (found <= 1))
    assert np.all(affine.share(3e5, 4) > blind.share(3e5, 4))
    assert affine.share(1e9, 4).min() > 0.9


def test_random_dealing_by_hand() -> None:
    """Turn t has 2t blocks. With four caches the last turn at the same one is m back with probability (1/4)(3/4)^(m - 1), and
    2(t - m) blocks are found; with one cache 2(t - 1)."""
    workload = conversations(users=600)
    found = sum(0.25 * 0.75 ** (m - 1) * (t - m) for t in range(2, 7) for m in range(1, t))
    expected = found / sum(t - 1 for t in range(2, 7))
    assert Reuse(workload, buckets(workload, 1), "random").share(1e9, 4)[0] == pytest.approx(expected, rel=0.06)


def test_imbalance_is_charged_to_affinity_alone() -> None:
    workload = conversations()
    blind, affine = (Reuse(workload, buckets(workload, 2), r) for r in ("random", "prefix-affine"))
    assert affine.imbalance(4) >= 1.0 == blind.imbalance(4)


def test_buckets_keep_found_and_unfound_prompts_apart() -> None:
    """In Mooncake's conversations a prompt is shared for the most part or hardly at all; a mean of both is neither."""
    trace = Trace(file="examples/traces/mooncake-conversation.csv.gz")
    workload = build(Spec(trace=trace, objectives=Objectives()), ROOT, 1, 1)
    cached = workload.cached()
    assert cached is not None
    middle = lambda part: float(np.mean((part > 0.25) & (part < 0.5)))  # noqa: E731
    for group in buckets(workload, 3):
        assert group.cached is not None
        mine = (workload.requests.input > group.edges[0]) & (workload.requests.input <= group.edges[1])
        truth = cached[mine] / workload.requests.input[mine]
        assert middle(group.cached / group.input) == pytest.approx(middle(truth), abs=0.12)
        assert group.cached.mean() == pytest.approx(cached[mine].mean(), rel=0.05)


def test_no_block_ids_is_one_clear_error() -> None:
    workload = conversations()
    plain = Workload(Requests(workload.requests.arrival, workload.requests.input, workload.requests.output), 1.0, 1.0, 1.0)
    with pytest.raises(SpecError, match="block ids"):
        Reuse(plain, buckets(plain, 1), "random")


def test_only_prompts_that_the_router_would_send_back_are_dealt_by_chance() -> None:
    """By hand: the router asks for 30 % of a prompt. Of turns 1 to 6, with 2t blocks of which 2(t - 1) were seen before, all but
    the first match by 1/2 to 5/6, so 5 of 6 go by their prefix. A seventh block in front of every prompt that all share (a
    system prompt) is a third of a first turn, and a ninth where the turn has eight blocks of its own: that one goes anywhere."""

    def chance(extra: int, first: int, routing: str) -> float:
        workload = conversations()
        group = buckets(workload, 1)[0]
        turn = np.tile(np.arange(1, 7), 200)
        own, seen = np.where(turn == 1, first, 2.0 * turn), np.where(turn == 1, 0, 2.0 * (turn - 1))
        group = replace(group, input=64.0 * (own + extra), output=np.full(turn.size, 50.0), cached=64.0 * (seen + extra))
        reuse = Reuse(workload, [group], "prefix-affine") if routing == "prefix-affine" else None
        case = Case(None, None, [group], (0,), workload, Objectives(), reuse, routing)  # type: ignore[arg-type]
        return case.by_chance

    assert chance(0, 2, "prefix-affine") == pytest.approx(5 / 6)
    assert chance(1, 2, "prefix-affine") == 1.0
    assert chance(1, 8, "prefix-affine") == pytest.approx(5 / 6)
    assert chance(1, 8, "random") == 1.0
    assert chance(1, 8, "round-robin") == chance(1, 8, "least-loaded") == 0.0
