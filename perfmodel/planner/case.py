"""A set of buckets on one instance: what it sees at a rate, and the rate at which it just keeps every promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from perfmodel.estimator import Estimator
from perfmodel.planner.layout import Layout
from perfmodel.planner.promise import MOST_PREFILL, Verdict, judge
from perfmodel.planner.reuse import Reuse
from perfmodel.planner.transfer import exposed_per_token
from perfmodel.serving import arrivals, frontend
from perfmodel.serving.clock import StepClock, kv_tokens
from perfmodel.serving.encode import EncodeClock, embedding_seconds, encode_clock
from perfmodel.serving.encode_pool import EncodeInstance, FedInstance
from perfmodel.serving.images import image_tokens
from perfmodel.serving.modes import WholeClock, WholeInstance
from perfmodel.serving.queueing import MOST_DISPERSED, Instance, Mix
from perfmodel.serving.replay.routing import Affinity
from perfmodel.serving.split import Sides, SplitClock, SplitInstance
from perfmodel.serving.static_batch import StaticInstance
from perfmodel.serving.workload import Bucket, Workload
from perfmodel.spec.deployment import Routing
from perfmodel.spec.workload import Objectives

_IDLE = 1e-4
WHOLE_LOAD = "the whole load"
"""What limits a column that could carry more than there is."""
_STRIDE = 1.3
_STEEP, _LEAST_EXCESS = 8.0, 0.2
"""First strides: from nowhere; from a rate that something like it has, as far as its misses tell: they grow about with the
eighth power of the rate."""
_HALVINGS = 8
_PRECISION = 1.02
_TIGHT = 0.02
"""A rate is high enough once one promise has no more than this share of its permitted misses left."""
_FEWEST = 1e-3
"""Misses over those permitted, below which no fewer count: a law's tail says little of where its limit lies."""
_AFFINE = Affinity().least_match
"""Share of a prompt that an instance must have seen for a router to send it there."""


def bucket_mix(buckets: list[Bucket], chosen: tuple[int, ...], weights: np.ndarray | None = None) -> Mix:
    """Joint lengths of some buckets, weighted by their shares (or by given rates)."""
    shares = np.array([b.share for b in buckets]) if weights is None else weights
    inputs = np.concatenate([buckets[k].input for k in chosen])
    outputs = np.concatenate([buckets[k].output for k in chosen])
    weight = np.concatenate([np.full(buckets[k].input.size, shares[k] / buckets[k].input.size) for k in chosen])
    seen = [buckets[k].images for k in chosen]
    images = None if any(x is None for x in seen) else np.concatenate([x for x in seen if x is not None])
    return Mix(inputs, outputs, weight / weight.sum(), images=images)


