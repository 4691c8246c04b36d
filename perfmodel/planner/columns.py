"""Columns: every instance configuration at its operating point, priced by what it consumes per request.

A column is a node type, a role, a layout (tp, pp), a weight format and a set of input-length buckets it may serve. Its
operating point is the highest request rate at which the closed forms meet every percentile for the mix of those
buckets; there it spends a share u of its time on prefill, decodes b sequences and holds M cached token-seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from perfmodel import memory
from perfmodel.catalog import load_model
from perfmodel.cost import demand_shares, device_power
from perfmodel.estimator import Estimator
from perfmodel.planner.layout import Built, Layout, build, layouts
from perfmodel.planner.offer import Offer
from perfmodel.planner.promise import Verdict, judge, percentile, why_never
from perfmodel.planner.reuse import Reuse
from perfmodel.planner.transfer import exposed_per_token
from perfmodel.serving import frontend
from perfmodel.serving.clock import StepClock, kv_tokens
from perfmodel.serving.modes import WholeClock, WholeInstance
from perfmodel.serving.queueing import Instance, Mix, State
from perfmodel.serving.split import Sides, SplitClock, SplitInstance
from perfmodel.serving.workload import Bucket, Workload
from perfmodel.spec.choices import Choices
from perfmodel.spec.workload import Objectives

__all__ = ["Column", "Enumerator", "Layout", "percentile"]

_IDLE = 1e-4
_STRIDE = 1.3
_PRECISION = 1.02
_TIGHT = 0.01
"""A rate is high enough once one promise has no more than this share of its permitted misses left."""


@dataclass(frozen=True)
class Column:
    """One layout at one operating point. Per-request demands are per bucket; capacities per instance."""

    layout: Layout
    offer: Offer
    buckets: tuple[int, ...]
    case: Case
    estimator: Estimator
    mix: Mix
    state: State
    limited_by: str
    """What stops the rate from growing: a percentile, memory or saturation."""
    prefill_s: np.ndarray
    """Seconds of prefill work one request of each bucket brings [bucket]."""
    decode_s: np.ndarray
    """Sequence-seconds of decoding one request of each bucket brings, at this point's step time [bucket]."""
    kv_token_s: np.ndarray
    """Token-seconds of cache [bucket]."""
    kv_limit: float
    """Cached tokens at the operating point [token]: its step time and its memory margin hold up to here."""
    moved_bytes: np.ndarray
    """Cache bytes handed over per request [bucket]; zero unless the role is prefill."""
    power_w: float | None
    """Watts of one instance's devices at the operating point."""

    @property
    def instance(self) -> Instance:
        """What answers for the layout's percentiles."""
        return self.case.instance

    @property
    def key(self) -> tuple[Layout, tuple[int, ...]]:
        return self.layout, self.buckets


@dataclass(frozen=True)
class Rejected:
    """A layout that cannot serve some buckets, and why; `best` is the nearest value of the limit it breaks."""

    layout: Layout
    buckets: tuple[int, ...]
    """The bucket set it was tried for; empty when it cannot even hold the model."""
    reason: str
    metric: str = ""
    best: float = math.nan


def bucket_mix(buckets: list[Bucket], chosen: tuple[int, ...], weights: np.ndarray | None = None) -> Mix:
    """Joint lengths of some buckets, weighted by their shares (or by given rates)."""
    shares = np.array([b.share for b in buckets]) if weights is None else weights
    inputs = np.concatenate([buckets[k].input for k in chosen])
    outputs = np.concatenate([buckets[k].output for k in chosen])
    weight = np.concatenate([np.full(buckets[k].input.size, shares[k] / buckets[k].input.size) for k in chosen])
    return Mix(inputs, outputs, weight / weight.sum())


def bucket_sets(count: int) -> list[tuple[int, ...]]:
    """All buckets, the shortest j, and the longest j: what a length-aware router can separate."""
    everything = tuple(range(count))
    prefixes = [everything[:j] for j in range(1, count)]
    suffixes = [everything[j:] for j in range(1, count)]
    return [everything, *prefixes, *suffixes]


