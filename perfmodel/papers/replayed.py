"""What a setting measures when requests are replayed one by one: waits for memory and for a place, bursts, several instances.

Lengths are spread evenly over their distributions and shuffled, gaps between arrivals are drawn; both by the seed `draw`, so that
settings at one rate see the same requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np

from perfmodel.errors import SpecError
from perfmodel.papers.pool import held
from perfmodel.papers.served import Served
from perfmodel.papers.setting import Resolved, estimator
from perfmodel.serving.modes import policy_clock
from perfmodel.serving.replay.deploy import link
from perfmodel.serving.replay.fleet import Fleet, Pool
from perfmodel.serving.replay.migration import Migration
from perfmodel.serving.replay.outcome import Outcome
from perfmodel.serving.replay.settings import Settings
from perfmodel.serving.requests import Requests

_WARM = 0.1  # of the requests, which find a fleet that is still filling
_ROUNDS = 12  # of the scale that keeps a mean although long requests are cut
_LEAST = math.log(1e-4)  # of a rate in requests/s
_STEP, _NEAR, _EDGE = math.log(2), 0.02, 0.05  # of its search: first step, what is near enough, least move of a bracket


class Replayed(Served):
    """A setting under arrivals at `rate` [1/s] of one instance; of `roles`, of all their devices together."""

    @cached_property
    def _drawn(self) -> Requests:
        """The requests, one a second on average. The label `prefix`: prompt tokens cached beforehand."""
        n, burst = int(self._value("requests")), self._value("burst")
        rng = np.random.default_rng(int(self._value("draw")))
        classes = self.setting.classes or ({"share": 1.0},)
        ends = np.rint(np.cumsum([0.0] + [c.get("share", 0.0) for c in classes]) * n).astype(int)
        if ends[-1] != n:
            raise SpecError(f"the shares of the classes of requests add up to {ends[-1] / n:.3g}, not to 1")
        many = np.diff(ends).tolist()
        inputs, outputs = (
            np.concatenate([self._lengths(name, c, k, rng) for c, k in zip(classes, many, strict=True)])
            for name in ("input", "output")
        )
        prefix = np.repeat([c.get("prefix", self._value("prefix")) for c in classes], many)
        order = rng.permutation(n)
        gaps = rng.gamma(1 / burst**2, burst**2, n)  # of mean 1 and a coefficient of variation `burst`
        arrival = np.cumsum(gaps) - gaps[0]
        arrival *= (n - 1) / arrival[-1]
        return Requests(arrival, inputs[order], outputs[order], labels={"prefix": prefix[order]})

    def _lengths(self, name: str, kind: Mapping[str, float], n: int, rng: np.random.Generator) -> np.ndarray:
        longest, context = self._value("longest"), self._estimator.model.max_positions
        mean, spread = (float(kind.get(k, self._value(k))) for k in (name, f"{name}_spread"))
        if not longest:
            # Where the mean fits the model's context; else the model stands for a longer one.
            fits = context and self.input + self.output <= context
            longest = math.inf if not fits else context / 2 if name == "output" else context - self.output
        return np.maximum(np.rint(_spread(mean, spread, longest, n, rng)), 1).astype(int)

    @cached_property
    def _fleet_of(self) -> Fleet:
        pools = tuple(self._replay_pool(role, s) for role, s in self._pooled.items())
        period, threshold = self._value("migration"), self._value("spare")
        return Fleet(pools, self.setting.routing, migration=Migration(period, threshold) if period else None)

    @property
    def _pooled(self) -> Mapping[str, Resolved]:
        return self.setting.roles or {"colocated": self.setting}

    def _replay_pool(self, role: str, setting: Resolved) -> Pool:
        if setting.static or setting.policy == "static":
            raise SpecError("a replay of a paper's setting knows no static batches")
        e, drawn = estimator(setting), self._drawn
        e.require_fit()
        context = float(drawn.output @ (drawn.input + drawn.output / 2) / drawn.output.sum())
        clock = policy_clock(
            e, context, setting.policy, chunk=int(setting.values["chunk"]), max_batch=int(setting.values["largest"]),
            longest=float(drawn.input.max()),
        )  # fmt: skip
        fetch, overtaken = float(setting.values["fetch"]), int(setting.values["overtaken"])
        scheduling = Settings(setting.policy, fetch_seconds_per_token=fetch, overtaken=overtaken)
        replicas = setting.devices / float(e.par.devices) if setting.devices else self._value("instances")
        sends = None
        if role == "prefill":
            to, message = estimator(self.setting.roles["decode"]), int(self._value("message"))
            sends = link(e, to, float(drawn.input.mean()), block_tokens=message)
        return Pool(clock, held(setting, context), max(round(replicas), 1), role, scheduling, handoff=sends)

    @cached_property
    def _cached(self) -> np.ndarray:
        """Prompt tokens whose cache techniques or `prefix` provide [request]."""
        prefix = self._drawn.labels["prefix"]
        asked = self._estimator.request(np.maximum(self._drawn.input - prefix, 1.0), prefix)
        found = np.broadcast_to(np.floor(asked.cached), self._drawn.input.shape)
        return np.minimum(found, self._drawn.input - 1).astype(int)

    def _replay(self, rate: float) -> Outcome:
        """The fleet's outcome at a rate, without the first requests."""
        if rate <= 0:
            raise SpecError("a replay needs the setting's `rate` [1/s]")
        fleet, drawn, tick = self._fleet_of, self._drawn, self._value("tick")
        arrival = drawn.arrival / (rate * (1 if self.setting.roles else fleet.pools[0].replicas))
        if tick:
            arrival = np.floor(arrival / tick) * tick
        found = fleet.run(Requests(arrival, drawn.input, drawn.output), seed=int(self._value("draw")), found=self._cached)
        return found.take(np.arange(len(drawn)) >= _WARM * len(drawn))

    @cached_property
    def _outcome(self) -> Outcome:
        return self._replay(self._value("rate"))

    @property
    def replayed_ttft(self) -> float:
        """Mean seconds to the first token at `rate`, of the requests of a replay."""
        return float(self._outcome.values("ttft").mean())

    @property
    def replayed_tail_ttft(self) -> float:
        """99th percentile of the seconds to the first token."""
        return self._outcome.percentile("ttft", 0.99)

    @property
    def replayed_tpot(self) -> float:
        """Mean seconds per output token after the first."""
        return float(self._outcome.values("tpot").mean())

    @property
    def replayed_latency(self) -> float:
        """Mean seconds of a request."""
        return float(self._outcome.values("e2e").mean())

    @property
    def replayed_per_token(self) -> float:
        """Seconds of a request over its output tokens that nine tenths of the requests keep (normalised latency)."""
        return _per_token(self._outcome)

    @property
    def replayed_share(self) -> float:
        """Share of the requests that keep `ttft`, `tpot` and, with every token, `gap`: those of the limits that are given."""
        limits = {"ttft": self._value("ttft"), "tpot": self._value("tpot"), "longest_gap": self._value("gap")}
        return self._outcome.attainment(**{name: limit for name, limit in limits.items() if limit})

    def _scale(self, outcome: Outcome) -> float:
        """Factor on the limits `ttft` and `tpot` that the share `attainment` of an outcome's requests keeps."""
        limits = {name: self._value(name) for name in ("ttft", "tpot") if self._value(name)}
        if not limits:
            raise SpecError("this metric needs a limit: give the setting `ttft`, `tpot` or both")
        over = [np.nan_to_num(getattr(outcome, name) / limit, nan=0.0) for name, limit in limits.items()]
        return float(np.quantile(np.max(over, axis=0), self._value("attainment")))

    @property
    def replayed_scale(self) -> float:
        """Least factor on both limits, `ttft` and `tpot`, at which `attainment` of the requests keep them at `rate`."""
        return self._scale(self._outcome)

    @cached_property
    def replayed_goodput(self) -> float:
        """Requests per second and device at which `attainment` of the requests keep `ttft` and `tpot`."""
        pools = zip(self._pooled.values(), self._fleet_of.pools, strict=True)
        devices = sum(estimator(s).par.devices * p.replicas for s, p in pools)
        each = float(devices) if self.setting.roles else self.devices
        return _crossing(lambda rate: math.log(self._scale(self._replay(rate)))) / each

    @cached_property
    def replayed_first_rate(self) -> float:
        """Highest rate [1/s] at which the mean first token keeps `ttft`."""
        limit = self._value("ttft")
        if limit <= 0:
            raise SpecError("this metric needs the limit `ttft` on the mean first token")
        return _crossing(lambda rate: math.log(float(self._replay(rate).values("ttft").mean()) / limit))

    @cached_property
    def replayed_rate(self) -> float:
        """Highest rate [1/s] at which nine tenths of the requests keep `per_token` seconds per output token."""
        limit = self._value("per_token")
        if limit <= 0:
            raise SpecError("this metric needs the limit `per_token` on a request's seconds over its output tokens")

        return _crossing(lambda rate: math.log(_per_token(self._replay(rate)) / limit))


