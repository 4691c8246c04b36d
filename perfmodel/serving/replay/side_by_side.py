"""The policy `split`: prefill and decode run at the same time on their shares of the device.

A prefill pass begins at the end of a decode step and lasts as long as it takes beside decoding; decode steps go on
meanwhile. Prompts that it completes have their token at its end, and decode on from the end of the decode step that runs
then. Both sides keep the speed they have beside each other (SplitClock), so a side whose other one rests is a little faster
than shown.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING, Any

from perfmodel.serving.replay.instance import Instance, steps_to_cover
from perfmodel.serving.split import SplitClock

if TYPE_CHECKING:
    from perfmodel.serving.clock import StepClock


class SideBySide(Instance):
    """An engine whose prefill pass outlives decode steps: `chunks` are what it carries, until `pass_end`."""

    def __init__(self, number: int, clock: StepClock, *rest: Any, **more: Any) -> None:
        super().__init__(number, clock, *rest, **more)
        assert isinstance(clock, SplitClock)
        self.prefill_clock = clock.prefill_side
        self.pass_start = self.pass_end = math.inf

    def turn(self) -> None:
        """End what runs and start the next decode steps, and the next pass if none runs."""
        kv = self.kv
        if self.end > self.now:
            start, before, self.now = self.now, kv.held, self.end
            seconds = self.now - start
            working = bool(self.run or self.chunks)
            after = self._advance(self.run) if self.run else before
            self.busy += seconds * working
            self.held_seconds += (before + after) * 0.5 * seconds
            self.most_held = max(self.most_held, min(after, kv.capacity))
        if self.pass_end <= self.now:
            self._end_pass()
        while kv.held > kv.capacity:
            self._preempt()
        if kv.cache is not None:
            kv.evict()
        while self.releases and self.releases[0][0] <= self.now:
            self._free(heapq.heappop(self.releases)[2])
        if self.ready or (self.waiting and self.waiting[0].delivered):
            self._join_delivered()
        if self.waiting and not self.chunks:
            self._begin_pass()
        self.run = 0
        if self.slots:
            self._start_run()
            if self.chunks:
                steps = steps_to_cover(self.pass_end - self.now - self.extra, self.first, self.grow)
                if steps < self.run:
                    self._set_run(steps)
        elif self.chunks:
            self.end = self.pass_end
        else:
            self.end = self.releases[0][0] if self.releases else math.inf

    def _begin_pass(self) -> None:
        if self.settings.timeout < math.inf:
            self._expire()
        self.chunks = self.plan_prefill(self)
        if self.chunks:
            seconds = self.prefill_clock.step(0, 0.0, [(q, item.done) for item, q in self.chunks])
            self.pass_start, self.pass_end = self.now, self.now + self._with_fetching(seconds)

    def _end_pass(self) -> None:
        """Tokens come at the end of the pass, which may lie before the end of the decode step that runs meanwhile."""
        now, joined = self.now, self.slots
        self.now = self.pass_end
        self.prefilling += self.pass_end - self.pass_start
        items = [item for item, _ in self.chunks]
        self._prefilled()
        self.now, self.chunks, self.pass_end = now, [], math.inf
        if self.slots > joined:
            self.late += [x for x in items if x.left > 0 and x.done >= x.prompt and x.last < now]