class Enumerator:
    """Enumerates columns for one workload and remembers operating points, so that tightening one is cheap."""

    def __init__(
        self, model: str, offers: list[Offer], choices: Choices, objectives: Objectives, workload: Workload,
        buckets: list[Bucket], built: dict[Layout, Built],
    ) -> None:  # fmt: skip
        self.model, self.offers, self.choices, self.objectives = model, offers, choices, objectives
        self.workload, self.buckets, self.built = workload, buckets, built
        self.reuse = Reuse(workload, buckets, choices.dealt) if choices.prefix_caching else None
        self.columns: dict[tuple[Layout, tuple[int, ...]], Column] = {}
        self.rejected: list[Rejected] = []
        self.layouts: list[Layout] = []
        for offer in offers:
            for layout in layouts(load_model(model), offer, choices):
                self.layouts.append(layout)
                self._add(layout, offer)

    def _add(self, layout: Layout, offer: Offer) -> None:
        if layout not in self.built:
            self.built[layout] = build(self.model, offer, layout, self.choices, self.workload)
        built = self.built[layout]
        if isinstance(built, str):
            self.rejected.append(Rejected(layout, (), built, "memory"))
            return
        instance = serving_instance(built, layout, bucket_mix(self.buckets, tuple(range(len(self.buckets)))))
        guess = 0.0
        for chosen in bucket_sets(len(self.buckets)):
            case = Case(instance, built[0], self.buckets, chosen, self.workload, self.objectives, self.reuse)
            # Sets come in order, so the one before lies near in work per request.
            tokens = float(case.mix(0.0).mean(case.mix(0.0).input))
            rate, limited = case.highest_rate(guess / tokens)
            guess = rate * tokens
            if rate <= 0:
                reason = why_never(instance, case.mix(0.0), self.objectives, built[0].engine)
                self.rejected.append(Rejected(layout, chosen, *reason))
                continue
            self.columns[layout, chosen] = column_at(layout, offer, case, rate, limited)

    def tighten(self, column: Column, factor: float) -> None:
        """Lower the operating point of a column's layout: its own bucket set fully, the others half as much."""
        for key, c in list(self.columns.items()):
            if c.layout == column.layout:
                rate = c.state.rate * (factor if set(c.buckets) & set(column.buckets) else factor**0.5)
                limited = c.limited_by if "replay" in c.limited_by else f"{c.limited_by} in replay"
                case = Case(
                    c.instance, c.estimator, self.buckets, c.buckets, self.workload, self.objectives, self.reuse
                )
                self.columns[key] = column_at(c.layout, c.offer, case, rate, limited)

    def select(self, test: Callable[[Column], bool] = lambda c: True) -> list[Column]:
        """Columns that pass a test, without those another of them dominates."""
        return _prune([c for c in self.columns.values() if test(c)], len(self.buckets))


