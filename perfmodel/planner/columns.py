"""Columns: every instance configuration at its operating point, priced by what it consumes per request.

A column is a node type, a role, a layout (tp, pp), a weight format and a set of input-length buckets it may serve. Its
operating point is the highest request rate at which the closed forms meet every percentile for the mix of those
buckets; there it spends a share u of its time on prefill, decodes b sequences and holds M cached token-seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perfmodel import memory
from perfmodel.catalog import load_model
from perfmodel.estimator import Estimator
from perfmodel.planner.case import Case, bucket_mix, serving_instance
from perfmodel.planner.layout import Built, Layout, build, layouts
from perfmodel.planner.offer import Offer
from perfmodel.planner.promise import why_never
from perfmodel.planner.reuse import reuse_of
from perfmodel.planner.watts import instance_power
from perfmodel.serving.batch_service import Service
from perfmodel.serving.images import image_tokens
from perfmodel.serving.queueing import MOST_DISPERSED, Instance, Mix, State
from perfmodel.serving.static_batch import StaticState
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
    embedded_bytes: np.ndarray | None = None
    """Embeddings handed over per request [bucket], where an encode pool makes them."""

    @property
    def instance(self) -> Instance:
        """What answers for the layout's percentiles."""
        return self.case.instance

    @property
    def key(self) -> tuple[Layout, tuple[int, ...]]:
        return self.layout, self.buckets

    def rate_of(self, chosen: tuple[int, ...]) -> float:
        """Requests/s of other buckets that would take as much of what binds here as its own do; 0: not known."""
        shares = np.array([self.case.buckets[k].share for k in chosen])
        if not set(chosen) <= set(self.buckets):
            return 0.0
        decoding = self.layout.role == "decode"
        need, room = (
            (self.kv_token_s, self.kv_limit) if self.limited_by.startswith("KV") else
            (self.decode_s, self.state.batch) if decoding else (self.prefill_s, self.state.utilisation)
        )  # fmt: skip
        each = float(shares @ need[list(chosen)]) / float(shares.sum())
        return room / each if each > 0 else 0.0


_FIELDS = {"longest gap": "longest_gap", "end to end": "e2e"}
Hints = Mapping[tuple[Layout, tuple[int, ...]], float]


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
        buckets: list[Bucket], built: dict[Layout, Built], hints: Hints | None = None,
    ) -> None:  # fmt: skip
        """hints: rates near which the operating points may lie, from another load or other limits; they only save time."""
        self.hints = hints or {}
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
        if layout.encode_share and (why := self._not_in_a_row()):
            self.rejected.append(Rejected(layout, (), why))
            return
        first: Column | None = None
        for chosen in self._sets(layout):
            case = replace(first.case, chosen=chosen) if first else self._case(layout, chosen)
            guess = self.hints.get((layout, chosen), 0.0) or (first.rate_of(chosen) if first else 0.0)
            found = self._seek(layout, offer, case, guess)
            first = first or found

    def _not_in_a_row(self) -> str:
        """Why nothing can be promised of encode pools before others; empty where it can."""
        if self.objectives.e2e:
            return "has no law of a whole request over encode, prefill and decode: limit TTFT and TPOT instead of end to end"
        if self.workload.dispersion > MOST_DISPERSED:
            return f"has no closed form for bursts of dispersion {self.workload.dispersion:.3g}, and pools in a row cannot be " \
                   "measured one by one"
        return ""

    def _sets(self, layout: Layout) -> list[tuple[int, ...]]:
        """Sets of buckets a layout may serve: encode instances those with images."""
        sets = bucket_sets(len(self.buckets))
        if layout.role != "encode":
            return sets
        seen = {k for k, b in enumerate(self.buckets) if b.images is not None and b.images.any()}
        return [x for x in dict.fromkeys(tuple(k for k in s if k in seen) for s in sets) if x]

    def _case(self, layout: Layout, chosen: tuple[int, ...]) -> Case:
        built = self.built[layout]
        assert not isinstance(built, str)
        everything = bucket_mix(self.buckets, tuple(range(len(self.buckets))))
        instance = serving_instance(built, layout, everything, self.workload.image)
        return Case(instance, built[0], self.buckets, chosen, self.workload, self.objectives, self.reuse, self.choices.dealt)

    def _seek(self, layout: Layout, offer: Offer, case: Case, guess: float) -> Column | None:
        """The case at its highest rate, among the columns or with those refused."""
        rate, limited = case.highest_rate(guess)
        if rate <= 0:
            reason = why_never(case.instance, case.mix(0.0), self.objectives, case.estimator.engine)
            self.rejected.append(Rejected(layout, case.chosen, *reason))
            return None
        column = self.columns[layout, case.chosen] = column_at(layout, offer, case, rate, limited)
        return column

    def loosened(self, objectives: Objectives, promise: str, among: Collection[Layout] | None = None) -> Enumerator:
        """The same under objectives of which one promise ("TTFT p95") is looser: it moves only the columns that it limits, and
        those it refused. among: seek only these layouts anew."""
        other = copy.copy(self)
        metric, _, at = promise.rpartition(" ")
        key = f"{metric.lower()}.{at}"
        limit = getattr(objectives, _FIELDS.get(metric, metric.lower()))[at]
        again = [
            r for r in self.rejected if r.metric == key and r.buckets and (among is None or r.layout in among)
            and (r.best <= float(limit) or limit.per_token)
        ]  # fmt: skip
        other.objectives, other.columns = objectives, dict(self.columns)
        other.rejected = [r for r in self.rejected if r not in again]
        for c in self.columns.values():
            if promise in c.limited_by and (among is None or c.layout in among):
                other._seek(c.layout, c.offer, replace(c.case, objectives=objectives), c.state.rate)
        for r in again:
            case = self._case(r.layout, r.buckets)
            other._seek(r.layout, self.offers[0], replace(case, objectives=objectives), 0.0)
        return other

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

    def select(self, test: Callable[[Column], bool] = lambda c: True) -> list[Column]:
        """Columns that pass a test, without those another of them dominates."""
        return _prune([c for c in self.columns.values() if test(c)], len(self.buckets))


