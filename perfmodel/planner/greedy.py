"""What a careful person would buy without a solver: the baseline that the integer program is compared with.

Buckets are served from the longest prompts down. Each goes to the column (or prefill and decode pair, with an encode column
where they need one) that costs least per request of it; room that its whole instances leave is filled with the next buckets
the column serves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from perfmodel.planner.columns import Column, carries_images
from perfmodel.planner.constraints import footprint
from perfmodel.planner.offer import Offer

_LEFT = 1e-9


@dataclass
class Greedy:
    """instances per column, whole nodes per offer, and what they cost; `unserved` requests/s when the nodes run out."""

    instances: dict[int, int] = field(default_factory=dict)
    nodes: list[int] = field(default_factory=list)
    cost: float = math.inf
    unserved: float = 0.0


def share(c: Column, bucket: int) -> float:
    """Share of one instance that a request per second of a bucket takes: its scarcest resource [s]."""
    rooms = ((c.prefill_s, c.state.utilisation), (c.decode_s, c.state.batch), (c.kv_token_s, c.kv_limit))
    return max((float(d[bucket]) / room if room > 0 else math.inf) if d[bucket] > 0 else 0.0 for d, room in rooms)


def greedy(columns: list[Column], offers: list[Offer], rates: list[float], weights: list[float]) -> Greedy:
    """Serve `rates` [1/s per bucket]; `weights`: what a node of each offer adds to the objective."""
    spare: dict[int, float] = {}
    result = Greedy()
    per_device = [w / o.devices for w, o in zip(weights, offers, strict=True)]

    def price(i: int, k: int) -> float:
        c = columns[i]
        return share(c, k) * footprint(c) * per_device[offers.index(c.offer)]

    def room(i: int) -> int:
        """Instances of a column that still fit on the nodes that may be bought."""
        offer = columns[i].offer
        if offer.max_nodes is None:
            return 10**9
        taken = sum(footprint(columns[j]) * n for j, n in result.instances.items() if columns[j].offer is offer)
        return int((offer.devices * offer.max_nodes - taken) / footprint(columns[i]) + _LEFT)

    def carries(way: tuple[int, ...], k: int) -> float:
        """Rate of bucket k that fits on instances already bought."""
        return min(spare.get(i, 0.0) / share(columns[i], k) for i in way)

    for k in reversed(range(len(rates))):
        left = rates[k]
        ways = _ways(columns, k)
        while left > _LEFT:
            paid = max(ways, key=lambda w: carries(w, k), default=())
            if not paid or carries(paid, k) <= _LEFT:
                ways = [w for w in ways if all(room(i) > 0 or spare.get(i, 0.0) > _LEFT for i in w)]
                if not ways:
                    result.unserved += left
                    break
                paid = min(ways, key=lambda w: sum(price(i, k) for i in w))
                for i in paid:
                    lack = math.ceil(left * share(columns[i], k) - spare.get(i, 0.0) - _LEFT)
                    more = min(max(lack, 0), room(i))
                    result.instances[i] = result.instances.get(i, 0) + more
                    spare[i] = spare.get(i, 0.0) + more
            served = min(left, carries(paid, k))
            for i in paid:
                spare[i] -= served * share(columns[i], k)
            left -= served
    used = np.zeros(len(offers))
    for i, n in result.instances.items():
        used[offers.index(columns[i].offer)] += footprint(columns[i]) * n
    result.nodes = [math.ceil(u / o.devices - _LEFT) for u, o in zip(used, offers, strict=True)]
    result.cost = math.inf if result.unserved > _LEFT else sum(w * n for w, n in zip(weights, result.nodes, strict=True))
    return result


def _ways(columns: list[Column], k: int) -> list[tuple[int, ...]]:
    """Columns, and prefill-decode pairs, that serve bucket k; by hand one pairs devices of one offer only."""
    able = [i for i, c in enumerate(columns) if k in c.buckets and share(c, k) < math.inf]
    alone: list[tuple[int, ...]] = [(i,) for i in able if columns[i].layout.role == "colocated"]
    pairs: list[tuple[int, ...]] = [
        (i, j) for i in able if columns[i].layout.role == "prefill"
        for j in able if columns[j].layout.role == "decode" and columns[j].offer is columns[i].offer
    ]  # fmt: skip
    return [x for way in alone + pairs for x in _encoded(way, columns, able, k)]


def _encoded(way: tuple[int, ...], columns: list[Column], able: list[int], k: int) -> list[tuple[int, ...]]:
    """A way as it is, or with each encode column that its first one needs for the images of bucket k."""
    first = columns[way[0]]
    if not (first.layout.fed and carries_images(first, k)):
        return [way]
    mates = [
        (c.layout.role, c.layout.encode_share, c.offer) == ("encode", first.layout.encode_share, first.offer) for c in columns
    ]  # fmt: skip
    return [(*way, j) for j in able if mates[j]]