def unserved(columns: list[Column], buckets: int) -> list[int]:
    """Buckets that no colocated column serves, nor a prefill and a decode column together."""

    def any_of(role: str, k: int) -> bool:
        return any(c.layout.role == role and k in c.buckets for c in columns)

    return [
        k for k in range(buckets)
        if not any_of("colocated", k) and not (any_of("prefill", k) and any_of("decode", k))
    ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A set of buckets on one instance: what it sees at a rate, and the rate at which it just keeps every promise."""

    instance: Instance
    estimator: Estimator
    buckets: list[Bucket]
    chosen: tuple[int, ...]
    workload: Workload
    objectives: Objectives
    reuse: Reuse | None

    @property
    def most(self) -> float:
        """Requests per second of these buckets together."""
        return self.workload.rate * sum(self.buckets[k].share for k in self.chosen)

    def replicas(self, rate: float) -> float:
        """Instances among which the buckets are dealt at so many requests per second each."""
        return max(1.0, self.most / rate) if rate > 0 else 1.0

    def mix(self, rate: float) -> Mix:
        """Lengths of the requests, with what the prefix cache beside the running batch holds of them."""
        return self.seen(bucket_mix(self.buckets, self.chosen), self.chosen, rate)

    def seen(self, mix: Mix, served: tuple[int, ...], rate: float) -> Mix:
        """A mix of the buckets `served` at `rate` per instance, with its cached tokens.

        A prefix is found whole or not at all, so every point becomes two: found with the bucket's chance, and not. Running
        requests have the first right to memory, so the cache has what they leave; two rounds settle that.
        """
        if self.reuse is None or self.instance.role == "decode":
            return mix
        ideal = np.concatenate([_cached(self.buckets[k]) for k in served])
        owner = self.owner(served)[: mix.input.size]
        # Prompt tokens that reach one instance, as a share of all: what its cache must keep.
        tokens = max(rate, _IDLE) * mix.mean(mix.input)
        parts = max(self.workload.rate * sum(b.share * float(b.input.mean()) for b in self.buckets) / tokens, 1.0)
        found = np.concatenate([np.minimum(ideal, mix.input - 1), np.zeros_like(ideal)])
        twice = Mix(np.tile(mix.input, 2), np.tile(mix.output, 2), np.tile(mix.weight, 2), found)
        left = self.instance.kv_tokens
        for _ in range(2):
            chance = self.reuse.share(left, parts)[owner]
            whole = replace(twice, weight=np.concatenate([mix.weight * chance, mix.weight * (1 - chance)]))
            s = self.instance.state(max(rate, _IDLE), whole)
            left = self.instance.kv_tokens * max(1 - s.kv_share, 0.0) if s.feasible else 0.0
        return whole

    def owner(self, served: tuple[int, ...]) -> np.ndarray:
        """Bucket of each point of a mix of these buckets, points with found prefixes first."""
        one = np.repeat(served, [self.buckets[k].input.size for k in served])
        return one if self.reuse is None or self.instance.role == "decode" else np.concatenate([one, one])

    def judge(self, rate: float) -> Verdict:
        """The promise that breaks at a rate, or comes nearest to it.

        Dealing requests out in turn among n instances divides the dispersion of each one's arrivals by n; prefix affinity
        gives the busiest instance more than its share.
        """
        mix, replicas = self.mix(rate), self.replicas(rate)
        uneven = self.reuse.imbalance(replicas) if self.reuse else 1.0
        s = self.instance.state(rate * uneven, mix)
        dispersion = self.workload.dispersion / math.floor(replicas)
        return judge(self.instance, s, mix, self.objectives, dispersion, self.estimator.engine)

    def highest_rate(self, guess: float = 0.0) -> tuple[float, str]:
        """Highest rate at which every promise is kept (0: none), and what breaks beyond it. guess: where it may lie."""
        most, beyond = self.most, "the whole load"
        mix = self.mix(0.0)
        if self.instance.role != "decode" and self.estimator.engine.frontend is not None:
            carried = frontend.rate_bound(self.estimator.engine, mix.mean(mix.input), mix.mean(mix.output))
            if carried < most:
                most, beyond = carried, "the engine's front end"
        low = high = min(guess, most) or most
        verdict = self.judge(high)
        # From the guess outwards, in growing strides, until one rate holds and a higher one does not.
        above = below = verdict
        stride = _STRIDE
        while not above.broken:
            if high >= most:
                return most, beyond
            low, below = high, above
            high, stride = min(high * stride, most), stride * stride
            above = self.judge(high)
        while below.broken:
            if low <= _IDLE:
                return 0.0, ""
            high, above = low, below
            low, stride = max(low / stride, _IDLE), stride * stride
            below = self.judge(low)
        return self._between(low, below, high, above)

    def _between(self, low: float, below: Verdict, high: float, above: Verdict) -> tuple[float, str]:
        """The rate where the slack vanishes, by secants kept inside the bracket (Illinois method) on the logarithm."""
        left, right = below.slack, above.slack
        while high > low * _PRECISION and below.slack > _TIGHT:
            part = left / (left - right) if math.isfinite(right) and math.isfinite(left) else 0.5
            trial = low * (high / low) ** min(max(part, 0.1), 0.9)
            verdict = self.judge(trial)
            if verdict.broken:
                high, above, right, left = trial, verdict, verdict.slack, left / 2
            else:
                low, below, left, right = trial, verdict, verdict.slack, right / 2
        return low, above.name


def _cached(bucket: Bucket) -> np.ndarray:
    return np.zeros(bucket.input.shape) if bucket.cached is None else bucket.cached


def serving_instance(built: tuple[Estimator, StepClock], layout: Layout, mix: Mix) -> Instance:
    """What answers for a layout's percentiles."""
    e, clock = built
    room = kv_tokens(e, mix.context)
    if isinstance(clock, SplitClock):
        # It answers to the same calls as an Instance.
        return cast(Instance, SplitInstance(Sides(e, mix.context, layout.prefill_share), room))
    kind = WholeInstance if isinstance(clock, WholeClock) else Instance
    return kind(clock, layout.role, room, exposed_per_token(e, clock, mix) if layout.role == "decode" else 0.0)


def column_at(layout: Layout, offer: Offer, case: Case, rate: float, limited: str) -> Column:
    """A case at one rate, priced; limited: what stops the rate from growing."""
    instance, e, buckets, chosen = case.instance, case.estimator, case.buckets, case.chosen
    mix = case.mix(rate)
    s = instance.state(rate, mix)
    prefill = np.full(len(buckets), math.inf)
    decode, held, moved = prefill.copy(), prefill.copy(), np.zeros(len(buckets))
    per_token = memory.kv_bytes_per_token(e.model, e.formats)
    work = s.work if layout.role != "decode" else np.zeros_like(mix.input)
    decoding = mix.steps * s.step if layout.role != "prefill" else np.zeros_like(mix.input)
    owner = case.owner(chosen)
    for k in chosen:
        mine = np.where(owner == k, mix.weight, 0.0)
        mine /= mine.sum()
        prefill[k], decode[k] = mine @ work, mine @ decoding
        held[k] = mine @ ((work + decoding) * (mix.input + mix.output / 2))
        if layout.role == "prefill":
            moved[k] = mine @ mix.input * per_token
    shares = np.array([buckets[k].share for k in chosen])
    mean_held = rate * float(np.dot(shares / shares.sum(), held[list(chosen)]))
    # Utilisation and batch at the point are what the bucket averages add up to, so that the natural mix fills it exactly.
    natural = rate * shares / shares.sum()
    s = replace(s, utilisation=float(natural @ prefill[list(chosen)]), batch=float(natural @ decode[list(chosen)]))
    return Column(
        layout, offer, chosen, case, e, mix, s, limited, prefill, decode, held, mean_held, moved,
        instance_power(e, layout.role, s, mix),
    )  # fmt: skip


def instance_power(e: Estimator, role: str, s: State, mix: Mix) -> float | None:
    """Watts of all devices of one instance in a steady state."""
    tokens = s.rate * mix.mean(mix.input) if role != "decode" else 0.0
    steps = 1 / s.step if role != "prefill" and s.step > 0 and s.batch > 0 else 0.0
    compute, hbm = demand_shares(e, tokens, mix.context, steps, max(s.batch, 1.0))
    one = device_power(e, compute, hbm)
    return one * int(e.par.devices) if one is not None else None


def _prune(columns: list[Column], buckets: int) -> list[Column]:
    """Drop columns that another of the same node type and role serves at least as well, per device, in every mixture.

    Column o dominates c when it is no larger, serves all of c's buckets, and each of its resources goes at least as far
    per device in each of them.
    """
    kept: list[Column] = []
    groups: dict[tuple[str, str], list[Column]] = {}
    for c in columns:
        groups.setdefault((c.layout.node, c.layout.role), []).append(c)
    for members in groups.values():
        # use[i, resource, bucket]: devices that one request/s of the bucket takes; infinite where it is not served.
        use = np.array([_use(c, buckets) for c in members])
        size = np.array([c.layout.devices for c in members])
        for i, c in enumerate(members):
            serves = np.isfinite(use[i]).all(axis=0)
            better = (use[:, :, serves] <= use[i][:, serves] * (1 + 1e-9)).all(axis=(1, 2)) & (size <= size[i])
            better[i] = False
            equal = better & (use[:, :, serves] >= use[i][:, serves] * (1 - 1e-9)).all(axis=(1, 2)) & (size == size[i])
            wider = np.isfinite(use).all(axis=1).sum(axis=1) > serves.sum()
            # Of equals the one that serves more buckets stays, then the first.
            ties = equal & ~wider & (np.arange(len(members)) > i)
            if not np.any(better & ~ties):
                kept.append(c)
    return kept


def _use(c: Column, buckets: int) -> np.ndarray:
    rows = np.full((3, buckets), np.inf)
    rooms = (c.state.utilisation, c.state.batch, c.kv_limit)
    for i, (demand, room) in enumerate(zip((c.prefill_s, c.decode_s, c.kv_token_s), rooms, strict=True)):
        for k in c.buckets:
            rows[i, k] = 0.0 if demand[k] == 0 else demand[k] / room * c.layout.devices if room > 0 else np.inf
    return rows
