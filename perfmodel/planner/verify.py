"""Check a chosen plan: closed forms at its real mix, then an event simulation of its pools on the requests themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from perfmodel.planner.columns import Column, Layout, bucket_mix, handoff_seconds, meets
from perfmodel.serving.queueing import Mix, State
from perfmodel.serving.replay import Outcome, merge, simulate
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import Bucket, Workload
from perfmodel.spec.workload import Objectives

_SIMULATED_INSTANCES = 3


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
            found.setdefault(column.layout, []).append(_pool(column, replicas, rates, buckets))
    result: list[Pool] = []
    for parts in found.values():
        whole = _merged(parts, buckets)
        result += [whole] if not missed(whole, objectives, dispersion) else parts
    return result


def _pool(column: Column, replicas: int, rates: np.ndarray, buckets: list[Bucket]) -> Pool:
    served = tuple(int(k) for k in np.flatnonzero(rates))
    mix = bucket_mix(buckets, served, rates)
    return Pool(column, replicas, rates, mix, column.instance.state(float(rates.sum()) / replicas, mix))


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
    return _pool(column, sum(x.replicas for x in parts), np.sum([x.rates for x in parts], axis=0), buckets)


def missed(pool: Pool, objectives: Objectives, dispersion: float) -> str:
    """What the closed forms say a pool misses at its real mix; empty when nothing."""
    return meets(pool.column.instance, pool.state, pool.mix, objectives, dispersion / pool.replicas)


def promised(chosen: list[Pool], metric: str, p: float, dispersion: float) -> float:
    """Closed-form percentile over all requests of the plan: the t at which the pools' met shares average to p."""
    role = "decode" if metric == "ttft" else "prefill"
    parts = [x for x in chosen if x.column.layout.role != role]
    total = sum(x.rate for x in parts)
    if total == 0:
        return 0.0

    def met(t: float) -> float:
        return sum(
            x.rate / total * (
                x.column.instance.ttft_met(t, x.state, x.mix, dispersion / x.replicas) if metric == "ttft"
                else x.column.instance.tpot_met(t, x.state, x.mix)
            )
            for x in parts
        )  # fmt: skip

    low, high = 0.0, 1e-3
    while met(high) < p:
        if high > 1e5:
            return float("inf")
        low, high = high, high * 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if met(middle) >= p else (middle, high)
    return high


@dataclass(frozen=True)
class Replayed:
    """Simulated requests of one pool; `weight` requests of the workload stand behind each of them."""

    pool: Pool
    outcome: Outcome
    weight: float


def replay(chosen: list[Pool], workload: Workload, buckets: list[Bucket], seed: int) -> list[Replayed]:
    """Route the workload's requests over the pools as the plan says and simulate some instances of each.

    A request goes to a pool of its bucket with the plan's probability, inside the pool round robin. Decode pools
    receive what the simulated prefill instances finish, after the hand-off.
    """
    rng = np.random.default_rng(seed)
    r = workload.requests
    upper = np.array([b.high for b in buckets])
    bucket = np.minimum(np.searchsorted(upper, r.input), len(buckets) - 1)
    entry = [x for x in chosen if x.column.layout.role != "decode"]
    assigned = _assign(entry, bucket, rng)
    results: list[Replayed] = []
    first = np.full(len(r), np.nan)
    ready = np.full(len(r), np.nan)
    for i, pool in enumerate(entry):
        mine = np.flatnonzero(assigned == i)
        outcomes, used = _sample(pool, r, mine)
        if not outcomes:
            continue
        whole, taken = merge(outcomes), np.concatenate(used)
        results.append(Replayed(pool, whole, mine.size / taken.size))
        if pool.column.layout.role == "prefill":
            first[mine] = r.arrival[mine] + _resample(whole.ttft, r.input[taken], r.input[mine], rng)
            first[taken] = r.arrival[taken] + whole.ttft
            ready[mine] = first[mine] + handoff_seconds(pool.column.estimator) * r.input[mine]
    decoders = [x for x in chosen if x.column.layout.role == "decode"]
    return results + (_decode_pools(decoders, r, first, ready, buckets, rng) if decoders else [])


