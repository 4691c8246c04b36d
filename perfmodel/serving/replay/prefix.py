"""Prefix cache of one instance: blocks by id, those nobody uses evicted oldest first, with slower tiers behind.

Every operation is O(1) per block. Memory is counted in KV blocks of the engine; one id stands for `unit` of them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from perfmodel.serving import sharing
from perfmodel.serving.requests import Requests


@dataclass(frozen=True)
class Tier:
    """A slower memory that takes what the cache evicts, oldest first, and gives it back on a hit."""

    name: str
    tokens: float
    """Capacity [token]."""
    seconds_per_token: float
    """Time to fetch a token's cache into the instance; writing goes on in the background."""


@dataclass(frozen=True)
class Found:
    """What a look-up found at the head of a prompt."""

    blocks: int
    """Leading ids found, in any tier."""
    shared: int
    """Those of them that running requests hold already, so that they need no more memory."""


class BlockCache:
    """Ids that are resident, with their users; the unused ones in order of their last use."""

    def __init__(self, unit: int, block_tokens: int, tiers: tuple[Tier, ...]) -> None:
        self.unit, self.tokens = unit, block_tokens
        self.users: dict[int, int] = {}
        self.unused: OrderedDict[int, None] = OrderedDict()
        self.tiers = tiers
        self._below: list[OrderedDict[int, None]] = [OrderedDict() for _ in tiers]
        self._room = [int(t.tokens // block_tokens) for t in tiers]

    @property
    def idle(self) -> int:
        """KV blocks that hold ids nobody uses."""
        return len(self.unused) * self.unit

    def look(self, ids: list[int]) -> Found:
        """How many leading ids are in some tier."""
        users, unused, below = self.users, self.unused, self._below
        shared = count = 0
        for i in ids:
            if i in users:
                shared += i not in unused
            elif not any(i in tier for tier in below):
                break
            count += 1
        return Found(count, shared)

    def take(self, ids: list[int]) -> float:
        """Use these ids, all of them found before; returns the seconds to fetch those of slower tiers."""
        seconds = 0.0
        for i in ids:
            n = self.users.get(i)
            if n is None:
                for tier, held in zip(self.tiers, self._below, strict=True):
                    if i in held:
                        del held[i]
                        seconds += tier.seconds_per_token * self.tokens
                        break
                self.users[i] = 1
            else:
                if n == 0:
                    del self.unused[i]
                self.users[i] = n + 1
        return seconds

    def publish(self, i: int) -> bool:
        """A request has computed this block and goes on using it; False if another request did before."""
        if i in self.users:
            return False
        self.users[i] = 1
        for held in self._below:
            held.pop(i, None)
        return True

    def release(self, ids: list[int]) -> int:
        """Stop using ids; returns how many of them nobody uses any more. The tail of a prompt is evicted before its head."""
        users, unused = self.users, self.unused
        freed = 0
        for i in reversed(ids):
            n = users[i] - 1
            users[i] = n
            if n == 0:
                unused[i] = None
                freed += 1
        return freed

    def evict(self, blocks: int) -> None:
        """Make room for `blocks` KV blocks among the unused ids; what falls out of a tier moves to the next."""
        for _ in range(-(-blocks // self.unit)):
            i, _none = self.unused.popitem(last=False)
            del self.users[i]
            falls: int | None = i
            for held, room in zip(self._below, self._room, strict=True):
                if falls is None or room < 1:
                    continue
                held[falls] = None
                falls = held.popitem(last=False)[0] if len(held) > room else None


def answer_ids(requests: Requests) -> list[list[int] | None]:
    """Ids of the blocks that each request's answer completes, as the session's next turn names them; None where unknown.

    Sessions are the requests' own, else those their block ids show.
    """
    blocks = requests.blocks
    assert blocks is not None
    if requests.session is None:
        requests = replace(requests, session=sharing.conversations(requests))
    full = sharing.full_blocks(requests).tolist()
    previous = sharing.previous_turn(requests).tolist()
    total = (requests.input + requests.output).tolist()
    found: list[list[int] | None] = [None] * len(requests)
    for j, i in enumerate(previous):
        if i < 0 or not full[i] or requests.input[j] < total[i]:
            continue
        mine = blocks.of(j)[: full[j]]
        # The earlier prompt's last block must stand at the same place, so that what follows is its answer.
        if full[j] > full[i] and mine[full[i] - 1] == blocks.of(i)[full[i] - 1]:
            found[i] = mine[full[i] : int(total[i] // blocks.tokens)].tolist() or None
    return found
