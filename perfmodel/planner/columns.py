"""Columns: every instance configuration at its operating point, priced by what it consumes per request.

A column is a node type, a role, a layout (tp, pp), a weight format and a set of input-length buckets it may serve. Its
operating point is the highest request rate at which the closed forms meet every percentile for the mix of those
buckets; there it spends a share u of its time on prefill, decodes b sequences and holds M cached token-seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from perfmodel import memory
from perfmodel.catalog import load_model
from perfmodel.cost import demand_shares, device_power
from perfmodel.estimator import Estimator
from perfmodel.planner.case import Case, bucket_mix, serving_instance
from perfmodel.planner.layout import Built, Layout, build, layouts
from perfmodel.planner.offer import Offer
from perfmodel.planner.promise import MOST_PREFILL, why_never
from perfmodel.planner.reuse import reuse_of
from perfmodel.serving.queueing import Instance, Mix, State
from perfmodel.serving.workload import Bucket, Workload
from perfmodel.spec.choices import Choices
from perfmodel.spec.workload import Objectives


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
        self.reuse = reuse_of(workload, buckets, choices.dealt) if choices.prefix_caching else None
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
            case = Case(instance, built[0], self.buckets, chosen, self.workload, self.objectives, self.reuse, self.choices.dealt)
            # Sets come in order, so the one before lies near in work per request.
            tokens = float(case.mix(0.0).mean(case.mix(0.0).input))
            rate, limited = case.highest_rate(guess / tokens)
            guess = rate * tokens
            if rate <= 0:
                reason = why_never(instance, case.mix(0.0), self.objectives, built[0].engine)
                self.rejected.append(Rejected(layout, chosen, *reason))
                continue
            self.columns[layout, chosen] = column_at(layout, offer, case, rate, limited)

    def tighten(self, column: Column, factor: float, filled: float = 1.0) -> None:
        """Lower the operating point of a column's layout: its own bucket set fully, the others half as much.

        filled: share of its operating point at which it broke its promise, so that it must be given less than that.
        """
        factor *= min(filled, 1.0)
        for key, c in list(self.columns.items()):
            if c.layout == column.layout:
                rate = c.state.rate * (factor if set(c.buckets) & set(column.buckets) else factor**0.5)
                limited = c.limited_by if "replay" in c.limited_by else f"{c.limited_by} in replay"
                case = Case(
                    c.instance, c.estimator, self.buckets, c.buckets, self.workload, self.objectives, self.reuse,
                    self.choices.dealt,
                )
                self.columns[key] = column_at(c.layout, c.offer, case, rate, limited)

    def loosen(self, factor: float, known: Collection[Layout]) -> None:
        """Raise every operating point, where closed forms do not reach and a replay had room to spare; not of `known` layouts,
        whose limit a replay has shown."""
        for key, c in list(self.columns.items()):
            if c.layout in known:
                continue
            rate = min(c.state.rate * factor, c.case.most)
            s = c.instance.state(rate, c.case.mix(rate))
            if s.feasible and s.utilisation <= MOST_PREFILL:
                self.columns[key] = column_at(c.layout, c.offer, c.case, rate, c.limited_by)

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
