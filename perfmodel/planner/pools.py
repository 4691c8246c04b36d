"""Pools of a solution, and what the closed forms say of them at their real mix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from perfmodel.planner.columns import Column, Layout, bucket_mix
from perfmodel.planner.promise import before_engine, judge
from perfmodel.serving.queueing import Mix, State
from perfmodel.serving.workload import Bucket
from perfmodel.spec.workload import Objectives


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
        result += [whole] if not missed(whole, objectives, dispersion) else parts
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
    verdict = judge(c.instance, pool.state, pool.mix, objectives, dispersion / pool.replicas, c.estimator.engine)
    return verdict.name if verdict.broken else ""


def within(pool: Pool, metric: str, seconds: float, dispersion: float) -> float:
    """Share of a pool's requests whose ttft or tpot is within so many seconds, front end included."""
    i, s, mix = pool.column.instance, pool.state, pool.mix
    if metric == "tpot":
        return i.tpot_met(seconds, s, mix, dispersion / pool.replicas)
    outside = before_engine(pool.column.estimator.engine, s, mix)
    return i.ttft_met(seconds - outside, s, mix, dispersion / pool.replicas)


def promised(chosen: list[Pool], metric: str, p: float, dispersion: float) -> float:
    """Closed-form percentile over all requests of the plan: the t at which the pools' met shares average to p."""
    role = "decode" if metric == "ttft" else "prefill"
    parts = [x for x in chosen if x.column.layout.role != role]
    total = sum(x.rate for x in parts)
    if total == 0:
        return 0.0

    def met(t: float) -> float:
        return sum(x.rate / total * within(x, metric, t, dispersion) for x in parts)

    low, high = 0.0, 1e-3
    while met(high) < p:
        if high > 1e5:
            return float("inf")
        low, high = high, high * 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if met(middle) >= p else (middle, high)
    return high
