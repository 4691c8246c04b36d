"""Placements of experts found quickly: a greedy start and swaps that lower the objective of experts.py."""

from __future__ import annotations

import numpy as np

from perfmodel.planner.placement.expert_problem import Demand, Ranks, by_node

# Swaps tried at most, and candidates priced for one.
_ROUNDS = 4000
_CANDIDATES = 24


def starts(demand: Demand, ranks: Ranks, slots: int) -> list[np.ndarray]:
    """Greedy placements with `slots` experts on each rank: by load alone and, where links cost, by node first."""
    loads = demand.loads
    replicas = np.ones(loads.size, int)
    for _ in range(ranks.count * slots - loads.size):
        per = np.where(replicas < ranks.count, loads / replicas, -1.0)
        if per.max() <= 0:
            break
        replicas[int(np.argmax(per))] += 1
    everywhere = np.zeros((loads.size, ranks.nodes), bool) | True
    starts = [_packed(loads, replicas, everywhere, ranks, slots)]
    if ranks.nodes > 1 and ranks.per_copy > 0 and demand.together is not None:
        starts.append(_packed(loads, replicas, _homes(demand, replicas, ranks, slots), ranks, slots))
    return starts


def _packed(loads: np.ndarray, replicas: np.ndarray, allowed: np.ndarray, ranks: Ranks, slots: int) -> np.ndarray:
    """Longest processing time first: replicated experts, then the rest by load, each to the least loaded rank it may use.

    A replica that finds no rank without its twin is left out; an expert that finds no room at home goes elsewhere.
    """
    held = np.zeros((loads.size, ranks.count), bool)
    used, work = np.zeros(ranks.count, int), np.zeros(ranks.count)
    home = np.repeat(allowed, ranks.per_node, axis=1)
    order = np.lexsort((-loads / replicas, replicas == 1))
    for e in order:
        for copy in range(replicas[e]):
            free = (used < slots) & ~held[e]
            here = free & home[e] if np.any(free & home[e]) else free
            if not here.any() or (copy and not np.any(free & home[e])):
                break
            g = int(np.argmin(np.where(here, work, np.inf)))
            held[e, g] = True
            used[g] += 1
            work[g] += loads[e] / replicas[e]
    return held


def _homes(demand: Demand, replicas: np.ndarray, ranks: Ranks, slots: int) -> np.ndarray:
    """A node for each expert, hottest first: the one with which it shares most tokens, less what overload would cost."""
    n, room = demand.loads.size, slots * ranks.per_node
    home = np.zeros((n, ranks.nodes), bool)
    used, work = np.zeros(ranks.nodes), np.zeros(ranks.nodes)
    mean = demand.loads.sum() / ranks.nodes
    c = demand.together if demand.together is not None else np.zeros((n, n))
    saves = ranks.per_copy * (1 - 1 / ranks.nodes) * 2 / demand.top_k
    for e in np.argsort(-demand.loads, kind="stable"):
        excess = np.maximum(work + demand.loads[e] - mean, 0.0) / ranks.per_node
        gain = saves * (c[e] @ home) - ranks.per_token * excess
        node = int(np.argmax(np.where(used + replicas[e] <= room, gain - 1e-12 * work, -np.inf)))
        home[e, node] = True
        used[node] += replicas[e]
        work[node] += demand.loads[e]
    return home


def improved(held: np.ndarray, demand: Demand, ranks: Ranks) -> np.ndarray:
    """Swap replicas between ranks, or move one to a free slot, as long as the objective falls."""
    held = held.copy()
    replicas = held.sum(axis=1)
    weight = ranks.per_token * demand.loads / replicas
    linked = ranks.per_copy > 0 and ranks.nodes > 1 and demand.together is not None
    for _ in range(_ROUNDS):
        work = weight @ held + ranks.per_expert * held.sum(axis=0)
        swap = _best_swap(held, weight, work, demand, ranks, linked)
        if swap is None:
            return held
        e, g, f, h = swap
        held[e, g], held[e, h] = False, True
        if f >= 0:
            held[f, h], held[f, g] = False, True
    return held


