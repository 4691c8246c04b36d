"""Columns: every instance configuration at its operating point, priced by what it consumes per request.

A column is a node type, a role, a layout (tp, pp), a weight format and a set of input-length buckets it may serve. Its
operating point is the highest request rate at which the closed forms meet every percentile for the mix of those
buckets; there it spends a share u of its time on prefill, decodes b sequences and holds M cached token-seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from perfmodel import memory
from perfmodel.catalog import load_model
from perfmodel.cost import demand_shares, device_power
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner.offer import Offer
from perfmodel.serving.clock import StepClock
from perfmodel.serving.queueing import Instance, Mix, State
from perfmodel.serving.workload import Bucket, Workload
from perfmodel.spec.model import Model, Moe
from perfmodel.spec.plan import Choices
from perfmodel.spec.workload import Objectives

_HALVINGS = 9
MOST_PREFILL = 0.9
"""Share of its time an instance may plan to spend on prefill: closer to one, waits depend on the last request."""
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Layout:
    """How one instance is built."""

    node: str
    role: str
    tp: int
    pp: int
    weight_dtype: str
    ep: int = 1

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    @property
    def label(self) -> str:
        more = "".join(f" {name}{n}" for name, n in (("pp", self.pp), ("ep", self.ep)) if n > 1)
        return f"{self.node} {self.role} tp{self.tp}{more} {self.weight_dtype}"


@dataclass(frozen=True)
class Column:
    """One layout at one operating point. Per-request demands are per bucket; capacities per instance."""

    layout: Layout
    offer: Offer
    buckets: tuple[int, ...]
    instance: Instance
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


Built = tuple[Estimator, StepClock] | str
"""An estimator and its clock, or why the layout cannot hold the model."""


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
        self.columns: dict[tuple[Layout, tuple[int, ...]], Column] = {}
        self.rejected: list[Rejected] = []
        self.layouts: list[Layout] = []
        for offer in offers:
            for layout in layouts(load_model(model), offer, choices):
                self.layouts.append(layout)
                self._add(layout, offer)

    def _add(self, layout: Layout, offer: Offer) -> None:
        if layout not in self.built:
            self.built[layout] = _build(self.model, offer, layout, self.choices, self.workload)
        built = self.built[layout]
        if isinstance(built, str):
            self.rejected.append(Rejected(layout, (), built, "memory"))
            return
        e, clock = built
        whole = bucket_mix(self.buckets, tuple(range(len(self.buckets))))
        moved = handoff_seconds(e) if layout.role == "decode" else 0.0
        instance = Instance(clock, layout.role, kv_tokens(e, whole.context), moved)
        for chosen in bucket_sets(len(self.buckets)):
            mix = bucket_mix(self.buckets, chosen)
            rate, limited = _highest_rate(instance, mix, self.objectives, self.workload, self._rate(chosen))
            if rate <= 0:
                self.rejected.append(Rejected(layout, chosen, *_why_never(instance, mix, self.objectives)))
                continue
            self.columns[layout, chosen] = _column(layout, offer, chosen, instance, e, mix, rate, limited, self.buckets)

    def _rate(self, chosen: tuple[int, ...]) -> float:
        return self.workload.rate * sum(self.buckets[k].share for k in chosen)

    def tighten(self, column: Column, factor: float) -> None:
        """Lower the operating point of a column's layout: its own bucket set fully, the others half as much."""
        for key, c in list(self.columns.items()):
            if c.layout == column.layout:
                rate = c.state.rate * (factor if set(c.buckets) & set(column.buckets) else factor**0.5)
                limited = c.limited_by if "replay" in c.limited_by else f"{c.limited_by} in replay"
                self.columns[key] = _column(
                    c.layout, c.offer, c.buckets, c.instance, c.estimator, c.mix, rate, limited, self.buckets
                )  # fmt: skip

    def select(self, test: Callable[[Column], bool] = lambda c: True) -> list[Column]:
        """Columns that pass a test, without those another of them dominates."""
        return _prune([c for c in self.columns.values() if test(c)], len(self.buckets))


def layouts(model: Model, offer: Offer, choices: Choices) -> list[Layout]:
    """Roles x formats x tensor-, pipeline- and expert-parallel degrees. tp stays inside a node unless it may cross."""
    count = offer.machine.devices_per_node
    widest = count * (2 if choices.tp_across_nodes else 1)
    degrees = choices.tp or tuple(2**i for i in range(int(math.log2(widest)) + 1))
    experts = any(isinstance(b.ffn, Moe) for b in model.blocks.values())
    return [
        Layout(offer.node.name, role, tp, pp, dtype, ep)
        for role in choices.roles
        for dtype in choices.weight_dtype or ("checkpoint",)
        for tp in degrees
        for pp in choices.pp
        for ep in choices.ep or sorted({1, tp} if experts else {1})
        if tp <= widest and (role == "colocated" or offer.machine.network > 0)
    ]


def _build(
    model: str, offer: Offer, layout: Layout, choices: Choices, workload: Workload
) -> tuple[Estimator, StepClock] | str:
    """Estimator and clock of a layout, or why it cannot hold the model."""
    try:
        e = Estimator(
            model, offer.node, tp=layout.tp, pp=layout.pp, ep=layout.ep, engine=choices.engine, kv_dtype=choices.kv_dtype,
            weight_dtype=None if layout.weight_dtype == "checkpoint" else layout.weight_dtype,
            mem_fraction=choices.mem_fraction,
        )  # fmt: skip
    except SpecError as error:
        return str(error)
    longest = float(np.max(workload.requests.input + workload.requests.output))
    one = float(memory.cache_bytes(e.model, e.par, e.formats, 1, longest, e.engine.block_tokens))
    if e.kv_free < one:
        weights = float(memory.weight_bytes(e.model, e.par, e.formats))
        return (
            f"needs {(weights + one) / 1e9:.1f} GB per device for weights and the longest request, and has "
            f"{(weights + e.kv_free) / 1e9:.1f} GB beside activations and engine"
        )
    inputs, outputs, weight = workload.sample()
    return e, StepClock(e, Mix(inputs, outputs, weight).context)


