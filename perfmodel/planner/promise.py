"""Which promise a state of an instance breaks, in closed form; and how near a layout comes that never keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from perfmodel.serving import frontend, goodput
from perfmodel.serving.encode_pool import EncodeInstance, FedInstance
from perfmodel.serving.queueing import Instance, Mix, State, invert
from perfmodel.serving.split import SplitState
from perfmodel.serving.static_batch import StaticInstance, StaticState
from perfmodel.spec.calibration import Engine
from perfmodel.spec.workload import Limit, Objectives

MOST_PREFILL = 0.9
"""Share of its time an instance may plan to spend on prefill: closer to one, waits depend on the last request."""
_ROUNDING = 1e-3
_BURSTY = 2.0
"""Dispersion up to which the memory margin of a steady state (mean and two sigma) is enough."""
_IDLE = 1e-4


@dataclass(frozen=True)
class Promise:
    """Share `p` of the requests (tokens for ITL) shall meet a limit. `met(t)`: the share that meets a limit of t seconds."""

    name: str
    p: float
    limit: float
    met: Callable[[float], float]

    @property
    def slack(self) -> float:
        """Share of the permitted misses that is left; negative where the promise is broken."""
        return (self.met(self.limit) - self.p) / (1 - self.p)


def percentile(name: str) -> float:
    """``p95`` -> 0.95."""
    return float(name[1:]) / 100


def promises(
    instance: Instance, s: State | SplitState, mix: Mix, goals: Objectives, dispersion: float, engine: Engine
) -> Iterator[Promise]:
    """What an instance of this role answers for. A hand-off splits a joint share evenly between both sides, and an end-to-end
    limit as their work without load."""
    first, later = instance.role != "decode", instance.role not in ("prefill", "encode")
    outside = frontend.before_engine(engine, s, mix) if first else np.zeros(mix.input.shape)
    if instance.role == "encode":
        outside = frontend.unloaded(engine, mix.input)
    alone, shared = _odds(instance, first and later)
    if isinstance(s, StaticState):
        yield from _static(cast(StaticInstance, instance), s, mix, goals, dispersion, outside)
        return
    # Where devices are split between the phases, each side has laws of its own.
    if isinstance(s, SplitState):
        front, ahead, back, after = s.prefill, s.first, s.decode, s.later
    else:
        front, ahead, back, after = instance, s, instance, s

    def ttft(t: float, per_token: float = 0.0) -> float:
        return front.ttft_met(t + per_token * mix.input - outside, ahead, mix, dispersion)

    for name, limit in goals.ttft.items() if first else ():
        yield Promise(f"TTFT {name}", percentile(name) ** alone, float(limit), partial(ttft, per_token=limit.per_token))
    for name, limit in goals.tpot.items() if later else ():
        yield Promise(f"TPOT {name}", percentile(name), float(limit), lambda t: back.tpot_met(t, after, mix, dispersion))
    for name, limit in goals.itl.items() if later else ():
        yield Promise(f"ITL {name}", percentile(name), float(limit), lambda t: goodput.itl_met(back, t, after, mix, dispersion))
    for name, limit in goals.longest_gap.items() if later else ():
        yield Promise(
            f"longest gap {name}", percentile(name), float(limit),
            lambda t: goodput.longest_gap_met(back, t, after, mix, dispersion),
        )  # fmt: skip
    both = first and later

    def e2e(t: float, per_token: float = 0.0) -> float:
        limit = t + per_token * mix.input
        if both:
            decoding = mix.steps * back.law(after, mix, dispersion).decoding.tpot
            return front.ttft_met(limit - outside - decoding, ahead, mix, dispersion)
        work = front.clock.prefill_work(mix.input, 0.0, 0.0)
        decoding = mix.steps * front.clock.decode(1, mix.context)
        if first:
            return front.ttft_met(limit * work / (work + decoding) - outside, ahead, mix, dispersion)
        each = limit * decoding / (work + decoding) / np.maximum(mix.steps, 1.0)
        return mix.mean(back.tpot_shares(each, after, mix, dispersion))

    for name, limit in goals.e2e.items():
        yield Promise(f"end to end {name}", percentile(name) ** shared, float(limit), partial(e2e, per_token=limit.per_token))
    joint = goals.attainment
    if joint is None:
        return
    def together(stretch: float) -> float:
        met = np.ones(mix.input.shape)
        if joint.ttft is not None and first:
            met = met * front.ttft_shares(stretch * joint.ttft.at(mix.input) - outside, ahead, mix, dispersion)
        if joint.tpot is not None and later:
            met = met * back.tpot_shares(stretch * float(joint.tpot), after, mix, dispersion)
        return mix.mean(met)

    yield Promise("attainment", joint.share**shared, 1.0, together)


def _odds(instance: Instance, both: bool) -> tuple[float, float]:
    """Exponents a, b: an instance owes p^a of its requests their TTFT, and p^b what it shares with a decode instance.

    Exponents of all that a request passes add up to one: sides of a hand-off 1/2 each, of which an encode pool takes half.
    """
    if isinstance(instance, EncodeInstance):
        return 0.5, 0.25
    if isinstance(instance, FedInstance):
        return 0.5, 0.75 if both else 0.25
    return 1.0, 1.0 if both else 0.5


def _static(
    instance: StaticInstance, s: StaticState, mix: Mix, goals: Objectives, dispersion: float, outside: np.ndarray
) -> Iterator[Promise]:
    """Those of batches that start and end together."""

    def met(t: float, metric: str, per_token: float) -> float:
        before = outside - per_token * mix.input if metric in ("ttft", "e2e") else 0.0
        return instance.met(metric, t - before, s, mix, dispersion)

    names = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "longest_gap": "longest gap", "e2e": "end to end"}
    for metric, name in names.items():
        limits: dict[str, Limit] = getattr(goals, metric)
        for p, limit in limits.items():
            form = partial(met, metric=metric, per_token=limit.per_token)
            yield Promise(f"{name} {p}", percentile(p), float(limit), form)
    joint = goals.attainment
    if joint is not None:

        def together(stretch: float) -> float:
            ttft = np.full(mix.input.shape, math.inf) if joint.ttft is None else stretch * joint.ttft.at(mix.input) - outside
            tpot = math.inf if joint.tpot is None else stretch * float(joint.tpot)
            return instance.jointly_met(ttft, tpot, s, mix, dispersion)

        yield Promise("attainment", joint.share, 1.0, together)


@dataclass(frozen=True)
class Verdict:
    """The promise that is broken or nearest to it; `slack` is -inf in a state that cannot last."""

    name: str
    slack: float

    @property
    def broken(self) -> bool:
        return self.slack < 0


def judge(
    instance: Instance, s: State, mix: Mix, goals: Objectives, dispersion: float, engine: Engine
) -> Verdict:
    """The tightest promise of a state; the first broken one settles it."""
    if not s.feasible:
        return Verdict(s.reason, -math.inf)
    if isinstance(s, StaticState) and (why := instance.refused(s, mix, dispersion)):
        # Static batches have a narrower range, and finding that out is cheaper than their laws.
        return Verdict(why.partition(":")[0], -math.inf)
    if s.utilisation > MOST_PREFILL * (1 + _ROUNDING):
        return Verdict("prefill time", -math.inf)
    tightest = Verdict("", math.inf)
    for x in promises(instance, s, mix, goals, dispersion, engine):
        slack = x.slack
        if slack < tightest.slack:
            tightest = Verdict(x.name, slack)
        if slack < 0:
            return tightest
    # In bursts requests wait for memory or a slot, or lose their cache: misses that these forms do not count.
    refused = instance.refused(s, mix, dispersion) if dispersion > _BURSTY else ""
    return Verdict(refused.partition(":")[0], -math.inf) if refused else tightest


def why_never(
    instance: Instance, mix: Mix, goals: Objectives, engine: Engine, dispersion: float = 1.0
) -> tuple[str, str, float]:
    """Reason, metric and best possible limit of a layout that breaks a promise even when idle."""
    s = instance.state(_IDLE, mix)
    if not s.feasible:
        return s.reason, "memory", math.nan
    for x in promises(instance, s, mix, goals, 1.0, engine):
        if x.slack >= 0:
            continue
        best = invert(x.met, x.p, x.limit)
        if x.name == "attainment":
            return f"{x.met(1.0):.1%} of the requests meet the joint limits without any load", "attainment", best
        digits = 0 if x.limit >= 0.2 else 1
        metric, _, share = x.name.rpartition(" ")
        return (
            f"{x.name} is {best * 1e3:,.{digits}f} ms without any load (limit {x.limit * 1e3:,.{digits}f} ms)",
            f"{metric.lower()}.{share}", best,
        )  # fmt: skip
    # What has no closed form at any load a replay would have to carry.
    return instance.refused(s, mix, dispersion) or "misses an objective", "", math.nan
