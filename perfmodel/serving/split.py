"""Prefill and decode at the same time on one device: its compute units are divided, its memory bandwidth is shared.

A fraction f of the units prefills, 1 - f decodes (Nexus, arXiv:2507.06608; semi-PD, arXiv:2504.19867). Each side takes
the time of its own kernels on its own units at the bandwidth the other leaves: its share is
    beta = max(1/2, 1 - bytes the other moves per second / bandwidth),
a fixed point (max-min fair: whoever wants more than half may have what the other does not use). Units that are too few
cannot draw the whole bandwidth either: a unit has `row_bytes_per_clock` in flight (Little's law).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from perfmodel import graph, roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.ops.shard import Group
from perfmodel.serving.clock import StepClock
from perfmodel.serving.queueing import Instance, Mix, State

_FAIR = 0.5  # of the bandwidth, which each side gets whatever the other wants
_SLOWED = np.linspace(1, 1 / _FAIR, 65)  # seconds of a pass over 1/bandwidth: straight where memory binds, level where not
_ROUNDS = 30
_SETTLED = 1e-3
_SEARCHED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def on_part(e: Estimator, units: float, bandwidth: float = 1.0) -> Estimator:
    """An estimator whose kernels run on a part of each device; host time stays."""
    other = object.__new__(type(e))
    other.__dict__.update(e.__dict__)
    other.machine, other._remembered = e.machine.part(units, bandwidth), {}
    return other


@dataclass(frozen=True)
class Demand:
    """One pass over a side: its seconds, and the share of the device's bandwidth it draws meanwhile."""

    seconds: float
    drawn: float


class _Pass:
    """One pass over a side: its records, and the seconds its traffic takes of the whole device's bandwidth."""

    def __init__(self, e: Estimator, group: Group, units: float, sequences: float) -> None:
        self.machine, self.units = e.machine, units
        self.schedule = e.lower(graph.Phase((group,))).schedule
        self.host = float(e.host_seconds(sequences))
        self.moved = float(roofline.cost(self.schedule, e.machine).busy["hbm"])
        part = self.machine.part(units)
        slower: dict[str, Any] = {"bandwidth": np.minimum(part.bandwidth, self.machine.bandwidth / _SLOWED)}
        slowed = replace(part, **slower)
        self._seconds = np.broadcast_to(roofline.cost(self.schedule, slowed).seconds, _SLOWED.shape)

    def demand(self, bandwidth: float) -> Demand:
        """With at most a share `bandwidth` of the memory's, at least half."""
        seconds = float(np.interp(1 / bandwidth, _SLOWED, self._seconds)) + self.host
        return Demand(seconds, self.moved / seconds)


def contention(
    e: Estimator, prefill_share: float, batch: float, context: float, chunk: float
) -> tuple[Demand, Demand, float, float]:
    """(prefill, decode, bandwidth share of prefill, of decode) when both sides run: the fixed point of their shares.

    batch sequences decode at `context` tokens each while chunks of `chunk` tokens prefill.
    """
    return _settled(_chunk_pass(e, prefill_share, chunk), _decode_pass(e, prefill_share, batch, context))


def _chunk_pass(e: Estimator, prefill_share: float, chunk: float) -> _Pass:
    return _Pass(e, Group(1.0, chunk, 0.0), prefill_share, 1.0)


def _decode_pass(e: Estimator, prefill_share: float, batch: float, context: float) -> _Pass:
    return _Pass(e, Group(batch, 1, context - 1, decode=True), 1 - prefill_share, batch)


def _settled(first: _Pass, later: _Pass) -> tuple[Demand, Demand, float, float]:
    """The fixed point of the bandwidth shares of a pass that prefills and one that decodes."""
    of_prefill = of_decode = 1.0
    for _ in range(_ROUNDS):
        prefill, decode = first.demand(of_prefill), later.demand(of_decode)
        wanted = max(_FAIR, 1 - decode.drawn), max(_FAIR, 1 - prefill.drawn)
        if abs(wanted[0] - of_prefill) + abs(wanted[1] - of_decode) < _SETTLED:
            break
        # Damped: each side's demand answers the other's.
        of_prefill, of_decode = (of_prefill + wanted[0]) / 2, (of_decode + wanted[1]) / 2
    return prefill, decode, of_prefill, of_decode


class Blend:
    """Clocks that share their grids, of which weighted means are taken: all their numbers as rows of one table."""

    def __init__(self, clocks: list[StepClock]) -> None:
        self.clocks = clocks
        self._places: list[tuple[str, int, int, tuple[int, ...], type]] = []
        parts, at = [], 0
        for name, first in vars(clocks[0]).items():
            if isinstance(first, (np.ndarray, float, list)):
                rows = np.array([getattr(c, name) for c in clocks])
                self._places.append((name, at, at + rows[0].size, rows[0].shape, type(first)))
                parts.append(rows.reshape(len(clocks), -1))
                at += rows[0].size
        self._table = np.concatenate(parts, axis=1)

    def at(self, weights: list[float]) -> StepClock:
        """A clock whose every step takes the weighted mean of theirs."""
        mean = object.__new__(StepClock)
        mean.__dict__.update(self.clocks[0].__dict__)
        numbers = np.asarray(weights) @ self._table
        for name, low, high, shape, kind in self._places:
            found = numbers[low:high].reshape(shape)
            mean.__dict__[name] = found if issubclass(kind, np.ndarray) else found.tolist()
        return mean


