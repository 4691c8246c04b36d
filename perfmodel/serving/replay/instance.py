"""One serving engine, step by step: admission, batching, KV blocks, preemption; runs of decode steps in closed form.

Rules. The queue is in order of arrival, and its head starts when the cache has blocks for its whole prompt and one token
(blocks that only the prefix cache holds are given up for it). A step decodes every running sequence once; what prefill
it carries is the policy's business. A sequence holds blocks for its prompt and all it has produced. When the blocks in
use exceed the cache after a step, the youngest request that holds any is preempted and goes back to the head of the
queue. Between events the batch is constant and a step's time affine in the total context, so k steps are summed in
closed form.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import TYPE_CHECKING

from perfmodel.serving.layered import LayeredClock
from perfmodel.serving.replay.kv import KvBlocks
from perfmodel.serving.replay.ledger import GapTrace, Ledger
from perfmodel.serving.replay.migration import give_away
from perfmodel.serving.replay.policies import POLICIES, Chunks, overtake
from perfmodel.serving.replay.settings import Item, Settings

if TYPE_CHECKING:
    from perfmodel.serving.clock import StepClock
    from perfmodel.serving.encode import EncodeClock


class Instance:
    """State of one engine. The caller delivers arrivals, and calls `turn` whenever the time `end` has come."""

    def __init__(
        self, number: int, clock: StepClock, kv_tokens: float, settings: Settings, ledger: Ledger, *,
        prefills_only: bool = False, prompt_block: int = 0, hands_over: bool = False, tower: EncodeClock | None = None,
    ) -> None:  # fmt: skip
        """prompt_block: tokens of one prompt block id (0: no ids). hands_over: another instance decodes what it prefills. tower:
        encodes the images of prompts, in the step that begins them."""
        self.number, self.clock, self.settings, self.ledger = number, clock, settings, ledger
        self.prefills_only, self.hands_over, self.tower = prefills_only, hands_over, tower
        block = settings.block_tokens or clock.estimator.engine.block_tokens
        self.kv = KvBlocks(kv_tokens, block, prompt_block, settings)
        self.max_batch = min(settings.max_batch or clock.max_batch, clock.max_batch)
        self.chunk = settings.chunk or clock.chunk
        self.plan_prefill = POLICIES[settings.policy]
        self.alone = settings.policy in ("whole", "static")  # prefill steps carry no decoding
        self.padded = settings.policy == "static"
        self.layered = clock if isinstance(clock, LayeredClock) else None
        self.gaps = GapTrace(ledger)

        self.now = 0.0
        """Beginning of what runs."""
        self.end = math.inf
        """Its end: the next turn. Infinite when idle."""
        self.version = 0
        """Of the announcement of `end`, which the caller counts."""
        self.run = 0  # decode steps that run
        self.first = self.grow = self.extra = 0.0  # seconds of the first of them, growth per step, and once
        self.chunks: Chunks = []
        self.decoding: list[tuple[int, int, Item]] = []  # heap of (end mark, order, item)
        self.waiting: deque[Item] = deque()
        self.ready: deque[Item] = deque()  # handed over, blocks and all: they join as soon as there is a place
        self.ended: list[Item] = []  # of a padded batch
        self.steps = 0  # decode steps taken: a sequence ends when this counter reaches its mark
        self.context = 0  # tokens attended by all slots of the batch together
        self.slots = 0  # sequences of the batch, ended ones of a padded batch included
        self.releases: list[tuple[float, int, Item]] = []  # handed-over caches by the time they are acknowledged
        self.late: list[Item] = []  # joined with a token older than the step before
        self.owed = 0.0  # seconds that the next step waits for swapped caches
        self.offers: list[Instance] = []  # that take a sequence each at the end of the step that runs
        self.moving: list[tuple[Item, Instance]] = []  # sequences that left for another instance since the caller last looked
        self.left: list[Item] = []  # finished, rejected or prefilled since the caller last looked
        self.resident = 0
        """Requests inside."""
        self.prefill_left = 0
        """Prompt tokens that wait or are under way."""
        self.served = 0
        self.busy = self.prefilling = self.held_seconds = 0.0
        self.most_held = 0

    # -- what the caller does ------------------------------------------------------------------------------------

    def submit(self, item: Item, time: float) -> bool:
        """A request arrives. True when the next turn comes earlier than announced."""
        item.order = self.served
        self.served += 1
        self.resident += 1
        self.prefill_left += item.prompt - item.done
        queue = self.ready if item.begun else self.waiting
        queue.append(item)
        if self.settings.overtaken and queue is self.waiting:
            overtake(queue, self.settings.overtaken)
        # The first in line may start at the end of the step that runs now.
        return self.wake(time) or (len(queue) == 1 and self.interrupt(time))

    def wake(self, time: float) -> bool:
        """Look again, if nothing runs, because something outside has changed. True when the next turn comes earlier."""
        if self.run or self.chunks:
            return False
        self.held_seconds += self.kv.held * (time - self.now)  # caches on their way out
        self.now = self.end = time
        return True

    def interrupt(self, time: float, *, full: bool = False) -> bool:
        """Cut a run of decode steps to those that have begun before `time`; of a full batch only if asked."""
        if self.run < 2 or (self.slots >= self.max_batch and not full) or self.padded:
            return False
        steps = steps_to_cover(time - self.now - self.extra, self.first, self.grow)
        if steps >= self.run:
            return False
        self._set_run(steps)
        return True

    def turn(self) -> None:
        """End what runs and start the next step."""
        if self.end > self.now:
            self._commit()
        if self.offers:
            give_away(self)
        while self.releases and self.releases[0][0] <= self.now:
            self._free(heapq.heappop(self.releases)[2])
        self.run, self.chunks = 0, []
        if self.ready or (self.waiting and self.waiting[0].delivered):
            self._join_delivered()
        if self.waiting:
            if self.settings.timeout < math.inf:
                self._expire()
            self.chunks = self.plan_prefill(self)
        if self.chunks:
            self._start_prefill()
        elif self.slots:
            self._start_run()
        else:
            self.end = self.releases[0][0] if self.releases else math.inf

    def reserve(self, item: Item) -> bool:
        """Take the blocks that an item needs to start; False when they are not free."""
        if not self.kv.reserve(item):
            return False
        if item.done and not item.delivered:
            self.kv.fetching += item.done * self.settings.fetch_seconds_per_token
        if item.hit and not item.delivered:
            item.done = item.hit
            self.prefill_left -= item.hit
            if math.isnan(item.last):
                self.ledger.cached[item.index] = item.hit
        return True

    # -- a step ends ---------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        kv, start, before = self.kv, self.now, self.kv.held
        self.now = self.end
        seconds = self.end - start
        after = before
        if self.chunks:
            self.busy += seconds
            self.prefilling += seconds
            if self.alone:
                self.gaps.pause(len(self.decoding) - len(self.late), seconds)
            elif self.slots:
                after = self._advance(1)
            self._prefilled()
        elif self.run:
            self.busy += seconds
            after = self._advance(self.run)
        self.held_seconds += (before + after) * 0.5 * seconds
        if after > self.most_held:
            self.most_held = min(after, kv.capacity)
        while kv.held > kv.capacity:
            self._preempt()
        if kv.cache is not None:
            kv.evict()

    def _advance(self, k: int) -> int:
        """All slots take k steps; sequences that have all their tokens leave. Returns the blocks held just before that."""
        decoding = self.decoding
        late = [x.last for x in self.late]
        self.gaps.steps(self.now, k, self.first, self.grow, self.extra, len(decoding), late)
        if late:
            at = self.now - (k - 1) * self.first - self.grow * (k * (k - 1) / 2)
            for x in self.late:
                x.longest = max(x.longest, at - x.last)
            self.late = []
        self.context += k * self.slots
        self.kv.grow(self.steps, k, self.slots)
        held = self.kv.held
        self.steps = steps = self.steps + k
        while decoding and decoding[0][0] <= steps:
            item = heapq.heappop(decoding)[2]
            item.left = 0
            self._finish(item, self.gaps.longest_since(item.counter))
            if self.padded:
                self.ended.append(item)
            else:
                self._leave_batch(item)
        if self.padded and not decoding:
            for item in self.ended:
                self._leave_batch(item)
            self.ended = []
        return held

    def _leave_batch(self, item: Item) -> int:
        """Take a sequence out of the batch and free its blocks; returns its tokens."""
        tokens = item.offset + self.steps
        self.context -= tokens
        self.slots -= 1
        self.kv.residues[-item.offset % self.kv.block] -= 1
        self.kv.release(item, self.kv.of(tokens))
        return tokens

    def _finish(self, item: Item, longest: float = 0.0) -> None:
        ledger, index = self.ledger, item.index
        ledger.finish[index] = self.now
        ledger.longest[index] = longest if longest > item.longest else item.longest
        self.resident -= 1
        if ledger.watched:
            self.left.append(item)

    def _prefilled(self) -> None:
        """Prompts got further; complete ones produce a token and decode on, here or elsewhere."""
        now, ledger, waiting, cache = self.now, self.ledger, self.waiting, self.kv.cache
        for item, q in self.chunks:
            item.done += q
            self.prefill_left -= q
            if cache is not None and item.ids is not None:
                self.kv.publish(item, item.ids[len(item.owned) : item.done // cache.tokens])
            if item.done < item.prompt:
                continue
            # Chunks are taken in order of the queue, so complete ones are its head, unless one was preempted meanwhile.
            waiting.remove(item)
            item.left -= 1
            if math.isnan(item.last):
                ledger.first[item.index] = now
                ledger.instance[item.index] = self.number
            else:
                gap = now - item.last
                ledger.gap(now, gap, gap, 1)
                item.longest = max(item.longest, gap)
            item.last = now
            if not self.prefills_only:
                self._join(item)
            elif self.hands_over and item.left:
                self.resident -= 1
                self.left.append(item)
            else:
                self._free(item)
                self._finish(item)

    def _free(self, item: Item) -> None:
        """Give back the blocks of a request that does not decode here."""
        self.kv.release(item, item.held)

    def _expire(self) -> None:
        """Reject what has waited too long at the head of the queue."""
        waiting, since = self.waiting, self.now - self.settings.timeout
        while waiting and math.isnan(waiting[0].last) and not waiting[0].begun:
            if self.ledger.arrival[waiting[0].index] >= since:
                return
            item = waiting.popleft()
            self.resident -= 1
            self.prefill_left -= item.prompt
            self.ledger.rejected[item.index] = True
            if self.ledger.watched:
                self.left.append(item)

    def take_out(self, victim: Item) -> int:
        """Take a sequence that has not ended out of the batch; returns its tokens."""
        self.decoding = [d for d in self.decoding if d[2] is not victim]
        heapq.heapify(self.decoding)
        self.late = [x for x in self.late if x is not victim]
        victim.longest = max(victim.longest, self.gaps.longest_since(victim.counter))
        produced = victim.offset + self.steps - victim.prompt - 1
        if produced:
            victim.last = self.now
        victim.left -= produced
        return self._leave_batch(victim)

    def _preempt(self) -> None:
        """Take the blocks of the youngest request that holds any. The oldest fits alone, or it was not admitted."""
        victim = max(self.decoding, key=lambda d: d[1])[2] if self.decoding else None
        head = self.waiting[0] if self.waiting and self.waiting[0].begun else None
        if victim is None or (head is not None and head.order > victim.order):
            assert head is not None
            victim = head
            self.chunks = [c for c in self.chunks if c[0] is not victim]
            self._free(victim)
        else:
            swap = self.settings.swap_seconds_per_token
            tokens = self.take_out(victim)
            victim.delivered = swap is not None
            # A swapped sequence keeps its place for the next token; a recomputed one produces it by its prefill.
            victim.prompt = tokens - 1 if victim.delivered else tokens
            self.owed += victim.prompt * (swap or 0.0)
            self.waiting.appendleft(victim)
        if not victim.delivered:
            self.prefill_left += victim.done if victim is head else victim.prompt
        victim.done = 0
        self.ledger.preempted[victim.index] += 1

    # -- a step starts -------------------------------------------------------------------------------------------

    def _join(self, item: Item) -> None:
        """A sequence with its blocks starts to decode: its next step attends prompt + 1 tokens."""
        if item.left <= 0:
            self._free(item)
            self._finish(item, item.longest)
            return
        item.offset = item.prompt + 1 - self.steps
        item.counter = self.gaps.counter
        self.context += item.prompt + 1
        self.slots += 1
        self.kv.residues[-item.offset % self.kv.block] += 1
        self.ledger.decoder[item.index] = self.number
        heapq.heappush(self.decoding, (self.steps + item.left, item.order, item))

    def _join_delivered(self) -> None:
        """Sequences whose cache came from elsewhere take places in the batch: handed over with their blocks, or not."""
        while self.slots < self.max_batch:
            if self.ready:
                item = self.ready.popleft()
            elif self.waiting and self.waiting[0].delivered and self.reserve(self.waiting[0]):
                item = self.waiting.popleft()
            else:
                return
            if item.done < item.prompt:  # it was swapped out
                self.owed += item.prompt * (self.settings.swap_seconds_per_token or 0.0)
                item.done = item.prompt
            item.delivered = False
            self._join(item)
            if item.left > 0 and item.last < self.now:
                self.late.append(item)

    def _start_prefill(self) -> None:
        slots = 0 if self.alone else self.slots
        chunks: list[tuple[float, float]] = [(q, item.done) for item, q in self.chunks]
        if self.layered is not None:
            prompts = [float(item.prompt - item.hit) for item, _ in self.chunks]
            seconds = self.layered.step(slots, self.context, chunks, prompts)
        else:
            seconds = self.clock.step(slots, self.context, chunks)
        if self.tower is not None:
            seconds += self.tower.seconds(sum(item.images for item, _ in self.chunks))
            for item, _ in self.chunks:
                item.images = 0
        self.first, self.grow, self.extra = self._with_fetching(seconds) + self.owed, 0.0, 0.0
        self.owed = 0.0
        self.end = self.now + self.first
        if self.hands_over:
            for item, _ in self.chunks:
                if math.isnan(item.started):
                    item.started = self.now

    def _with_fetching(self, seconds: float) -> float:
        """A prefill step with the fetching of what it found in slower tiers."""
        fetching, self.kv.fetching = self.kv.fetching, 0.0
        return max(seconds, fetching) if self.settings.fetch_overlaps else seconds + fetching

    def _start_run(self) -> None:
        """Decode steps until a sequence ends or the cache overflows."""
        slots = self.slots
        self.first = self.clock.decode_base[slots] + self.clock.decode_slope[slots] * self.context
        self.grow = self.clock.decode_slope[slots] * slots
        self.extra, self.owed = self.owed, 0.0
        self._set_run(self.kv.steps_to_overflow(self.steps, self.decoding[0][0] - self.steps, slots))

    def _set_run(self, steps: int) -> None:
        self.run = steps
        self.end = self.now + self.extra + steps * self.first + self.grow * (steps * (steps - 1) / 2)


def steps_to_cover(gap: float, first: float, grow: float) -> int:
    """Smallest k >= 1 with k first + grow k (k - 1)/2 >= gap."""
    if gap <= first:
        return 1
    if grow <= 0:
        return math.ceil(gap / first)
    half = first - grow / 2
    return max(1, math.ceil((-half + math.sqrt(half * half + 2 * grow * gap)) / grow - 1e-12))
