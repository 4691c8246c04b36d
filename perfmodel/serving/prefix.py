"""Prefix caching as an outcome: the prompt tokens that a cache of some size holds already, from a trace's block ids.

Block ids name whole prefixes (each hash covers the blocks before it), so a block is never held without its parents as
long as a request touches its last block first. Under LRU one pass over the trace then gives the hits at every cache
size: a use is a hit if and only if its stack distance fits (Mattson, Gecsei, Slutz, Traiger, IBM Syst. J. 9, 1970).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.serving.requests import Requests
from perfmodel.spec.deployment import Routing

_DEALS = 3  # deals of random routing that an expectation is taken over
_WINDOW_S = 300.0


@dataclass(frozen=True)
class Uses:
    """Every use of a prompt block, in order of requests and last block first."""

    request: np.ndarray
    """Index of the request."""
    tokens: np.ndarray
    """Prompt tokens of the block: what it takes in a cache."""
    saved: np.ndarray
    """Prompt tokens that need no prefill if it is cached: an engine computes a prompt's last token in any case."""
    depth: np.ndarray
    """Prompt tokens before the block."""
    earlier: np.ndarray
    """Uses of the block before this one, by the same replica."""
    distance: np.ndarray
    """Tokens an LRU cache must hold for this use to be a hit, the block included; inf for a first use."""
    at: np.ndarray
    """Seconds of the use."""
    since: np.ndarray
    """Seconds since the last use; inf for a first use."""
    until: np.ndarray
    """Seconds to the next use; inf for a last use."""

    def cached(self, capacity: float, requests: int) -> np.ndarray:
        """Prompt tokens of each of so many requests found in an LRU cache of `capacity` tokens [request]."""
        hit = np.isfinite(self.distance) & (self.distance <= capacity)
        return np.bincount(self.request[hit], self.saved[hit], minlength=requests)

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(cache tokens, prompt tokens found in all): the steps of the hit curve, at every size where it rises."""
        reused = np.isfinite(self.distance)
        order = np.argsort(self.distance[reused])
        return self.distance[reused][order], np.cumsum(self.saved[reused][order])


def uses(requests: Requests, replica: np.ndarray | None = None) -> Uses:
    """Uses of blocks by requests sorted by arrival; `replica`: where each request goes, to a cache of its own.

    Requests of one instant see what earlier ones of that instant brought. Raises SpecError without block ids, and where
    an id stands for different prefixes.
    """
    if requests.blocks is None:
        raise SpecError("the trace has no block ids, so no prefix can be recognised; name their column: columns.blocks")
    home = np.zeros(len(requests), int) if replica is None else np.asarray(replica)
    # One replica after the other: a stream of its own for each.
    order = np.argsort(home, kind="stable")
    blocks = requests.blocks.take(order)
    counts = np.diff(blocks.start)
    begin = np.repeat(blocks.start[:-1], counts)
    row = np.repeat(order, counts)
    # Within a request the last block comes first, so that parents are more recent than children and leave after them.
    turned = 2 * begin + np.repeat(counts, counts) - 1 - np.arange(begin.size)
    place = turned - begin
    known, ids = np.unique(blocks.ids, return_inverse=True)
    _check_chained(known, ids, place, turned)
    ids = ids[turned] * (int(home.max(initial=0)) + 1) + home[row]
    depth = place * float(blocks.tokens)
    tokens = np.clip(requests.input[row] - depth, 1.0, float(blocks.tokens))
    previous, following, earlier = _neighbours(ids)
    at, reused = requests.arrival[row].astype(float), previous >= 0
    total = np.concatenate([[0.0], np.cumsum(tokens)])
    # Tokens used between the block's last use and this request, each block once, and the block itself.
    distance = np.full(ids.size, np.inf)
    passed = total[begin[reused]] - total[previous[reused] + 1]
    distance[reused] = passed - _superseded(previous[reused], tokens[previous[reused]]) + tokens[reused]
    return Uses(
        row, tokens, tokens - (place == np.repeat(counts, counts) - 1), depth, earlier, distance, at,
        np.where(reused, at - at[previous], np.inf),
        np.where(following < ids.size, at[np.minimum(following, ids.size - 1)] - at, np.inf),
    )  # fmt: skip


def _check_chained(known: np.ndarray, ids: np.ndarray, place: np.ndarray, turned: np.ndarray) -> None:
    """Every id must always follow the same id, and none may come twice in a request, for then none is the other's prefix."""
    # In turned order a block's parent comes right after it; a first block has none.
    child, parent = ids[turned], np.append(ids[turned][1:], -1)
    parent = np.where(place == 0, -1, parent)
    seen = np.full(known.size, -2)
    seen[child] = parent
    depth = np.zeros(known.size, int)
    depth[child] = place
    wrong = np.flatnonzero((seen[child] != parent) | (depth[child] != place))
    if wrong.size:
        raise SpecError(
            f"block id {known[child[wrong[0]]]} follows different blocks in different prompts: ids must name whole prefixes "
            "(a hash of the block and of all before it), as vLLM's and Mooncake's do"
        )


