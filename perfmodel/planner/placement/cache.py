"""Where cached prefixes should live: a linear program over segments of blocks and tiers of memory.

Variables: x[c, k, t], the share of class c's blocks of age k that tier t holds (one tier holds a block; a hit brings it back
to device memory, age pushes it down), and w[c, k, t], tokens/s written into t. With hits h, saved prefill seconds s, room
r and entering tokens e per segment, and a tier's fetch f per token, latency l, capacity C, rates R (out) and W (in):

    maximise   sum x (s - h f - n l)                   n: requests with such hits, per second
    subject to sum_ck r x <= C[t],  sum_ck h x <= b R[t],  sum_ck w <= b W[t]
               w[c,k,t] >= e[c,k] (x[c,k,t] - x[c,k-1,t])
               sum_{t' <= t} x[c,k,t'] falls with k for every t (fastest tier first): blocks only move down
               sum_t x[c,k,t] rises with c: what was used more often is kept as long, so parents outlive children

b is the share of a path's rate that may be planned for. Recomputing is x = 0. A share between 0 and 1 is one of
conversations, chosen by a hash: with a number in [0, 1) for each, it is in the tier whose span of sum_{t' <= t} x holds it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pulp

from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner.placement.profile import Profile, token_seconds, visible_fetch
from perfmodel.planner.placement.tiers import Tier
from perfmodel.planner.solver import Solution, solve
from perfmodel.serving.prefix import Uses

MONTH_S = 30.44 * 86400
_GB = 1e9
# Of equals the one that stores less: an age span without hits stays out of the tiers.
_TIDY = 1e-6


@dataclass(frozen=True)
class TierUse:
    """What one tier does in a placement; rates are per second of the trace, seconds those of one instance's prefill."""

    tier: Tier
    used: float
    """Tokens it holds on average."""
    hits: float
    """Prompt tokens per second found here."""
    saved: float
    """Prefill seconds per second saved here, fetches taken off."""
    read: float
    """Share of its outgoing rate."""
    write: float
    keeps: np.ndarray
    """Mean seconds for which a block of each class that is not used again is held, here and in faster tiers [class]."""
    value: float
    """Prefill seconds per second that one more token of capacity would save: the shadow price."""

    @property
    def value_per_gb(self) -> float:
        """Prefill seconds per second that one more GB would save."""
        return self.value * _GB / self.tier.token_bytes


@dataclass(frozen=True)
class Placement:
    """An optimum over tiers. `saved` in prefill seconds per second; shares of prompt tokens."""

    uses: tuple[TierUse, ...]
    saved: float
    hit_share: float
    recomputed: float
    """Share of prompt tokens that were used before and are computed again: for want of room, or because it is quicker."""
    new: float
    """Share of prompt tokens never seen before by the replica they came to."""
    shares: np.ndarray
    """x [class, age, tier]."""
    solution: Solution

    def of(self, name: str) -> TierUse:
        return next(u for u in self.uses if u.tier.name == name)


def values(p: Profile, tiers: list[Tier], *, objective: str = "net", overlap: bool = False) -> np.ndarray:
    """Prefill seconds per second that each segment is worth in each tier [class, age, tier].

    net: saved prefill less fetches. gpu: saved prefill where the fetch is quicker than computing, for fetches that wait
    beside the device's work. overlap: fetches of a layer hide behind the prefill of the layer before.
    """
    if objective not in ("net", "gpu"):
        raise SpecError(f"objective {objective!r}: net (saved prefill less fetches) or gpu (saved prefill)")
    result = np.empty((*p.hits.shape, len(tiers)))
    for i, t in enumerate(tiers):
        seen = visible_fetch(p, t.fetch) if overlap else 1.0
        net = p.saved - p.hits * t.fetch * seen - p.requests * t.latency
        result[:, :, i] = net if objective == "net" else np.where(net > 0, p.saved, 0.0)
    return result


