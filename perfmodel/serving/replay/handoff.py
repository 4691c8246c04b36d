"""Hand-off of the KV cache from prefill to decode instances: over a link, layer by layer, held until acknowledged."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfmodel.serving.replay.settings import Item

if TYPE_CHECKING:
    from perfmodel.serving.replay.instance import Instance


@dataclass(frozen=True)
class Handoff:
    """How a prefill instance sends caches. All its transfers share its link."""

    seconds_per_token: float
    """Link time of one token's cache."""
    latency: float = 0.0
    """From the last byte to the acknowledgement [s]."""
    block_tokens: int = 1
    """Caches move in whole messages of so many tokens."""
    layers: int = 1
    """Layers that are sent as soon as they are computed, so that all but the last hide behind the prefill; 1: no overlap."""

    def link_seconds(self, tokens: int) -> float:
        """Time the link needs for a prompt's cache."""
        return -(-tokens // self.block_tokens) * self.block_tokens * self.seconds_per_token

    def delivered(self, tokens: int, began: float, ended: float, free: float) -> float:
        """When the last byte arrives: prefill from `began` to `ended`, the link free from `free` on.

        A layer leaves when it is computed and the link is free, so the last one leaves after the prefill's end and all
        of them take at least the link time.
        """
        link = self.link_seconds(tokens)
        first = began + (ended - began) / self.layers
        return max(max(first, free) + link, ended + link / self.layers, free + link)


@dataclass(frozen=True)
class _Waiting:
    item: Item
    source: Instance
    ended: float


class Transfers:
    """Caches on their way between the instances of prefill and decode pools.

    A cache moves when the decode instance has blocks for it; the prefill instance holds its own copy until the
    acknowledgement. Decode instances serve those that wait for space in the order of their prefills' ends.
    """

    def __init__(self, handoff: dict[int, Handoff], arrive: Callable[[float, Item, Instance], None]) -> None:
        """handoff: by number of the prefill instance. arrive: called with what is delivered, and when."""
        self.handoff, self.arrive = handoff, arrive
        self.link_free: dict[int, float] = dict.fromkeys(handoff, 0.0)
        self.waiting: dict[int, deque[_Waiting]] = {}

    def offer(self, item: Item, source: Instance, target: Instance, now: float) -> None:
        """A prefill has ended at `source`; `target` shall decode."""
        target.resident += 1
        queue = self.waiting.setdefault(target.number, deque())
        queue.append(_Waiting(item, source, now))
        if len(queue) == 1:
            self.grant(target, now)

    def grant(self, target: Instance, now: float) -> list[Instance]:
        """Start the transfers that the target has space for; returns the sources, whose releases changed."""
        changed = []
        queue = self.waiting.get(target.number)
        # What was preempted there comes first.
        while queue and not target.waiting:
            sent, source = queue[0].item, queue[0].source
            item = Item(sent.index, sent.prompt, sent.left)
            item.last, item.done = sent.last, sent.prompt
            if not target.reserve(item):
                break
            ended = queue.popleft().ended
            handoff, free = self.handoff[source.number], self.link_free[source.number]
            if now > ended:
                # The space came late: nothing was sent during the prefill.
                at = max(now, free) + handoff.link_seconds(item.prompt)
            else:
                at = handoff.delivered(item.prompt, sent.started, ended, free)
            self.link_free[source.number] = at
            heapq.heappush(source.releases, (at + handoff.latency, sent.index, sent))
            self.arrive(at + handoff.latency, item, target)
            changed.append(source)
        return changed