def _best_swap(
    held: np.ndarray, weight: np.ndarray, work: np.ndarray, demand: Demand, ranks: Ranks, linked: bool
) -> tuple[int, int, int, int] | None:
    """(e, g, f, h): expert e goes from rank g to h and f (-1: a free slot) comes back; None where nothing helps."""
    tolerance = 1e-9 * work.max()
    hottest = int(np.argmax(work))
    moves = _relief(held, weight, work, ranks, hottest)
    if not linked:
        return next(((e, hottest, f, h) for score, e, f, h in moves if score < work[hottest] - tolerance), None)
    q = by_node(held / held.sum(axis=1, keepdims=True), ranks)
    candidates = [(e, hottest, f, h) for _, e, f, h in moves[:_CANDIDATES]] + _attracted(held, q, demand, ranks)
    best, chosen = -tolerance, None
    for e, g, f, h in candidates:
        after = work.copy()
        back = weight[f] + ranks.per_expert if f >= 0 else 0.0
        after[g] += back - weight[e] - ranks.per_expert
        after[h] += weight[e] + ranks.per_expert - back
        change = after.max() - work.max() - ranks.per_copy * _saved(held, q, demand, ranks, e, g, f, h)
        # Several ranks may tie for the slowest: relieving one of them is progress too.
        change += 1e-6 * (max(after[g], after[h]) - max(work[g], work[h]))
        if change < best:
            best, chosen = change, (e, g, f, h)
    return chosen


def _relief(
    held: np.ndarray, weight: np.ndarray, work: np.ndarray, ranks: Ranks, g: int
) -> list[tuple[float, int, int, int]]:
    """(slower of the two ranks afterwards, e, f, h) of every swap that takes expert e from rank g, best first."""
    mine = np.nonzero(held[:, g])[0]
    found: list[tuple[float, int, int, int]] = []
    others, h_of = np.nonzero(held)
    keep = (h_of != g) & ~held[others, g]
    others, h_of = others[keep], h_of[keep]
    free = np.nonzero(held.sum(axis=0) < ranks.slots)[0]
    for e in mine:
        fine = ~held[e, h_of]
        f, h = others[fine], h_of[fine]
        delta = weight[e] - weight[f]
        score = np.maximum(work[g] - delta, work[h] + delta)
        for i in np.argsort(score, kind="stable")[: _CANDIDATES // 4]:
            found.append((float(score[i]), int(e), int(f[i]), int(h[i])))
        moved = weight[e] + ranks.per_expert
        found += [
            (float(max(work[g] - moved, work[h] + moved)), int(e), -1, int(h)) for h in free if h != g and not held[e, h]
        ]
    return sorted(found)


def _attracted(held: np.ndarray, q: np.ndarray, demand: Demand, ranks: Ranks) -> list[tuple[int, int, int, int]]:
    """Swaps between nodes that bring most tokens' choices together (the gain of Kernighan and Lin, 1970)."""
    c = demand.together if demand.together is not None else np.zeros((len(held), len(held)))
    pull = (c - np.diag(np.diag(c))) @ q
    one = held.sum(axis=1) == 1
    singles = np.nonzero(one)[0]
    at = np.argmax(held[singles], axis=1)
    node = at // ranks.per_node
    stay = pull[singles, node]
    there = pull[singles][:, node]
    gain = there + there.T - stay[:, None] - stay[None, :] - 2 * c[np.ix_(singles, singles)]
    gain = np.where(np.triu(node[:, None] != node[None, :], 1), gain, -np.inf)
    order = np.argsort(-gain, axis=None)[:_CANDIDATES]
    pairs = [np.unravel_index(i, gain.shape) for i in order if gain.flat[i] > 0]
    return [(int(singles[i]), int(at[i]), int(singles[j]), int(at[j])) for i, j in pairs]


def _saved(held: np.ndarray, q: np.ndarray, demand: Demand, ranks: Ranks, e: int, g: int, f: int, h: int) -> float:
    """Fall of X by one swap: only the rows of the experts that move change."""
    if g // ranks.per_node == h // ranks.per_node or demand.together is None:
        return 0.0
    c = demand.together
    after = q.copy()
    rows = [e, f] if f >= 0 else [e]
    for expert, source, target in ((e, g, h), (f, h, g))[: len(rows)]:
        part = 1 / held[expert].sum()
        after[expert, source // ranks.per_node] -= part
        after[expert, target // ranks.per_node] += part

    def met(shares: np.ndarray) -> float:
        rest = sum(float(c[i] @ np.minimum(shares[i], shares).sum(axis=1)) - float(c[i, i]) for i in rows)
        return rest - (float(c[e, f]) * float(np.minimum(shares[e], shares[f]).sum()) if f >= 0 else 0.0)

    return (1 - 1 / ranks.nodes) * 2 / demand.top_k * (met(after) - met(q))
