"""Which promise a state of an instance breaks, in closed form; and how near a layout comes that never keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from perfmodel.serving import frontend, goodput
from perfmodel.serving.queueing import Instance, Mix, State, invert
from perfmodel.spec.calibration import Engine
from perfmodel.spec.workload import Objectives

MOST_PREFILL = 0.9
"""Share of its time an instance may plan to spend on prefill: closer to one, waits depend on the last request."""
_ROUNDING = 1e-3
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


def before_engine(engine: Engine, s: State, mix: Mix) -> np.ndarray:
    """Seconds of each request outside the engine's steps: tokeniser and API server, and waiting for the latter."""
    alone = frontend.unloaded(engine, mix.input)
    if engine.frontend is None:
        return alone
    lengths = mix.mean(mix.input), mix.mean(mix.output)
    if s.rate >= frontend.capacity(engine, *lengths).rate:
        return np.full(mix.input.shape, math.inf)
    return alone + frontend.waiting(engine, s.rate, *lengths, s.step if math.isfinite(s.step) else 0.0)


def promises(
    instance: Instance, s: State, mix: Mix, goals: Objectives, dispersion: float, engine: Engine
) -> Iterator[Promise]:
    """What an instance of this role answers for. A hand-off splits a joint share evenly between both sides."""
    first, later = instance.role != "decode", instance.role != "prefill"
    outside = before_engine(engine, s, mix) if first else np.zeros(mix.input.shape)

    def ttft(t: float, per_token: float = 0.0) -> float:
        return instance.ttft_met(t + per_token * mix.input - outside, s, mix, dispersion)

    for name, limit in goals.ttft.items() if first else ():
        yield Promise(f"TTFT {name}", percentile(name), float(limit), partial(ttft, per_token=limit.per_token))
    for name, limit in goals.tpot.items() if later else ():
        yield Promise(f"TPOT {name}", percentile(name), float(limit), lambda t: instance.tpot_met(t, s, mix, dispersion))
    if not isinstance(instance, Instance):
        return
    for name, limit in goals.itl.items() if later else ():
        yield Promise(
            f"ITL {name}", percentile(name), float(limit), lambda t: goodput.itl_met(instance, t, s, mix, dispersion)
        )
    for name, limit in goals.longest_gap.items() if later else ():
        yield Promise(
            f"longest gap {name}", percentile(name), float(limit),
            lambda t: goodput.longest_gap_met(instance, t, s, mix, dispersion),
        )  # fmt: skip
    for name, limit in goals.e2e.items() if first and later else ():

        def e2e(t: float, k: float = limit.per_token) -> float:
            decoding = mix.steps * instance.law(s, mix, dispersion).decoding.tpot
            return instance.ttft_met(t + k * mix.input - outside - decoding, s, mix, dispersion)

        yield Promise(f"end to end {name}", percentile(name), float(limit), e2e)
    joint = goals.attainment
    if joint is None:
        return
    p = joint.share if first and later else math.sqrt(joint.share)

    def together(stretch: float) -> float:
        met = np.ones(mix.input.shape)
        if joint.ttft is not None and first:
            met = met * instance.ttft_shares(stretch * joint.ttft.at(mix.input) - outside, s, mix, dispersion)
        if joint.tpot is not None and later:
            met = met * instance.tpot_shares(stretch * float(joint.tpot), s, mix, dispersion)
        return mix.mean(met)

    yield Promise("attainment", p, 1.0, together)


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
    if s.utilisation > MOST_PREFILL * (1 + _ROUNDING):
        return Verdict("prefill time", -math.inf)
    tightest = Verdict("", math.inf)
    for x in promises(instance, s, mix, goals, dispersion, engine):
        slack = x.slack
        if slack < tightest.slack:
            tightest = Verdict(x.name, slack)
        if slack < 0:
            break
    return tightest


def why_never(instance: Instance, mix: Mix, goals: Objectives, engine: Engine) -> tuple[str, str, float]:
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
    return "misses an objective", "", math.nan
