"""Static batching: requests are collected, prefilled together and decoded until the longest of them ends.

A bulk-service queue, M/G^(1,B)/1 (Bailey, J. Royal Stat. Soc. B 16, 1954): the server takes up to B waiting requests, and
its service lasts as long as the longest answer of the batch, the largest of n draws, whose law is F(x)^n. The number
waiting when a batch ends is a Markov chain; its stationary law gives batch sizes, waits and throughput. Used like
serving.queueing.Instance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

from perfmodel.serving.batch_service import POINTS, Service, decode_seconds, quantile, shrinking_seconds
from perfmodel.serving.clock import StepClock
from perfmodel.serving.queueing import Mix, State

_MOST_BUSY = 0.98
_MOST_TESTED = 0.85  # of saturation, up to which docs/modes.md compares these forms with a simulation
_MOST_DISPERSED = 4.0
_SIZES = 24  # batch sizes at which service times are computed
_BATCHES = 6  # the chain counts this many full batches waiting, and as many arrivals more as a batch lasts


@dataclass(frozen=True, eq=False)
class StaticInstance:
    """An instance that serves one batch after the other."""

    clock: StepClock
    kv_tokens: float
    """Cached tokens that fit; every slot is reserved for the longest request."""
    batch: int
    """Most requests of a batch."""
    max_wait: float = 0.0
    """Seconds the oldest request of a batch that is not full waits for more."""
    pads: bool = True
    """Prompts are padded to the longest of the batch, and slots of ended answers keep computing; else neither."""
    role: str = "colocated"

    def state(self, rate: float, mix: Mix) -> StaticState:
        """Steady state at `rate` requests per second, Poisson; the methods below take other dispersions (variance over mean
        of the arrivals in a batch's time)."""
        return StaticState(self, rate, mix)

    def refused(self, s: StaticState, mix: Mix, dispersion: float = 1.0) -> str:
        """Why these forms do not hold at a state (replay decides there); empty where they do."""
        if s.reason:
            return s.reason
        if dispersion > _MOST_DISPERSED:
            return f"arrivals of dispersion {dispersion:.3g}: beyond {_MOST_DISPERSED:g} bursts decide, not their variance"
        return "batches are within 15 % of saturation" if s.rate > self.most_promised(mix) * (1 + 1e-9) else ""

    def ttft_met(self, limit: float | np.ndarray, s: StaticState, mix: Mix, dispersion: float = 1.0) -> float:
        """Share of requests whose prefill ends within `limit` seconds (one, or one per request of the mix) of their arrival."""
        bursty = s.at(dispersion)
        return mix.mean(np.broadcast_to(bursty.shares("ttft", limit), mix.weight.shape))

    def tpot_met(self, limit: float, s: StaticState, mix: Mix, dispersion: float = 1.0) -> float:
        """Share of requests (with two tokens or more) whose TPOT is within `limit` seconds."""
        return s.at(dispersion).share("tpot", limit)

    def met(self, metric: str, limit: float | np.ndarray, s: StaticState, mix: Mix, dispersion: float = 1.0) -> float:
        """Share of requests (itl: of tokens) whose ttft, tpot, itl, longest_gap or e2e is within `limit` seconds."""
        return mix.mean(np.broadcast_to(s.at(dispersion).shares(metric, limit), mix.weight.shape))

    def jointly_met(
        self, ttft: float | np.ndarray, tpot: float, s: StaticState, mix: Mix, dispersion: float = 1.0
    ) -> float:
        """Share of requests that meet both: beside the size of its batch, a request's wait says nothing of its answer."""
        return mix.mean(np.broadcast_to(s.at(dispersion).both(ttft, tpot), mix.weight.shape))

    def ttft_quantile(self, p: float, s: StaticState, mix: Mix, dispersion: float = 1.0) -> float:
        """Seconds within which a share p of requests have their first token."""
        return s.at(dispersion).quantile("ttft", p)

    def tpot_quantile(self, p: float, s: StaticState, mix: Mix, dispersion: float = 1.0) -> float:
        """Seconds within which a share p of requests have their TPOT."""
        return s.at(dispersion).quantile("tpot", p)

    def slots(self, mix: Mix) -> int:
        """Requests a batch holds: the limit, or what memory reserves for the longest."""
        longest = float(np.max(mix.input)) + float(np.max(mix.output))
        return min(self.batch, self.clock.max_batch, int(self.kv_tokens / longest))

    def most_promised(self, mix: Mix) -> float:
        """Highest rate at which these forms hold."""
        return _MOST_TESTED * self.highest_rate(mix)

    def highest_rate(self, mix: Mix) -> float:
        """Requests per second of full batches, one after the other."""
        n = self.slots(mix)
        return n / Service(self.clock, mix, n, pads=self.pads).mean if n else 0.0


@dataclass(eq=False)
class StaticState:
    """Steady state, with the attributes of serving.queueing.State. Laws are computed when first asked for."""

    instance: StaticInstance
    rate: float
    mix: Mix
    dispersion: float = 1.0
    reason: str = ""
    slots: int = field(init=False)
    _bursty: dict[float, StaticState] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.slots = self.instance.slots(self.mix)
        if self.slots < 1:
            self.reason = "KV cache exceeds memory"
        elif self.rate >= _MOST_BUSY * self.instance.highest_rate(self.mix):
            self.reason = "full batches cannot keep up"

    @property
    def feasible(self) -> bool:
        return not self.reason

    @property
    def prompt(self) -> float:
        """Mean tokens that a slot prefills, padding included."""
        return self.service(max(1, round(self.mean_batch))).prompt

    def snapshot(self) -> State:
        """The same state as plain numbers."""
        names = (x.name for x in fields(State))
        return State(*(getattr(self, name) for name in names))

    def at(self, dispersion: float) -> StaticState:
        """The same load with arrivals of another dispersion; below one as at one."""
        if dispersion <= self.dispersion:
            return self
        if dispersion not in self._bursty:
            self._bursty[dispersion] = StaticState(self.instance, self.rate, self.mix, dispersion)
        return self._bursty[dispersion]

    @cached_property
    def services(self) -> list[Service]:
        """Service at some batch sizes from one to the limit."""
        sizes = np.unique(np.geomspace(1, self.slots, _SIZES).round().astype(int))
        return [Service(self.instance.clock, self.mix, int(n), pads=self.instance.pads) for n in sizes]

    def service(self, n: int) -> Service:
        """That of the nearest computed size, on the scale of ratios."""
        return min(self.services, key=lambda s: abs(math.log(s.n / n)))

    @cached_property
    def _chain(self) -> tuple[np.ndarray, np.ndarray]:
        """(share of batches that begin with n requests [n = 1 … B], requests left behind by a full batch [number])."""
        b, rate = self.slots, self.rate
        full = self.service(b)
        top = int(b * _BATCHES + rate * full.seconds[-1] * 1.5 + 10)
        counts = np.arange(top + 1)
        # Requests that come while a batch of n is served.
        during = {s.n: _counts(rate * s.seconds, counts, self.dispersion) for s in self.services}
        start = np.zeros((top + 1, b + 1))  # sizes of the batch that follows a number waiting
        for q in range(b):
            # After q came in the last service, the oldest is about q/(q + 1) of that service old.
            previous = self.service(max(q, 1)).mean
            age = 0.0 if q == 0 else previous * q / (q + 1)
            more = self.rate * max(self.instance.max_wait - age, 0.0)
            first = max(q, 1)
            law = _counts(np.array([more]), np.arange(b + 1 - first), self.dispersion)
            law[-1] += 1 - law.sum()
            start[q, first:] = law
        start[b:, b] = 1.0
        chain = np.zeros((top + 1, top + 1))
        arrivals = np.array([during[self.service(n).n] for n in range(1, b + 1)])
        chain[:b] = start[:b, 1:] @ arrivals
        for q in range(b, top + 1):
            left = q - b
            chain[q, left:] = arrivals[b - 1, : top + 1 - left]
        chain[:, -1] += 1 - chain.sum(axis=1)
        law = _stationary(chain)
        sizes = law @ start
        left_behind = np.zeros(top + 1)
        left_behind[: top + 1 - b] = law[b:]
        return sizes[1:], left_behind

    @cached_property
    def _sizes(self) -> list[tuple[float, dict[str, _Law]]]:
        """(share of the requests, laws of their times) for each size of batch at which service times are computed."""
        waits, sizes, weights = self._waits
        u = (np.arange(POINTS) + 0.5) / POINTS
        answer = quantile(self.mix.output, self.mix.weight)(u)
        clock = self.instance.clock
        nearest = np.array([self.service(int(n)).n for n in range(1, self.slots + 1)])[sizes - 1]
        more = answer > 1
        found = []
        for s in self.services:
            mine = nearest == s.n
            if not np.any(mine):
                continue
            decoding = (
                decode_seconds(clock, s.n, s.prompt, answer) if self.instance.pads
                else shrinking_seconds(clock, s.n, s.prompt, self.mix, answer, last=False)
            )  # fmt: skip
            wait, weight = waits[mine], weights[mine]
            steps = answer[more] - 1
            # Steps only get longer, so a request's last gap is its longest; its gaps grow evenly from the first.
            first, last = (clock.decode_base[s.n] + clock.decode_slope[s.n] * s.n * (s.prompt + k) for k in (1.0, steps))
            gaps = first + np.multiply.outer(last - first, u)
            found.append((float(weight.sum()), {
                "ttft": _Law(np.add.outer(wait, s.prefill).ravel(), np.repeat(weight, s.prefill.size)),
                "tpot": _Law(decoding[more] / steps, np.ones(steps.size)),
                "longest_gap": _Law(last, np.ones(steps.size)),
                "itl": _Law(gaps.ravel(), np.repeat(steps, u.size)),
                "e2e": _Law(np.add.outer(wait + s.prefill.mean(), decoding).ravel(), np.repeat(weight, answer.size)),
            }))  # fmt: skip
        return found

    @cached_property
    def _requests(self) -> dict[str, _Law]:
        """Laws over all requests."""
        return {
            name: _Law(
                np.concatenate([laws[name].values for _, laws in self._sizes]),
                np.concatenate([share * laws[name].weights / max(laws[name].total, 1e-300) for share, laws in self._sizes]),
            )
            for name in ("ttft", "tpot", "longest_gap", "itl", "e2e")
        }  # fmt: skip

    @cached_property
    def _waits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(wait before its batch begins, size of that batch, weight) over where and when a request arrives.

        Arrivals fall on the batch in service in proportion to its length, at any moment of it; those after an empty moment
        begin or join the next. A request that finds k waiting is served floor(k/B) full batches later.
        """
        sizes, left = self._chain
        b, rate, instance = self.slots, self.rate, self.instance
        waits: list[np.ndarray] = []
        batch: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        full = self.service(b).mean
        u = (np.arange(8) + 0.5) / 8
        rest = max(sizes[b - 1] - left.sum(), 0.0)
        behind = np.flatnonzero(left > 1e-9)
        for n in range(1, b + 1):
            cases = [(0, sizes[n - 1])] if n < b else [(0, rest), *((int(k), left[k]) for k in behind)]
            for k, share in cases:
                if share < 1e-9:
                    continue
                seconds = self.service(n).seconds.reshape(POINTS, -1).mean(axis=1)
                come = np.multiply.outer(seconds, u)
                remaining = seconds[:, None] - come
                ahead = k + rate * come
                later = np.floor(ahead / b)
                in_batch = ahead - later * b + 1
                final = np.minimum(in_batch + rate * (remaining + later * full), b)
                age = np.minimum(remaining + later * full, instance.max_wait)
                collect = np.where(final < b, np.maximum(instance.max_wait - np.maximum(age, come), 0.0), 0.0)
                final = np.minimum(final + rate * collect, b)
                waits.append((remaining + later * full + collect).ravel())
                batch.append(np.maximum(final.round(), 1).astype(int).ravel())
                weights.append((share * rate * np.repeat(seconds, u.size) / (POINTS * u.size)).ravel())
        # The request that finds the server idle starts the collection, and waits it out unless the batch fills.
        empty = self._empty
        if empty > 0:
            collected = 1 + rate * instance.max_wait
            wait = instance.max_wait if collected < b else (b - 1) / rate
            joined = np.concatenate([[1.0], np.full(u.size, min(collected - 1, b - 1) / u.size)])
            waits.append(np.concatenate([[wait], wait * u]))
            batch.append(np.full(u.size + 1, int(max(1, round(min(collected, b))))))
            weights.append(empty * joined)
        total = np.concatenate(weights)
        return np.concatenate(waits), np.concatenate(batch), total / total.sum()

    @cached_property
    def _empty(self) -> float:
        """Share of batches before which nobody waited."""
        sizes, _ = self._chain
        # Requests per batch balance arrivals: what does not come during service comes while the server idles.
        during = self.rate * float(sizes @ np.array([self.service(n).mean for n in range(1, self.slots + 1)]))
        idle = max(self.mean_batch - during, 0.0)
        return float(idle / (1 + min(self.rate * self.instance.max_wait, self.slots - 1)))

    @cached_property
    def mean_batch(self) -> float:
        """Mean requests of a batch."""
        sizes, _ = self._chain
        return float(sizes @ np.arange(1, self.slots + 1))

    @cached_property
    def busy(self) -> float:
        """Share of time a batch is in service: near one long before saturation, where batches are small."""
        sizes, _ = self._chain
        seconds = float(sizes @ np.array([self.service(n).mean for n in range(1, self.slots + 1)]))
        return self.rate * seconds / self.mean_batch

    @property
    def utilisation(self) -> float:
        """Share of time prefill takes."""
        return self.rate * float(self.work[0])

    @property
    def batch(self) -> float:
        """Mean slots in use."""
        return self.busy * self.mean_batch

    @property
    def step(self) -> float:
        """Mean seconds between a sequence's tokens."""
        tpot = self._requests["tpot"]
        return float(tpot.values @ tpot.weights / tpot.total) if tpot.total else 0.0

    @property
    def pure_step(self) -> float:
        return self.step

    @property
    def work(self) -> np.ndarray:
        """Prefill seconds of a batch over its requests [request of the mix]."""
        s = self.service(max(1, round(self.mean_batch)))
        return np.full(self.mix.input.shape, float(s.prefill.mean()) / s.n)

    @property
    def kv_share(self) -> float:
        """Reserved tokens over those that fit."""
        longest = float(np.max(self.mix.input)) + float(np.max(self.mix.output))
        return self.slots * longest / self.instance.kv_tokens

    def share(self, metric: str, limit: float) -> float:
        """Share of requests whose `ttft`, `tpot`, `longest_gap` or `e2e` is within `limit` seconds; `itl`: of the tokens."""
        return float(self.shares(metric, limit))

    def shares(self, metric: str, limits: float | np.ndarray) -> np.ndarray:
        """The same for each of several limits."""
        return self._requests[metric].within(limits)

    def both(self, ttft: float | np.ndarray, tpot: float) -> np.ndarray:
        """Share of requests within a TTFT limit (each of several) and a TPOT limit."""
        parts = [share * laws["ttft"].within(ttft) * laws["tpot"].within(tpot) for share, laws in self._sizes]
        return np.asarray(np.sum(parts, axis=0))

    def quantile(self, metric: str, p: float) -> float:
        """Smallest time within which a share p of requests stays."""
        return self._requests[metric].quantile(p)


class _Law:
    """Weighted values."""

    def __init__(self, values: np.ndarray, weights: np.ndarray) -> None:
        order = np.argsort(values)
        self.values, self.weights = values[order], weights[order]
        self.total = float(weights.sum())
        self._upto = np.concatenate([[0.0], np.cumsum(self.weights)])

    def within(self, limits: float | np.ndarray) -> np.ndarray:
        """Share of the weight at or below each limit; one where there is none."""
        if not self.total:
            return np.ones(np.shape(limits))
        return np.asarray(self._upto[np.searchsorted(self.values, limits, side="right")] / self.total)

    def quantile(self, p: float) -> float:
        """Smallest value at or below which a share p lies."""
        if not self.total:
            return 0.0
        place = int(np.searchsorted(self._upto[1:] / self.total, p))
        return float(self.values[min(place, self.values.size - 1)])


def _counts(means: np.ndarray, counts: np.ndarray, dispersion: float) -> np.ndarray:
    """Law of a number of arrivals, averaged over equally likely means: Poisson, or negative binomial of that dispersion."""
    from scipy.special import gammaln

    means = np.maximum(means, 1e-12)[:, None]
    if dispersion <= 1.0 + 1e-9:
        law = counts * np.log(means) - means
    else:
        r = means / (dispersion - 1)
        law = gammaln(counts + r) - gammaln(r) - r * math.log(dispersion) + counts * math.log(1 - 1 / dispersion)
    return np.asarray(np.exp(law - gammaln(counts + 1.0)).mean(axis=0))


def _stationary(chain: np.ndarray) -> np.ndarray:
    """Law pi with pi = pi P."""
    n = chain.shape[0]
    system = chain.T - np.eye(n)
    system[-1] = 1.0
    law = np.linalg.solve(system, np.eye(n)[-1])
    return np.maximum(law, 0.0) / np.maximum(law, 0.0).sum()
