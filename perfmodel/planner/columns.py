"""Columns: every instance configuration at its operating point, priced by what it consumes per request.

A column is a node type, a role, a layout (tp, pp), a weight format and a set of input-length buckets it may serve. Its
operating point is the highest request rate at which the closed forms meet every percentile for the mix of those
buckets; there it spends a share u of its time on prefill, decodes b sequences and holds M cached token-seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from perfmodel import memory
from perfmodel.cost import demand_shares, device_power
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.planner.offer import Offer
from perfmodel.serving.clock import StepClock
from perfmodel.serving.queueing import Instance, Mix, State
from perfmodel.serving.workload import Bucket, Workload
from perfmodel.spec.plan import Choices, Objectives

_HALVINGS = 14


@dataclass(frozen=True)
class Layout:
    """How one instance is built."""

    node: str
    role: str
    tp: int
    pp: int
    weight_dtype: str

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    @property
    def label(self) -> str:
        pipeline = f" pp{self.pp}" if self.pp > 1 else ""
        return f"{self.node} {self.role} tp{self.tp}{pipeline} {self.weight_dtype}"


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
    """Mean cached tokens at which mean + 2 sigma fills the memory."""
    moved_bytes: np.ndarray
    """Cache bytes handed over per request [bucket]; zero unless the role is prefill."""
    power_w: float | None
    """Watts of one instance's devices at the operating point."""

    @property
    def key(self) -> tuple[Layout, tuple[int, ...]]:
        return self.layout, self.buckets

    def capacity(self, bucket: int) -> float:
        """Requests per second of one bucket alone that one instance serves."""
        limits = [math.inf]
        if self.prefill_s[bucket] > 0:
            limits.append(self.state.utilisation / self.prefill_s[bucket])
        if self.decode_s[bucket] > 0:
            limits.append(self.state.batch / self.decode_s[bucket])
        if self.kv_token_s[bucket] > 0:
            limits.append(self.kv_limit / self.kv_token_s[bucket])
        return min(limits)


@dataclass(frozen=True)
class Rejected:
    """A layout that cannot serve at all, and why; `best` is the nearest value of the limit it breaks."""

    layout: Layout
    reason: str
    metric: str = ""
    best: float = math.nan


@dataclass
class Columns:
    """Everything enumerated: columns to choose from, and layouts that fell out with their reasons."""

    offered: list[Column] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    dominated: int = 0
    enumerated: int = 0


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


def enumerate_columns(
    model: str,
    offers: list[Offer],
    choices: Choices,
    objectives: Objectives,
    workload: Workload,
    buckets: list[Bucket],
    tighten: dict[tuple[Layout, tuple[int, ...]], float],
    cache: dict[Layout, tuple[Estimator, StepClock] | str],
) -> Columns:
    """All layouts of all offers at their operating points, without the dominated ones."""
    found = Columns()
    sets = bucket_sets(len(buckets))
    for offer in offers:
        for layout in layouts(model, offer, choices):
            built = cache.get(layout)
            if built is None:
                built = cache[layout] = _build(model, offer, layout, choices, workload)
            found.enumerated += 1
            if isinstance(built, str):
                found.rejected.append(Rejected(layout, built, "memory"))
                continue
            _points(found, layout, offer, built, sets, objectives, workload, buckets, tighten)
    before = len(found.offered)
    found.offered = _prune(found.offered, len(buckets))
    found.dominated = before - len(found.offered)
    return found


def layouts(model: str, offer: Offer, choices: Choices) -> list[Layout]:
    """Roles x formats x tensor- and pipeline-parallel degrees that a node can hold."""
    count = offer.machine.devices_per_node
    degrees = choices.tp or tuple(2**i for i in range(int(math.log2(count)) + 1))
    formats = choices.weight_dtype or ("checkpoint",)
    return [
        Layout(offer.node.name, role, tp, pp, dtype)
        for role in choices.roles
        for dtype in formats
        for tp in degrees
        for pp in choices.pp
        if (tp <= count or choices.tp_across_nodes) and tp * pp <= max(count, 1)
        and (role == "colocated" or offer.machine.network > 0)
    ]  # fmt: skip


def _build(
    model: str, offer: Offer, layout: Layout, choices: Choices, workload: Workload
) -> tuple[Estimator, StepClock] | str:
    """Estimator and clock of a layout, or why it cannot hold the model."""
    try:
        e = Estimator(
            model, offer.node, tp=layout.tp, pp=layout.pp, engine=choices.engine, kv_dtype=choices.kv_dtype,
            weight_dtype=None if layout.weight_dtype == "checkpoint" else layout.weight_dtype,
            mem_fraction=choices.mem_fraction,
        )  # fmt: skip
    except SpecError as error:
        return str(error)
    longest = float(np.max(workload.requests.input + workload.requests.output))
    one = float(memory.cache_bytes(e.model, e.par, e.formats, 1, longest, e.engine.block_tokens))
    if e.kv_free < one:
        need = (float(memory.weight_bytes(e.model, e.par, e.formats)) + one) / 1e9
        return f"needs {need:.0f} GB per device with its longest request, has {e.machine.capacity / 1e9:.0f} GB"
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


