"""What happens where the cache fills up: requests wait for memory, and running ones are dropped and computed again.

Cached tokens X are those of an M/G/infinity population (mean m by Little's law), made wider by two things. Sequences slow
each other down, so an excess lives longer: 1/(1 - eta), eta = d ln step / d ln batch. And decoding pauses while a prompt
prefills, so a prompt that adds itself also delays departures: each brings J = 1 + rate S/(1 - u) of itself. Near its mean X
is a diffusion with linear noise, whose stationary law is the gamma law of that mean and variance; at the limit M it is
held there, and what waits outside is exponential (the argument of Halfin and Whitt, Operations Research 29, 1981). X can
cross M only by growing, one token per sequence and step, so preemptions follow from the density of X at M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from perfmodel import memory
from perfmodel.estimator import Estimator
from perfmodel.kernels.transfer import host_copy_seconds
from perfmodel.serving.clock import StepClock

if TYPE_CHECKING:
    from perfmodel.serving.queueing import Instance, Mix, State

_ROUNDS = 40
_MOST_ELASTIC = 0.95


@dataclass(frozen=True)
class Pressure:
    """Steady state of an instance whose cache holds `limit` tokens."""

    state: State
    """With the repeated work; infeasible where that saturates the device."""
    held: float
    """Mean cached tokens there would be without the limit."""
    spread: float
    """Their standard deviation."""
    full: float
    """Share of time in which requests wait because the cache is full."""
    preempted: float
    """Preemptions per request."""
    wait: float
    """Mean seconds a request waits for memory, over all requests."""
    again: float
    """Mean seconds of work per request that preemptions repeat."""

    @property
    def feasible(self) -> bool:
        """Whether the queue for memory has an end."""
        return self.state.feasible and math.isfinite(self.wait)


def swap_seconds(e: Estimator, tokens: np.ndarray) -> np.ndarray:
    """Seconds to move caches of `tokens` tokens each to host memory and back [sequence], every device its shard."""
    shard = memory.cache_bytes(e.model, replace(e.par, dp=1), e.formats, 1, tokens, e.engine.block_tokens)
    return np.asarray(2 * host_copy_seconds(e.machine, shard))


def pressure(
    instance: Instance, rate: float, mix: Mix, mode: Literal["recompute", "swap"] = "recompute"
) -> Pressure:
    """Waits and preemptions at `rate` requests per second, with what they cost fed back into the load.

    Per request, with output o, input i and G, g the law of X at the limit M:
        full = r/(G + r), r = g v M/(m (M - m));  preempted = E[o] (full/E[i] + (1 - full) g/G).
    A cache that is full has a gap below the next prompt, so its density at M is 1/E[i]. The youngest is dropped: it has
    produced little, and its prompt is computed again (or swapped out and in).
    """
    clock, limit = instance.clock, instance.kv_tokens
    roomy = replace(instance, kv_tokens=math.inf)
    times, found = 0.0, None
    for _ in range(_ROUNDS):
        repeated = _Repeating(clock, times, swaps=mode == "swap")
        state = replace(roomy, clock=repeated).state(rate, mix)
        if not state.feasible:
            break
        found = _law(clock, state, rate, mix, limit)
        settled = abs(found.preempted - times) < 1e-4 * (1 + times)
        times = (times + found.preempted) / 2
        if settled:
            break
    if found is None or not state.feasible:
        most = mix.mean(mix.output) / mix.mean(mix.input)
        return Pressure(state, math.inf, math.inf, 1.0, most, math.inf, math.inf)
    once = repeated.once(mix.input, state.batch, state.batch * mix.context)
    return replace(found, again=found.preempted * mix.mean(once))


def _law(clock: StepClock, s: State, rate: float, mix: Mix, limit: float) -> Pressure:
    life = s.work + mix.steps * s.step
    mean, variance = population(clock, rate, mix, life, s.batch, rate * s.work / (1 - s.utilisation))
    # The pull back to the mean weakens with the batch, so the mean of X lies above the point of balance.
    mean += elasticity(clock, s.batch, mix.context) * variance / mean
    prompt, answer = mix.mean(mix.input), mix.mean(mix.output)
    if limit <= mean:
        return Pressure(s, mean, math.sqrt(variance), 1.0, answer / prompt, math.inf, 0.0)
    density, below = _gamma(limit, mean, variance)
    full, outside = fullness(mean, variance, limit)
    preempted = answer * (full / prompt + (1 - full) * density / below)
    each = mean / (rate * mix.mean(life))
    return Pressure(s, mean, math.sqrt(variance), full, preempted, full * outside / each / rate, 0.0)


def population(
    clock: StepClock, rate: float, mix: Mix, life: np.ndarray, batch: float, stalled: np.ndarray | float, spread: float = 1.0
) -> tuple[float, float]:
    """Mean and variance of the cached tokens of requests that stay `life` seconds each.

    stalled: prefills that come while a request's own pauses decoding, per request. spread: of the population through bursts,
    over a Poisson one's.
    """
    # A sequence grows from its prompt to prompt and answer: the mean square of a uniform growth.
    square = mix.input**2 + mix.input * mix.output + mix.output**2 / 3
    stalls = (mix.mean((1 + stalled) ** 2 * np.ones(life.shape)) + 1) / 2
    variance = rate * mix.mean(life * square) * spread * stalls / (1 - elasticity(clock, batch, mix.context))
    return rate * mix.mean(life * (mix.input + mix.output / 2)), variance


def fullness(mean: float, variance: float, limit: float) -> tuple[float, float]:
    """Share of time in which requests find a cache of `limit` tokens full, and mean tokens that wait meanwhile."""
    if limit <= mean:
        return 1.0, math.inf
    density, below = _gamma(limit, mean, variance)
    outside = variance * limit / (mean * (limit - mean))
    return density * outside / (below + density * outside), outside


def elasticity(clock: StepClock, batch: float, context: float) -> float:
    """d ln step / d ln batch; 0 where nothing decodes."""
    if not batch:
        return 0.0
    b = max(batch, 1.0)
    low, high = max(0.9 * b, 1.0), 1.1 * b + 1
    rise = (clock.decode(high, high * context) - clock.decode(low, low * context)) / (high - low)
    return float(np.clip(b * rise / clock.decode(b, b * context), 0.0, _MOST_ELASTIC))


def _gamma(x: float, mean: float, variance: float) -> tuple[float, float]:
    """Density and distribution function of a gamma law at x."""
    from scipy.special import gammainc, gammaln

    shape, scale = mean**2 / variance, variance / mean
    log_density = (shape - 1) * math.log(x / scale) - x / scale - float(gammaln(shape))
    return math.exp(log_density) / scale, float(gammainc(shape, x / scale))


class _Repeating(StepClock):
    """The same clock, with prefill done `times` more per request, or a swap in its place."""

    def __init__(self, clock: StepClock, times: float, *, swaps: bool) -> None:
        self._clock, self._times, self._swaps = clock, times, swaps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clock, name)

    def host(self, sequences: float) -> float:
        return self._clock.host(sequences)

    def decode(self, batch: float, total_context: float) -> float:
        return self._clock.decode(batch, total_context)

    def step(self, batch: int, total_context: float, chunks: list[tuple[float, float]]) -> float:
        return self._clock.step(batch, total_context, chunks)

    def prefill_work(
        self, inputs: np.ndarray, batch: float, total_context: float, cached: np.ndarray | float = 0.0
    ) -> np.ndarray:
        work = self._clock.prefill_work(inputs, batch, total_context, cached)
        return work + self._times * self.once(inputs, batch, total_context)

    def once(self, inputs: np.ndarray, batch: float, total_context: float) -> np.ndarray:
        """Seconds that one preemption of a request with each input costs."""
        if self._swaps:
            return swap_seconds(self._clock.estimator, inputs)
        return self._clock.prefill_work(inputs, batch, total_context)
