"""Instances on both sides of an encode pool, asked as `queueing.Instance` is; each answers for its share of a TTFT limit.

A request's TTFT is its wait and pass at the encode instance, the hand-off of its embeddings, and its wait and prefill. The
two queues are in pools that are chosen apart, so a limit is split: a share f is the encode pool's, 1 - f the other's. Both
keep to their parts with probability sqrt(p), so the sum keeps to the limit with p, queues taken as independent.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from perfmodel.serving.encode import BOUNDLESS, EncodeClock
from perfmodel.serving.queueing import Instance, Mix, State, invert

_FEWEST = 4
_Limit = float | np.ndarray


@dataclass(frozen=True, eq=False)
class EncodeInstance:
    """An instance of an encode pool. It is asked about whole requests; those without images pass it by."""

    clock: EncodeClock
    share: float
    """Of a TTFT limit."""
    role: str = "encode"
    kv_tokens: float = BOUNDLESS
    handoff: float = 0.0

    def state(self, rate: float, mix: Mix) -> State:
        """Steady state at `rate` requests per second, those without images included; `work` is zero for these."""
        found, seen = _queue(self.clock).state(rate * _seen(mix)[2], _seen(mix)[0]), _seen(mix)[1]
        work = np.zeros(mix.input.shape)
        work[seen] = found.work
        return replace(found, rate=rate, work=work)

    def refused(self, s: State, mix: Mix, dispersion: float = 1.0) -> str:
        """Why the closed forms do not hold at a state (replay decides there); empty where they do."""
        images, _, part = _seen(mix)
        return _queue(self.clock).refused(_inner(self, s, mix), images, _thinned(dispersion, part))

    def ttft_shares(self, limit: _Limit, s: State, mix: Mix, dispersion: float = 1.0) -> np.ndarray:
        """P(embeddings ready within this pool's share of a TTFT limit) of each request of the mix."""
        return self.part_shares(self.share * np.asarray(limit), s, mix, dispersion)

    def part_shares(self, seconds: _Limit, s: State, mix: Mix, dispersion: float = 1.0) -> np.ndarray:
        """P(embeddings ready within so many seconds) of each request of the mix; one without images is at once."""
        images, seen, part = _seen(mix)
        limits = np.broadcast_to(np.asarray(seconds, float), mix.input.shape)
        found = (limits >= 0).astype(float)
        found[seen] = _queue(self.clock).ttft_shares(limits[seen], _inner(self, s, mix), images, _thinned(dispersion, part))
        return found

    def ttft_met(self, limit: _Limit, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Share of the requests that leave within this pool's share of a TTFT limit."""
        return mix.mean(self.ttft_shares(limit, s, mix, dispersion))

    def ttft_quantile(self, p: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Seconds within which a share p of the requests leave."""
        return invert(lambda t: mix.mean(self.part_shares(t, s, mix, dispersion)), p, mix.mean(s.work))

    def tpot_quantile(self, p: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        return 0.0


@dataclass(frozen=True, eq=False)
class FedInstance(Instance):
    """An instance that prefills embeddings from an encode pool. `share`: of a TTFT limit, which is the encode pool's."""

    share: float = 0.0
    arrival: float = 0.0
    """Seconds that embeddings take to come, beside those of each image."""
    per_image: float = 0.0

    def hop(self, mix: Mix) -> np.ndarray:
        """Seconds that each request's embeddings take to come."""
        if mix.images is None:
            return np.zeros(mix.input.shape)
        return np.where(mix.images > 0, self.arrival + self.per_image * mix.images, 0.0)

    def ttft_shares(self, limit: _Limit, s: State, mix: Mix, dispersion: float = 1.0) -> np.ndarray:
        """P(embeddings come and prefill ends within this side's share of a TTFT limit) of each request of the mix."""
        return self.part_shares((1 - self.share) * np.asarray(limit), s, mix, dispersion)

    def part_shares(self, seconds: _Limit, s: State, mix: Mix, dispersion: float = 1.0) -> np.ndarray:
        """P(embeddings come and prefill ends within so many seconds of their leaving) of each request of the mix."""
        return super().ttft_shares(seconds - self.hop(mix), s, mix, dispersion)

    def ttft_quantile(self, p: float, s: State, mix: Mix, dispersion: float = 1.0) -> float:
        """Seconds within which a share p of requests have their first token, from when their embeddings leave."""
        start = self.mean_ttft(s, mix, dispersion)
        return invert(lambda t: mix.mean(self.part_shares(t, s, mix, dispersion)), p, start)


@lru_cache(maxsize=256)
def _queue(clock: EncodeClock) -> Instance:
    """The queue of an encode instance, whose inputs are images.

    The law tells a pass's own time from its images' by passes of a quarter and of the whole budget, so a budget of a few images
    counts as one of four: their passes one after the other take as long.
    """
    if clock.chunk < _FEWEST:
        clock = copy.copy(clock)
        clock.chunk = _FEWEST
    return Instance(clock, "prefill", BOUNDLESS)


@lru_cache(maxsize=256)
def _seen(mix: Mix) -> tuple[Mix, np.ndarray, float]:
    """(the requests with images, their input the number of them; which they are; their share)."""
    images = np.zeros(mix.input.shape) if mix.images is None else mix.images
    seen = images > 0
    part = float(mix.weight[seen].sum())
    return Mix(images[seen], np.ones(int(seen.sum())), mix.weight[seen] / (part or 1.0)), seen, part


@lru_cache(maxsize=256)
def _inner(instance: EncodeInstance, s: State, mix: Mix) -> State:
    _, seen, part = _seen(mix)
    return replace(s, rate=s.rate * part, work=s.work[seen])


def _thinned(dispersion: float, part: float) -> float:
    """Squared CV of the gaps between those requests of a stream that carry images, by chance a share of them."""
    return 1 + part * (dispersion - 1)
