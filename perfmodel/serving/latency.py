"""The laws of one steady state together: waits, decode steps, and the batch that both follow from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from perfmodel.serving import renewal
from perfmodel.serving.cycle import DOUBLINGS, Cycle, Load, solve
from perfmodel.serving.preemption import fullness, population
from perfmodel.serving.renewal import Renewal
from perfmodel.serving.waiting import Waiting

if TYPE_CHECKING:
    from perfmodel.serving.clock import StepClock
    from perfmodel.serving.queueing import Instance, Mix, State

_SETTLED = 0.1  # change of the batch below which the cycle need not be solved again
_ROUNDS = 2
_OVERLAP = 0.5  # a population varies as if this share of a burst lived at the same time: E[min(D, D')]/E[D] of like requests
_SIGMAS = 2.0
_SHORT = 0.5  # gaps below this share of a step with one prompt count as short: their order is all that matters


@dataclass(frozen=True, eq=False)
class Decoding:
    """TPOT of each request of a mix: a certain part, what prefills add, and how the batch varies."""

    floor: np.ndarray
    """Seconds per token of a request that decodes alone, hand-off included."""
    beside: np.ndarray
    crowd: np.ndarray
    """Mean and variance of what the sequences beside it add, averaged over the request's steps (a gamma law)."""
    single: float
    """Variance of one undisturbed step, from the batch and its contexts."""
    free: np.ndarray
    """Probability that no prefill interrupts the request."""
    mean: np.ndarray
    variance: np.ndarray
    """Of the seconds per token that prefills add to the requests they interrupt."""
    most: float
    """The longest step less the decode step: no request is slowed by more per token."""

    @property
    def tpot(self) -> np.ndarray:
        """Mean seconds per token."""
        return self.floor + self.beside + (1 - self.free) * self.mean

    def within(self, limit: float | np.ndarray) -> np.ndarray:
        """P(seconds per token <= limit) of each request."""
        room = limit - self.floor
        calm = gamma_cdf(room, self.beside, self.crowd)
        # The least that others add: the batch rarely falls further.
        least = np.maximum(self.beside - _SIGMAS * np.sqrt(self.crowd), 0.0)
        over, most = self.beside - least, self.beside - least + self.most
        hit = beta_cdf(room - least, over + self.mean, self.crowd + self.variance, most)
        return self.free * calm + (1 - self.free) * hit


@dataclass(frozen=True, eq=False)
class Law:
    """Everything the percentiles of one state follow from."""

    batch: float
    """Mean decoding sequences, bursts included."""
    crowded: float
    """Batch that is rarely exceeded (mean + 2 sigma)."""
    full: float
    """Share of time in which requests find no room in the cache."""
    busy: float
    """Share of time prefill takes when requests share steps."""
    cycle: Cycle | None
    waiting: Waiting | None
    decoding: Decoding


@lru_cache(maxsize=128)
def law(instance: Instance, s: State, mix: Mix, dispersion: float) -> Law:
    """Laws of a feasible state with arrivals of a squared coefficient of variation `dispersion`."""
    dispersion = max(dispersion, renewal.MOST_REGULAR)
    batch = s.batch
    for _ in range(_ROUNDS):
        cycle = arrivals = None
        if instance.role != "decode":
            load = _load(instance, s.rate, mix, batch, dispersion)
            arrivals = renewal.gamma(s.rate, dispersion, _SHORT * float(load.seconds(np.array(load.weight @ load.work))))
            cycle = solve(load, arrivals)
        else:
            arrivals = renewal.gamma(s.rate, dispersion, 0.5 * s.pure_step)
        decoding = _decoding(instance, s, mix, batch, dispersion, cycle, arrivals)
        if instance.role == "prefill":
            break
        found = s.rate * mix.mean(mix.steps * (decoding.tpot - _moved(instance, mix)))
        found = min(found, 2 * instance.clock.max_batch)
        settled = abs(found - batch) <= _SETTLED * max(batch, 1.0)
        batch = found
        if settled:
            break
    waiting = None
    if cycle is not None:
        alone = instance.work(mix, 0.0)
        chunks = instance.chunks(batch, mix)
        waiting = Waiting(cycle, cycle.load.work + (cycle.load.overhead) * chunks, alone)
    spread = 1 + (dispersion - 1) * _OVERLAP
    busy = 0.0 if cycle is None else s.rate * float(cycle.load.weight @ cycle.load.work)
    stalled = s.rate * s.work / max(1 - busy, 1e-6) if instance.role == "colocated" else 0.0
    held = population(instance.clock, s.rate, mix, s.work + mix.steps * decoding.tpot, batch, stalled, spread)
    return Law(
        batch, batch + _SIGMAS * math.sqrt(batch * spread), fullness(*held, instance.kv_tokens)[0],
        busy, cycle, waiting, decoding,
    )  # fmt: skip


