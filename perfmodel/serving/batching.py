"""Steady state of one instance for a fixed request shape: what `estimate --rate` and `--concurrency` add."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from perfmodel import memory
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving import frontend, goodput
from perfmodel.serving.clock import StepClock
from perfmodel.serving.preemption import pressure, swap_seconds
from perfmodel.serving.queueing import Instance, Mix, State

Fetch = tuple[float, dict[str, float]]
"""What `Estimator.fetching` says of a prompt."""

_PERCENTILES = (0.5, 0.9, 0.95, 0.99)
_LEAVES = 0.999
"""Share of the front end's rate that is still below its saturation."""


def serving_summary(
    e: Estimator,
    isl: int,
    osl: int,
    *,
    rate: float | None,
    concurrency: int | None,
    ttft: float | None,
    tpot: float | None,
) -> dict[str, Any]:
    """Continuous batching of `isl`/`osl` requests: at a Poisson rate [1/s], or with `concurrency` clients in a loop.

    A closed loop keeps C requests in flight, so its rate follows from Little's law: C = rate x (TTFT + (osl - 1) TPOT).
    TTFT includes the engine's front end: tokeniser, API server and waiting for it. `memory`: how often the cache is full, and
    per request the preemptions, the wait for memory, and the work that preemptions repeat, or what swapping would take instead.
    Requests that a technique answers without the model (semantic caches) come and go at the front end; rates count them.
    Raises Infeasible when the instance or its front end saturates, with the highest rate it can carry.
    """
    if rate is not None and concurrency is not None:
        raise SpecError("give either --rate (open loop) or --concurrency (closed loop), not both")
    mix, instance = _fixed_shape(e, isl, osl)
    carried, fetch = _carried(e, mix), e.fetching(isl)
    closed = concurrency is not None
    reaches = max(1 - float(e.request(isl).answered), 1e-9)
    if rate is not None:
        rate = rate * reaches
    if concurrency is not None:
        rate = _closed_loop_rate(instance, mix, concurrency, lambda s: _outside(e, s, mix, fetch), carried)
    assert rate is not None
    state = instance.state(rate, mix)
    fetched, link, busy = _fetched(e, rate, fetch)
    reason = state.reason or ("the front end saturates" if rate >= carried else "")
    reason = reason or (f"{link} cannot deliver the cached prompt tokens" if busy >= 1 else "")
    if reason:
        delivered = rate / busy if busy else math.inf
        most = _below(min(goodput.highest_rate(instance, mix), _LEAVES * min(carried, delivered)) / reaches)
        raise Infeasible(f"{rate / reaches:.3g} requests/s: {reason}", nearest=f"--rate {most}", binding=(reason,))
    outside = _outside(e, state, mix, fetch)
    result: dict[str, Any] = {
        "rate_per_s": rate / reaches, "concurrency": concurrency or rate * (_residence(instance, state, mix) + outside),
        "front_end": {"ttft_s": outside - fetched, "utilisation": rate / carried},
        "fetched": {"ttft_s": fetched, "over": link, "utilisation": busy} if fetched else None,
        "decode_batch": state.batch, "prefill_utilisation": state.utilisation, "kv_share": state.kv_share,
        "output_tokens_per_s": rate * osl,
    }  # fmt: skip
    if closed:
        # Clients in a loop wait for each other, not for a random arrival stream: means, no percentiles.
        return result | {"ttft_s": {"mean": _mean_ttft(instance, state, mix) + outside}, "tpot_s": {"mean": state.step}}
    result["memory"] = _memory(e, instance, state, mix)
    refused = instance.refused(state, mix)
    result["closed_form"] = f"outside its range: {refused}" if refused else "valid"
    quantiles = {
        "ttft_s": lambda p, s, m: outside + instance.ttft_quantile(p, s, m),
        "tpot_s": instance.tpot_quantile,
        "itl_s": lambda p, s, m: goodput.itl_quantile(instance, p, s, m),
        "longest_gap_s": lambda p, s, m: goodput.longest_gap_quantile(instance, p, s, m),
    }
    for name, quantile in quantiles.items():
        result[name] = {f"p{p * 100:g}": quantile(p, state, mix) for p in _PERCENTILES}
    if ttft is None and tpot is None:
        return result
    return result | _against(e, instance, state, mix, goodput.Goals(ttft, tpot), fetch)


def _carried(e: Estimator, mix: Mix) -> float:
    """Rate [1/s] at which the front end is busy all the time; infinite for an engine nobody wrote one of."""
    if e.engine.frontend is None:
        return math.inf
    return frontend.capacity(e.engine, mix.mean(mix.input), mix.mean(mix.output)).rate