def _crossing(over: Callable[[float], float]) -> float:
    """Highest rate at which a rising function is not above 0, to a fiftieth: regula falsi on logarithms (Illinois)."""
    low = high = 0.0  # logarithms
    below = above = over(1.0)
    while above <= 0:
        low, below, high = high, above, high + _STEP
        above = over(math.exp(high))
    while below > 0:
        high, above, low = low, below, low - _STEP
        if low < _LEAST:
            return 0.0
        below = over(math.exp(low))
    side, low_weight, high_weight = 0, below, above
    while high - low > _NEAR:
        share = min(max(low_weight / (low_weight - high_weight), _EDGE), 1 - _EDGE)
        middle = low + share * (high - low)
        found = over(math.exp(middle))
        if found <= 0:
            low, low_weight = middle, found
            high_weight = high_weight / 2 if side < 0 else high_weight
            side = -1
        else:
            high, high_weight = middle, found
            low_weight = low_weight / 2 if side > 0 else low_weight
            side = 1
    return math.exp(low)


def _per_token(outcome: Outcome) -> float:
    return float(np.percentile(outcome.e2e / outcome.output, 90))


def _spread(mean: float, spread: float, longest: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths at even shares of a lognormal of a coefficient of variation, in any order, cut at the longest; `mean` is kept."""
    if spread <= 0:
        return np.full(n, float(mean))
    from scipy.special import ndtri

    found = np.exp(math.sqrt(math.log1p(spread**2)) * ndtri((np.arange(n) + 0.5) / n))
    longest = max(longest, mean)
    scale = mean / found.mean()
    for _ in range(_ROUNDS):
        scale *= mean / np.minimum(scale * found, longest).mean()
    return np.asarray(rng.permutation(np.minimum(scale * found, longest)))
