"""A second simulator, written only from the rules: one engine step per loop turn, nothing summed in closed form.

Rules. The queue is in order of arrival. A request starts if the cache has blocks for its whole prompt and one token more.
chunked: a step decodes every running sequence once and prefills the head of the queue with the tokens that the budget
leaves. whole: a step prefills whole prompts only, as many as the budget takes (or one), and goes before decoding.
static: when nothing runs, prompts are taken while they fit when all are as long as the longest; they are prefilled
together at that length, and all slots run until the last answer has ended. A running sequence holds blocks for its
prompt and what it has produced; when that exceeds the cache after a step, the youngest request with blocks is sent back
to the head of the queue, and recomputes its prompt and all it had produced (or moves out and back, each at some
seconds per token, which the next step waits for). An instance that decodes only gets its caches ready.

Prefix cache: full blocks of ids. A request that starts takes the leading ids it finds and computes the rest, at least one
token; what it computes can be found by others from the end of the step on. Ids stay when nobody uses them, until their
blocks are needed: then the one unused for longest goes, the tail of a prompt before its head; it goes to the next slower
memory, if there is one, from where it is fetched at some seconds per token. The answer's full blocks stay too where
their ids are known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sequence:
    index: int
    prompt: int
    wanted: int
    ids: list = field(default_factory=list)
    answer: list = field(default_factory=list)
    produced: int = 0
    cached: int = 0
    target: int = 0
    """Tokens to prefill before the next token can be produced."""
    started: bool = False
    ready: bool = False
    """Its cache is delivered, not computed here."""
    decodes: bool = False
    moved_out: bool = False
    padded: int = 0
    last: float = math.nan
    gaps: list = field(default_factory=list)

    def __post_init__(self):
        self.target = self.prompt


@dataclass
class Result:
    first: np.ndarray
    finish: np.ndarray
    longest: np.ndarray
    preempted: np.ndarray
    cached: np.ndarray
    produced: np.ndarray
    presence: float = 0.0
    """Sum over steps of duration x sequences in the instance."""
    gaps: list = field(default_factory=list)
    """Every gap between two tokens."""
    most: int = 0
    """Most blocks ever in use by requests, after preemption."""


class Memory:
    """Who uses which ids; nothing is counted incrementally."""

    def __init__(self, tokens_per_id, block, lower):
        self.per_id, self.block = tokens_per_id, block
        self.users = {}
        self.unused = []  # ids, the one to go first first
        self.lower = [[room, seconds, []] for room, seconds in lower]

    def owned(self, s):
        return [i for i in s.ids + s.answer if s.index in self.users.get(i, ())]

    def tier(self, i):
        return next((t for t in self.lower if i in t[2]), None)


def simulate(
    clock, kv_tokens, requests, role="colocated", *, block=1, policy="chunked", swap=None, caching=False, lower=(),
    answers=None, overlap=True,
):  # fmt: skip
    n = len(requests)
    empty = lambda value, kind=float: np.full(n, value, kind)  # noqa: E731
    out = Result(empty(np.nan), empty(np.nan), empty(0.0), empty(0, int), empty(0, int), empty(0, int))
    per_id = requests.blocks.tokens if requests.blocks is not None else block
    if caching:
        block = math.gcd(block, per_id)
    memory = Memory(per_id, block, lower)
    total_blocks = int(kv_tokens // block)
    coming = []
    for i in range(n):
        s = Sequence(i, int(requests.input[i]), int(requests.output[i]), ready=role == "decode")
        if caching:
            s.ids = [int(x) for x in requests.blocks.of(i)[: s.prompt // per_id]]
            s.answer = (answers[i] or []) if answers else []
        coming.append(s)
    waiting, running, ended = [], [], []
    now, extra = 0.0, 0.0

    def size(s):
        """Blocks of the whole sequence."""
        return -(-(s.prompt + s.produced + s.padded if s.decodes else s.target + 1) // block)

    def holders():
        return running + ended + [s for s in waiting if s.started]

    def in_use():
        unit = per_id // block
        private = sum(size(s) - (len(memory.owned(s)) * unit if caching else 0) for s in holders())
        return private + unit * (len(memory.users) - len(memory.unused))

    def drop_unused():
        while memory.unused and in_use() + len(memory.unused) * (per_id // block) > total_blocks:
            i = memory.unused.pop(0)
            del memory.users[i]
            for room, _, held in memory.lower:
                if room >= per_id:
                    held.append(i)
                    i = held.pop(0) if len(held) * per_id > room else None
                    if i is None:
                        break

    def let_go(s):
        for i in reversed(memory.owned(s)):
            memory.users[i].discard(s.index)
            if not memory.users[i]:
                memory.unused.append(i)

    def start(s):
        """Take blocks and known ids if they fit; returns seconds of fetching, or None."""
        found = []
        for i in s.ids:
            if i not in memory.users and memory.tier(i) is None:
                break
            found.append(i)
        need = -(-(s.target if s.moved_out else s.target + 1) // block)
        added = need - (per_id // block) * sum(1 for i in found if memory.users.get(i))
        if in_use() + added > total_blocks:
            return None
        seconds = 0.0
        for i in found:
            if i not in memory.users:
                tier = memory.tier(i)
                tier[2].remove(i)
                seconds += tier[1] * per_id
            elif i in memory.unused:
                memory.unused.remove(i)
            memory.users.setdefault(i, set()).add(s.index)
        s.started = True
        if not s.ready and not s.moved_out:
            s.cached = min(len(found) * per_id, s.target - 1)
            if math.isnan(s.last):
                out.cached[s.index] = s.cached
        drop_unused()
        return seconds

    def publish(s, ids):
        for i in ids:
            if i not in memory.users:
                memory.users[i] = {s.index}
                for _, _, held in memory.lower:
                    if i in held:
                        held.remove(i)
            elif s.index not in memory.users[i]:
                return

    def token(s):
        if math.isnan(s.last):
            out.first[s.index] = now
        else:
            s.gaps.append(now - s.last)
            out.gaps.append(now - s.last)
        s.last = now

    def finish_one(s):
        out.finish[s.index] = now
        out.longest[s.index] = max(s.gaps, default=0.0)

    def leave(s):
        if s.produced >= s.wanted:
            publish(s, s.answer)
        s.started = s.decodes = False
        let_go(s)

    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, float(requests.arrival[coming[0].index]))
        while coming and requests.arrival[coming[0].index] <= now:
            waiting.append(coming.pop(0))
        # Delivered and moved-out caches join at once.
        while waiting and (waiting[0].ready or waiting[0].moved_out) and len(running) < clock.max_batch:
            s = waiting[0]
            if start(s) is None:
                break
            waiting.pop(0)
            if s.ready:
                s.produced, s.last = 1, float(requests.arrival[s.index])
                out.first[s.index] = s.last
            else:
                extra += (s.target - 1) * swap
            s.ready = s.moved_out = False
            if s.wanted > s.produced:
                running.append(s)
                s.decodes = True
            else:
                finish_one(s)
                leave(s)
        chunks, fetch = [], 0.0
        places = clock.max_batch - len(running)
        if policy == "static":
            chosen = []
            for s in waiting if not running else []:
                longest = max(x.prompt for x in [*chosen, s]) + max(x.wanted for x in [*chosen, s])
                if chosen and (len(chosen) == clock.max_batch or (len(chosen) + 1) * -(-longest // block) > total_blocks):
                    break
                chosen.append(s)
            for s in chosen:
                s.padded = max(x.prompt for x in chosen) - s.prompt
                s.target = s.prompt + s.padded
                start(s)
                chunks.append((s, s.target, 0))
                s.cached = s.target
        else:
            budget = clock.chunk - (len(running) if policy == "chunked" else 0)
            for s in waiting:
                if s.ready or s.moved_out or len(chunks) >= places:
                    break
                if policy == "chunked" and budget <= 0:
                    break
                if policy == "whole" and chunks and s.target > budget:
                    break
                if not s.started:
                    seconds = start(s)
                    if seconds is None:
                        break
                    fetch += seconds
                q = s.target - s.cached if policy == "whole" else min(budget, s.target - s.cached)
                chunks.append((s, q, s.cached))
                s.cached += q
                budget -= q
        if not chunks and not running:
            if not waiting and coming:
                continue
            if waiting:
                raise ValueError("stuck")
            break
        decoders = [] if chunks and policy != "chunked" else list(running)
        slots = decoders + (ended if decoders else [])
        context = float(sum(s.prompt + s.produced + s.padded for s in slots))
        seconds = clock.step(len(slots), context, [(float(q), float(c)) for _, q, c in chunks])
        seconds = max(seconds, fetch) if overlap else seconds + fetch
        seconds += extra
        extra = 0.0
        out.presence += seconds * (len(running) + len(waiting))
        now += seconds
        for s in slots:
            s.produced += 1
        drop_unused()
        for s in decoders:
            out.produced[s.index] += 1
            token(s)
            if s.produced >= s.wanted:
                running.remove(s)
                finish_one(s)
                if policy == "static":
                    ended.append(s)
                else:
                    leave(s)
        if not running:
            for s in ended:
                leave(s)
            ended = []
        for s, q, c in chunks:
            publish(s, [i for k, i in enumerate(s.ids) if (k + 1) * per_id <= c + q])
            if s.cached >= s.target:
                waiting.remove(s)
                s.produced += 1
                out.produced[s.index] += 1
                token(s)
                if s.produced >= s.wanted or role == "prefill":
                    finish_one(s)
                    leave(s)
                else:
                    running.append(s)
                    s.decodes = True
        while in_use() > total_blocks:
            s = max(holders(), key=lambda s: s.index)
            out.preempted[s.index] += 1
            leave(s)
            s.cached = 0
            if s in running:
                running.remove(s)
                s.target = s.prompt + s.produced
                s.moved_out = swap is not None
                if s.moved_out:
                    extra += (s.target - 1) * swap
                waiting.insert(0, s)
        drop_unused()
        out.most = max(out.most, in_use())
    return out
