"""What a rate is worth: joint attainment of TTFT and TPOT, goodput, capacity, gaps between tokens, and the worst window."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

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


def attainment(instance: Instance, s: State, mix: Mix, goals: Goals, dispersion: float = 1.0) -> float:
    """Share of requests that meet TTFT and TPOT together, lengths taken jointly: E[P(ttft | lengths) P(tpot | lengths)].

    Given its lengths a request's wait and its interruptions are taken as independent.
    """
    met = np.ones(mix.input.shape)
    if goals.ttft is not None:
        limit = goals.ttft.at(mix.input) if isinstance(goals.ttft, Limit) else goals.ttft
        met = met * instance.ttft_shares(limit, s, mix, dispersion)
    if goals.tpot is not None:
        met = met * instance.tpot_shares(float(goals.tpot), s, mix, dispersion)
    return mix.mean(met)


def goodput(instance: Instance, s: State, mix: Mix, goals: Goals, dispersion: float = 1.0) -> float:
    """Requests per second that meet both limits."""
    return s.rate * attainment(instance, s, mix, goals, dispersion)


def highest_rate(instance: Instance, mix: Mix) -> float:
    """Highest feasible rate [1/s], by bisection on the logarithm."""
    low, high = 1e-6, 1e6
    for _ in range(36):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if instance.state(middle, mix).feasible else (low, middle)
    return low


def capacity(instance: Instance, mix: Mix, goals: Goals, dispersion: float = 1.0) -> float:
    """Highest rate [1/s] whose attainment is at least the goals' share; 0 when not even an idle instance reaches it."""

    def holds(rate: float) -> bool:
        s = instance.state(rate, mix)
        return s.feasible and attainment(instance, s, mix, goals, dispersion) >= goals.share

    high = highest_rate(instance, mix)
    low = high * 1e-4
    if not holds(low):
        return 0.0
    if holds(high):
        return high
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def itl_met(instance: Instance, limit: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
    """Share of tokens that follow the one before within `limit` seconds: the law of single steps."""
    if instance.role == "prefill" or not np.any(mix.steps > 0):
        return 1.0
    cycle = instance.law(s, mix, dispersion).cycle
    if cycle is None:
        return instance.tpot_met(limit, s, mix, dispersion)
    # Undisturbed steps are an atom; the rest lies evenly around its nodes, all within the longest step.
    below = np.cumsum(cycle.often) - cycle.often / 2
    below[0] = cycle.often[0]
    return 1.0 if limit >= cycle.lengths[-1] else float(np.interp(limit, cycle.lengths, below, left=0.0))


def itl_quantile(instance: Instance, p: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
    """Seconds within which a share p of the tokens follow the one before."""
    return invert(lambda t: itl_met(instance, t, s, mix, dispersion), p, s.step)


def longest_gap_met(instance: Instance, limit: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
    """Share of requests none of whose gaps exceeds `limit` seconds: each of n steps does with the chance of any step."""
    counted = mix.weight * (mix.steps > 0)
    if not counted.any():
        return 1.0
    over = 1 - itl_met(instance, limit, s, mix, dispersion)
    return float(counted @ (1 - min(over, 1.0)) ** mix.steps / counted.sum())


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
