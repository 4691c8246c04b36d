"""Replay of requests on a fleet: pools of instances behind routers, in one loop over arrivals and turns of instances."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from perfmodel.errors import SpecError, did_you_mean
from perfmodel.serving import sharing
from perfmodel.serving.layered import LayeredClock
from perfmodel.serving.replay.encoder import Embeddings, Encoder
from perfmodel.serving.replay.handoff import Handoff, Transfers
from perfmodel.serving.replay.instance import Instance
from perfmodel.serving.replay.ledger import Ledger
from perfmodel.serving.replay.migration import Migration, look
from perfmodel.serving.replay.outcome import Gaps, Outcome, Usage
from perfmodel.serving.replay.policies import POLICIES
from perfmodel.serving.replay.prefix import answer_ids
from perfmodel.serving.replay.routing import Affinity, Router, router
from perfmodel.serving.replay.settings import Item, Settings
from perfmodel.serving.replay.side_by_side import SideBySide
from perfmodel.serving.requests import Requests
from perfmodel.serving.split import SplitClock

if TYPE_CHECKING:
    from perfmodel.serving.clock import StepClock
    from perfmodel.serving.encode import EncodeClock

_ARRIVAL, _TURN = 0, 1  # at the same moment arrivals come first
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pool:
    """Equal instances behind one router."""

    clock: StepClock
    kv_tokens: float
    """Tokens that one instance can cache."""
    replicas: int = 1
    role: str = "colocated"
    """colocated, prefill, decode or encode."""
    settings: Settings = field(default_factory=Settings)
    input_tokens: tuple[float, float] | None = None
    """Input lengths that come here; None: all."""
    share: float = 1.0
    """Weight of this pool among those of its role that take the same input length."""
    routes: tuple[tuple[float, float, float], ...] = ()
    """(lowest input, highest, weight) in place of these two where lengths come with different weights."""
    handoff: Handoff | None = None
    """How a prefill pool sends its caches."""
    embeddings: Embeddings | None = None
    """How an encode pool sends what it makes."""
    tower: EncodeClock | None = None
    """Encodes the images of the prompts that come here; None: an encode pool does, if any request has images."""

    def __post_init__(self) -> None:
        policy = self.settings.policy
        if policy not in POLICIES:
            raise SpecError(f"replay knows no policy {policy!r}{did_you_mean(policy, POLICIES)}; it has {', '.join(POLICIES)}")
        if policy in ("static", "split") and self.role != "colocated":
            raise SpecError(f"the policy {policy!r} prefills and decodes on one instance: the role must be colocated")
        if policy == "split" and self.tower is not None:
            raise SpecError("the policy 'split' has no law of a tower beside both phases: leave its images to an encode pool")
        if policy == "static" and self.settings.prefix_caching:
            raise SpecError("static batches are padded: they have no prefix cache")
        for name, kind in (("layered", LayeredClock), ("split", SplitClock)):
            if self.role != "encode" and (policy == name) != isinstance(self.clock, kind):
                raise SpecError(f"the policy {name!r} and a {kind.__name__} need each other (modes.policy_clock makes it)")


@dataclass(frozen=True)
class Fleet:
    """Pools, and how requests are dealt to the instances of each."""

    pools: tuple[Pool, ...]
    routing: str = "round-robin"
    """One of routing's kinds. Decode pools never have prefixes: affine means least-loaded there."""
    affinity: Affinity = field(default_factory=Affinity)
    migration: Migration | None = None
    """How running sequences move between the instances, which must be of one pool; None: they stay."""

    def run(
        self, requests: Requests, *, seed: int = 1, front: np.ndarray | None = None, progress: Progress | None = None,
        assigned: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None, found: np.ndarray | None = None,
    ) -> Outcome:
        """Replay the requests (sorted by arrival); their label `images` says how many images each carries.

        assigned: places in `pools` of the pool that takes each request, of the one that decodes it, and of the one that encodes
        its images, where the caller has routed them already.

        front: seconds each request spends before its engine (tokeniser, API server); they count in its TTFT.
        found: prompt tokens of each request whose cache is there whichever instance takes it, so that none computes them.
        progress: called now and then with the requests that have arrived and all of them.
        """
        return _Run(self, requests, seed, front, assigned, found).outcome(progress)


