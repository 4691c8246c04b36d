"""What a rate is worth: joint attainment of TTFT and TPOT, goodput, capacity, gaps between tokens, and the worst window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from perfmodel.serving.latency import Decoding, gamma_cdf
from perfmodel.serving.queueing import Instance, Mix, State, invert
from perfmodel.spec.workload import Limit

_HALVINGS = 24
DEFAULT_SHARE = 0.95


@dataclass(frozen=True)
class Goals:
    """Limits of one request; None: not asked for. `share` of the requests must meet both together."""

    ttft: Limit | float | None = None
    tpot: float | None = None
    share: float = DEFAULT_SHARE


def attainment(
    instance: Instance, s: State, mix: Mix, goals: Goals, dispersion: float = 1.0, outside: np.ndarray | float = 0.0
) -> float:
    """Share of requests that meet TTFT and TPOT together, lengths taken jointly: E[P(ttft | lengths) P(tpot | lengths)].

    Given its lengths a request's wait and its interruptions are taken as independent. `outside`: seconds of TTFT that pass
    outside the engine's steps.
    """
    met = np.ones(mix.input.shape)
    if goals.ttft is not None:
        limit = goals.ttft.at(mix.input) if isinstance(goals.ttft, Limit) else goals.ttft
        met = met * instance.ttft_shares(limit - outside, s, mix, dispersion)
    if goals.tpot is not None:
        met = met * instance.tpot_shares(float(goals.tpot), s, mix, dispersion)
    return mix.mean(met)


def goodput(
    instance: Instance, s: State, mix: Mix, goals: Goals, dispersion: float = 1.0, outside: np.ndarray | float = 0.0
) -> float:
    """Requests per second that meet both limits."""
    return s.rate * attainment(instance, s, mix, goals, dispersion, outside)


def highest_rate(instance: Instance, mix: Mix) -> float:
    """Highest feasible rate [1/s], by bisection on the logarithm."""
    low, high = 1e-6, 1e6
    for _ in range(36):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if instance.state(middle, mix).feasible else (low, middle)
    return low


def capacity(
    instance: Instance, mix: Mix, goals: Goals, dispersion: float = 1.0,
    outside: Callable[[State], np.ndarray | float] = lambda _: 0.0, most: float = math.inf,
) -> float:  # fmt: skip
    """Highest rate [1/s] whose attainment is at least the goals' share; 0 when not even an idle instance reaches it.

    `outside`: seconds of TTFT outside the engine's steps in a state; `most`: the rate that what is outside carries [1/s].
    """

    def holds(rate: float) -> bool:
        s = instance.state(rate, mix)
        return s.feasible and attainment(instance, s, mix, goals, dispersion, outside(s)) >= goals.share

    high = min(highest_rate(instance, mix), most)
    low = high * 1e-4
    if not holds(low):
        return 0.0
    if holds(high):
        return high
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@dataclass(frozen=True, eq=False)
class _Gaps:
    """Single steps that a decoding request sees."""

    lengths: np.ndarray
    below: np.ndarray
    """Law of the steps that carry prefill: seconds, and the share that is shorter."""
    mean: float
    """Their mean [s]."""
    decode: float
    """Seconds of a step without prefill, on average."""

    def over(self, limit: float) -> float:
        """P(a step with prefill takes longer than `limit`)."""
        return 1 - float(np.interp(limit, self.lengths, self.below, left=0.0))

    def held(self, decoding: Decoding) -> np.ndarray:
        """Share of each request's steps that carry prefill."""
        return np.asarray(np.clip((1 - decoding.free) * decoding.mean / max(self.mean - self.decode, 1e-9), 0, 1))