def place(
    p: Profile, tiers: list[Tier], *, busy: float = 1.0, objective: str = "net", overlap: bool = False,
    usd_per_second: float | None = None, solver: str = "highs",
) -> Placement:  # fmt: skip
    """The best placement over `tiers`, fastest first. busy: b of the paths' rates.

    usd_per_second: price of one instance. With it, a tier that carries a price costs its rent for what it holds, and the
    placement is the one that saves most money.
    """
    if not tiers:
        raise Infeasible("there is no tier to place anything in", nearest="--tier dram=1TB")
    worth = values(p, tiers, objective=objective, overlap=overlap)
    problem = pulp.LpProblem("cache", pulp.LpMaximize)
    keys = list(np.ndindex(worth.shape))
    x = {i: problem.add_variable("x_{}_{}_{}".format(*i), 0, 1) for i in keys}
    # Device memory is where blocks are made: nothing is written into it.
    w = {i: problem.add_variable("w_{}_{}_{}".format(*i), 0) for i in keys if np.isfinite(tiers[i[2]].write)}
    tidy = _TIDY * float(p.saved.sum()) / max(float(p.held.sum()), 1.0)
    rent = [_rent(t, usd_per_second) + tidy for t in tiers]
    problem.setObjective(pulp.lpSum(float(worth[i] - p.held[i[:2]] * rent[i[2]]) * x[i] for i in keys))
    for t, tier in enumerate(tiers):
        mine = [i for i in keys if i[2] == t]
        _at_most(problem, f"capacity_{t}", {x[i]: float(p.held[i[:2]]) for i in mine}, tier.capacity)
        _at_most(problem, f"read_{t}", {x[i]: float(p.hits[i[:2]]) for i in mine}, busy * tier.read)
        _at_most(problem, f"write_{t}", {w[i]: 1.0 for i in mine if i in w}, busy * tier.write)
    _define_moves(problem, p, x, w, worth.shape)
    solution = solve(problem, solver=solver)
    if not solution.ok:
        raise Infeasible("no placement meets the limits of the tiers")
    return _read(p, tiers, worth, solution)


Key = tuple[int, ...]
Variables = dict[Key, pulp.LpVariable]


def _rent(tier: Tier, usd_per_second: float | None) -> float:
    """What holding a token costs, in prefill seconds per second."""
    if tier.usd_per_gb_month is None or not usd_per_second:
        return 0.0
    return tier.usd_per_gb_month * tier.token_bytes / _GB / MONTH_S / usd_per_second


def _at_most(problem: pulp.LpProblem, name: str, terms: dict[pulp.LpVariable, float], bound: float) -> None:
    if terms and np.isfinite(bound):
        problem.addConstraint(pulp.lpSum(float(a) * v for v, a in terms.items()) <= bound, name)


def _define_moves(problem: pulp.LpProblem, p: Profile, x: Variables, w: Variables, shape: Key) -> None:
    """One place at a time, downwards only; writes are what a tier gains with age; classes used more often stay longer."""
    classes, ages, count = shape
    for c in range(classes):
        for k in range(ages):
            whole = pulp.lpSum(x[c, k, t] for t in range(count))
            problem.addConstraint(whole <= 1)
            if c:
                problem.addConstraint(whole >= pulp.lpSum(x[c - 1, k, t] for t in range(count)))
            for t in range(count):
                before = x[c, k - 1, t] if k else 0
                if (c, k, t) in w:
                    problem.addConstraint(w[c, k, t] >= float(p.entered[c, k]) * (x[c, k, t] - before))
                if k:
                    faster = pulp.lpSum(x[c, k, j] - x[c, k - 1, j] for j in range(t + 1))
                    problem.addConstraint(faster <= 0)


