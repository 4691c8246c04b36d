"""KV memory of one instance in blocks: what requests hold, what the prefix cache keeps, and how decoding grows it."""

from __future__ import annotations

import math

from perfmodel.serving.replay.prefix import BlockCache
from perfmodel.serving.replay.settings import Item, Settings


class KvBlocks:
    """Blocks of a cache. `held` are those that requests use; idle ones of the prefix cache give way to them.

    A decoding sequence of n tokens needs a block more when n is a whole number of blocks. With n = offset + step counter
    that is when the counter, modulo a block, is -offset: sequences are counted by that residue, so that k steps of any
    batch grow the cache in O(block) and not O(batch).
    """

    def __init__(self, tokens: float, block: int, prompt_block: int, settings: Settings) -> None:
        """tokens: that fit. block: tokens of one. prompt_block: tokens of one prompt block id; 0: no ids."""
        self.block = block
        self.cache: BlockCache | None = None
        if prompt_block and settings.prefix_caching:
            # An id must stand for whole blocks of the engine, so coarser ones are divided.
            self.block = math.gcd(block, prompt_block)
            self.cache = BlockCache(prompt_block // self.block, prompt_block, settings.tiers)
        self.capacity = int(tokens // self.block)
        self.held = 0
        self.residues = [0] * self.block
        self.fetching = 0.0
        """Seconds to fetch what the next step found in slower tiers."""

    def of(self, tokens: int) -> int:
        """Blocks of a sequence."""
        return -(-tokens // self.block)

    def reserve(self, item: Item) -> bool:
        """Take the blocks that an item needs to start, for its prompt and a token; False when they are not free."""
        need = -(-(item.prompt + 1) // self.block)
        cache = self.cache
        if cache is None:
            if self.held + need > self.capacity:
                return False
            self.held += need
        else:
            ids = item.ids or []
            found = cache.look(ids)
            added = need - found.shared * cache.unit
            if self.held + added > self.capacity:
                return False
            self.held += added
            item.owned = ids[: found.blocks]
            fetching = cache.take(item.owned)
            # One token is always computed: it gives the next one.
            item.hit = min(found.blocks * cache.tokens, item.prompt - 1)
            if not item.delivered:
                self.fetching += fetching
            self.evict()
        item.begun, item.held = True, need
        return True

    def release(self, item: Item, held: int) -> None:
        """Give back the `held` blocks of a sequence; those with an id stay in the prefix cache until room is needed."""
        item.begun = False
        cache = self.cache
        if cache is None or item.ids is None:
            self.held -= held
            return
        if item.answer and item.left == 0:
            self.publish(item, item.answer)
        self.held -= held - len(item.owned) * cache.unit + cache.release(item.owned) * cache.unit
        item.owned = []

    def publish(self, item: Item, ids: list[int]) -> None:
        """Blocks that a request has computed can be found by others from now on."""
        assert self.cache is not None
        for i in ids:
            if not self.cache.publish(i):
                break  # another request computed the same meanwhile: this copy stays private
            item.owned.append(i)

    def evict(self) -> None:
        """Blocks of the prefix cache that nobody uses make room for those in use."""
        assert self.cache is not None
        idle = self.cache.idle
        over = min(self.held + idle - self.capacity, idle)
        if over > 0:
            self.cache.evict(over)

    def grow(self, steps: int, k: int, sequences: int) -> None:
        """k decode steps of so many sequences from step counter `steps` on."""
        cycles, rest = divmod(k, self.block)
        held = self.held + cycles * sequences
        if rest:
            at = steps % self.block
            held += sum(self.residues[at : at + rest])
            if at + rest > self.block:
                held += sum(self.residues[: at + rest - self.block])
        self.held = held
        if self.cache is not None:
            self.evict()

    def steps_to_overflow(self, steps: int, most: int, sequences: int) -> int:
        """Smallest number of decode steps from counter `steps` on after which requests hold more than there is, else `most`."""
        free = self.capacity - self.held
        if -(-most // self.block) * sequences <= free:
            return most
        cycles, free = divmod(free, sequences)
        taken = cycles * self.block
        while free >= 0 and taken < most:
            free -= self.residues[(steps + taken) % self.block]
            taken += 1
        return min(taken, most)