@lru_cache(maxsize=64)
def _gaps(instance: Instance, s: State, mix: Mix, dispersion: float) -> _Gaps | None:
    """Steps of the cycle; where nothing prefills, None.

    Full token budgets of one long prompt take the longer the deeper they are in it; others what the mean of the cycle says.
    """
    law = instance.law(s, mix, dispersion)
    cycle = law.cycle
    if cycle is None:
        return None
    often, lengths = cycle.often[1:] / max(float(cycle.often[1:].sum()), 1e-300), cycle.lengths[1:]
    full = lengths >= lengths[-1] * (1 - 1e-9) if lengths[-1] >= cycle.load.chunk + cycle.load.overhead else lengths > math.inf
    clock, decoding = instance.clock, min(round(law.batch), instance.clock.max_batch)
    room = max(clock.chunk - decoding, 1.0)
    whole = np.floor(mix.new / room)
    points, weights = [lengths[~full]], [often[~full]]
    share = float(often[full].sum())
    if share > 0:
        alone = mix.mean(whole * room) / mix.mean(mix.new)
        points.append(np.array([lengths[-1]]))
        weights.append(np.array([share * (1 - alone)]))
        if alone > 0:
            index = np.repeat(np.arange(whole.size), whole.astype(int))
            order = np.arange(index.size) - np.repeat(np.cumsum(whole) - whole, whole.astype(int))
            depth = (mix.input - mix.new)[index] + order * room
            one = clock.step(decoding, decoding * mix.context, [(room, 0.0)]) - clock.attention(room, 0.0)
            points.append(one + clock.attention_array(np.full(depth.shape, room), depth))
            weights.append(share * alone * mix.weight[index] / mix.weight[index].sum())
    at, chance = np.concatenate(points), np.concatenate(weights)
    place = np.argsort(at, kind="stable")
    # The law lies evenly around its points, all within the longest.
    below = np.cumsum(chance[place]) - chance[place] / 2
    below[-1] = 1.0
    return _Gaps(at[place], below, float(often @ lengths), cycle.load.tau)


def itl_met(instance: Instance, limit: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
    """Share of tokens that follow the one before within `limit` seconds.

    A token's step carries prefill as often as what prefills add to the request asks for: tokens of a burst come beside the
    prefills of its rest, so they are held up more often than a step picked at random. Other steps vary with the batch.
    """
    tokens = mix.weight * mix.steps
    if instance.role == "prefill" or not tokens.any():
        return 1.0
    gaps, decoding = _gaps(instance, s, mix, dispersion), instance.law(s, mix, dispersion).decoding
    calm = gamma_cdf(limit - decoding.floor, decoding.beside, decoding.single)
    if gaps is None:
        return float(tokens @ calm / tokens.sum())
    held = gaps.held(decoding)
    return float(tokens @ ((1 - held) * calm + held * (1 - gaps.over(limit))) / tokens.sum())


def itl_quantile(instance: Instance, p: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
    """Seconds within which a share p of the tokens follow the one before."""
    return invert(lambda t: itl_met(instance, t, s, mix, dispersion), p, s.step)


def longest_gap_met(instance: Instance, limit: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
    """Share of requests none of whose gaps exceeds `limit` seconds.

    A request meets m steps with prefill on average, and escapes all with probability f. If a share q of them takes longer, it
    escapes those with probability exp(-m q); where bursts make them come together and f > exp(-m), with f^q.
    """
    counted = mix.weight * (mix.steps > 0)
    if instance.role == "prefill" or not counted.any():
        return 1.0
    gaps, decoding = _gaps(instance, s, mix, dispersion), instance.law(s, mix, dispersion).decoding
    met = gamma_cdf(limit - decoding.floor, decoding.beside, decoding.single)
    if gaps is not None:
        many = np.minimum(mix.steps * gaps.held(decoding), -np.log(np.maximum(decoding.free, 1e-300)))
        met = met * np.exp(-many * gaps.over(limit))
    return float(counted @ met / counted.sum())


def longest_gap_quantile(instance: Instance, p: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
    """Seconds that the longest gap of a share p of the requests does not exceed."""
    return invert(lambda t: longest_gap_met(instance, t, s, mix, dispersion), p, s.step)


def worst_window(p: float, requests: float, windows: float) -> float:
    """Percentile of steady traffic that the p-percentile of the worst of `windows` windows of `requests` each is expected at.

    The share of a window below the p-quantile varies with sd sqrt(p (1 - p)/n), so the highest sample quantile of W windows
    lies where the share is p + z sd with z = Phi^-1(W/(W + 1)) (Blom, Statistical Estimates and Transformed Beta-Variables,
    1958, to first order). Requests of a window count as independent; waits are correlated, so this is a lower estimate.

    >>> worst_window(0.95, 1000, 1), round(worst_window(0.95, 1000, 100), 4)
    (0.95, 0.9661)
    """
    if windows <= 1:
        return p
    from scipy.special import ndtri

    return min(p + float(ndtri(windows / (windows + 1))) * math.sqrt(p * (1 - p) / max(requests, 1.0)), 1 - 1e-6)