def _read(p: Profile, tiers: list[Tier], worth: np.ndarray, solution: Solution) -> Placement:
    shares = np.array([solution.values["x_{}_{}_{}".format(*i)] for i in np.ndindex(worth.shape)]).reshape(worth.shape)
    shares = np.clip(shares, 0.0, 1.0)
    spans = np.diff(np.minimum(p.edges, p.warm_up + p.seconds))
    keeps = np.cumsum(shares, axis=2).transpose(0, 2, 1) @ spans
    uses = []
    for t, tier in enumerate(tiers):
        x = shares[:, :, t]
        grown = np.maximum(np.diff(x, axis=1, prepend=0.0), 0.0)
        hits, wrote = float((x * p.hits).sum()), float((grown * p.entered).sum())
        # A maximum's dual of an upper limit is what one more unit is worth.
        value = abs(solution.duals.get(f"capacity_{t}", 0.0))
        saved = float((x * worth[:, :, t]).sum())
        uses.append(
            TierUse(tier, float((x * p.held).sum()), hits, saved, hits / tier.read, wrote / tier.write, keeps[:, t], value)
        )
    found, again = sum(u.hits for u in uses), float(p.hits.sum())
    return Placement(
        tuple(uses), sum(u.saved for u in uses), found / p.prompt, max(again - found, 0.0) / p.prompt, 1 - again / p.prompt,
        shares, solution,
    )  # fmt: skip


def sizes(p: Profile, tiers: list[Tier], *, usd_per_second: float | None = None, **options: Any) -> dict[str, float]:
    """Tokens that each tier but device memory should hold.

    With prices: where the value of the last GB has fallen to its price, all priced tiers together. A tier without a price:
    beyond which more of it is worth nothing, the others as they are.
    """
    result = {}
    rented = usd_per_second is not None and any(t.usd_per_gb_month is not None for t in tiers)
    if rented:
        free = [t if t.usd_per_gb_month is None else replace(t, capacity=np.inf) for t in tiers]
        best = place(p, free, usd_per_second=usd_per_second, **options)
        result = {u.tier.name: u.used for u in best.uses if u.tier.usd_per_gb_month is not None}
    for i, t in enumerate(tiers):
        if t.name != "hbm" and t.name not in result:
            free = [*tiers[:i], replace(t, capacity=np.inf), *tiers[i + 1 :]]
            result[t.name] = place(p, free, usd_per_second=usd_per_second, **options).of(t.name).used
    return result


@dataclass(frozen=True)
class Baseline:
    """A rule of thumb on the same trace: everything under LRU. Rates are per second of the trace."""

    name: str
    hits: tuple[float, ...]
    """Prompt tokens per second found in each tier."""
    saved: float
    """Prefill seconds per second, fetches taken off."""
    limited: str
    """Path that cannot carry it, so that part is recomputed; empty if none."""


def lru(e: Estimator, u: Uses, p: Profile, tiers: list[Tier], replicas: int, *, busy: float = 1.0) -> Baseline:
    """Exact LRU over a chain of tiers, each taking what the one before evicts; one tier: everything in it.

    Every replica has its part of each tier, as in `u`. A path that is too slow serves or takes what it can, and the rest is
    recomputed.
    """
    seen = u.at >= p.warm_up
    cost = token_seconds(e, u.depth)
    depths = np.concatenate([[0.0], np.cumsum([t.capacity / replicas for t in tiers])])
    hits, saved, limited = [], 0.0, []
    for t, above, below in zip(tiers, depths[:-1], depths[1:], strict=True):
        here = seen & (u.distance > above) & (u.distance <= below)
        found = float(u.saved[here].sum()) / p.seconds
        # A first tier takes every block it did not hold, a later one what misses above push out.
        pushed = float(u.tokens[seen & (u.distance > (above or below))].sum()) / p.seconds
        share = min(1.0, busy * t.read / max(found, 1e-12), busy * t.write / max(pushed, 1e-12))
        if share < 1:
            limited.append(t.name)
        net = float((u.saved[here] * (cost[here] - t.fetch)).sum()) / p.seconds
        starts = np.unique(u.request[here]).size / p.seconds
        hits.append(found * share)
        saved += (net - starts * t.latency) * share
    return Baseline(" > ".join(t.name for t in tiers), tuple(hits), saved, ", ".join(limited))