def kv_tokens(e: Estimator, context: float) -> float:
    """Cached tokens an instance holds, at a typical context (windows and states included)."""
    per_token = float(memory.cache_bytes(e.model, e.par, e.formats, 1, context, e.engine.block_tokens)) / context
    return e.kv_free / per_token


def handoff_seconds(e: Estimator) -> float:
    """Seconds per token to move its cache over the instance's share of the node's NICs."""
    bytes_ = memory.kv_bytes_per_token(e.model, e.formats)
    m = e.machine
    return float(bytes_ / (m.network * m.network_efficiency * e.par.devices)) if m.network else math.inf


def meets(instance: Instance, s: State, mix: Mix, objectives: Objectives, dispersion: float) -> str:
    """Empty when every percentile holds, else the one that breaks."""
    if not s.feasible:
        return s.reason
    if s.utilisation > MOST_PREFILL * (1 + _ROUNDING):
        return "prefill time"
    for name, limit in objectives.ttft.items() if instance.role != "decode" else ():
        if instance.ttft_met(limit, s, mix, dispersion) < percentile(name):
            return f"TTFT {name}"
    for name, limit in objectives.tpot.items():
        if instance.tpot_met(limit, s, mix) < percentile(name):
            return f"TPOT {name}"
    return ""


def unserved(columns: list[Column], buckets: int) -> list[int]:
    """Buckets that no colocated column serves, nor a prefill and a decode column together."""

    def any_of(role: str, k: int) -> bool:
        return any(c.layout.role == role and k in c.buckets for c in columns)

    return [
        k for k in range(buckets)
        if not any_of("colocated", k) and not (any_of("prefill", k) and any_of("decode", k))
    ]  # fmt: skip


def percentile(name: str) -> float:
    """``p95`` -> 0.95."""
    return float(name[1:]) / 100


def _highest_rate(
    instance: Instance, mix: Mix, objectives: Objectives, workload: Workload, most: float
) -> tuple[float, str]:
    """Highest rate at which everything holds (0: none), and what breaks beyond it.

    `most` is the whole rate of the mix: at a rate r it takes most/r instances, and dealing requests out in turn
    among n divides the dispersion of each one's arrivals by n.
    """

    def judge(rate: float) -> str:
        dispersion = workload.dispersion / max(1.0, math.floor(most / rate))
        return meets(instance, instance.state(rate, mix), mix, objectives, dispersion)

    low = 1e-4
    if judge(low):
        return 0.0, ""
    high, broken = low, ""
    while high < most:
        high = min(high * 8, most)
        broken = judge(high)
        if broken:
            break
        low = high
    if not broken:
        return low, "the whole load"
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        verdict = judge(middle)
        if verdict:
            high, broken = middle, verdict
        else:
            low = middle
    return low, broken


def _why_never(instance: Instance, mix: Mix, objectives: Objectives) -> tuple[str, str, float]:
    """Reason, metric and best possible value of a layout that misses a limit even when idle."""
    s = instance.state(1e-4, mix)
    if not s.feasible:
        return s.reason, "memory", math.nan
    for name, limit in objectives.ttft.items() if instance.role != "decode" else ():
        best = instance.ttft_quantile(percentile(name), s, mix)
        if best > limit:
            return (
                f"TTFT {name} is {best * 1e3:,.0f} ms without any load (limit {limit * 1e3:,.0f} ms)",
                f"ttft.{name}",
                best,
            )
    for name, limit in objectives.tpot.items():
        best = instance.tpot_quantile(percentile(name), s, mix)
        if best > limit:
            return (
                f"TPOT {name} is {best * 1e3:,.1f} ms without any load (limit {limit * 1e3:,.1f} ms)",
                f"tpot.{name}",
                best,
            )
    return "misses an objective", "", math.nan


def _column(
    layout: Layout, offer: Offer, chosen: tuple[int, ...], instance: Instance, e: Estimator, mix: Mix, rate: float,
    limited: str, buckets: list[Bucket],
) -> Column:  # fmt: skip
    s = instance.state(rate, mix)
    prefill = np.full(len(buckets), math.inf)
    decode, held, moved = prefill.copy(), prefill.copy(), np.zeros(len(buckets))
    per_token = memory.kv_bytes_per_token(e.model, e.formats)
    for k in chosen:
        b = buckets[k]
        work = (
            instance.clock.prefill_work(b.input, s.batch, s.batch * mix.context)
            if layout.role != "decode" else np.zeros_like(b.input)
        )  # fmt: skip
        decoding = (b.output - 1) * s.step if layout.role != "prefill" else np.zeros_like(b.input)
        prefill[k], decode[k] = work.mean(), decoding.mean()
        held[k] = float(np.mean((work + decoding) * (b.input + b.output / 2)))
        if layout.role == "prefill":
            moved[k] = float(b.input.mean()) * per_token
    shares = np.array([buckets[k].share for k in chosen])
    mean_held = rate * float(np.dot(shares / shares.sum(), held[list(chosen)]))
    # Utilisation and batch at the point are what the bucket averages add up to, so that the natural mix fills it exactly.
    natural = rate * shares / shares.sum()
    s = replace(s, utilisation=float(natural @ prefill[list(chosen)]), batch=float(natural @ decode[list(chosen)]))
    return Column(
        layout, offer, chosen, instance, e, mix, s, limited, prefill, decode, held, mean_held, moved,
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