def _points(
    found: Columns, layout: Layout, offer: Offer, built: tuple[Estimator, StepClock], sets: list[tuple[int, ...]],
    objectives: Objectives, workload: Workload, buckets: list[Bucket],
    tighten: dict[tuple[Layout, tuple[int, ...]], float],
) -> None:  # fmt: skip
    e, clock = built
    whole = bucket_mix(buckets, tuple(range(len(buckets))))
    moved = handoff_seconds(e) if layout.role != "colocated" else 0.0
    instance = Instance(clock, layout.role, kv_tokens(e, whole.context), moved if layout.role == "decode" else 0.0)
    refused: Rejected | None = None
    served = False
    for chosen in sets:
        mix = bucket_mix(buckets, chosen)
        rate, limited = _highest_rate(instance, mix, objectives, workload.dispersion, workload.rate)
        if rate <= 0:
            if refused is None:
                refused = Rejected(layout, *_why_never(instance, mix, objectives))
            continue
        served = True
        rate *= tighten.get((layout, chosen), 1.0)
        found.offered.append(_column(layout, offer, chosen, instance, e, mix, rate, limited, buckets))
    if not served and refused is not None:
        found.rejected.append(refused)


def _meets(instance: Instance, s: State, mix: Mix, objectives: Objectives, dispersion: float) -> str:
    """Empty when every percentile holds, else the one that breaks."""
    if not s.feasible:
        return s.reason
    for name, limit in objectives.ttft.items() if instance.role != "decode" else ():
        if instance.ttft_met(limit, s, mix, dispersion) < percentile(name):
            return f"TTFT {name}"
    for name, limit in objectives.tpot.items():
        if instance.tpot_met(limit, s, mix) < percentile(name):
            return f"TPOT {name}"
    return ""


def percentile(name: str) -> float:
    """``p95`` -> 0.95."""
    return float(name[1:]) / 100


def _highest_rate(
    instance: Instance, mix: Mix, objectives: Objectives, dispersion: float, most: float
) -> tuple[float, str]:
    """Highest rate at which everything holds (0: none), and what breaks beyond it."""
    low = 1e-4
    if _meets(instance, instance.state(low, mix), mix, objectives, dispersion):
        return 0.0, ""
    high, broken = low, ""
    while high < most:
        high = min(high * 8, most)
        broken = _meets(instance, instance.state(high, mix), mix, objectives, dispersion)
        if broken:
            break
        low = high
    if not broken:
        return low, "the whole load"
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        verdict = _meets(instance, instance.state(middle, mix), mix, objectives, dispersion)
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
            return f"TTFT {name} is {best * 1e3:,.0f} ms without any load (limit {limit * 1e3:,.0f} ms)", f"ttft.{name}", best
    for name, limit in objectives.tpot.items():
        best = instance.tpot_quantile(percentile(name), s, mix)
        if best > limit:
            return f"TPOT {name} is {best * 1e3:,.1f} ms without any load (limit {limit * 1e3:,.1f} ms)", f"tpot.{name}", best
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
    kv_limit = mean_held / s.kv_share if s.kv_share > 0 else math.inf
    # Utilisation and batch at the point are what the bucket averages add up to, so that the natural mix fills it exactly.
    natural = rate * shares / shares.sum()
    s = replace(s, utilisation=float(natural @ prefill[list(chosen)]), batch=float(natural @ decode[list(chosen)]))
    return Column(
        layout, offer, chosen, instance, e, mix, s, limited, prefill, decode, held, kv_limit, moved,
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
    """Drop columns that another of the same node type, role and size serves at least as well in every bucket."""
    kept: list[Column] = []
    rates = {id(c): np.array([c.capacity(k) if k in c.buckets else 0.0 for k in range(buckets)]) for c in columns}
    rooms = {id(c): (c.state.utilisation, c.state.batch, c.kv_limit) for c in columns}
    for c in columns:
        mine = rates[id(c)] / c.layout.devices
        rivals = (
            o for o in columns
            if o is not c and o.layout.node == c.layout.node and o.layout.role == c.layout.role
            and o.layout.devices <= c.layout.devices
        )  # fmt: skip
        beaten = any(
            np.all(rates[id(o)] / o.layout.devices >= mine * 1.0000001)
            and np.any(rates[id(o)] / o.layout.devices > mine * 1.02)
            and _roomier(o, c, rooms)
            for o in rivals
        )
        if not beaten:
            kept.append(c)
    return kept


def _roomier(o: Column, c: Column, rooms: dict[int, tuple[float, float, float]]) -> bool:
    """Whether o serves every mixture that c serves: per device, each resource goes at least as far in each bucket."""
    scale = c.layout.devices / o.layout.devices
    for k in c.buckets:
        for demand_o, demand_c, i in (
            (o.prefill_s[k], c.prefill_s[k], 0), (o.decode_s[k], c.decode_s[k], 1), (o.kv_token_s[k], c.kv_token_s[k], 2),
        ):  # fmt: skip
            have_o, have_c = rooms[id(o)][i] * scale, rooms[id(c)][i]
            if demand_o > 0 and (have_o <= 0 or demand_o / have_o > demand_c / max(have_c, 1e-300) * 1.0000001):
                return False
    return True
