"""Routing: which instance of a pool a request goes to.

random         any, with equal probability
round-robin    in turn
least-loaded   fewest requests inside (prefill pools: fewest prompt tokens to compute)
freest         most free memory per request inside, less what the waiting ones ask for (Llumnix, arXiv:2406.03243)
prefix-affine  where most of the prompt was sent before, unless that instance is overloaded
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfmodel.serving.replay.migration import room

if TYPE_CHECKING:
    import numpy as np

    from perfmodel.serving.replay.instance import Instance
    from perfmodel.serving.replay.settings import Item

Router = Callable[["Item"], "Instance"]


@dataclass(frozen=True)
class Affinity:
    """When affinity counts.

    Defaults: SGLang's model gateway, policy cache_aware, options --cache-threshold, --balance-abs-threshold and
    --balance-rel-threshold (github.com/lightseekorg/smg, docs/getting-started/load-balancing.md, read in November 2026).
    """

    least_match: float = 0.3
    """Share of the prompt's blocks that must match; else the least loaded instance takes the request."""
    load_gap: int = 64
    """A pool is out of balance when the most loaded instance has so many requests more than the least loaded ..."""
    load_ratio: float = 1.5
    """... and this many times as many; then the least loaded one takes the request."""


def load(x: Instance) -> tuple[int, int]:
    """What least-loaded routing compares."""
    return (x.prefill_left, x.resident) if x.prefills_only else (x.resident, x.prefill_left)


def router(kind: str, instances: list[Instance], rng: np.random.Generator, affinity: Affinity, keys: bool) -> Router:
    """The router of one pool. keys: whether requests carry prompt block ids or sessions."""
    if len(instances) == 1:
        return lambda item: instances[0]
    if kind == "random":
        return lambda item: instances[int(rng.integers(len(instances)))]
    if kind == "round-robin":
        return _RoundRobin(instances)
    if kind == "freest":
        return lambda item: max(instances, key=room)
    if kind == "prefix-affine" and keys:
        return PrefixAffine(instances, affinity)
    return lambda item: min(instances, key=load)


class _RoundRobin:
    def __init__(self, instances: list[Instance]) -> None:
        self.instances, self.next = instances, 0

    def __call__(self, item: Item) -> Instance:
        chosen = self.instances[self.next]
        self.next = (self.next + 1) % len(self.instances)
        return chosen


class PrefixAffine:
    """Longest-prefix match over what was sent where, with a guard against imbalance.

    For each block id the instances that a prompt with it went to are one bit mask, so a look-up is one AND per block.
    """

    def __init__(self, instances: list[Instance], affinity: Affinity) -> None:
        self.instances, self.affinity = instances, affinity
        self.sent: dict[int, int] = {}

    def __call__(self, item: Item) -> Instance:
        chosen = self._choose(item)
        bit = 1 << self.instances.index(chosen)
        for i in item.keys:
            self.sent[i] = self.sent.get(i, 0) | bit
        return chosen

    def _choose(self, item: Item) -> Instance:
        loads = [x.resident for x in self.instances]
        least, most = min(loads), max(loads)
        out_of_balance = most - least > self.affinity.load_gap and most > self.affinity.load_ratio * least
        mask = matched = 0
        if not out_of_balance:
            candidates = (1 << len(self.instances)) - 1
            for i in item.keys:
                candidates &= self.sent.get(i, 0)
                if not candidates:
                    break
                mask = candidates
                matched += 1
        if not matched or matched < self.affinity.least_match * len(item.keys):
            return min(self.instances, key=load)
        return min((x for n, x in enumerate(self.instances) if mask >> n & 1), key=load)