def _memory(e: Estimator, instance: Instance, s: State, mix: Mix) -> dict[str, Any]:
    """How often the cache is full and what that costs a request; None where preemptions would cause ever more of them."""
    tight = pressure(instance, s.rate, mix)
    lasts = tight.feasible
    return {
        "full_share": tight.full, "preemptions_per_request": tight.preempted if lasts else None,
        "wait_s": tight.wait if lasts else None, "repeated_s": tight.again if lasts else None,
        "swapped_s": tight.preempted * mix.mean(swap_seconds(e, mix.input)) if lasts else None,
    }  # fmt: skip


def _outside(e: Estimator, s: State, mix: Mix, fetch: Fetch) -> float:
    """Seconds of a first token outside the engine's steps, infinite where what it waits for saturates."""
    return float(frontend.before_engine(e.engine, s, mix)[0]) + _fetched(e, s.rate, fetch)[0]


def _fetched(e: Estimator, rate: float, fetch: Fetch) -> tuple[float, str, float]:
    """Wait for what is looked up and fetched of a prompt [s], the busiest link or decoder of it, and its busy share.

    Beyond what the prompt's own pass hides, a fetch waits for those before it: M/D/1, rho x seconds / (2 (1 - rho)).
    """
    wait, links = fetch
    if not links:
        return wait, "", 0.0
    name = max(links, key=lambda x: links[x])
    busy = rate / float(e.par.dp) * links[name]
    return wait + (busy * links[name] / (2 * (1 - busy)) if busy < 1 else math.inf), name.replace("_", " "), busy


def _below(rate: float) -> str:
    """Three digits of a rate, rounded down."""
    unit = 10 ** (math.floor(math.log10(rate)) - 2)
    return f"{math.floor(rate / unit) * unit:.3g}"


def _against(e: Estimator, instance: Instance, state: State, mix: Mix, goals: goodput.Goals, fetch: Fetch) -> dict[str, Any]:
    """Shares that meet the limits, and what they make of the rate."""
    outside = _outside(e, state, mix, fetch)
    shares = {}
    if goals.ttft is not None:
        shares["ttft"] = goodput.attainment(instance, state, mix, goodput.Goals(ttft=goals.ttft), outside=outside)
    if goals.tpot is not None:
        shares["tpot"] = instance.tpot_met(goals.tpot, state, mix)
    both = goodput.attainment(instance, state, mix, goals, outside=outside)
    most = goodput.capacity(
        instance, mix, goals, outside=lambda s: _outside(e, s, mix, fetch), most=_LEAVES * _carried(e, mix)
    )
    devices = int(instance.clock.estimator.par.devices)
    return {
        "met_share": shares, "attainment": both, "attainment_target": goals.share, "goodput_per_s": state.rate * both,
        "goodput_per_s_per_device": state.rate * both / devices,
        "capacity_per_s": most, "capacity_per_s_per_device": most / devices,
    }  # fmt: skip


def _fixed_shape(e: Estimator, isl: int, osl: int) -> tuple[Mix, Instance]:
    """An instance that serves requests of one shape."""
    # What techniques find of a prompt is not computed; `_outside` has the wait for what they fetch.
    found = math.floor(float(e.request(isl).cached))
    mix = Mix(np.array([float(isl)]), np.array([float(osl)]), np.ones(1), np.array([float(found)]) if found else None)
    per_token = (
        float(memory.cache_bytes(e.model, e.par, e.formats, 1, mix.context, e.engine.block_tokens)) / mix.context
    )
    return mix, Instance(StepClock(e, mix.context), "colocated", max(e.kv_free, per_token) / per_token * int(e.par.dp))


def _mean_ttft(instance: Instance, s: State, mix: Mix) -> float:
    """Own steps, half a running one, and the mean wait of M/G/1 (Pollaczek and Khinchine)."""
    wait = s.rate * mix.mean(s.work**2) / (2 * (1 - s.utilisation))
    return wait + s.pure_step * 0.5 * min(s.batch, 1.0) + mix.mean(instance.own(s, mix))


def _residence(instance: Instance, s: State, mix: Mix) -> float:
    """Seconds a request spends in the instance."""
    return _mean_ttft(instance, s, mix) + mix.mean(mix.steps) * s.step


def _closed_loop_rate(
    instance: Instance, mix: Mix, concurrency: float, outside: Callable[[State], float] = lambda _: 0.0, most: float = math.inf
) -> float:
    """Rate at which `concurrency` requests are in flight; what does not fit in memory waits outside.

    `outside`: seconds of a request outside the engine's steps; `most`: the rate at which those never end.
    """
    idle = instance.state(1e-9, mix)
    alone = concurrency / (_residence(instance, idle, mix) + outside(idle))
    # Requests stay longest when they are most, so the rate without company is an upper limit.
    low, high = 0.0, min(alone, goodput.highest_rate(instance, mix), most)
    for _ in range(22):
        middle = (low + high) / 2
        s = instance.state(middle, mix)
        crowded = not s.feasible or middle * (_residence(instance, s, mix) + outside(s)) >= concurrency
        low, high = (low, middle) if crowded else (middle, high)
    return low
