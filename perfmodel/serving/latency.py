"""The laws of one steady state together: waits, decode steps, and the batch that both follow from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from perfmodel.serving import renewal
from perfmodel.serving.cycle import Cycle, Load, solve
from perfmodel.serving.renewal import Renewal
from perfmodel.serving.waiting import Waiting

if TYPE_CHECKING:
    from perfmodel.serving.queueing import Instance, Mix, State

_SETTLED = 0.1  # change of the batch below which the cycle need not be solved again
_ROUNDS = 2
_OVERLAP = 0.5  # a population varies as if this share of a burst lived at the same time: E[min(D, D')]/E[D] of like requests
_SIGMAS = 2.0
_SHORT = 0.5  # gaps below this share of a step with one prompt count as short: their order is all that matters
_KNOTS = 5  # numbers of prompts at which the time of a shared step is found


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
        hit = gamma_cdf(room, self.beside + self.mean, self.crowd + self.variance)
        return self.free * calm + (1 - self.free) * np.where(room >= self.beside + self.most, 1.0, hit)


@dataclass(frozen=True, eq=False)
class Law:
    """Everything the percentiles of one state follow from."""

    batch: float
    """Mean decoding sequences, bursts included."""
    crowded: float
    """Batch that is rarely exceeded (mean + 2 sigma)."""
    kv: float
    """Cached tokens that are hardly ever exceeded (mean + 4 sigma, and the longest prompt on top), over what fits."""
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
    life = s.work + mix.steps * decoding.tpot
    tokens = mix.input + mix.output / 2
    held = s.rate * mix.mean(life * tokens)
    varies = s.rate * mix.mean(life * tokens**2) * spread
    busy = 0.0 if cycle is None else s.rate * float(cycle.load.weight @ cycle.load.work)
    most_held = held + 2 * _SIGMAS * math.sqrt(varies) + float(mix.input.max())
    return Law(
        batch, batch + _SIGMAS * math.sqrt(batch * spread), most_held / instance.kv_tokens,
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
    # Prompts that share a step: its time over their number, whose secant splits the time into work and a step's own part.
    tokens = max(min(mix.mean(new), clock.chunk / 4), 1.0)
    most = int(max(clock.chunk - decoding, 2 * tokens) // tokens)
    count = np.unique(np.geomspace(1, most, _KNOTS).round())
    shared = np.array([clock.step(decoding, context, [(tokens, 0.0)] * int(k)) for k in count])
    each = (shared[-1] - shared[0]) / (count[-1] - 1)
    extra = float(shared[0] - each) - (clock.decode(decoding, context) if decoding else 0.0)
    own = np.maximum(work - extra * chunks, 1e-6 + 0.05 * work)
    full = max(clock.chunk - decoding, 1.0) * mix.mean(own) / max(mix.mean(new), 1e-9)
    return Load(rate, own, mix.weight, tau, extra, full, idle, count * each, shared - shared[0] - (count - 1) * each)


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
    seen = batch + 1 / slack + (company if cycle is None else company / slack)
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


def _interrupted(cycle: Cycle, n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What prefills add to each request's n steps: mean and variance of the seconds per step, P(nothing).

    Known after the doublings of the cycle, per class of own work; beyond the last, totals grow as they last did.
    """
    place = np.clip(np.interp(cycle.load.work, cycle.own, np.arange(cycle.own.size)), 0, cycle.own.size - 1)
    low = np.minimum(place.astype(int), max(cycle.own.size - 2, 0))
    part = place - low
    high = np.minimum(low + 1, cycle.own.size - 1)
    side, steps = np.concatenate([low, high]), np.concatenate([n, n])
    at = cycle.steps
    k = np.clip((steps > at[:, side]).sum(0) - 1, 0, len(at) - 2)
    start, stop = at[k, side], at[k + 1, side]
    inside = np.clip(np.log(steps / start) / np.log(stop / start), 0, 1)
    beyond = np.maximum(steps - at[-1, side], 0.0)

    def per_step(total: np.ndarray) -> np.ndarray:
        each = total / at
        growth = ((total[-1] - total[-2]) / (at[-1] - at[-2]))[side]
        known = each[k, side] + (each[k + 1, side] - each[k, side]) * inside
        return np.where(beyond > 0, (total[-1, side] + beyond * growth) / steps, known)

    calm = np.log(np.maximum(cycle.free, 1e-300))
    within = np.maximum((steps - start) / (stop - start), 0.0)
    free = np.exp(calm[k, side] + (calm[k + 1, side] - calm[k, side]) * within)
    parts = [x[: n.size] * (1 - part) + x[n.size :] * part for x in (per_step(cycle.mean), per_step(cycle.variance), free)]
    return parts[0] - cycle.load.tau, parts[1], parts[2]


def gamma_cdf(x: np.ndarray, mean: np.ndarray | float, variance: np.ndarray | float) -> np.ndarray:
    """P(Gamma <= x) of a gamma law of this mean and variance; a step where it does not vary."""
    from scipy.special import gammainc

    x, mean, variance = np.broadcast_arrays(x, mean, variance)
    varies = (variance > 1e-18) & (mean > 1e-12)
    scale = np.where(varies, variance, 1.0) / np.where(varies, mean, 1.0)
    found = gammainc(np.where(varies, mean, 1.0) / scale, np.maximum(x, 0.0) / scale)
    return np.where(x < 0, 0.0, np.where(varies, found, (x >= mean).astype(float)))
