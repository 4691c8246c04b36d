"""Steady state of one instance for a fixed request shape: what `estimate --rate` and `--concurrency` add."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from perfmodel import calibration, memory
from perfmodel.errors import Infeasible, SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving import goodput
from perfmodel.serving.clock import StepClock
from perfmodel.serving.queueing import Instance, Mix, State

_PERCENTILES = (0.5, 0.9, 0.95, 0.99)


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
    Raises Infeasible when the instance saturates, with the highest rate it can carry.
    """
    if rate is not None and concurrency is not None:
        raise SpecError("give either --rate (open loop) or --concurrency (closed loop), not both")
    mix, instance = _fixed_shape(e, isl, osl)
    closed = concurrency is not None
    if concurrency is not None:
        rate = _closed_loop_rate(instance, mix, concurrency)
    assert rate is not None
    state = instance.state(rate, mix)
    if not state.feasible:
        most = goodput.highest_rate(instance, mix)
        raise Infeasible(
            f"{rate:.3g} requests/s: {state.reason}", nearest=f"--rate {most:.3g}", binding=(state.reason,)
        )
    result: dict[str, Any] = {
        "rate_per_s": rate, "concurrency": concurrency or rate * _residence(instance, state, mix),
        "decode_batch": state.batch, "prefill_utilisation": state.utilisation, "kv_share": state.kv_share,
        "output_tokens_per_s": rate * osl,
    }  # fmt: skip
    if closed:
        # Clients in a loop wait for each other, not for a random arrival stream: means, no percentiles.
        return result | {"ttft_s": {"mean": _mean_ttft(instance, state, mix)}, "tpot_s": {"mean": state.step}}
    outside = instance.refused(state, mix)
    result["closed_form"] = f"outside its range: {outside}" if outside else "valid"
    quantiles = {
        "ttft_s": instance.ttft_quantile,
        "tpot_s": instance.tpot_quantile,
        "itl_s": lambda p, s, m: goodput.itl_quantile(instance, p, s, m),
        "longest_gap_s": lambda p, s, m: goodput.longest_gap_quantile(instance, p, s, m),
    }
    for name, quantile in quantiles.items():
        result[name] = {f"p{p * 100:g}": quantile(p, state, mix) for p in _PERCENTILES}
    return result | (_against(instance, state, mix, goodput.Goals(ttft, tpot)) if ttft or tpot else {})


def _against(instance: Instance, state: State, mix: Mix, goals: goodput.Goals) -> dict[str, Any]:
    """Shares that meet the limits, and what they make of the rate."""
    shares = {}
    if goals.ttft is not None:
        shares["ttft"] = instance.ttft_met(goals.ttft, state, mix)
    if goals.tpot is not None:
        shares["tpot"] = instance.tpot_met(goals.tpot, state, mix)
    both = goodput.attainment(instance, state, mix, goals)
    most = goodput.capacity(instance, mix, goals)
    devices = int(instance.clock.estimator.par.devices)
    return {
        "met_share": shares, "attainment": both, "goodput_per_s": state.rate * both,
        "goodput_per_s_per_device": state.rate * both / devices,
        "capacity_per_s": most, "capacity_per_s_per_device": most / devices,
    }  # fmt: skip


def _fixed_shape(e: Estimator, isl: int, osl: int) -> tuple[Mix, Instance]:
    """An instance that serves requests of one shape."""
    mix = Mix(np.array([float(isl)]), np.array([float(osl)]), np.ones(1))
    per_token = (
        float(memory.cache_bytes(e.model, e.par, e.formats, 1, mix.context, e.engine.block_tokens)) / mix.context
    )
    return mix, Instance(StepClock(e, mix.context), "colocated", max(e.kv_free, per_token) / per_token * int(e.par.dp))


@lru_cache(maxsize=1024)
def _loop_instance(
    model: str, hardware: str, isl: int, osl: int, options: tuple[tuple[str, Any], ...]
) -> tuple[Mix, Instance]:
    return _fixed_shape(Estimator(model, hardware, **dict(options)), isl, osl)


calibration.on_change(_loop_instance.cache_clear)


def closed_loop_step(model: str, hardware: str, isl: int, osl: int, concurrency: float, **instance: Any) -> float:
    """Mean seconds between a request's tokens with `concurrency` clients in a loop."""
    mix, served = _loop_instance(model, hardware, isl, osl, tuple(sorted(instance.items())))
    return served.state(_closed_loop_rate(served, mix, concurrency), mix).step


def _mean_ttft(instance: Instance, s: State, mix: Mix) -> float:
    """Own steps, half a running one, and the mean wait of M/G/1 (Pollaczek and Khinchine)."""
    wait = s.rate * mix.mean(s.work**2) / (2 * (1 - s.utilisation))
    return wait + s.pure_step * 0.5 * min(s.batch, 1.0) + mix.mean(instance.own(s, mix))


def _residence(instance: Instance, s: State, mix: Mix) -> float:
    """Seconds a request spends in the instance."""
    return _mean_ttft(instance, s, mix) + mix.mean(mix.steps) * s.step


def _closed_loop_rate(instance: Instance, mix: Mix, concurrency: float) -> float:
    """Rate at which `concurrency` requests are in flight; what does not fit in memory waits outside."""
    alone = concurrency / _residence(instance, instance.state(1e-9, mix), mix)
    # Requests stay longest when they are most, so the rate without company is an upper limit.
    low, high = 0.0, min(alone, goodput.highest_rate(instance, mix))
    for _ in range(22):
        middle = (low + high) / 2
        s = instance.state(middle, mix)
        crowded = not s.feasible or middle * _residence(instance, s, mix) >= concurrency
        low, high = (low, middle) if crowded else (middle, high)
    return low
