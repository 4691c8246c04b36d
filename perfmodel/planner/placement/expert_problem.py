"""The placement of experts as a problem: what is asked for, where experts may go, and what a placement costs.

The letters are those of experts.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfmodel.errors import Infeasible, SpecError


@dataclass(frozen=True)
class Demand:
    """What the router of one layer asks for in one step, all ranks together."""

    loads: np.ndarray
    """Tokens that choose each expert, shape (experts,)."""
    top_k: int = 1
    together: np.ndarray | None = None
    """Tokens that choose both of two experts, shape (experts, experts), symmetric; the diagonal is not read."""

    def __post_init__(self) -> None:
        if self.loads.ndim != 1 or not np.all(np.isfinite(self.loads)) or self.loads.min() < 0 or not self.loads.any():
            raise SpecError("expert loads must be one list of numbers of 0 or more, not all 0")
        n = self.loads.size
        if not 1 <= self.top_k <= n:
            raise SpecError(f"top_k must lie between 1 and the {n} experts, got {self.top_k}")
        c = self.together
        if c is None:
            return
        if c.shape != (n, n) or not np.allclose(c, c.T, rtol=1e-6, atol=1e-9):
            raise SpecError(f"co-activation must be a symmetric matrix of {n} x {n}, got shape {c.shape}")
        if np.any(c - np.diag(np.diag(c)) > np.minimum.outer(self.loads, self.loads) * (1 + 1e-6) + 1e-9):
            raise SpecError("co-activation: more tokens choose two experts together than choose one of them")


@dataclass(frozen=True)
class Ranks:
    """Where experts may go, and what a token, an expert and a copy cost."""

    count: int
    slots: int
    """Experts a rank may hold."""
    nodes: int = 1
    per_token: float = 1.0
    """Seconds per token on a rank (1: loads are counted in tokens)."""
    per_expert: float = 0.0
    """Seconds per expert on a rank: its weights are read."""
    per_copy: float = 0.0
    """Seconds of the step per copy of a token that goes to another node."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.nodes < 1 or self.count % self.nodes:
            raise SpecError(f"{self.nodes} nodes must divide the {self.count} ranks, both at least 1")

    @property
    def per_node(self) -> int:
        return self.count // self.nodes

    def check(self, demand: Demand) -> None:
        """Raise Infeasible where the experts have no room, SpecError where links have a cost and no co-activation."""
        n = demand.loads.size
        if self.slots * self.count < n:
            need = -(-n // self.count)
            raise Infeasible(
                f"{n} experts do not fit into {self.count} ranks x {self.slots} slots = {self.slots * self.count}",
                nearest=f"{need} slots per rank, or {-(-n // max(self.slots, 1))} ranks",
                binding=("slots",),
            )
        if self.per_copy > 0 and self.nodes > 1 and demand.together is None:
            raise SpecError("copies between nodes depend on which experts are chosen together: give a co-activation")


@dataclass(frozen=True)
class Placed:
    """A placement and how far from optimal it can be."""

    held: np.ndarray
    """Whether expert e has a replica on rank g, shape (experts, ranks)."""
    loads: np.ndarray
    """Tokens of each rank."""
    busiest: float
    """T: seconds of the slowest rank."""
    copies: float
    """X: copies of tokens between nodes, by the pairwise count above."""
    objective: float
    bound: float
    method: str
    seconds: float

    @property
    def gap(self) -> float:
        return (self.objective - self.bound) / self.objective if self.objective > 0 else 0.0

    @property
    def imbalance(self) -> float:
        """Tokens of the busiest rank over the mean."""
        return float(self.loads.max() / self.loads.mean())

    @property
    def replicas(self) -> np.ndarray:
        return self.held.sum(axis=1)


def evaluate(held: np.ndarray, demand: Demand, ranks: Ranks, bound: float, method: str, seconds: float = 0.0) -> Placed:
    """The costs of any placement."""
    share = held / held.sum(axis=1, keepdims=True)
    loads = demand.loads @ share
    busiest = float(np.max(ranks.per_token * loads + ranks.per_expert * held.sum(axis=0)))
    crossing = copies(share, demand, ranks)
    return Placed(held, loads, busiest, crossing, busiest + ranks.per_copy * crossing, bound, method, seconds)


def copies(share: np.ndarray, demand: Demand, ranks: Ranks) -> float:
    """X of experts.py for shares (experts, ranks) of each expert; 0 on one node or without a co-activation."""
    if ranks.nodes == 1 or demand.together is None:
        return 0.0
    q = by_node(share, ranks)
    met = np.minimum(q[:, None, :], q[None, :, :]).sum(axis=2)
    pairs = np.triu(demand.together * met, 1).sum()
    return float((1 - 1 / ranks.nodes) * (demand.loads.sum() - 2 / demand.top_k * pairs))


def by_node(share: np.ndarray, ranks: Ranks) -> np.ndarray:
    summed: np.ndarray = share.reshape(len(share), ranks.nodes, ranks.per_node).sum(axis=2)
    return summed


def lower_bound(demand: Demand, ranks: Ranks) -> float:
    """No placement costs less than this.

    The slowest rank is no faster than the mean one, and than the least load M that the slots allow: an expert whose
    replicas carry at most M each has ceil(l_e/M) of them. Where the other ranks' slots cannot take all the rest, the
    rank with load M holds the least loaded of it too. Every token visits one node at least, and an expert meets no more
    than the experts that fit beside it on a node: at best those it is chosen with most.
    """
    loads, total = demand.loads, ranks.count * ranks.slots
    mean = ranks.per_token * loads.mean() * loads.size / ranks.count + ranks.per_expert * loads.size / ranks.count
    levels = np.unique((loads[loads > 0, None] / np.arange(1, ranks.count + 1)).ravel())
    low, high = 0, levels.size - 1
    while low < high:
        middle = (low + high) // 2
        # A hair above the level, so that l/M is not rounded up.
        needed = np.ceil(loads / (levels[middle] * (1 + 1e-12)))
        fits = needed.max() <= ranks.count and np.maximum(needed, 1).sum() <= total
        low, high = (low, middle) if fits else (middle + 1, high)
    beside = loads.size - (ranks.count - 1) * ranks.slots - 1
    lightest = np.sort(loads)[: max(beside, 0)].sum() / min(ranks.count, total - loads.size + 1)
    hottest = ranks.per_token * (levels[low] + lightest) + ranks.per_expert * (1 + max(beside, 0))
    crossing = 0.0
    if ranks.nodes > 1 and demand.together is not None:
        others = np.sort(demand.together - np.diag(np.diag(demand.together)), axis=1)[:, ::-1]
        most = others[:, : ranks.per_node * ranks.slots - 1].sum() / 2
        fewest = max(loads.sum() - 2 / demand.top_k * most, loads.sum() / demand.top_k)
        crossing = (1 - 1 / ranks.nodes) * fewest
    return float(max(mean, hottest) + ranks.per_copy * crossing)


def contiguous(demand: Demand, ranks: Ranks) -> np.ndarray:
    """Experts in the order of their numbers, equally many on each rank, none twice: what engines do unasked."""
    n = demand.loads.size
    held = np.zeros((n, ranks.count), bool)
    held[np.arange(n), np.arange(n) * ranks.count // n] = True
    return held