class Sides:
    """Clocks of the two sides, alone on the memory and at half of its bandwidth; `prefill_share` of the units prefill.

    alone: share of the units that a side has while the other has no work; 0: no more than its own.
    """

    def __init__(self, e: Estimator, context: float, prefill_share: float, alone: float = 0.0) -> None:
        if not 0 < prefill_share < 1:
            raise SpecError(f"prefill_share must lie between 0 and 1, got {prefill_share:g}")
        if not 0 <= alone <= 1:
            raise SpecError(f"alone must lie between 0 and 1, got {alone:g}")
        self.estimator, self.context, self.prefill_share = e, context, prefill_share
        # A side keeps the tables of its own phase.
        sides: tuple[tuple[Literal["prefill", "decode"], float], ...] = (
            ("prefill", prefill_share), ("decode", 1 - prefill_share),
        )  # fmt: skip
        self._prefill, self._decode = (
            Blend([StepClock(on_part(e, units, beta), context, only=phase)
                   for units, beta in ((max(own, alone), 1.0), (own, 1.0), (own, _FAIR))[0 if alone > own else 1 :]])
            for phase, own in sides
        )  # fmt: skip
        self._settled: dict[tuple[float, float], tuple[float, float]] = {}
        self._chunks: dict[float, _Pass] = {}
        self._decodes: dict[float, _Pass] = {}

    def prefill(self, bandwidth: float, often: float = 1.0) -> StepClock:
        """Clock of prefill with a share of the bandwidth in [1/2, 1], `often` of the time, and else with all of it."""
        return _between(self._prefill, bandwidth, often)

    def decode(self, bandwidth: float, often: float = 1.0) -> StepClock:
        """Clock of decode with a share of the bandwidth in [1/2, 1], `often` of the time, and else with all of it."""
        return _between(self._decode, bandwidth, often)

    def shares(self, batch: float, chunk: float) -> tuple[float, float]:
        """Bandwidth shares of (prefill, decode) while both run: settled at powers of two, linear in log(batch) between them."""
        place = math.log2(max(batch, 1.0))
        low = math.floor(place)
        near, far = self._shares(2.0**low, chunk), self._shares(2.0 ** (low + 1), chunk)
        part = place - low
        return near[0] + part * (far[0] - near[0]), near[1] + part * (far[1] - near[1])

    def _shares(self, batch: float, chunk: float) -> tuple[float, float]:
        key = (batch, chunk)
        if key not in self._settled:
            e, share = self.estimator, self.prefill_share
            if chunk not in self._chunks:
                self._chunks[chunk] = _chunk_pass(e, share, chunk)
            if batch not in self._decodes:
                self._decodes[batch] = _decode_pass(e, share, batch, self.context)
            self._settled[key] = _settled(self._chunks[chunk], self._decodes[batch])[2:]
        return self._settled[key]


