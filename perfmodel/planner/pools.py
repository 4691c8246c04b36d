"""Pools of a solution, and what the closed forms say of them at their real mix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from perfmodel.planner.case import bucket_mix
from perfmodel.planner.columns import Column
from perfmodel.planner.layout import Layout
from perfmodel.planner.promise import judge, promises
from perfmodel.planner.through import first_token
from perfmodel.serving import arrivals
from perfmodel.serving.queueing import MOST_DISPERSED, Mix, State
from perfmodel.serving.workload import Bucket
from perfmodel.spec.workload import Limit, Objectives

FIRST_TOKENS, OTHER_TOKENS = ("colocated", "prefill"), ("colocated", "decode")
"""Roles that compute them."""


@dataclass(frozen=True)
class Pool:
    """Equal instances of one column, with the traffic the plan gives them."""

    column: Column
    replicas: int
    rates: np.ndarray
    """Requests per second of each bucket, the whole pool."""
    mix: Mix
    state: State
    """Steady state of one instance at its share."""

    @property
    def rate(self) -> float:
        return float(self.rates.sum())

    @property
    def filled(self) -> float:
        """Share of its column's operating point that it is given: of the scarcest of time, batch and cached tokens."""
        c, served = self.column, self.rates > 0
        rooms = ((c.prefill_s, c.state.utilisation), (c.decode_s, c.state.batch), (c.kv_token_s, c.kv_limit))
        return max(float(self.rates[served] @ need[served]) / (self.replicas * room) for need, room in rooms if room > 0)

    @property
    def devices(self) -> int:
        return self.replicas * self.column.layout.devices


def pools(
    columns: list[Column], values: dict[str, float], buckets: list[Bucket], objectives: Objectives, dispersion: float
) -> list[Pool]:
    """Pools of a solution. Columns of one layout become one pool where that still meets every percentile."""
    found: dict[Layout, list[Pool]] = {}
    for c, column in enumerate(columns):
        replicas = round(values.get(f"n_{c}", 0.0))
        rates = np.array([max(values.get(f"y_{c}_{k}", 0.0), 0.0) for k in range(len(buckets))])
        rates[rates < 1e-9] = 0.0
        if replicas and rates.sum() > 0:
            found.setdefault(column.layout, []).append(pool_of(column, replicas, rates, buckets))
    result: list[Pool] = []
    for parts in found.values():
        whole = _merged(parts, buckets)
        # Beyond the closed forms' range replay is the judge, and bursts are carried best together.
        result += [whole] if dispersion > MOST_DISPERSED or not missed(whole, objectives, dispersion) else parts
    return result


def pool_of(column: Column, replicas: int, rates: np.ndarray, buckets: list[Bucket]) -> Pool:
    """Instances of a column with the traffic given to them [bucket], at the mix and state that follow."""
    served = tuple(int(k) for k in np.flatnonzero(rates))
    each = float(rates.sum()) / replicas
    mix = column.case.seen(bucket_mix(buckets, served, rates), served, each)
    return Pool(column, replicas, rates, mix, column.instance.state(each, mix))


def _merged(parts: list[Pool], buckets: list[Bucket]) -> Pool:
    """The same instances behind one router."""
    if len(parts) == 1:
        return parts[0]
    widest = max(parts, key=lambda x: len(x.column.buckets)).column
    served = tuple(sorted({k for x in parts for k in x.column.buckets}))
    demands = {
        name: np.min([getattr(x.column, name) for x in parts], axis=0)
        for name in ("prefill_s", "decode_s", "kv_token_s")
    }
    share = np.array([x.replicas for x in parts]) / sum(x.replicas for x in parts)

    def average(values: list[float]) -> float:
        return float(share @ np.array(values))

    state = replace(
        widest.state,
        utilisation=average([x.column.state.utilisation for x in parts]),
        batch=average([x.column.state.batch for x in parts]),
    )
    room = average([x.column.kv_limit for x in parts])
    column = replace(widest, buckets=served, state=state, kv_limit=room, **demands)
    return pool_of(column, sum(x.replicas for x in parts), np.sum([x.rates for x in parts], axis=0), buckets)


def missed(pool: Pool, objectives: Objectives, dispersion: float) -> str:
    """What the closed forms say a pool misses at its real mix; empty when nothing."""
    c = pool.column
    each = arrivals.dealt(dispersion, pool.replicas, c.case.by_chance)
    verdict = judge(c.instance, pool.state, pool.mix, objectives, each, c.estimator.engine)
    return verdict.name if verdict.broken else ""


def closed_form(pool: Pool, metric: str, dispersion: float, per_token: float = 0.0) -> Callable[[float], float] | None:
    """Share of a pool's requests (itl: tokens) whose metric, at the client, is within so many seconds; None where no closed
    form says."""
    c = pool.column
    goals = Objectives(**{metric: {"p50": Limit(1.0, per_token)}})
    if metric == "e2e" and c.layout.role != "colocated":
        return None  # each side of a hand-off knows its own part
    each = arrivals.dealt(dispersion, pool.replicas, c.case.by_chance)
    found = promises(c.instance, pool.state, pool.mix, goals, each, c.estimator.engine)
    far = c.offer.site.rtt if metric in ("ttft", "e2e") else 0.0
    return next((lambda t, met=x.met: met(t - far) for x in found), None)


def answers(role: str, metric: str) -> bool:
    """Whether pools of a role decide a metric: prefill pools the first token, decode pools the others. What an encode
    pool adds to the first token is counted where it ends."""
    return role in (FIRST_TOKENS if metric in ("ttft", "e2e") else OTHER_TOKENS)


def _before(pool: Pool, chosen: list[Pool]) -> list[Pool]:
    """Encode pools whose embeddings may come to a pool."""
    wanted = ("encode", pool.column.layout.encode_share)
    return [x for x in chosen if (x.column.layout.role, x.column.layout.encode_share) == wanted]


def promised(chosen: list[Pool], metric: str, p: float, dispersion: float, per_token: float = 0.0) -> float | None:
    """Closed-form percentile over all requests of the plan: the t at which the pools' met shares average to p.

    None where a pool has no closed form for the metric. per_token: seconds granted for each input token beside t.
    """
    parts = [x for x in chosen if answers(x.column.layout.role, metric)]
    forms = [
        first_token(x, _before(x, chosen), dispersion, per_token, x.column.offer.site.rtt)
        if metric == "ttft" and x.column.layout.fed else closed_form(x, metric, dispersion, per_token) for x in parts
    ]  # fmt: skip
    total = sum(x.rate for x in parts)
    if total == 0:
        return 0.0
    if None in forms:
        return None

    def met(t: float) -> float:
        return sum(x.rate / total * form(t) for x, form in zip(parts, forms, strict=True) if form is not None)

    low, high = 0.0, 1e-3
    while met(high) < p:
        if high > 1e5:
            return float("inf")
        low, high = high, high * 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if met(middle) >= p else (middle, high)
    return high