def _sample(pool: Pool, r: Requests, mine: np.ndarray) -> tuple[list[Outcome], list[np.ndarray]]:
    """Simulate some instances of a pool on every replicas-th of its requests; (outcomes, indices of the requests)."""
    parts = [mine[i :: pool.replicas] for i in range(min(pool.replicas, _SIMULATED_INSTANCES))]
    parts = [p for p in parts if p.size]
    return [_run(pool, r.take(p)) for p in parts], parts


def _resample(values: np.ndarray, known: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Times of requests that were not simulated: that of a simulated one of about the same input length."""
    order = np.argsort(known)
    place = np.searchsorted(known[order], wanted) + rng.integers(-3, 4, wanted.size)
    return values[order][np.clip(place, 0, known.size - 1)]


def _decode_pools(
    decoders: list[Pool],
    r: Requests,
    first: np.ndarray,
    ready: np.ndarray,
    buckets: list[Bucket],
    rng: np.random.Generator,
) -> list[Replayed]:
    """Simulate decode instances on the requests whose cache was handed over, in the order it arrives."""
    chosen = np.flatnonzero(~np.isnan(ready) & (r.output > 1))
    chosen = chosen[np.argsort(ready[chosen], kind="stable")]
    handed = Requests(ready[chosen], r.input[chosen], r.output[chosen])
    first = first[chosen]
    upper = np.array([b.high for b in buckets])
    bucket = np.minimum(np.searchsorted(upper, handed.input), len(buckets) - 1)
    assigned = _assign(decoders, bucket, rng)
    results = []
    for i, pool in enumerate(decoders):
        mine = np.flatnonzero(assigned == i)
        outcomes, used = _sample(pool, handed, mine)
        # TPOT counts from the first token at the prefill instance, hand-off included.
        for k, (outcome, part) in enumerate(zip(outcomes, used, strict=True)):
            outcomes[k] = replace(outcome, tpot=(outcome.finish - first[part]) / (handed.output[part] - 1))
        if outcomes:
            whole = merge(outcomes)
            results.append(Replayed(pool, whole, mine.size / whole.ttft.size))
    return results


def _run(pool: Pool, requests: Requests) -> Outcome:
    i = pool.column.instance
    return simulate(i.clock, i.kv_tokens, requests, pool.column.layout.role)


def _assign(entry: list[Pool], bucket: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pool of each request, drawn with the plan's probabilities for its bucket."""
    rates = np.array([x.rates for x in entry])
    total = rates.sum(axis=0)
    edges = np.cumsum(rates / np.where(total > 0, total, 1), axis=0)
    draw = rng.random(bucket.size)
    return np.minimum((draw[None, :] > edges[:, bucket]).sum(axis=0), len(entry) - 1)


def replayed_percentile(results: list[Replayed], metric: str, p: float) -> float:
    """Percentile over all requests, each simulated request weighted by those it stands for."""
    role = "decode" if metric == "ttft" else "prefill"
    parts = [x for x in results if x.pool.column.layout.role != role]
    values = np.concatenate([getattr(x.outcome, metric) for x in parts]) if parts else np.zeros(0)
    weights = np.concatenate([np.full(x.outcome.ttft.size, x.weight) for x in parts]) if parts else np.zeros(0)
    valid = ~np.isnan(values)
    values, weights = values[valid], weights[valid]
    if not values.size:
        return 0.0
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(share, p)), values.size - 1)])


def broken(results: list[Replayed], objectives: Objectives) -> list[tuple[Column, str]]:
    """Columns whose own simulated requests miss a percentile, if the plan as a whole misses it."""
    found = []
    for metric, limits in (("ttft", objectives.ttft), ("tpot", objectives.tpot)):
        for name, limit in limits.items():
            p = float(name[1:]) / 100
            if replayed_percentile(results, metric, p) <= limit:
                continue
            role = "decode" if metric == "ttft" else "prefill"
            for x in results:
                if x.pool.column.layout.role != role and x.outcome.percentile(metric, p) > limit:
                    found.append((x.pool.column, f"{metric} {name}"))
    return found