def _neighbours(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position of the last use, of the next use, number of uses before) of every use; -1 and ids.size for none."""
    order = np.argsort(ids, kind="stable")
    same = ids[order][1:] == ids[order][:-1]
    previous, following = np.full(ids.size, -1), np.full(ids.size, ids.size)
    previous[order[1:][same]] = order[:-1][same]
    following[order[:-1][same]] = order[1:][same]
    first = np.flatnonzero(np.concatenate([[True], ~same]))
    earlier = np.empty(ids.size, int)
    earlier[order] = np.arange(ids.size) - np.repeat(first, np.diff(np.append(first, ids.size)))
    return previous, following, earlier


def _superseded(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """For each element of distinct values, the weights of the elements before it with a greater value, summed.

    Elements are split by the bits of their rank, highest first, keeping their order: at each bit, those with a zero have
    the ones before them in their group as greater elements. n log n in all (the offline form of a Fenwick tree).
    """
    rank = np.empty(value.size, int)
    rank[np.argsort(value)] = np.arange(value.size)
    element, above = np.arange(value.size), np.zeros(value.size)
    for bit in range(max(value.size - 1, 0).bit_length() - 1, -1, -1):
        one = (rank[element] >> bit) & 1
        group = (rank[element] >> (bit + 1)) << (bit + 1)  # where the group begins
        ones = np.concatenate([[0], np.cumsum(one)])
        heavy = np.concatenate([[0.0], np.cumsum(weight[element] * one)])
        here = np.arange(value.size)
        zero = one == 0
        above[element[zero]] += heavy[here[zero]] - heavy[group[zero]]
        before = ones[here] - ones[group]
        moved = np.where(zero, here - before, group + (1 << bit) + before)
        after = np.empty_like(element)
        after[moved] = element
        element = after
    return above


def families(requests: Requests, replicas: int, work: np.ndarray | None = None) -> np.ndarray:
    """What a prefix-affine router keeps together: the group of each request, by number [request].

    A prefix that brings more than one replica's share of the work (a system prompt that all use) cannot have a replica to
    itself, so the router looks past it: a request belongs to its first block that brings no more than that.
    """
    blocks = requests.blocks
    if blocks is None:
        raise SpecError("prefix-affine routing needs the trace's block ids; name their column under columns.blocks")
    work = requests.input if work is None else work
    counts = np.diff(blocks.start)
    row = np.repeat(np.arange(len(requests)), counts)
    _, ids = np.unique(blocks.ids, return_inverse=True)
    brought = np.bincount(ids, work[row])[ids]
    popular = np.bincount(row, brought > work.sum() / replicas, minlength=len(requests)).astype(int)
    # A prompt without a block of its own may go anywhere.
    alone = popular >= counts
    first = ids[np.minimum(blocks.start[:-1] + popular, ids.size - 1)]
    _, group = np.unique(np.where(alone, ids.max(initial=0) + 1 + np.arange(len(requests)), first), return_inverse=True)
    return np.asarray(group)


def route(
    requests: Requests, replicas: int, routing: Routing, *, guard: float | None = None, work: np.ndarray | None = None,
    window: float = _WINDOW_S, seed: int = 1,
) -> np.ndarray:  # fmt: skip
    """Replica of each request [request].

    random, and least-loaded, which knows nothing of prefixes and is random for this purpose; round-robin; prefix-affine:
    a family of prompts is hashed to one replica. `guard`: a replica that would get more than this multiple of the mean work
    (input tokens unless given) of the recent `window` seconds passes the request on to the family's next one
    (consistent hashing with bounded loads, Mirrokni, Thorup, Zadimoghaddam, SODA 2018).
    """
    rng = np.random.default_rng(seed)
    if routing == "round-robin":
        return np.arange(len(requests)) % replicas
    if routing != "prefix-affine":
        return rng.integers(replicas, size=len(requests))
    work = requests.input if work is None else work
    group = families(requests, replicas, work)
    home = rng.integers(replicas, size=int(group.max(initial=0)) + 1)[group]
    if guard is None or replicas == 1:
        return home
    if guard <= 1:
        raise SpecError(f"a load guard of {guard:g} leaves no replica room for more than its mean: give more than 1")
    load, now = np.zeros(replicas), 0.0
    for i, (arrival, w) in enumerate(zip(requests.arrival.tolist(), work.tolist(), strict=True)):
        load *= np.exp((now - arrival) / window)
        now = arrival
        most = guard * (load.sum() + w) / replicas
        r = int(home[i])
        for _ in range(replicas):
            # A request heavier than the guard allows goes to an empty replica.
            if load[r] + w <= most or load[r] <= 0:
                break
            r = (r + 1) % replicas
        else:
            r = int(np.argmin(load))
        home[i] = r
        load[r] += w
    return home


@dataclass(frozen=True)
class Found:
    """What caches of any size find under one routing: computed once, asked for as many sizes as a planner tries."""

    deals: tuple[Uses, ...]
    """One for certain routing, a few for random, of which the mean is taken."""
    requests: int

    def cached(self, capacity: float) -> np.ndarray:
        """Expected cached prompt tokens of each request, with `capacity` tokens of LRU cache at its replica [request]."""
        return np.asarray(np.mean([u.cached(capacity, self.requests) for u in self.deals], axis=0))


def found(
    requests: Requests, replicas: int, routing: Routing, *, guard: float | None = None, seed: int = 1
) -> Found:
    """Hits of a fleet at any cache size.

    Routing that ignores prefixes thins every stream to 1/replicas and keeps a copy of a popular block in each; affinity
    keeps one copy of most, so that the fleet's distinct content is `replicas` times as large.
    """
    if replicas < 1:
        raise SpecError(f"prefix caching needs at least one replica, got {replicas}")
    certain = replicas == 1 or routing == "round-robin"
    homes = [route(requests, replicas, routing, guard=guard, seed=seed + k) for k in range(1 if certain else _DEALS)]
    return Found(tuple(uses(requests, home) for home in homes), len(requests))


def cached_tokens(
    requests: Requests, cache_bytes: float, replicas: int, routing: Routing, bytes_per_token: float, *,
    guard: float | None = None, seed: int = 1,
) -> np.ndarray:  # fmt: skip
    """Prompt tokens of each request expected in its replica's LRU cache of `cache_bytes` bytes [request]."""
    if bytes_per_token <= 0 or cache_bytes < 0:
        raise SpecError("a prefix cache has positive bytes per token and no negative size")
    return found(requests, replicas, routing, guard=guard, seed=seed).cached(cache_bytes / bytes_per_token)


def imbalance(
    requests: Requests, replicas: int, routing: Routing, *, guard: float | None = None, work: np.ndarray | None = None,
    window: float = _WINDOW_S, seed: int = 1, deals: int = 8,
) -> float:  # fmt: skip
    """How much more work the busiest replica gets in a window than under random routing; 1 for routing that ignores prefixes.

    Both are the mean over windows, weighted by their work, of the largest share x replicas. The unevenness of single
    requests dealt at random is left out, for the queue's arrival dispersion charges it.
    """
    if routing != "prefix-affine" or replicas == 1:
        return 1.0
    weight = requests.input if work is None else work
    slot = (requests.arrival // window).astype(int)

    def busiest(home: np.ndarray) -> float:
        share = np.zeros((int(slot.max()) + 1, replicas))
        np.add.at(share, (slot, home), weight)
        return float(share.max(axis=1).sum() * replicas / share.sum())

    kinds: tuple[Routing, Routing] = ("prefix-affine", "random")
    affine, dealt = (
        np.mean([busiest(route(requests, replicas, k, guard=guard, work=work, window=window, seed=seed + i))
                 for i in range(deals)])
        for k in kinds
    )  # fmt: skip
    return max(float(affine / dealt), 1.0)
