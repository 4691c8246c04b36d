"""The numbers behind the charts, taken from the run's own estimators, states and simulated requests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from perfmodel import breakdown
from perfmodel.estimator import Estimator
from perfmodel.planner.case import bucket_mix, serving_instance
from perfmodel.planner.constraints import footprint
from perfmodel.planner.evaluated import Running, Served
from perfmodel.planner.layout import Layout
from perfmodel.planner.pools import Pool, promised
from perfmodel.planner.promise import percentile
from perfmodel.planner.verify import Replayed
from perfmodel.schedule import operators
from perfmodel.serving.frontend import before_engine
from perfmodel.serving.queueing import Instance, Mix, State
from perfmodel.serving.workload import Workload
from perfmodel.spec.workload import Objectives

_SHARES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.94, 0.99)
_REFINED = 4  # halvings of the step in which a layout stops being feasible
_BISECTIONS = 10
_BEYOND = 3.0  # curves are followed to this multiple of a limit

Line = tuple[list[float], list[float]]
"""Horizontal and vertical values of a plot."""


@dataclass(frozen=True)
class Step:
    """One typical step of a pool: its phase, its operators and its time [s] with host and pipeline."""

    pool: int
    phase: str
    described: str
    batch: float
    new: float
    context: float
    rows: list[dict[str, Any]]
    """breakdown.op_table, each row with the operator's shape."""
    seconds: float

    @property
    def is_decode(self) -> bool:
        return self.phase == "decode"


def steps(pools: list[Pool]) -> list[Step]:
    """The steps of every pool: prefill of a mean prompt (at most one chunk), decode at the mean batch and context."""
    found = []
    for i, pool in enumerate(pools):
        e, mix, role = pool.column.estimator, pool.mix, pool.column.layout.role
        if role != "decode":
            new = float(max(1, round(min(mix.mean(mix.input), e.engine.chunk_tokens))))
            found.append(_step(i, pool, "prefill", f"prefill of {new:,.0f} tokens", 1.0, new, 0.0))
        if role != "prefill" and mix.mean(mix.steps) > 0:
            batch, context = float(max(1, round(pool.state.batch))), float(round(mix.context))
            described = f"decode of {batch:,.0f} sequences at {context:,.0f} tokens"
            found.append(_step(i, pool, "decode", described, batch, 1.0, context - 1))
    return found


def _step(i: int, pool: Pool, phase: str, described: str, batch: float, new: float, context: float) -> Step:
    e, is_decode = pool.column.estimator, phase == "decode"
    given = breakdown.step_phase(e, batch, new, context, is_decode=is_decode)
    shapes = [op.shape for op, _, _ in operators(e.lower(given).schedule)]
    rows = [row | {"shape": dict(s)} for row, s in zip(breakdown.op_table(e, given), shapes, strict=True)]
    whole = float(e.decode(batch, context + 1) if is_decode else e.prefill(batch, new, context))
    return Step(i, phase, described, batch, new, context, rows, whole)


def group(row: dict[str, Any]) -> str:
    """Which part of the model an operator belongs to."""
    kind, name = row["kind"], row["name"]
    if kind in ("collective", "p2p"):
        return "communication"
    if kind in ("attention", "latent_attention", "scan"):
        return "attention"
    if row["part"] in ("embedding", "head"):
        return "embedding and head"
    if kind in ("grouped_gemm", "expert_passes") or "router" in name or "shared" in name:
        return "experts"
    if kind == "gemm":
        return "feed-forward" if "gate_up" in name or "up_proj" in name or "down_proj" in name else "projections"
    return "norms, activations, casts"


GROUPS = (
    "projections", "attention", "feed-forward", "experts", "communication", "norms, activations, casts",
    "embedding and head", "host and pipeline",
)  # fmt: skip
RESOURCES = {
    "compute": "matrix units", "hbm": "device memory", "cache": "cache", "vector": "vector units", "link": "links in the node",
    "network": "network", "launch": "launches and fixed latencies", "host": "host and pipeline",
}  # fmt: skip