def _moved(instance: Instance, mix: Mix) -> np.ndarray:
    """Hand-off seconds per token."""
    return instance.handoff * mix.input / np.maximum(mix.steps, 1)


def _load(instance: Instance, rate: float, mix: Mix, batch: float, dispersion: float) -> Load:
    clock = instance.clock
    tau, context, decoding = 0.0, 0.0, 0
    idle = 1.0
    if instance.role == "colocated":
        beside = max(batch, 1.0)
        context = beside * mix.context
        tau, decoding = clock.decode(beside, context), min(round(beside), clock.max_batch)
        spread = 1 + (dispersion - 1) * _OVERLAP
        # Chance that none decodes: Poisson, or negative binomial of the same mean and a larger variance.
        idle = math.exp(-batch) if spread <= 1 else spread ** (-batch / (spread - 1))
    work = instance.work(mix, float(decoding))
    new = mix.new
    chunks = instance.chunks(float(decoding), mix)
    room = max(clock.chunk - decoding, 1.0)
    tokens = max(min(mix.mean(new), clock.chunk / 4), 1.0)
    knots, extra, bend = _line(clock, decoding, tokens)
    last = new - (chunks - 1) * room
    own = np.maximum(work - extra * chunks - np.interp(last, knots, bend), 1e-6 + 0.05 * work)
    inside = mix.weight * (new <= room)
    per_token = float(inside @ own / (inside @ new)) if inside.any() else mix.mean(own) / mix.mean(new)
    full = room * mix.mean(own) / max(mix.mean(new), 1e-9)
    return Load(rate, own, mix.weight, tau, extra, full, idle, knots * per_token, bend)


@lru_cache(maxsize=512)
def _line(clock: StepClock, decoding: int, tokens: float) -> tuple[np.ndarray, float, np.ndarray]:
    return clock.prefill_line(decoding, tokens)


def _decoding(
    instance: Instance, s: State, mix: Mix, batch: float, dispersion: float, cycle: Cycle | None, arrivals: Renewal
) -> Decoding:
    clock, n = instance.clock, np.maximum(mix.steps, 1.0)
    none = np.zeros(n.shape)
    if instance.role == "prefill":
        return Decoding(none, none, none, 0.0, np.ones(n.shape), none, none, 0.0)
    life = n * max(s.step, 1e-9)
    # A request decodes beside the mean batch, itself, and those of its own burst while both last.
    order = np.argsort(life)
    weight, sorted_life = mix.weight[order], life[order]
    below = np.cumsum(weight * sorted_life)
    both = np.empty(n.shape)
    both[order] = below + sorted_life * (1 - np.cumsum(weight))
    # Steps that lengthen with the batch keep an excess longer: the population varies by batch/slack instead of batch.
    each = instance.slope(max(batch, 1.0), mix.context)
    slack = 1 - min(batch * each / max(s.pure_step, 1e-12), 0.9)
    company = 2 * arrivals.excess(life / 2) * both / life
    # Beside prefill, a burst's sequences also last through the prefills of the rest of it.
    if cycle is not None:
        company = (company + _mates(cycle.load) * both / life) / slack
    seen = batch + 1 / slack + company
    seen = np.minimum(seen, clock.max_batch)
    count = np.arange(len(clock.decode_base))
    slope = np.interp(seen, count, clock.decode_slope)
    alone = np.interp(seen, count, clock.decode_base)
    tau = alone + slope * ((seen - 1) * mix.context + mix.contexts)
    token = clock.decode_slope[min(max(round(batch), 1), clock.max_batch)]
    square = mix.mean(mix.steps * mix.contexts**2) / max(mix.mean(mix.steps), 1e-9) - mix.context**2
    turns = np.maximum(life / max(mix.mean(life) / slack, 1e-12), 1e-6)
    spread = 1 + (dispersion - 1) * _OVERLAP
    single = batch * (each**2 * spread + token**2 * square) / slack
    crowd = single * 2 / turns**2 * (turns - 1 + np.exp(-turns))
    floor = clock.decode_base[1] + clock.decode_slope[1] * mix.contexts + _moved(instance, mix)
    beside = np.maximum(tau + _moved(instance, mix) - floor, 0.0)
    if cycle is None:
        # A delivered sequence joins at the end of the running step.
        joining = beside + tau / 2 / n
        return Decoding(floor, joining, crowd + tau**2 / 12 / n**2, single, np.ones(n.shape), none, none, 0.0)
    added, varies, free = _interrupted(cycle, n)
    met = np.maximum(1 - free, 1e-9)
    load = cycle.load
    most = load.chunk + load.overhead - load.tau
    mean = np.minimum(np.maximum(added, 0.0) / met, 0.95 * most)
    variance = np.maximum((varies / n + np.maximum(added, 0.0) ** 2) / met - mean**2, 0.0)
    return Decoding(floor, beside, crowd, single, free, mean, variance, most)