class SplitClock(StepClock):
    """Both sides while neither pauses: what a simulation or a table of step times needs.

    A step lasts as long as the slower of its chunks on the prefill side and its tokens on the decode side; prefill work takes
    nothing from decode. Percentiles need SplitInstance, which knows how often the sides meet.
    """

    def __init__(self, sides: Sides) -> None:
        engine = sides.estimator.engine
        of_prefill, of_decode = sides.shares(engine.max_sequences / 2, engine.chunk_tokens)
        self.__dict__.update(vars(sides.decode(of_decode)))
        self._prefill = sides.prefill(of_prefill)

    @property
    def prefill_side(self) -> StepClock:
        """Step times of prefill beside decoding."""
        return self._prefill

    def step(self, batch: int, total_context: float, chunks: list[tuple[float, float]]) -> float:
        """Seconds until both sides are done with a step."""
        first = self._prefill.step(0, 0.0, chunks) if chunks else 0.0
        return max(first, self.decode(batch, total_context))

    def prefill_work(
        self, inputs: np.ndarray, batch: float, total_context: float, cached: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Seconds each input keeps the prefill side busy."""
        return self._prefill.prefill_work(inputs, 0.0, 0.0, cached)


def _between(blend: Blend, bandwidth: float, often: float) -> StepClock:
    """Kernels bound by memory take 1/bandwidth longer, others no longer: linear in 1/bandwidth between 1 and 2."""
    slower = often * (1 / bandwidth - 1) / (1 / _FAIR - 1)
    # While the other side has no work, the first of three clocks has more of the units.
    return blend.at([1 - slower, slower] if len(blend.clocks) == 2 else [1 - often, often - slower, slower])


@dataclass(frozen=True, eq=False)
class SplitInstance:
    """An instance whose devices prefill and decode side by side; used like serving.queueing.Instance."""

    sides: Sides
    kv_tokens: float
    """Cached tokens that fit, per instance, shared by both sides: nothing is handed over."""
    role: str = "colocated"

    @cached_property
    def clock(self) -> SplitClock:
        """Step times while neither side pauses."""
        return SplitClock(self.sides)

    def state(self, rate: float, mix: Mix) -> SplitState:
        """Steady state at `rate` requests per second.

        A side meets the other as often as that one is busy: prefill a share u of the time, decode whenever a sequence
        decodes. Both rates follow from those shares, which a few rounds settle.
        """
        busy_prefill = busy_decode = 0.0
        batch = 1.0
        chunk = float(min(mix.mean(mix.input), self.sides.estimator.engine.chunk_tokens))
        for _ in range(6):
            of_prefill, of_decode = self.sides.shares(batch, chunk)
            prefill = Instance(self.sides.prefill(of_prefill, busy_decode), "prefill", self.kv_tokens)
            decode = Instance(self.sides.decode(of_decode, busy_prefill), "decode", self.kv_tokens)
            first, later = prefill.state(rate, mix), decode.state(rate, mix)
            if not (np.isfinite(later.batch) and first.utilisation < 1):
                break
            new_prefill, new_decode = min(first.utilisation, 1.0), min(later.batch, 1.0)
            settled = abs(new_prefill - busy_prefill) + abs(new_decode - busy_decode) < 1e-3
            busy_prefill, busy_decode, batch = new_prefill, new_decode, max(later.batch, 1.0)
            if settled:
                break
        # Both sides cache in the same memory.
        held = first.kv_share + later.kv_share
        reason = first.reason or later.reason or ("KV cache exceeds memory" if held > 1 else "")
        return SplitState(
            not reason, reason, rate, first.utilisation, later.batch, later.step, later.pure_step, first.work, held,
            prefill, decode, first, later,
        )  # fmt: skip

    def refused(self, s: SplitState, mix: Mix, dispersion: float = 1.0) -> str:
        """Why these forms do not hold at a state (replay decides there); empty where they do."""
        return s.reason or s.prefill.refused(s.first, mix, dispersion) or s.decode.refused(s.later, mix, dispersion)

    def ttft_met(self, limit: float | np.ndarray, s: SplitState, mix: Mix, dispersion: float = 1.0) -> float:
        """Share of requests with a first token within `limit` seconds: prefill is a queue of its own."""
        return s.prefill.ttft_met(limit, s.first, mix, dispersion)

    def ttft_shares(self, limit: float | np.ndarray, s: SplitState, mix: Mix, dispersion: float = 1.0) -> np.ndarray:
        """P(first token within `limit` seconds) of each request of the mix."""
        return s.prefill.ttft_shares(limit, s.first, mix, dispersion)

    def tpot_shares(self, limit: float | np.ndarray, s: SplitState, mix: Mix, dispersion: float = 1.0) -> np.ndarray:
        """P(TPOT within `limit` seconds) of each request of the mix."""
        return s.decode.tpot_shares(limit, s.later, mix, dispersion)

    def tpot_met(self, limit: float, s: SplitState, mix: Mix, dispersion: float = 1.0) -> float:
        """Share of requests whose TPOT is within `limit` seconds."""
        return s.decode.tpot_met(limit, s.later, mix, dispersion)

    def ttft_quantile(self, p: float, s: SplitState, mix: Mix, dispersion: float = 1.0) -> float:
        """Seconds within which a share p of requests have their first token."""
        return s.prefill.ttft_quantile(p, s.first, mix, dispersion)

    def tpot_quantile(self, p: float, s: SplitState, mix: Mix, dispersion: float = 1.0) -> float:
        """Seconds within which a share p of requests have their TPOT."""
        return s.decode.tpot_quantile(p, s.later, mix, dispersion)


@dataclass(frozen=True, eq=False)
class SplitState(State):
    """A steady state with the two sides it is made of; its utilisation is that of the prefill side."""

    prefill: Instance
    decode: Instance
    first: State
    later: State


def best_share(
    e: Estimator, mix: Mix, rate: float, kv_tokens: float, *, ttft: float, tpot: float, p: float = 0.95,
    shares: Sequence[float] = _SEARCHED,
) -> tuple[float, float]:  # fmt: skip
    """(share of units for prefill, slack) at which the worse of TTFT/limit and TPOT/limit at percentile p is least.

    slack: that worse ratio; above one no share meets both limits. Infinite where no share carries the rate.
    """
    best = (shares[0], float("inf"))
    for share in shares:
        instance = SplitInstance(Sides(e, mix.context, share), kv_tokens)
        s = instance.state(rate, mix)
        if s.feasible:
            worse = max(instance.ttft_quantile(p, s, mix) / ttft, instance.tpot_quantile(p, s, mix) / tpot)
            best = min(best, (share, worse), key=lambda x: x[1])
    return best