def by_group(step: Step) -> dict[str, float]:
    """Seconds of a step by group of operators; they add up to the step."""
    parts: dict[str, float] = {}
    for row in step.rows:
        parts[group(row)] = parts.get(group(row), 0.0) + row["times"] * row["seconds"]
    return parts | {"host and pipeline": max(0.0, step.seconds - sum(parts.values()))}


def by_resource(step: Step) -> dict[str, float]:
    """Seconds of a step by what each operator waits for; they add up to the step.

    Launches and fixed latencies are a part of their own; what is left of an operator counts for the resource that is
    busy longest in it.
    """
    parts: dict[str, float] = {}
    for row in step.rows:
        busy = dict(row["busy"])
        fixed = min(busy.pop("launch", 0.0), row["seconds"])
        bound = max(busy, key=lambda r: busy[r], default="launch")
        for resource, seconds in (("launch", fixed), (bound, row["seconds"] - fixed)):
            parts[resource] = parts.get(resource, 0.0) + row["times"] * seconds
    return parts | {"host": max(0.0, step.seconds - sum(parts.values()))}


def memory_parts(pool: Pool) -> dict[str, float]:
    """Bytes on one device of a pool. cached: mean and two sigma of the keys and values held; free: what is left for more."""
    e = pool.column.estimator
    empty = e.memory(float(e.engine.max_sequences), 0.0)
    cached = min(1.0, pool.state.kv_share) * e.kv_free
    return {
        "weights": float(empty.weights), "activations": float(empty.activations), "other": float(empty.other),
        "cached": cached, "free": e.kv_free - cached, "reserved": e.machine.capacity - float(empty.capacity),
    }  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One operating point. worth: requests per USD, or requests/s per device where nothing has a price."""

    rate: float
    batch: float
    utilisation: float
    ttft: float
    tpot: float
    worth: float


@dataclass(frozen=True)
class Curve:
    """A layout from idle to saturation, on the mix of all requests."""

    layout: Layout
    points: list[Point]


def worth(rate: float, layout: Layout, offer: Any, objective: str) -> float:
    """Requests per USD (objective cost) or requests/s per device."""
    devices = float(footprint(SimpleNamespace(layout=layout, offer=offer)))  # type: ignore[arg-type]
    if objective != "cost":
        return rate / devices
    return rate / (offer.price * devices / offer.devices)


def strictest(limits: Mapping[str, float]) -> tuple[str, float | None]:
    """The highest percentile that has a limit, or p95 without one."""
    name = max(limits, key=percentile, default="p95")
    return name, limits.get(name)


def curves(service: Served, objective: str) -> list[Curve]:
    """Every layout that holds the model, at rates up to saturation or until both latencies are far beyond their limits.

    For the mix of all the service's requests, none of it found in a prefix cache.
    """
    mix = replace(bucket_mix(service.buckets, tuple(range(len(service.buckets)))), cached=None)
    by_label = {o.label: o for o in service.offers}
    found = []
    for layout in service.layouts:
        built = service.built[layout]
        if isinstance(built, str):
            continue
        instance = serving_instance(built, layout, mix)
        points = []
        for s in _states(instance, mix):
            burst = service.workload.dispersion / max(1.0, math.floor(service.workload.rate / s.rate))
            ttft, tpot = _latencies(instance, built[0], s, mix, service.objectives, burst)
            if not (math.isfinite(ttft) and math.isfinite(tpot)):
                break
            value = worth(s.rate, layout, by_label[layout.node], objective)
            points.append(Point(s.rate, s.batch, s.utilisation, ttft, tpot, value))
        if points:
            found.append(Curve(layout, points))
    return found


def _states(instance: Instance, mix: Mix) -> list[State]:
    """Feasible states from idle to the edge."""
    idle = instance.state(1e-4, mix)
    if not idle.feasible:
        return []
    # No instance serves more than its prefill time or its largest decode batch allows.
    most = []
    if instance.role != "decode":
        most.append(1 / mix.mean(idle.work))
    if instance.role != "prefill" and mix.mean(mix.steps) > 0:
        largest = instance.clock.max_batch
        most.append(largest / (mix.mean(mix.steps) * instance.clock.decode(largest, largest * mix.context)))
    found: list[State] = []
    low = 0.0
    for share in _SHARES:
        s = instance.state(share * min(most), mix)
        if not s.feasible:
            break
        found.append(s)
        low = share
    else:
        return found
    high = share
    for _ in range(_REFINED):
        middle = (low + high) / 2
        s = instance.state(middle * min(most), mix)
        if s.feasible:
            found.append(s)
            low = middle
        else:
            high = middle
    return found


def _latencies(
    instance: Instance, e: Estimator, s: State, mix: Mix, goals: Objectives, burst: float
) -> tuple[float, float]:
    """TTFT and TPOT at the strictest percentiles, to about one percent; infinite far beyond a limit."""
    ttft = tpot = 0.0
    if instance.role != "decode":
        name, limit = strictest(goals.ttft)
        start = float(np.min(s.work)) + s.pure_step
        outside = before_engine(e.engine, s, mix)
        ttft = _quantile(lambda t: instance.ttft_met(t - outside, s, mix, burst), percentile(name), start, limit)
    if instance.role != "prefill":
        name, limit = strictest(goals.tpot)
        tpot = _quantile(lambda t: instance.tpot_met(t, s, mix, burst), percentile(name), s.pure_step, limit)
    return ttft, tpot


def _quantile(met: Any, p: float, low: float, limit: float | None) -> float:
    low = max(low * 0.999, 1e-6)
    high = max(limit or 0.0, low) * _BEYOND if limit else low * 100
    if met(high) < p:
        return math.inf
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if met(middle) >= p else (middle, high)
    return high


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (latency, worth) that no other point beats in both, by rising latency."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda q: (q[0], -q[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def replayed_values(results: list[Replayed], metric: str) -> list[tuple[Replayed, np.ndarray]]:
    """Simulated seconds, at the client, of the pools that decide this metric."""
    found = []
    for x in results:
        values = getattr(x.outcome, metric)
        values = np.sort(values[np.isfinite(values)])
        if x.answers_for(metric) and values.size:
            found.append((x, values + (x.pool.column.offer.site.rtt if metric == "ttft" else 0.0)))
    return found


def cumulative(parts: list[tuple[np.ndarray, float]], most: int = 300) -> Line:
    """(value, share of requests at or below it), each part's values weighted, thinned to `most` points evenly in share."""
    values = np.concatenate([v for v, _ in parts])
    weights = np.concatenate([np.full(v.size, w) for v, w in parts])
    order = np.argsort(values, kind="stable")
    values, share = values[order], np.cumsum(weights[order]) / weights.sum()
    if values.size <= most:
        return values.tolist(), share.tolist()
    picks = np.unique(np.searchsorted(share, np.linspace(share[0], 1.0, most)).clip(0, values.size - 1))
    return values[picks].tolist(), share[picks].tolist()


def closed_form(c: Running, metric: str) -> Line:
    """(seconds, share) of the closed form over all requests of a service."""
    shares = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995]
    times = [promised(c.pools, metric, share, c.service.workload.dispersion) for share in shares]
    kept = [(t, s) for t, s in zip(times, shares, strict=True) if t is not None and math.isfinite(t)]
    return [t for t, _ in kept], [s for _, s in kept]


def arrivals(w: Workload, bins: int = 60) -> Line:
    """(bin starts [s], requests/s in each bin) over the window."""
    r = w.requests
    end = max(w.span, float(r.arrival[-1]) if len(r) else 0.0)
    counts, edges = np.histogram(r.arrival, bins=bins, range=(0.0, end or 1.0))
    return edges[:-1].tolist(), (counts / (edges[1] - edges[0])).tolist()


def lengths(values: np.ndarray, bins: int = 40) -> Line:
    """(edges, share of requests) over logarithmic bins."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low / 2, high * 2
    edges = np.geomspace(low, high * (1 + 1e-9), bins + 1)
    counts, _ = np.histogram(values, bins=edges)
    return edges.tolist(), (counts / values.size).tolist()
