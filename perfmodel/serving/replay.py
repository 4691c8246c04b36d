"""Iteration-level event simulation of serving instances, with the estimator's tables as clock.

One engine step takes every decoding sequence one token further and fills what is left of the token budget with
prefill, first come first served (chunked prefill, arXiv:2403.02310). Between events the batch is constant and a
step's time affine in the total context, so runs of decode steps are summed in closed form.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from perfmodel.serving.clock import StepClock
from perfmodel.serving.requests import Requests


@dataclass(frozen=True)
class Outcome:
    """Per request: seconds to first token, seconds per further token (nan for one-token requests), preemptions."""

    ttft: np.ndarray
    tpot: np.ndarray
    finish: np.ndarray
    preempted: int

    def percentile(self, metric: str, p: float) -> float:
        """Percentile over requests; one-token requests have no TPOT."""
        values = self.ttft if metric == "ttft" else self.tpot[~np.isnan(self.tpot)]
        return float(np.percentile(values, p * 100)) if values.size else 0.0


@dataclass(slots=True)
class _Waiting:
    index: int
    prompt: float
    """Tokens to prefill: the prompt, and after a preemption what had been generated."""
    done: float
    left: float
    """Tokens to generate."""
    cached: bool = False
    """A prefill instance delivered its cache and first token: it decodes as soon as it fits."""


class _Instance:
    """State of one simulated engine."""

    def __init__(
        self, clock: StepClock, kv_tokens: float, requests: Requests, *, prefill_only: bool, prefilled: bool
    ) -> None:
        self.clock, self.kv_tokens, self.requests = clock, kv_tokens, requests
        self.prefill_only, self.prefilled = prefill_only, prefilled
        self.now = 0.0
        self.steps = 0  # decode steps taken so far: a sequence ends when this counter reaches its mark
        self.context = 0.0  # tokens attended by all decoding sequences together
        self.decoding: list[tuple[int, int, float]] = []  # heap of (end mark, index, tokens attended at the end)
        self.waiting: deque[_Waiting] = deque()
        self.reserved = 0.0  # tokens of requests whose prefill has begun
        n = len(requests)
        self.first = np.full(n, np.nan)
        self.finish = np.full(n, np.nan)
        self.preempted = 0
        self.next = 0

    def run(self) -> None:
        n = len(self.requests)
        arrival = self.requests.arrival
        while self.next < n or self.waiting or self.decoding:
            if not self.waiting and not self.decoding:
                self.now = max(self.now, float(arrival[self.next]))
            self._arrive()
            self._admit_cached()
            chunks = self._schedule()
            if chunks:
                self._mixed_step(chunks)
            elif self.decoding:
                self._decode_run()
            elif self.waiting:
                # Nothing runs and the head does not fit: it never will.
                raise ValueError("a request is larger than the KV cache of the instance")

    def _arrive(self) -> None:
        arrival, r = self.requests.arrival, self.requests
        while self.next < len(r) and arrival[self.next] <= self.now:
            i = self.next
            self.waiting.append(_Waiting(i, float(r.input[i]), 0.0, float(r.output[i]), self.prefilled))
            self.next += 1

    def _fits(self, item: _Waiting) -> bool:
        return self.context + self.reserved + item.prompt + 1 <= self.kv_tokens

    def _admit_cached(self) -> None:
        while self.waiting and self.waiting[0].cached and len(self.decoding) < self.clock.max_batch:
            if not self._fits(self.waiting[0]):
                break
            item = self.waiting.popleft()
            item.left -= 1
            self._join(item)

    def _schedule(self) -> list[tuple[_Waiting, float]]:
        """Chunks of this step: what is left of the token budget and of the cache, in order of arrival."""
        budget: float = self.clock.chunk - len(self.decoding)
        chunks: list[tuple[_Waiting, float]] = []
        for item in self.waiting:
            running = len(self.decoding) + len(chunks)
            if budget <= 0 or item.cached or running >= self.clock.max_batch:
                break
            if item.done == 0:
                if not self._fits(item):
                    break
                self.reserved += item.prompt
            q = min(item.prompt - item.done, budget)
            budget -= q
            chunks.append((item, q))
        return chunks

    def _mixed_step(self, chunks: list[tuple[_Waiting, float]]) -> None:
        batch = len(self.decoding)
        self.now += self.clock.step(batch, self.context, [(q, item.done) for item, q in chunks])
        for item, q in chunks:
            item.done += q
        # Chunks are taken in order, so the finished ones are the head of the queue.
        whole = [item for item, _ in chunks if item.done >= item.prompt]
        for _ in whole:
            self.waiting.popleft()
        self._advance(1)
        for item in whole:
            self.reserved -= item.prompt
            if math.isnan(self.first[item.index]):
                self.first[item.index] = self.now
            item.left -= 1
            if self.prefill_only:
                self.finish[item.index] = self.now
            else:
                self._join(item)

    def _join(self, item: _Waiting) -> None:
        """A sequence starts to decode: its next step attends prompt + 1 tokens."""
        if item.left <= 0:
            self.finish[item.index] = self.now
            return
        heapq.heappush(self.decoding, (self.steps + int(item.left), item.index, item.prompt + 1 + item.left))
        self.context += item.prompt + 1

    def _advance(self, steps: int) -> None:
        """Count decode steps, let sequences end, and preempt the youngest while the cache overflows."""
        if not self.decoding:
            return
        self.steps += steps
        self.context += steps * len(self.decoding)
        while self.decoding and self.decoding[0][0] <= self.steps:
            _, index, tokens = heapq.heappop(self.decoding)
            self.context -= tokens
            self.finish[index] = self.now
        while self.context + self.reserved > self.kv_tokens and len(self.decoding) > 1:
            self._preempt()

    def _preempt(self) -> None:
        """Drop the sequence that arrived last; it is recomputed from its prompt and what it had generated."""
        victim = max(self.decoding, key=lambda d: d[1])
        self.decoding.remove(victim)
        heapq.heapify(self.decoding)
        mark, index, tokens = victim
        left = mark - self.steps
        held = tokens - left
        self.context -= held
        # Behind the request whose prefill has begun: that one holds its cache and must be able to finish.
        place = 1 if self.waiting and self.waiting[0].done else 0
        self.waiting.insert(place, _Waiting(index, held, 0.0, float(left)))
        self.preempted += 1

    def _decode_run(self) -> None:
        """Decode steps until a sequence ends, a request arrives or the cache overflows, summed in closed form."""
        batch = len(self.decoding)
        clock = self.clock
        most = self.decoding[0][0] - self.steps
        slack = (self.kv_tokens - self.context - self.reserved) / batch
        most = max(1, min(most, int(slack)))
        base, slope = clock.decode_base[batch], clock.decode_slope[batch]
        first = base + slope * self.context
        grow = slope * batch
        steps = most
        if self.next < len(self.requests) and not self.waiting:
            # Smallest k with k first + grow k (k - 1)/2 >= time to the next arrival.
            gap = float(self.requests.arrival[self.next]) - self.now
            steps = min(most, _steps_to_cover(gap, first, grow))
        self.now += steps * first + grow * steps * (steps - 1) / 2
        self._advance(steps)


def _steps_to_cover(gap: float, first: float, grow: float) -> int:
    """Smallest k >= 1 with k first + grow k (k - 1)/2 >= gap."""
    if gap <= first:
        return 1
    if grow <= 0:
        return math.ceil(gap / first)
    half = first - grow / 2
    return max(1, math.ceil((-half + math.sqrt(half * half + 2 * grow * gap)) / grow - 1e-12))


def simulate(clock: StepClock, kv_tokens: float, requests: Requests, role: str = "colocated") -> Outcome:
    """Run one instance over its requests (sorted by arrival). Decode instances get requests whose cache has arrived.

    Raises ValueError when a single request exceeds the instance's cache.
    """
    engine = _Instance(clock, kv_tokens, requests, prefill_only=role == "prefill", prefilled=role == "decode")
    engine.run()
    r = requests
    first = r.arrival if role == "decode" else engine.first
    tpot = np.where(r.output > 1, (engine.finish - first) / np.maximum(r.output - 1, 1), np.nan)
    return Outcome(first - r.arrival, tpot, engine.finish, engine.preempted)


def merge(outcomes: list[Outcome]) -> Outcome:
    """Requests of several instances together."""
    return Outcome(
        np.concatenate([o.ttft for o in outcomes]),
        np.concatenate([o.tpot for o in outcomes]),
        np.concatenate([o.finish for o in outcomes]),
        sum(o.preempted for o in outcomes),
    )