def unserved(columns: list[Column], buckets: int) -> list[int]:
    """Buckets that no colocated column serves, nor a prefill and a decode column together."""

    encoded: dict[float, set[int]] = {}
    for c in columns:
        if c.layout.role == "encode":
            encoded.setdefault(c.layout.encode_share, set()).update(c.buckets)

    def any_of(role: str, k: int) -> bool:
        mine = (c for c in columns if c.layout.role == role and k in c.buckets)
        return any(not c.layout.fed or not carries_images(c, k) or k in encoded.get(c.layout.encode_share, ()) for c in mine)

    return [
        k for k in range(buckets)
        if not any_of("colocated", k) and not (any_of("prefill", k) and any_of("decode", k))
    ]  # fmt: skip


def carries_images(c: Column, k: int) -> bool:
    """Whether requests of a bucket hand embeddings over to or from a column."""
    return c.embedded_bytes is not None and float(c.embedded_bytes[k]) > 0


def column_at(layout: Layout, offer: Offer, case: Case, rate: float, limited: str) -> Column:
    """A case at one rate, priced; limited: what stops the rate from growing."""
    instance, e, buckets, chosen = case.instance, case.estimator, case.buckets, case.chosen
    mix = case.mix(rate)
    s = instance.state(rate, mix)
    embedded = np.zeros(len(buckets))
    if isinstance(s, StaticState):
        return _static_column(layout, offer, case, s, limited)
    prefill = np.full(len(buckets), math.inf)
    decode, held, moved = prefill.copy(), prefill.copy(), np.zeros(len(buckets))
    work = s.work if layout.role != "decode" else np.zeros_like(mix.input)
    decoding = mix.steps * s.step if layout.role not in ("prefill", "encode") else np.zeros_like(mix.input)
    sent = _embedding_bytes(case, mix) if layout.encode_share else np.zeros_like(mix.input)
    owner = case.owner(chosen)
    for k in chosen:
        mine = np.where(owner == k, mix.weight, 0.0)
        mine /= mine.sum()
        prefill[k], decode[k] = mine @ work, mine @ decoding
        held[k] = mine @ ((work + decoding) * (mix.input + mix.output / 2)) if layout.role != "encode" else 0.0
        embedded[k] = mine @ sent
        if layout.role == "prefill":
            moved[k] = mine @ (mix.input * memory.kv_bytes_per_token(e.model, e.formats, mix.input))
    shares = np.array([buckets[k].share for k in chosen])
    mean_held = rate * float(np.dot(shares / shares.sum(), held[list(chosen)]))
    # Utilisation and batch at the point are what the bucket averages add up to, so that the natural mix fills it exactly.
    natural = rate * shares / shares.sum()
    s = replace(s, utilisation=float(natural @ prefill[list(chosen)]), batch=float(natural @ decode[list(chosen)]))
    return Column(
        layout, offer, chosen, case, e, mix, s, limited, prefill, decode, held, mean_held, moved,
        instance_power(e, instance, s, mix),
        embedded if layout.encode_share else None,
    )  # fmt: skip


def _embedding_bytes(case: Case, mix: Mix) -> np.ndarray:
    """Of each request: hidden x activation width for every token of its images."""
    e, image = case.estimator, case.workload.image
    if image is None or mix.images is None:
        return np.zeros(mix.input.shape)
    return np.asarray(mix.images * image_tokens(e.model, *image)[1] * e.model.hidden * e.formats.act.width)


def _static_column(layout: Layout, offer: Offer, case: Case, s: StaticState, limited: str) -> Column:
    """A static batch lasts as long as its longest answer, so all requests of a mix take the same share of an instance, 1/rate.

    A bucket whose requests alone would make longer batches takes as much more: no mixture is then slower than the point.
    """
    buckets, mix, e = case.buckets, s.mix, case.estimator
    need, none = np.full(len(buckets), math.inf), np.full(len(buckets), math.inf)
    typical = Service(s.instance.clock, mix, s.slots, pads=s.instance.pads).mean
    for k in case.chosen:
        alone = Service(s.instance.clock, bucket_mix(buckets, (k,)), s.slots, pads=s.instance.pads).mean
        need[k], none[k] = max(alone / typical, 1.0) / s.rate, 0.0
    state = replace(s.snapshot(), utilisation=1.0)
    return Column(
        layout, offer, case.chosen, case, e, mix, state, limited, need, none, none, 0.0, np.zeros(len(buckets)),
        instance_power(e, case.instance, s, mix),
    )  # fmt: skip


def plain(s: Any) -> State:
    """A state of any policy as one whose numbers can be replaced."""
    return s.snapshot() if isinstance(s, StaticState) else s


def _prune(columns: list[Column], buckets: int) -> list[Column]:
    """Drop columns that another of the same node type and role serves at least as well, per device, in every mixture.

    Column o dominates c when it is no larger, serves all of c's buckets, and each of its resources goes at least as far
    per device in each of them.
    """
    kept: list[Column] = []
    groups: dict[tuple[str, str, float], list[Column]] = {}
    for c in columns:
        groups.setdefault((c.layout.node, c.layout.role, c.layout.encode_share), []).append(c)
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