def _mates(load: Load) -> float:
    """Other requests in the busy period of a request's prefill: decoding waits through it, so they decode together.

    N requests in a busy period of M/G/1, each of which brings A while it is served: Var N = Var A/(1 - u)^3, Var A = u + the
    variance of rate x work; E[N] = 1/(1 - u). The period of a request has E[N^2]/E[N] of them.
    """
    first, second = float(load.weight @ load.work), float(load.weight @ load.work**2)
    busy = min(load.rate * first, 0.95)
    brought = busy + load.rate**2 * (second - first**2)
    return brought / (1 - busy) ** 2 + 1 / (1 - busy) - 1


def _interrupted(cycle: Cycle, n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What prefills add to each request's n steps: mean and variance of the seconds per step, P(nothing).

    Known after each doubling of the steps, per class of own work; beyond the last, totals grow as they last did.
    """
    place = np.clip(np.interp(cycle.load.work, cycle.own, np.arange(cycle.own.size)), 0, cycle.own.size - 1)
    low = np.minimum(place.astype(int), max(cycle.own.size - 2, 0))
    part = place - low
    high = np.minimum(low + 1, cycle.own.size - 1)
    at = 2.0 ** np.arange(DOUBLINGS + 1)
    k = np.minimum(np.log2(n).astype(int), DOUBLINGS - 1)
    within = np.minimum(n / at[k] - 1, 1.0)
    beyond = np.maximum(n - at[-1], 0.0)

    def per_step(total: np.ndarray) -> np.ndarray:
        each = total / at[:, None]
        growth = (total[-1] - total[-2]) / (at[-1] - at[-2])
        inside = np.minimum(np.log2(n) - k, 1.0)

        def of(side: np.ndarray) -> np.ndarray:
            known = each[k, side] + (each[k + 1, side] - each[k, side]) * inside
            return np.where(beyond > 0, (total[-1, side] + beyond * growth[side]) / n, known)

        return of(low) * (1 - part) + of(high) * part

    calm = np.log(np.maximum(cycle.free, 1e-300))
    free = [np.exp(calm[k, side] + (calm[k + 1, side] - calm[k, side]) * (within + beyond / at[-2])) for side in (low, high)]
    return per_step(cycle.mean) - cycle.load.tau, per_step(cycle.variance), free[0] * (1 - part) + free[1] * part


def gamma_cdf(x: np.ndarray, mean: np.ndarray | float, variance: np.ndarray | float) -> np.ndarray:
    """P(Gamma <= x) of a gamma law of this mean and variance; a step where it does not vary."""
    from scipy.special import gammainc

    x, mean, variance = np.broadcast_arrays(x, mean, variance)
    varies = (variance > 1e-18) & (mean > 1e-12)
    scale = np.where(varies, variance, 1.0) / np.where(varies, mean, 1.0)
    found = gammainc(np.where(varies, mean, 1.0) / scale, np.maximum(x, 0.0) / scale)
    return np.where(x < 0, 0.0, np.where(varies, found, (x >= mean).astype(float)))


def beta_cdf(
    x: np.ndarray, mean: np.ndarray | float, variance: np.ndarray | float, most: np.ndarray | float
) -> np.ndarray:
    """P(Beta <= x) of a beta law on [0, most] of this mean and variance: nearly a gamma law far below `most`; of a variance
    so large that only its ends have weight, these."""
    from scipy.special import betainc

    x, part, square = np.broadcast_arrays(np.clip(x / most, 0.0, 1.0), mean / most, variance / most**2)
    part = np.clip(part, 1e-9, 1 - 1e-9)
    both = np.maximum(part * (1 - part) / np.maximum(square, 1e-12) - 1, 1e-3)
    return np.asarray(betainc(part * both, (1 - part) * both, x))