class _Run:
    """One replay: its instances, its events, and what follows from a request's end."""

    def __init__(
        self, fleet: Fleet, requests: Requests, seed: int, front: np.ndarray | None,
        assigned: tuple[np.ndarray, np.ndarray, np.ndarray] | None, found: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.fleet, self.requests = fleet, requests
        self.found = None if found is None else found.tolist()
        n = len(requests)
        self.front = np.zeros(n) if front is None else np.asarray(front, float)
        self.sent = requests.arrival.astype(float)  # of closed-loop turns: set when the turn before has ended
        self.follower = _followers(requests)
        by_clock = np.ones(n, bool)
        by_clock[list(self.follower.values())] = False
        self.next_look = 0.0
        if fleet.migration and len(fleet.pools) > 1:
            raise SpecError("sequences migrate between the instances of one pool, and this fleet has several")
        self.ledger = Ledger((self.sent + self.front).tolist())
        self.rng = np.random.default_rng(seed)
        blocks = requests.blocks
        prompt_block = blocks.tokens if blocks is not None else 0
        self.instances: list[Instance] = []
        self.pool_of: list[int] = []
        members: list[list[Instance]] = []
        hands_over = any(p.role == "decode" for p in fleet.pools) and any(p.role == "prefill" for p in fleet.pools)
        for number, pool in enumerate(fleet.pools):
            mine = [
                (Encoder if pool.role == "encode" else SideBySide if pool.settings.policy == "split" else Instance)(
                    len(self.instances) + i, pool.clock, pool.kv_tokens, pool.settings, self.ledger,
                    prefills_only=pool.role == "prefill", hands_over=hands_over and pool.role == "prefill",
                    prompt_block=0 if pool.role in ("decode", "encode") else prompt_block, tower=pool.tower,
                )
                for i in range(pool.replicas)
            ]  # fmt: skip
            members.append(mine)
            self.instances += mine
            self.pool_of += [number] * len(mine)
        keyed = blocks is not None or requests.session is not None
        self.routers: list[Router] = [router(fleet.routing, m, self.rng, fleet.affinity, keyed) for m in members]
        # Without prefill pools, decode pools receive what was prefilled outside.
        takes = [p.role != "encode" and (p.role != "decode" or not hands_over) for p in fleet.pools]
        self.pool = assigned[0] if assigned else _assign(fleet.pools, takes, requests.input, self.rng)
        self.decode_pool = np.full(n, -1)
        self.transfers: Transfers | None = None
        if hands_over:
            decodes = [p.role == "decode" for p in fleet.pools]
            self.decode_pool = assigned[1] if assigned else _assign(fleet.pools, decodes, requests.input, self.rng)
            links = {}
            for x, p in zip(self.instances, self.pool_of, strict=True):
                if x.hands_over:
                    links[x.number] = fleet.pools[p].handoff or Handoff(0.0)
            self.transfers = Transfers(links, self._deliver)
        self.images = self._images()
        self.encode_pool = np.full(n, -1)
        encodes = [p.role == "encode" for p in fleet.pools]
        if any(encodes):
            self.encode_pool = assigned[2] if assigned else _assign(fleet.pools, encodes, requests.input, self.rng)
        self.ledger.watched = bool(self.follower) or self.transfers is not None or any(encodes)
        self.heap: list[tuple[float, int, int, int, Instance | None, Item | None]] = []
        self.events = 0
        self.by_clock = by_clock
        self._prepare_ids()

    def _images(self) -> list[int] | None:
        """Images of each request; None where no pool encodes any."""
        if all(p.role != "encode" and p.tower is None for p in self.fleet.pools):
            return None
        return [int(x) for x in self.requests.labels.get("images", np.zeros(len(self.requests)))]

    def _prepare_ids(self) -> None:
        """Block ids and answers of every request, as lists that instances use."""
        r = self.requests
        self.ids: list[list[int]] | None = None
        self.answers: list[list[int] | None] = []
        if r.blocks is None:
            return
        every, start = r.blocks.ids.tolist(), r.blocks.start.tolist()
        full = sharing.full_blocks(r).tolist()
        self.ids = [list(dict.fromkeys(every[s : s + k])) for s, k in zip(start, full, strict=False)]
        caching = any(p.settings.prefix_caching for p in self.fleet.pools)
        self.answers = answer_ids(r) if caching else [None] * len(r)

    # -- the loop ------------------------------------------------------------------------------------------------

    def outcome(self, progress: Progress | None) -> Outcome:
        arrivals = np.asarray(self.ledger.arrival)
        order = np.flatnonzero(self.by_clock)
        order = order[np.argsort(arrivals[order], kind="stable")]
        times, indices = arrivals[order].tolist(), order.tolist()
        total, at, often = len(indices), 0, max(1, len(indices) // 100)
        heap, follow, migration = self.heap, self.ledger.watched, self.fleet.migration
        coming = times[0] if total else math.inf
        while True:
            if heap and (heap[0][0] < coming):
                time, kind, _, version, x, item = heapq.heappop(heap)
                if migration is not None and time >= self.next_look:
                    self.next_look = time + migration.period
                    for other in look(self.instances, migration, time):
                        self._announce(other)
                if kind == _TURN:
                    assert x is not None
                    if version != x.version:
                        continue  # announced anew since
                    x.turn()
                    if x.end < math.inf:
                        self._announce(x)
                    if x.moving:
                        self._migrate(x)
                    if follow:
                        self._follow(x)
                elif x is None:
                    assert item is not None
                    self._enter(item.index, time)
                else:
                    assert item is not None
                    x.resident -= 1  # it was counted when its transfer was decided
                    if item.delivered and item.done and not item.begun:
                        x.reserve(item)  # of a sequence that migrates: it joins at once, or it waits for memory
                    if x.submit(item, time):
                        self._announce(x)
            elif at < total:
                self._enter(indices[at], coming)
                at += 1
                coming = times[at] if at < total else math.inf
                if progress is not None and (at % often == 0 or at == total):
                    progress(at, total)
            else:
                break
        return self._result()

    def _migrate(self, x: Instance) -> None:
        moving, x.moving = x.moving, []
        assert self.fleet.migration is not None
        for item, target in moving:
            target.resident += 1
            self._deliver(x.now + self.fleet.migration.halt, item, target)

    def _announce(self, x: Instance) -> None:
        x.version += 1
        self.events += 1
        heapq.heappush(self.heap, (x.end, _TURN, self.events, x.version, x, None))

    def _enter(self, index: int, time: float) -> None:
        """A request reaches its pool, or the encode pool that its images go through first."""
        r = self.requests
        pool = int(self.pool[index])
        prompt, output = int(r.input[index]), int(r.output[index])
        item = Item(index, prompt, output)
        if self.found is not None:
            item.done = min(self.found[index], prompt - 1)
        if self.images is not None and self.images[index]:
            if self.fleet.pools[pool].tower is not None:
                item.images = self.images[index]
            elif self.encode_pool[index] >= 0 and math.isnan(self.ledger.encoded[index]):
                self._encode(index, time)
                return
        if self.ids is not None:
            item.ids = item.keys = self.ids[index]
            item.answer = self.answers[index]
        elif r.session is not None:
            item.keys = [int(r.session[index])]
        x = self.routers[pool](item)
        if self.fleet.pools[pool].role == "decode":
            # Its cache and first token were made elsewhere.
            item.left, item.done, item.delivered, item.last = output - 1, prompt, True, time
            self.ledger.first[index] = time
            self.ledger.instance[index] = x.number
        grown = prompt + 1 if x.hands_over or x.prefills_only else prompt + output
        if x.kv.of(grown) > x.kv.capacity:
            self._reject(index, time)
        elif x.submit(item, time):
            self._announce(x)

    def _encode(self, index: int, time: float) -> None:
        assert self.images is not None
        item = Item(index, self.images[index], 1)
        x = self.routers[int(self.encode_pool[index])](item)
        self.ledger.encoder[index] = x.number
        if x.submit(item, time):
            self._announce(x)

    def _reject(self, index: int, time: float) -> None:
        self.ledger.rejected[index] = True
        self._next_turn(index, time)

    # -- what follows from the end of a request or of its prefill ---------------------------------------------------

    def _follow(self, x: Instance) -> None:
        """Requests that left an instance in its turn: send their caches on, let the session's next turn come."""
        left, x.left = x.left, []
        for item in left:
            if isinstance(x, Encoder) and item.done:
                link = self.fleet.pools[self.pool_of[x.number]].embeddings or Embeddings(0.0)
                at = self.ledger.encoded[item.index] = x.send(item.prompt, link)
                self.events += 1
                heapq.heappush(self.heap, (at, _ARRIVAL, self.events, 0, None, Item(item.index, 0, 0)))
            elif x.hands_over and item.begun:
                self._hand_over(item, x)
            else:
                self._next_turn(item.index, x.now)
        if self.transfers is not None and not x.hands_over and not isinstance(x, Encoder):
            for source in self.transfers.grant(x, x.now):
                if source.wake(x.now):
                    self._announce(source)

    def _hand_over(self, item: Item, source: Instance) -> None:
        assert self.transfers is not None
        pool = int(self.decode_pool[item.index])
        target = self.routers[pool](item)
        if target.kv.of(item.prompt + 1 + item.left) > target.kv.capacity:
            # Nobody can decode it: the prefill was in vain.
            heapq.heappush(source.releases, (source.now, item.index, item))
            self.ledger.first[item.index] = math.nan
            self._reject(item.index, source.now)
        else:
            self.transfers.offer(item, source, target, source.now)
        if source.end == math.inf and source.wake(source.now):
            self._announce(source)

    def _deliver(self, time: float, item: Item, target: Instance) -> None:
        self.events += 1
        heapq.heappush(self.heap, (time, _ARRIVAL, self.events, 0, target, item))

    def _next_turn(self, index: int, time: float) -> None:
        """The next turn of a session comes when the user has thought."""
        follower = self.follower.get(index)
        if follower is None:
            return
        assert self.requests.think is not None
        sent = time + float(self.requests.think[follower])
        self.sent[follower] = sent
        reaches = sent + float(self.front[follower])
        self.ledger.arrival[follower] = reaches
        self.events += 1
        heapq.heappush(self.heap, (reaches, _ARRIVAL, self.events, 0, None, Item(follower, 0, 0)))

    def _result(self) -> Outcome:
        ledger, r = self.ledger, self.requests
        first, finish = np.array(ledger.first), np.array(ledger.finish)
        more = r.output - 1
        tpot = np.where(more > 0, (finish - first) / np.maximum(more, 1), np.nan)
        start = float(self.sent.min()) if len(r) else 0.0
        span = max((x.now for x in self.instances), default=start) - start
        held = [x.held_seconds / (x.kv.capacity * span) if span and x.kv.capacity else 0.0 for x in self.instances]
        usage = Usage(
            np.array(self.pool_of), np.array([x.served for x in self.instances]),
            np.array([x.busy for x in self.instances]), np.array([x.prefilling for x in self.instances]),
            np.array(held), np.array([x.most_held / x.kv.capacity if x.kv.capacity else 0.0 for x in self.instances]),
            np.full(len(self.instances), span),
        )  # fmt: skip
        return Outcome(
            first - self.sent, tpot, finish, np.array(ledger.preempted), self.sent, r.input.astype(float),
            r.output.astype(float), np.array(ledger.longest), np.array(ledger.rejected), np.array(ledger.cached),
            np.array(ledger.instance), np.array(ledger.decoder), np.array(ledger.encoded), np.array(ledger.encoder),
            Gaps.of_runs(ledger.at, ledger.gap_first, ledger.gap_last, ledger.gap_tokens), usage,
        )  # fmt: skip


def _followers(requests: Requests) -> dict[int, int]:
    """Request -> the session's next turn, where that one waits for its end."""
    if requests.session is None or requests.think is None:
        return {}
    latest: dict[int, int] = {}
    found: dict[int, int] = {}
    for i, (session, think) in enumerate(zip(requests.session.tolist(), requests.think.tolist(), strict=True)):
        if session < 0:
            continue
        if session in latest and not math.isnan(think):
            found[latest[session]] = i
        latest[session] = i
    return found


def _assign(pools: Sequence[Pool], takes: list[bool], inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pool of each request: of those with a route that holds its input (else whose route is nearest), by their weights."""
    routes = [
        (i, *route) for i, taken in enumerate(takes) if taken
        for route in pools[i].routes or ((*(pools[i].input_tokens or (0.0, math.inf)), pools[i].share),)
    ]  # fmt: skip
    if not routes:
        raise SpecError("no pool takes requests: add a colocated or a prefill pool")
    pool, low, high, share = (np.array(column) for column in zip(*routes, strict=True))
    away = np.maximum(np.maximum(low[:, None] - inputs, inputs - high[:, None]), 0.0)
    weight = (away <= away.min(axis=0)) * share[:, None]
    edges = np.cumsum(weight, axis=0) / weight.sum(axis=0)
    # Drawn even for a single pool, so that a pool more does not change what else is random.
    place = np.minimum((rng.random(inputs.size) >= edges).sum(axis=0), len(routes) - 1)
    return np.asarray(pool)[place]


def simulate(
    clock: StepClock, kv_tokens: float, requests: Requests, role: str = "colocated", settings: Settings | None = None
) -> Outcome:
    """Run one instance over its requests (sorted by arrival). Decode instances get requests whose cache has arrived."""
    return Fleet((Pool(clock, kv_tokens, 1, role, settings or Settings()),)).run(requests)
