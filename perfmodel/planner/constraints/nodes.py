"""Whole nodes: what shares one, in what units they are bought, and how many there are."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import pulp

from perfmodel.planner.columns import Column
from perfmodel.planner.constraints.capacity import rooms
from perfmodel.planner.program import LimitRow, Program

_PATTERN_DEVICES = 16  # packing patterns are listed for nodes of at most so many devices


def footprint(c: Column) -> float:
    """Devices that one instance occupies, what cannot be shared with its equals included: D/floor(D/d), or whole nodes."""
    have, need = c.offer.devices, c.layout.devices
    return have / (have // need) if need <= have else -(-need // have) * have


def define_whole_nodes(p: Program, needed: dict[tuple[int, int], pulp.LpAffineExpression]) -> None:
    """For every offer t and period p, instances fit into the nodes K[t,p]; those of more than a node take ceil(d/D) whole ones.

    Where each size divides the next larger one (tp 1, 2, 4, 8), one row per size s is necessary and sufficient:
    sum over entries with d >= s of (d/s) n[i] + floor(D/s) x (nodes of larger instances) <= floor(D/s) K. Otherwise the ways
    to fill a node (tp6 + tp2, tp3 + tp3 + tp2 …) are variables z: sum z = K, and sum over patterns of count_s z >= sum n of
    that size.
    """
    for t, offer in enumerate(p.question.offers):
        for period in p.periods:
            inside: dict[int, list[pulp.LpVariable]] = {}
            whole = []
            for i, c in p.on(t, period):
                if c.layout.devices <= offer.devices:
                    inside.setdefault(c.layout.devices, []).append(p.n[i])
                else:
                    whole.append(-(-c.layout.devices // offer.devices) * p.n[i])
            room = needed[t, period] - pulp.lpSum(whole)
            name = f"nodes_{t}_{period}"
            if chained(sizes := sorted(inside)):
                for s in sizes or [offer.devices]:
                    used = pulp.lpSum((d // s) * v for d, members in inside.items() if d >= s for v in members)
                    p.problem += used <= (offer.devices // s) * room, f"{name}_{s}"
            elif offer.devices <= _PATTERN_DEVICES:
                _define_patterns(p, inside, room, offer.devices, name)
            else:
                used = pulp.lpSum(offer.devices / (offer.devices // d) * v for d, m in inside.items() for v in m)
                p.problem += used <= offer.devices * room, name


def chained(sizes: list[int]) -> bool:
    """Whether each size divides the next: then items pack without a remainder."""
    return all(b % a == 0 for a, b in pairwise(sizes))


def _define_patterns(
    p: Program, inside: dict[int, list[pulp.LpVariable]], room: pulp.LpAffineExpression, devices: int, name: str
) -> None:
    sizes = tuple(sorted(inside))
    ways = patterns(sizes, devices)
    z = [p.problem.add_variable(f"{name}_way{w}", lowBound=0, cat=p.integer) for w in range(len(ways))]
    p.problem += pulp.lpSum(z) <= room, name
    for j, s in enumerate(sizes):
        packed = pulp.lpSum(way[j] * v for way, v in zip(ways, z, strict=True))
        p.problem += pulp.lpSum(inside[s]) <= packed, f"{name}_{s}"


@lru_cache(maxsize=64)
def patterns(sizes: tuple[int, ...], devices: int) -> tuple[tuple[int, ...], ...]:
    """Ways to fill a node to which nothing more can be added: counts by size.

    >>> patterns((2, 6), 8)
    ((1, 1), (4, 0))
    """

    def fill(j: int, left: int) -> list[tuple[int, ...]]:
        if j < 0:
            return [()]
        return [(*rest, n) for n in range(left // sizes[j], -1, -1) for rest in fill(j - 1, left - n * sizes[j])]

    every = fill(len(sizes) - 1, devices)
    smallest = min(sizes)
    full = [w for w in every if devices - sum(a * b for a, b in zip(w, sizes, strict=True)) < smallest]
    return tuple(sorted(full))


def define_availability(p: Program) -> None:
    """For every item of the fleet list with a limit, in every period: sum over its offers of N[t] <= max_nodes."""
    for item in dict.fromkeys(o.item for o in p.question.offers):
        mine = [t for t, o in enumerate(p.question.offers) if o.item == item]
        first = p.question.offers[mine[0]]
        if first.max_nodes is not None:
            for period in p.periods:
                row = LimitRow(f"max_nodes of {first.label.removesuffix(' (spot)')}", first.max_nodes, "nodes")
                p.limit(pulp.lpSum(p.bought(t, period) for t in mine), row, f"available_{item}_{period}")


def define_quota(p: Program) -> None:
    """For every tariff with a quota, in every period: block x N[t,m,p] <= quota."""
    for t, offer in enumerate(p.question.offers):
        for m, tariff in enumerate(offer.paid):
            if tariff.quota is not None:
                for period in p.periods:
                    row = LimitRow(f"{tariff.term} quota of {offer.label}", tariff.quota, "nodes")
                    p.limit(offer.block * p.nodes[t, m, period], row, f"quota_{t}_{m}_{period}")


def define_purchase_unit(p: Program) -> None:
    """For every offer with a smallest purchase: min_nodes x_t <= N[t,p] <= most x_t with x_t in {0, 1}.

    Blocks need no row: the variables count them.
    """
    for t, offer in enumerate(p.question.offers):
        if offer.min_nodes > offer.block:
            most = most_nodes(p, t)
            for period in p.periods:
                taken = p.problem.add_variable(f"taken_{t}_{period}", lowBound=0, upBound=1, cat=p.integer)
                p.problem += p.bought(t, period) >= offer.min_nodes * taken, f"least_{t}_{period}"
                p.problem += p.bought(t, period) <= most * taken, f"most_{t}_{period}"


def most_nodes(p: Program, t: int) -> int:
    """More nodes of an offer than any sensible plan buys: its limit, or what its least efficient column takes for all load."""
    offer = p.question.offers[t]
    if offer.max_nodes is not None:
        return offer.max_nodes
    devices = sum(most_instances(p, i) * footprint(p.entries[i].column) for period in p.periods for i, _ in p.on(t, period))
    return max(math.ceil(devices / offer.devices), offer.min_nodes, offer.block) + offer.block


def most_instances(p: Program, i: int) -> int:
    """Instances of an entry that carry all load of its buckets twice over."""
    entry = p.entries[i]
    many = max(
        sum(entry.demand.rates[k] * demand[k] for k in entry.column.buckets) / room if room > 0 else 0.0
        for _, demand, room in rooms(entry.column)
    )
    return 2 * math.ceil(many) + 2