@dataclass(frozen=True)
class Case:
    """A set of buckets on one instance: what it sees at a rate, and the rate at which it just keeps every promise."""

    instance: Instance
    estimator: Estimator
    buckets: list[Bucket]
    chosen: tuple[int, ...]
    workload: Workload
    objectives: Objectives
    reuse: Reuse | None
    routing: Routing = "round-robin"

    def dispersion(self, instances: float) -> float:
        """Squared CV of the gaps between requests at one of so many instances, as far as the closed forms reach.

        Beyond that they are only where the search begins, and replay decides (run.py).
        """
        return min(arrivals.dealt(self.workload.dispersion, instances, self.by_chance), MOST_DISPERSED)

    @property
    def by_chance(self) -> float:
        """Share of the requests whose instance owes nothing to what the others hold: the router's dice, or a prompt's prefix.

        Prompts of which less than the router asks for was seen before go where least waits, as evenly as dealt in turn.
        """
        if self.routing == "random":
            return 1.0
        if self.routing != "prefix-affine" or self.reuse is None:
            return 0.0
        shares = np.array([self.buckets[k].share for k in self.chosen])
        mine = [self.buckets[k] for k in self.chosen]
        return float(shares @ [np.mean(_cached(b) >= _AFFINE * b.input) for b in mine] / shares.sum())

    @property
    def most(self) -> float:
        """Requests per second of these buckets together."""
        return self.workload.rate * sum(self.buckets[k].share for k in self.chosen)

    def replicas(self, rate: float) -> float:
        """Instances among which the buckets are dealt at so many requests per second each."""
        return max(1.0, self.most / rate) if rate > 0 else 1.0

    def mix(self, rate: float) -> Mix:
        """Lengths of the requests, with what the prefix cache beside the running batch holds of them."""
        return self.seen(bucket_mix(self.buckets, self.chosen), self.chosen, rate)

    def seen(self, mix: Mix, served: tuple[int, ...], rate: float) -> Mix:
        """A mix of the buckets `served` at `rate` per instance, with its cached tokens.

        A prefix is found whole or not at all, so every point becomes two: found with the bucket's chance, and not. Running
        requests have the first right to memory, so the cache has what they leave; two rounds settle that.
        """
        if self.reuse is None or self.instance.role == "decode":
            return mix
        ideal = np.concatenate([_cached(self.buckets[k]) for k in served])
        owner = self.owner(served)[: mix.input.size]
        # Prompt tokens that reach one instance, as a share of all: what its cache must keep.
        tokens = max(rate, _IDLE) * mix.mean(mix.input)
        parts = max(self.workload.rate * sum(b.share * float(b.input.mean()) for b in self.buckets) / tokens, 1.0)
        found = np.concatenate([np.minimum(ideal, mix.input - 1), np.zeros_like(ideal)])
        twice = Mix(np.tile(mix.input, 2), np.tile(mix.output, 2), np.tile(mix.weight, 2), found)
        left = self.instance.kv_tokens
        for _ in range(2):
            chance = self.reuse.share(left, parts)[owner]
            whole = replace(twice, weight=np.concatenate([mix.weight * chance, mix.weight * (1 - chance)]))
            s = self.instance.state(max(rate, _IDLE), whole)
            left = self.instance.kv_tokens * max(1 - s.kv_share, 0.0) if s.feasible else 0.0
        return whole

    def owner(self, served: tuple[int, ...]) -> np.ndarray:
        """Bucket of each point of a mix of these buckets, points with found prefixes first."""
        one = np.repeat(served, [self.buckets[k].input.size for k in served])
        return one if self.reuse is None or self.instance.role == "decode" else np.concatenate([one, one])

    def judge(self, rate: float) -> Verdict:
        """The promise that breaks at a rate, or comes nearest to it.

        Prefix affinity gives the busiest instance more than its share.
        """
        mix, replicas = self.mix(rate), self.replicas(rate)
        uneven = self.reuse.imbalance(replicas) if self.reuse else 1.0
        s = self.instance.state(rate * uneven, mix)
        dispersion = self.dispersion(math.floor(replicas))
        return judge(self.instance, s, mix, self.objectives, dispersion, self.estimator.engine)

    def highest_rate(self, guess: float = 0.0) -> tuple[float, str]:
        """Highest rate at which every promise is kept (0: none), and what breaks beyond it. guess: where it may lie."""
        most, beyond = self.most, WHOLE_LOAD
        mix = self.mix(0.0)
        if self.instance.role not in ("decode", "encode") and self.estimator.engine.frontend is not None:
            carried = frontend.rate_bound(self.estimator.engine, mix.mean(mix.input), mix.mean(mix.output))
            if carried < most:
                most, beyond = carried, "the engine's front end"
        low = high = min(guess or self._lasting(most), most)
        verdict = self.judge(high)
        # From the guess outwards, in growing strides, until one rate holds and a higher one does not.
        above = below = verdict
        stride = _STRIDE
        if guess and math.isfinite(verdict.slack):
            stride = min(math.exp(max(abs(_excess(verdict)), _LEAST_EXCESS) / _STEEP), _STRIDE)
        while not above.broken:
            if high >= most:
                return most, beyond
            low, below = high, above
            high, stride = min(high * stride, most), stride * stride
            above = self.judge(high)
        if below.broken and not guess and self.judge(_IDLE).broken:
            return 0.0, ""
        while below.broken:
            if low <= _IDLE:
                return 0.0, ""
            high, above = low, below
            low, stride = max(low / stride, _IDLE), stride * stride
            below = self.judge(low)
        return self._between(low, below, high, above)

    def _lasting(self, most: float) -> float:
        """Half of the highest rate at which a steady state exists: where to look first. A state costs little beside its laws."""
        mix = self.mix(0.0)
        if isinstance(self.instance, StaticInstance):
            return min(most, self.instance.most_promised(mix))

        def lasts(rate: float) -> bool:
            s = self.instance.state(rate, mix)
            return s.feasible and s.utilisation <= MOST_PREFILL

        low, high = 0.0, most
        if lasts(most):
            return most
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if lasts(middle) else (low, middle)
        return max(low, high / 2) / 2

    def _between(self, low: float, below: Verdict, high: float, above: Verdict) -> tuple[float, str]:
        """The rate where the misses are those permitted, by secants kept inside the bracket (Illinois method), in logarithms."""
        left, right = _excess(below), _excess(above)
        while high > low * _PRECISION and below.slack > _TIGHT:
            part = left / (left - right) if math.isfinite(right) and math.isfinite(left) else 0.5
            trial = low * (high / low) ** min(max(part, 0.1), 0.9)
            verdict = self.judge(trial)
            if verdict.broken:
                high, above, right, left = trial, verdict, _excess(verdict), left / 2
            else:
                low, below, left, right = trial, verdict, _excess(verdict), right / 2
        return low, above.name


def _excess(verdict: Verdict) -> float:
    """Logarithm of the misses over those permitted: about linear in that of the rate."""
    return math.log(max(1 - verdict.slack, _FEWEST))


def _cached(bucket: Bucket) -> np.ndarray:
    return np.zeros(bucket.input.shape) if bucket.cached is None else bucket.cached


def serving_instance(
    built: tuple[Estimator, StepClock], layout: Layout, mix: Mix, image: tuple[int, int] | None = None
) -> Instance:
    """What answers for a layout's percentiles. image: pixels of the images that prompts hold, height and width."""
    e, clock = built
    if isinstance(clock, EncodeClock):
        # These three answer to the same calls as an Instance.
        return cast(Instance, EncodeInstance(clock, layout.encode_share))
    room = kv_tokens(e, mix.context)
    if isinstance(clock, SplitClock):
        return cast(Instance, SplitInstance(Sides(e, mix.context, layout.prefill_share), room))
    if layout.policy == "static":
        return cast(Instance, StaticInstance(clock, room, clock.max_batch))
    if layout.fed:
        assert image is not None
        tokens = image_tokens(e.model, *image)[1]
        alone, one = (float(embedding_seconds(e, e, n)) for n in (0, tokens))
        return FedInstance(clock, layout.role, room, share=layout.encode_share, arrival=alone, per_image=one - alone)
    exposed = exposed_per_token(e, clock, mix) if layout.role == "decode" else 0.0
    encoder = encode_clock(e, image) if image is not None and layout.role != "decode" else None
    return (WholeInstance if isinstance(clock, WholeClock) else Instance)(clock, layout.role, room, exposed, encoder)
