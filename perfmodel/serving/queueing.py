"""Percentiles of TTFT and TPOT under load, in closed form.

Prefill work queues for the device as in M/G/1; decoding sequences share its steps. With prefill utilisation
u = rate E[S], a decode step lasts tau(b)/(1 - u) on average, the batch b follows from Little's law, and a request's
TPOT varies with the prefill work that happens to arrive while it decodes (a compound Poisson sum). The forms are
checked against the event simulation in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from perfmodel.serving.clock import StepClock

_MOST_BUSY = 0.98
_SPARE_SIGMAS = 2.0  # cached bytes may exceed their mean by this many standard deviations


@dataclass(frozen=True, eq=False)
class Mix:
    """Joint lengths of the requests one instance sees, with weights that sum to one."""

    input: np.ndarray
    output: np.ndarray
    weight: np.ndarray

    def mean(self, values: np.ndarray) -> float:
        return float(np.dot(self.weight, values))

    @property
    def steps(self) -> np.ndarray:
        """Decode steps of each request."""
        return self.output - 1

    @property
    def context(self) -> float:
        """Mean context of a decoding sequence, over its steps."""
        total = self.mean(self.steps)
        if total == 0:
            return self.mean(self.input)
        return self.mean(self.steps * (self.input + (self.output + 1) / 2)) / total


@dataclass(frozen=True)
class State:
    """Steady state of one instance at a request rate. `feasible` is False beyond saturation or memory."""

    feasible: bool
    reason: str
    rate: float
    utilisation: float
    """Share of time prefill takes."""
    batch: float
    """Mean decoding sequences."""
    step: float
    """Mean seconds between a sequence's tokens, prefill interruptions included."""
    pure_step: float
    """The same without interruptions."""
    work: np.ndarray
    """Prefill seconds of each request of the mix."""
    kv_share: float
    """Cached bytes (mean + 2 sigma) over the free bytes."""


