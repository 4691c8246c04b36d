"""Percentiles of TTFT and TPOT under load, in closed form.

Prefill takes a share u = rate E[S] of the time, so a decode step lasts tau(b)/(1 - u) on average and the batch b follows from
Little's law. How long a request waits for the running step and for those it shares its own step with is the stationary law
of the step cycle (cycle.py); its TPOT is the decode step at the batch it sees plus what prefills add while it decodes.
docs/serving.md holds both against the event simulation and states where they are valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from perfmodel.serving.clock import StepClock
from perfmodel.serving.latency import Law, law

_MOST_BUSY = 0.98
_SPARE_SIGMAS = 2.0  # cached bytes may exceed their mean by this many standard deviations
_MOST_FULL = 0.04
"""Share of time in which the cache may be full: towards the 5 % that a 95th percentile leaves, waits for memory decide it."""
MOST_DISPERSED = 20.0
"""Dispersion up to which the forms hold: beyond, a few bursts decide, not their variance."""
_SAME_BATCH = 1e-6


@dataclass(frozen=True, eq=False)
class Mix:
    """Joint lengths of the requests one instance sees, with weights that sum to one."""

    input: np.ndarray
    output: np.ndarray
    weight: np.ndarray
    cached: np.ndarray | None = None
    """Tokens of the input that the prefix cache holds: attended, not computed. None: none."""
    images: np.ndarray | None = None
    """Images of each request, whose tokens the input holds. None: none."""

    def mean(self, values: np.ndarray) -> float:
        return float(np.dot(self.weight, values))

    @property
    def steps(self) -> np.ndarray:
        """Decode steps of each request."""
        return self.output - 1

    @property
    def new(self) -> np.ndarray:
        """Tokens of each input that must be computed."""
        return self.input if self.cached is None else self.input - self.cached

    @property
    def contexts(self) -> np.ndarray:
        """Mean context of each request while it decodes."""
        return self.input + (self.output + 1) / 2

    @property
    def context(self) -> float:
        """Mean context of a decoding sequence, over its steps."""
        total = self.mean(self.steps)
        if total == 0:
            return self.mean(self.input)
        return self.mean(self.steps * self.contexts) / total

    @staticmethod
    def of(input_: np.ndarray, output: np.ndarray, points: int = 600) -> Mix:
        """A mix of at most about `points` points that keeps the means: requests of like input and output are averaged."""
        rows = max(int(math.sqrt(6 * points)), 1)
        order = np.argsort(input_, kind="stable")
        cells = [
            cell for row in np.array_split(order, min(rows, order.size))
            for cell in np.array_split(row[np.argsort(output[row], kind="stable")], max(points // rows, 1)) if cell.size
        ]  # fmt: skip
        means = np.array([[input_[c].mean(), output[c].mean(), c.size / order.size] for c in cells])
        return Mix(means[:, 0].copy(), means[:, 1].copy(), means[:, 2].copy())


@dataclass(frozen=True, eq=False)
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
    encoder: StepClock | None = None
    """Clock of a vision tower that the instance runs itself, before the prompt that its images are in."""

    def work(self, mix: Mix, batch: float) -> np.ndarray:
        """Prefill seconds of each request beside `batch` decoding sequences, its images encoded first."""
        found = _alone(self.clock, mix) if batch == 0 else _beside(self.clock, mix, batch)
        if self.encoder is None or mix.images is None:
            return found
        return found + self.encoder.prefill_work(mix.images, 0.0, 0.0)

    def state(self, rate: float, mix: Mix) -> State:
        """Steady state at `rate` requests per second. Little's law is solved by bisection on the batch."""
        context = mix.context
        tau = lambda b: self.clock.decode(b, b * context)  # noqa: E731
        none = np.zeros(mix.input.shape)
        if self.role == "prefill":
            work = self.work(mix, 0.0)
            u = rate * mix.mean(work)
            held = self._held(rate, mix, work, np.zeros_like(work))
            return self._judge(rate, u, 0.0, 0.0, 0.0, work, held)
        steps = mix.mean(mix.steps)
        work = none
        batch = u = 0.0
        # The work a prefill adds depends weakly on the batch it joins: two rounds settle it.
        for _ in range(3):
            if self.role == "colocated":
                work = self.work(mix, batch)
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
        # Below one sequence a step takes as long as with one.
        few = tokens_per_s * tau(1.0)
        if few <= 1:
            return few
        low = 1.0
        while high - low > _SAME_BATCH * high:
            mid = (low + high) / 2
            low, high = (mid, high) if tokens_per_s * tau(mid) > mid else (low, mid)
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

    def law(self, s: State, mix: Mix, dispersion: float = 1.0) -> Law:
        """What the percentiles of a state follow from."""
        return law(self, s, mix, dispersion)

    def own(self, s: State, mix: Mix | None = None) -> np.ndarray:
        """Seconds of each request's own prefill steps, the decoding they carry along included."""
        if self.role == "decode":
            return np.zeros_like(s.work)
        chunks = np.ones_like(s.work) if mix is None else self.chunks(s.batch, mix)
        return s.work + s.pure_step * min(s.batch, 1.0) * chunks

    def chunks(self, batch: float, mix: Mix) -> np.ndarray:
        """Steps that each prompt takes."""
        return np.maximum(np.ceil(mix.new / max(self.clock.chunk - batch, 1.0)), 1.0)

    def refused(self, s: State, mix: Mix, dispersion: float = 1.0) -> str:
        """Why these forms do not hold at a state (replay decides there); empty where they do."""
        if not s.feasible:
            return s.reason
        if dispersion > MOST_DISPERSED:
            return f"arrivals of dispersion {dispersion:.3g}: beyond {MOST_DISPERSED:g} bursts decide, not their variance"
        found = self.law(s, mix, dispersion)
        if found.busy > _MOST_BUSY - 0.03:
            return "prefill is within 5 % of saturation"
        if found.full > _MOST_FULL:
            return f"the cache is full {found.full:.0%} of the time: requests wait for memory or are preempted"
        if found.crowded > self.clock.max_batch:
            return "bursts fill the batch: requests wait for a slot"
        return ""

    def ttft_met(self, limit: float | np.ndarray, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Share of requests whose first token comes within `limit` seconds (one, or one per request of the mix)."""
        return mix.mean(self.ttft_shares(limit, s, mix, dispersion))

    def ttft_shares(self, limit: float | np.ndarray, s: State, mix: Mix, dispersion: float = 1.0) -> np.ndarray:
        """P(first token within `limit` seconds) of each request of the mix."""
        limits = np.broadcast_to(np.asarray(limit, float), mix.input.shape)
        if self.role == "decode":
            return (limits >= 0).astype(float)
        if s.utilisation >= 1 or math.isinf(s.batch):
            return np.zeros(mix.input.shape)
        waiting = self.law(s, mix, dispersion).waiting
        assert waiting is not None
        return waiting.within(limits)

    def mean_ttft(self, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Mean seconds to the first token."""
        waiting = self.law(s, mix, dispersion).waiting
        return 0.0 if waiting is None else waiting.mean

    def tpot_met(self, limit: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Share of requests (with two tokens or more) whose TPOT is within `limit` seconds."""
        weight = mix.weight * (mix.steps > 0)
        if self.role == "prefill" or not weight.any():
            return 1.0
        return float(np.dot(weight, self.tpot_shares(limit, s, mix, dispersion)) / weight.sum())

    def tpot_shares(self, limit: float | np.ndarray, s: State, mix: Mix, dispersion: float = 1.0) -> np.ndarray:
        """P(TPOT within `limit` seconds) of each request of the mix; 1 where there is only one token."""
        if self.role == "prefill":
            return np.ones(mix.input.shape)
        if s.utilisation >= 1 or math.isinf(s.batch):
            return (mix.steps <= 0).astype(float)
        met = self.law(s, mix, dispersion).decoding.within(limit)
        return np.where(mix.steps > 0, met, 1.0)

    def slope(self, batch: float, context: float) -> float:
        """Seconds one more sequence adds to a step, over a fifth of the batch so that no tile's edge stands for all."""
        if batch < 1:
            return 0.0
        around = max(0.2 * batch, 1.0)
        low, high = max(batch - around, 1.0), batch + around
        return (self.clock.decode(high, high * context) - self.clock.decode(low, low * context)) / (high - low)

    def ttft_quantile(self, p: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Seconds within which a share p of requests have their first token."""
        if self.role == "decode":
            return 0.0
        return invert(lambda t: self.ttft_met(t, s, mix, dispersion), p, self.mean_ttft(s, mix, dispersion))

    def tpot_quantile(self, p: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Seconds within which a share p of requests have their TPOT."""
        if self.role == "prefill" or not np.any(mix.steps > 0):
            return 0.0
        return invert(lambda t: self.tpot_met(t, s, mix, dispersion), p, s.step + self.handoff * float(np.max(mix.input)))


def _beside(clock: StepClock, mix: Mix, batch: float) -> np.ndarray:
    return clock.prefill_work(mix.input, batch, batch * mix.context, 0.0 if mix.cached is None else mix.cached)


@lru_cache(maxsize=256)
def _alone(clock: StepClock, mix: Mix) -> np.ndarray:
    """Prefill seconds on an idle engine: every state of a mix starts from them."""
    work = _beside(clock, mix, 0.0)
    work.flags.writeable = False
    return work


def invert(share: Callable[[float], float], p: float, start: float) -> float:
    """Smallest t with share(t) >= p, by doubling and bisection."""
    low, high = 0.0, max(start, 1e-6)
    for _ in range(60):
        if share(high) >= p:
            break
        low, high = high, high * 2
    else:
        return math.inf
    for _ in range(28):
        mid = (low + high) / 2
        low, high = (low, mid) if share(mid) >= p else (mid, high)
    return high
