"""Prefix hits without a trace: popular prefixes, sessions of turns, and the loops they close.

An LRU cache keeps what was used within its characteristic time T, at which what was used in T just fills it (Che, Tung,
Wang, IEEE JSAC 20, 2002). An object used at a rate r [1/s] with intervals X then takes tokens x r E[min(X, T)] of the cache
on average and is found with probability P(X <= T), whatever the law of X.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.spec.deployment import Routing

_ROUNDS = 60


def zipf(n: int, exponent: float) -> np.ndarray:
    """Shares of n things ranked by popularity, share of the i-th proportional to i^-exponent; exponent 0: all equal.

    >>> zipf(3, 1.0) * 11
    array([6., 3., 2.])
    """
    if n < 1 or not math.isfinite(exponent) or exponent < 0:
        raise SpecError(f"a Zipf law needs at least one thing and an exponent of 0 or more, got {n} and {exponent}")
    weights = np.arange(1, n + 1, dtype=float) ** -exponent
    return weights / weights.sum()


class Law(Protocol):
    """What one cache sees. T: seconds for which unused content stays."""

    ttl: float
    """Seconds after which unused content is dropped even where there is room."""

    def held(self, seconds: float) -> float:
        """Tokens used within the last `seconds`, on average; may be infinite for infinite seconds."""
        ...

    def cached(self, seconds: float) -> np.ndarray:
        """Expected cached prompt tokens by class of request."""
        ...

    def thinned(self, replicas: int) -> Law:
        """The law at one of `replicas` caches among which requests are dealt at random."""
        ...


@dataclass(frozen=True)
class Popularity:
    """Requests that begin with one of many prefixes, independently of each other (independent reference model).

    Prefix i of `prefixes` is chosen with a probability proportional to i^-exponent (Zipf); the prompt ends in `fresh` tokens
    that nobody uses again. One class of request per prefix.
    """

    rate: float
    """Requests per second."""
    prefixes: int
    exponent: float
    tokens: float
    """Tokens of a prefix."""
    fresh: float = 0.0
    ttl: float = math.inf

    @property
    def shares(self) -> np.ndarray:
        """Probability of each prefix [prefix]."""
        return zipf(self.prefixes, self.exponent)

    def held(self, seconds: float) -> float:
        """Tokens of prefixes and of prompt ends used within the last `seconds`."""
        ends = self.rate * self.fresh * seconds if self.fresh else 0.0
        return float(self.cached(seconds).sum()) + ends

    def cached(self, seconds: float) -> np.ndarray:
        """tokens x (1 - exp(-rate share T)) [prefix]: intervals are exponential."""
        return self.tokens * -np.expm1(-self.rate * self.shares * seconds)

    def thinned(self, replicas: int) -> Popularity:
        """Each cache sees every prefix, 1/replicas as often."""
        return Popularity(self.rate / replicas, self.prefixes, self.exponent, self.tokens, self.fresh, self.ttl)


@dataclass(frozen=True)
class Sessions:
    """Conversations whose every prompt begins with the context of the turn before. One class of request per turn."""

    rate: float
    """Sessions that begin per second."""
    prompt: np.ndarray
    """Prompt tokens [turn]."""
    kept: np.ndarray
    """Tokens of a turn's context that enter the cache and open the next prompt: prompt and answer, or the prompt alone
    where the engine drops what it generated [turn]."""
    follow: np.ndarray
    """Probability that a session reaches the turn; 1 for the first [turn]."""
    interval: float
    """Mean seconds between two turns: response and think time."""
    variation: float = 1.0
    """Coefficient of variation of the interval (gamma law)."""
    replicas: int = 1
    """Caches among which the turns are dealt at random."""
    ttl: float = math.inf

    def _later(self, turns: int, seconds: float) -> tuple[float, float]:
        """(P(X <= T), E[min(X, T)]) of the time X that so many intervals take."""
        mean = turns * self.interval
        if math.isinf(seconds):
            return 1.0, mean
        if self.variation <= 0:
            return float(seconds >= mean), min(mean, seconds)
        from scipy.special import gammainc

        shape = turns / self.variation**2
        x = seconds * shape / mean
        within = float(gammainc(shape, x))
        return within, mean * float(gammainc(shape + 1, x)) + seconds * (1 - within)

    def _lag(self, m: int) -> float:
        """Probability that the last turn at this cache is m turns back."""
        stay = 1 / self.replicas
        return float(stay * (1 - stay) ** (m - 1))

    def cached(self, seconds: float) -> np.ndarray:
        """Expected cached tokens of each turn [turn]: of the last turn at the same cache, if it is not too long ago."""
        found = np.zeros(self.prompt.size)
        for m in range(1, self.prompt.size):
            reach = np.minimum(self.kept[:-m], self.prompt[m:] - 1)
            found[m:] += self._lag(m) * self._later(m, seconds)[0] * reach
        return found

    def held(self, seconds: float) -> float:
        """Tokens used within the last `seconds` at one cache."""
        total = 0.0
        for j in range(self.prompt.size):
            ever, stays = 0.0, 0.0
            for m in range(1, self.prompt.size - j):
                share = self._lag(m) * float(self.follow[j + m] / self.follow[j])
                ever, stays = ever + share, stays + share * self._later(m, seconds)[1]
            # What no turn of this cache will use again stays until it has aged.
            stays += (1 - ever) * seconds if ever < 1 - 1e-12 else 0.0
            total += self.rate / self.replicas * float(self.follow[j] * self.kept[j]) * stays
        return total

    def thinned(self, replicas: int) -> Sessions:
        """Each turn goes to one of so many times more caches."""
        return Sessions(
            self.rate, self.prompt, self.kept, self.follow, self.interval, self.variation, self.replicas * replicas, self.ttl
        )


def characteristic_time(law: Law, capacity: float) -> float:
    """Seconds for which an LRU cache of `capacity` tokens keeps unused content; at most the law's time to live.

    >>> round(characteristic_time(Popularity(rate=1.0, prefixes=100, exponent=0.0, tokens=10.0), 500.0), 2)  # 100 ln 2
    69.31
    """
    if capacity <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while law.held(high) < capacity:
        low, high = high, 2 * high
        if high >= law.ttl or high > 1e12:
            return law.ttl
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if law.held(middle) < capacity else (low, middle)
    return min(high, law.ttl)


def expected(law: Law, capacity: float, replicas: int, routing: Routing) -> np.ndarray:
    """Expected cached tokens by class of request, with an LRU cache of `capacity` tokens at each replica.

    Prefix-affine routing makes one cache of all; any other deals every prefix to all of them.
    """
    if replicas < 1 or capacity < 0:
        raise SpecError("prefix caching needs at least one replica and no negative cache")
    if routing == "prefix-affine":
        return law.cached(characteristic_time(law, capacity * replicas))
    one = law.thinned(replicas)
    return one.cached(characteristic_time(one, capacity))


def busiest_share(shares: np.ndarray, replicas: int, *, guard: float | None = None, deals: int = 64, seed: int = 1) -> float:
    """Work of the busiest replica over the mean when groups with these shares of the work are hashed to replicas.

    Mean over hashings; a load guard caps it.
    """
    rng = np.random.default_rng(seed)
    most = [
        np.bincount(rng.integers(replicas, size=shares.size), shares, minlength=replicas).max() for _ in range(deals)
    ]
    uneven = float(np.mean(most) / shares.sum() * replicas)
    return uneven if guard is None else min(uneven, guard)


def turn_rate(users: float, think: float, response: Callable[[float], float]) -> float:
    """Requests per second of `users` who think `think` seconds between an answer and the next turn.

    Interactive response-time law: users = rate x (think + response(rate)), response in seconds, infinite where nothing is
    left to give. The interval between a user's turns is users/rate: what a cache must bridge, so that a response that
    counts on hits may also fall with the rate. Of several balances, one is found.
    """
    if users <= 0:
        return 0.0
    quick = think + response(0.0)
    if quick <= 0:
        raise SpecError("users without think time need a response that takes time")
    low, high = 0.0, users / quick
    for _ in range(_ROUNDS):
        if high * (think + response(high)) >= users:
            break
        low, high = high, 2 * high
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (think + response(middle)) < users else (low, middle)
    return low


def spare_bytes(free: float, running: Callable[[float], float]) -> float:
    """Bytes that a prefix cache has beside the running batch: x = free - running(x).

    `running`: bytes that running requests hold with a prefix cache of x bytes, by Little's law; more hits make requests
    leave sooner, so it does not grow with x. Starting from what is left without any hit, x grows to the first balance.
    """
    x = max(free - running(0.0), 0.0)
    for _ in range(_ROUNDS):
        more = min(max(free - running(x), x), free)
        if more <= x * (1 + 1e-6):
            break
        x = more
    return x
