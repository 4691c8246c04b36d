"""A second simulator, written only from the rules: one engine step per loop turn, nothing summed in closed form.

Rules. A step decodes every running sequence once and prefills waiting requests, oldest first, with the tokens that the
budget leaves. A request starts only if the cache holds everything cached, everything promised to requests that have
started, and its own prompt plus one token. When decoding overflows the cache the running sequence that arrived last is
dropped and later recomputes its prompt and all it had produced. An instance that decodes only gets its caches ready.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Sequence:
    index: int
    prompt: int
    wanted: int
    produced: int = 0
    cached: int = 0
    target: int = 0
    """Tokens to prefill before the next token can be produced."""
    ready: bool = False
    """Its cache is delivered, not computed here."""

    def __post_init__(self):
        self.target = self.prompt


def simulate(clock, kv_tokens, requests, role="colocated"):
    """(first token, finish, preemptions, tokens produced here, sum over steps of duration x sequences in the instance)."""
    n = len(requests)
    first, finish, produced = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, int)
    coming = [
        Sequence(i, int(requests.input[i]), int(requests.output[i]), ready=role == "decode") for i in range(n)
    ]
    waiting, running = [], []
    now, preempted, presence = 0.0, 0, 0.0

    def cached():
        return sum(s.prompt + s.produced for s in running)

    def promised():
        return sum(s.target for s in waiting if s.cached > 0)

    def finish_one(s):
        finish[s.index] = now

    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, float(requests.arrival[coming[0].index]))
        while coming and requests.arrival[coming[0].index] <= now:
            waiting.append(coming.pop(0))
        # Delivered caches join at once.
        while waiting and waiting[0].ready and len(running) < clock.max_batch:
            s = waiting[0]
            if cached() + promised() + s.target + 1 > kv_tokens:
                break
            waiting.pop(0)
            s.ready, s.produced = False, 1
            if s.wanted > 1:
                running.append(s)
            else:
                finish_one(s)
        budget = clock.chunk - len(running)
        chunks = []
        for s in waiting:
            if budget <= 0 or s.ready or len(running) + len(chunks) >= clock.max_batch:
                break
            if s.cached == 0 and cached() + promised() + s.target + 1 > kv_tokens:
                break
            q = min(budget, s.target - s.cached)
            chunks.append((s, q, s.cached))
            s.cached += q
            budget -= q
        if not chunks and not running:
            if not waiting and coming:
                continue
            if waiting:
                raise ValueError("stuck")
            break
        seconds = clock.step(len(running), float(cached()), [(float(q), float(c)) for _, q, c in chunks])
        presence += seconds * (len(running) + len(waiting))
        now += seconds
        for s in list(running):
            s.produced += 1
            produced[s.index] += 1
            if s.produced >= s.wanted:
                running.remove(s)
                finish_one(s)
        while cached() + promised() > kv_tokens and len(running) > 1:
            s = max(running, key=lambda s: s.index)
            running.remove(s)
            s.target, s.cached = s.prompt + s.produced, 0
            preempted += 1
            at = sum(1 for w in waiting if w.cached > 0)
            waiting.insert(at, s)
        for s, _, _ in chunks:
            if s.cached >= s.target:
                waiting.remove(s)
                s.produced += 1
                produced[s.index] += 1
                if np.isnan(first[s.index]):
                    first[s.index] = now
                if s.produced >= s.wanted or role == "prefill":
                    finish_one(s)
                else:
                    running.append(s)
    return first, finish, preempted, produced, presence