@dataclass(frozen=True, eq=False)
class Instance:
    """One serving instance: its clock, its role, and how many sequences' tokens its memory holds."""

    clock: StepClock
    role: str
    kv_tokens: float
    """Cached tokens that fit, per instance."""
    handoff: float = 0.0
    """Seconds per input token to move the cache to a decode instance (0: colocated)."""

    def state(self, rate: float, mix: Mix) -> State:
        """Steady state at `rate` requests per second. Little's law is solved by bisection on the batch."""
        context = mix.context
        tau = lambda b: self.clock.decode(b, b * context)  # noqa: E731
        none = np.zeros(mix.input.shape)
        if self.role == "prefill":
            work = self.clock.prefill_work(mix.input, 0.0, 0.0)
            u = rate * mix.mean(work)
            held = self._held(rate, mix, work, np.zeros_like(work))
            return self._judge(rate, u, 0.0, 0.0, 0.0, work, held)
        steps = mix.mean(mix.steps)
        work = none
        batch = u = 0.0
        # The work a prefill adds depends weakly on the batch it joins: two rounds settle it.
        for _ in range(3):
            if self.role == "colocated":
                work = self.clock.prefill_work(mix.input, batch, batch * context)
                u = rate * mix.mean(work)
            if u >= _MOST_BUSY:
                return self._judge(rate, u, math.inf, math.inf, math.inf, work, math.inf)
            batch = self._little(rate * steps / (1 - u), tau)
            if math.isinf(batch):
                return self._judge(rate, u, math.inf, math.inf, math.inf, work, math.inf)
        pure = tau(max(batch, 1.0))
        step = pure / (1 - u)
        held = self._held(rate, mix, work, mix.steps * step)
        return self._judge(rate, u, batch, step, pure, work, held)

    def _little(self, tokens_per_s: float, tau: Callable[[float], float]) -> float:
        """Smallest b with b = tokens_per_s * tau(b); infinite when the instance saturates."""
        low, high = 0.0, float(self.clock.max_batch)
        if tokens_per_s * tau(high) > high:
            return math.inf
        for _ in range(40):
            mid = (low + high) / 2
            # Below one sequence a step takes as long as with one.
            low, high = (mid, high) if tokens_per_s * tau(max(mid, 1.0)) > mid else (low, mid)
        return high

    def _held(self, rate: float, mix: Mix, work: np.ndarray, decoding: np.ndarray) -> float:
        """Cached tokens held: mean + 2 sigma of an M/G/infinity population, over what fits."""
        life = work + decoding
        tokens = mix.input + mix.output / 2
        mean = rate * mix.mean(life * tokens)
        variance = rate * mix.mean(life * tokens**2)
        return (mean + _SPARE_SIGMAS * math.sqrt(variance)) / self.kv_tokens

    def _judge(
        self, rate: float, u: float, batch: float, step: float, pure: float, work: np.ndarray, held: float
    ) -> State:
        longest = float(np.max(work)) if work.size else 0.0
        reason = ""
        if u >= _MOST_BUSY:
            reason = "prefill saturates the device"
        elif math.isinf(batch) or batch > self.clock.max_batch:
            reason = "decode saturates the device"
        elif held > 1:
            reason = "KV cache exceeds memory"
        return State(not reason and math.isfinite(longest), reason, rate, u, batch, step, pure, work, held)

    def ttft_met(self, limit: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Share of requests whose first token comes within `limit` seconds.

        Wait: zero with probability 1 - u, else exponential with the Pollaczek-Khinchine mean, corrected for bursts
        by (ca2 + cs2)/(1 + cs2) (Allen-Cunneen); then half a running step, then the request's own steps.
        """
        left = limit - self.own(s)
        if s.utilisation <= 0:
            return mix.mean((left >= 0).astype(float))
        wait = self.mean_wait(s, mix, dispersion)
        tail = np.where(left < 0, 1.0, s.utilisation * np.exp(-s.utilisation * np.maximum(left, 0) / max(wait, 1e-12)))
        return mix.mean(1 - tail)

    def mean_wait(self, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Mean seconds a prefill waits for others."""
        first, second = mix.mean(s.work), mix.mean(s.work**2)
        spread = max(second / first**2 - 1, 0.0)
        burst = (dispersion + spread) / (1 + spread)
        return s.rate * second / (2 * (1 - s.utilisation)) * burst

    def own(self, s: State) -> np.ndarray:
        """Seconds from being next in line to the first token [request of the mix]."""
        if self.role == "decode":
            return np.zeros_like(s.work)
        # Half a running step, if one runs, then its own steps: `work` beyond the decode steps that they carry along,
        # or all of it where hardly anything decodes.
        return s.work + s.pure_step * (0.5 * min(s.batch, 1.0) + (s.batch >= 1))

    def tpot_met(self, limit: float, s: State, mix: Mix) -> float:
        """Share of requests (with two tokens or more) whose TPOT is within `limit` seconds.

        A request exposed to arrivals for D seconds meets prefill work with mean u D and variance rate E[S^2] D; the batch
        it sees varies like a Poisson count. Both enter a gamma law matched in mean and variance.
        """
        counted = mix.steps > 0
        if self.role == "prefill" or not np.any(counted):
            return 1.0
        steps = np.maximum(mix.steps, 1)
        decoding = steps * s.step
        moved = self.handoff * mix.input / steps
        # What arrived during the request's own prefill step is served right after it, while it already decodes.
        exposed = decoding + s.work + s.pure_step * (s.utilisation > 0)
        slope = self._slope(s.batch, mix.context)
        variance = s.rate * mix.mean(s.work**2) * exposed / steps**2 + max(slope, 0.0) ** 2 * s.batch
        mean = s.utilisation * exposed / steps
        room = limit - s.pure_step - moved
        met = _gamma_cdf(room, mean, variance)
        weight = mix.weight * counted
        return float(np.dot(weight, met) / weight.sum())

    def _slope(self, batch: float, context: float) -> float:
        """Seconds one more sequence adds to a step, over a fifth of the batch so that no tile's edge stands for all."""
        if batch < 1:
            return 0.0
        around = max(0.2 * batch, 1.0)
        low, high = max(batch - around, 1.0), batch + around
        return (self.clock.decode(high, high * context) - self.clock.decode(low, low * context)) / (high - low)

    def ttft_quantile(self, p: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Seconds within which a share p of requests have their first token."""
        return _invert(lambda t: self.ttft_met(t, s, mix, dispersion), p, float(np.max(self.own(s))) + 1e-3)

    def tpot_quantile(self, p: float, s: State, mix: Mix) -> float:
        """Seconds within which a share p of requests have their TPOT."""
        if self.role == "prefill" or not np.any(mix.steps > 0):
            return 0.0
        return _invert(lambda t: self.tpot_met(t, s, mix), p, s.step + self.handoff * float(np.max(mix.input)))


def _gamma_cdf(x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """P(Gamma <= x) by the Wilson-Hilferty cube-root normal approximation (PNAS 17, 1931)."""
    x, mean, variance = np.broadcast_arrays(x, mean, variance)
    certain = (variance <= 1e-18) | (mean <= 1e-12)
    shape = np.where(certain, 1.0, mean**2 / np.maximum(variance, 1e-18))
    ratio = np.where(certain, 1.0, np.maximum(x, 0.0) / np.where(mean > 0, mean, 1.0))
    z = (np.cbrt(ratio) - (1 - 1 / (9 * shape))) * 3 * np.sqrt(shape)
    normal = 0.5 * (1 + _erf(z / math.sqrt(2)))
    # With few expected interruptions the law has an atom at zero, which the normal form misses.
    normal = np.where(shape < 0.2, np.maximum(normal, 1 - np.minimum(shape * 3, 1.0)), normal)
    spread = np.sqrt(np.maximum(variance, 0.0))
    sure = np.where(
        variance <= 1e-18,
        (x >= mean).astype(float),
        0.5 * (1 + _erf((x - mean) / np.maximum(spread, 1e-12) / math.sqrt(2))),
    )
    return np.where(x < 0, 0.0, np.where(certain, sure, normal))


def _erf(x: np.ndarray) -> np.ndarray:
    """Error function to 1.5e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26)."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.sign(x) * (1 - poly * np.exp(-x * x))


def _invert(share: Callable[[float], float], p: float, start: float) -> float:
    """Smallest t with share(t) >= p, by doubling and bisection."""
    low, high = 0.0, max(start, 1e-6)
    for _ in range(60):
        if share(high) >= p:
            break
        low, high = high, high * 2
    else:
        return math.inf
    for _ in range(50):
        mid = (low + high) / 2
        low, high = (low, mid) if share(mid) >= p else (mid, high)
    return high
