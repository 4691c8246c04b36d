"""Replay a plan on the requests it was made for, and find the columns that break a promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from perfmodel.planner.pools import FIRST_TOKENS, Pool, answers
from perfmodel.planner.promise import percentile
from perfmodel.planner.transfer import slowest_link
from perfmodel.serving import frontend, prefix
from perfmodel.serving.images import LABEL
from perfmodel.serving.replay import Fleet, Outcome, Settings
from perfmodel.serving.replay import Pool as SimulatedPool
from perfmodel.serving.replay.deploy import embeddings
from perfmodel.serving.requests import Requests
from perfmodel.serving.workload import Bucket, Workload, bucket_of
from perfmodel.spec.choices import Choices
from perfmodel.spec.workload import Limit, Objectives

MOST_REPLAYED = 60_000
"""Requests of one replay: about two seconds."""


@dataclass(frozen=True)
class Replayed:
    """What the replay saw of one pool's requests."""

    pool: Pool
    whole: Outcome
    """Of all pools."""
    mine: np.ndarray
    """Which of its requests are this pool's."""
    weight: float
    """Requests of the workload behind each of them."""

    @cached_property
    def outcome(self) -> Outcome:
        """The requests of this pool alone."""
        return self.whole.take(self.mine)

    def answers_for(self, metric: str) -> bool:
        """Whether this pool decides the metric: prefill pools the first token, decode pools the others."""
        return answers(self.pool.column.layout.role, metric)


def replay(
    chosen: list[Pool], workload: Workload, buckets: list[Bucket], seed: int, choices: Choices
) -> list[Replayed]:
    """Replay the workload's requests on all pools of a plan together, hand-offs included.

    A request goes to a pool of its bucket with the plan's probability. More than MOST_REPLAYED requests are thinned together
    with the instances where every pool can shrink by one factor, and else cut to the busiest part of the window; not so with
    prefix caching, where what is shared meets only if all are there.
    """
    rng = np.random.default_rng(seed)
    requests, factor = workload.requests, 1
    if not choices.prefix_caching:
        requests, factor = _affordable(requests, [x.replicas for x in chosen])
    elif workload.before is not None:
        # What came before fills the caches, and counts for nothing else.
        requests = Requests.join([workload.before, requests])
    found = prefix.uses(requests).cached(math.inf, len(requests)) if "cached" in choices.bucket_by else None
    bucket = bucket_of(buckets, requests, found)
    roles = [x.column.layout.role for x in chosen]
    first = _assign([r in FIRST_TOKENS for r in roles], chosen, bucket, rng)
    later = _assign([r == "decode" for r in roles], chosen, bucket, rng)
    front = frontend.unloaded(chosen[0].column.estimator.engine, requests.input)
    encoders = _encoders(chosen, first, requests, bucket, rng)
    simulated = fleet(chosen, factor, choices, workload.image)
    outcome = simulated.run(requests, seed=seed, front=front, assigned=(first, later, encoders))
    # Requests of colocated pools never reach a decode pool.
    later = np.where(np.array([r == "colocated" for r in roles])[first], -1, later)
    counted = outcome.arrival >= 0
    weight = len(workload.requests) / int(counted.sum())
    place = {"decode": later, "encode": encoders}
    parts = [(x, counted & (place.get(x.column.layout.role, first) == i)) for i, x in enumerate(chosen)]
    return [Replayed(x, outcome, mine, weight) for x, mine in parts if mine.any()]


def _encoders(
    chosen: list[Pool], first: np.ndarray, requests: Requests, bucket: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Place of the encode pool of each request, among those of the share of TTFT that its own pool leaves; -1 for none."""
    found = np.full(len(requests), -1)
    shares = np.array([x.column.layout.encode_share if x.column.layout.fed else 0.0 for x in chosen])[first]
    seen = requests.labels.get(LABEL, np.zeros(len(requests))) > 0
    for share in np.unique(shares[shares > 0]):
        able = [(x.column.layout.role, x.column.layout.encode_share) == ("encode", share) for x in chosen]
        if any(able):
            found = np.where(seen & (shares == share), _assign(able, chosen, bucket, rng), found)
    return found


def fleet(chosen: list[Pool], factor: int, choices: Choices, image: tuple[int, int] | None = None) -> Fleet:
    """The pools as the simulation wants them, with `factor` times fewer instances."""
    decoders = [x.column.estimator for x in chosen if x.column.layout.role == "decode"]
    fed = [x.column.estimator for x in chosen if x.column.layout.fed]
    pools = []
    for x in chosen:
        c, e = x.column, x.column.estimator
        settings = Settings(c.layout.policy, prefix_caching=choices.prefix_caching)
        moved = slowest_link(e, decoders, x.mix) if c.layout.role == "prefill" and decoders else None
        sent = embeddings(e, fed, image) if c.layout.role == "encode" and fed and image is not None else None
        pools.append(SimulatedPool(
            c.instance.clock, c.instance.kv_tokens, x.replicas // factor, c.layout.role, settings,
            handoff=moved, embeddings=sent, tower=getattr(c.instance, "encoder", None),
        ))  # fmt: skip
    return Fleet(tuple(pools), choices.dealt)


def _affordable(requests: Requests, replicas: list[int]) -> tuple[Requests, int]:
    """(requests to replay, factor by which the instances shrink)."""
    wanted = math.ceil(len(requests) / MOST_REPLAYED)
    factor = max((f for f in range(1, wanted + 1) if all(n % f == 0 for n in replicas)), default=1)
    # Every f-th request on one f-th of the instances: each of them sees what it would see of all.
    requests = requests.take(slice(None, None, factor))
    if len(requests) > MOST_REPLAYED:
        lasting = requests.arrival[MOST_REPLAYED - 1 :] - requests.arrival[: len(requests) - MOST_REPLAYED + 1]
        first = int(np.argmin(lasting))
        requests = requests.take(slice(first, first + MOST_REPLAYED))
    return requests, factor


def _assign(able: list[bool], chosen: list[Pool], bucket: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Place of the pool of each request, drawn with the plan's probabilities for its bucket; -1 where no pool is able."""
    rates = np.array([x.rates * ok for x, ok in zip(chosen, able, strict=True)])
    total = rates.sum(axis=0)
    edges = np.cumsum(rates / np.where(total > 0, total, 1), axis=0)
    place = (rng.random(bucket.size)[None, :] >= edges[:, bucket] - 1e-12).sum(axis=0)
    return np.where(total[bucket] > 0, np.minimum(place, max((i for i, ok in enumerate(able) if ok), default=0)), -1)


def replayed_percentile(
    results: list[Replayed], metric: str, p: float, window: float = math.inf, per_token: float = 0.0
) -> float:
    """Percentile over the requests of all pools that decide the metric, in the worst window of that length [s].

    per_token: seconds granted for each input token, which do not count.
    """
    found = together([x for x in results if x.answers_for(metric)])
    return found.worst_window(metric, p, window, per_token)[0] if found is not None else 0.0


def together(parts: list[Replayed]) -> Outcome | None:
    """The requests of some pools of one replay."""
    return parts[0].whole.take(np.any([x.mine for x in parts], axis=0)) if parts else None


Good = Callable[[Outcome], np.ndarray]


def broken(results: list[Replayed], objectives: Objectives) -> list[tuple[Pool, str]]:
    """Pools whose own requests miss a limit, where the plan as a whole misses it; preempted requests count as misses."""
    found: list[tuple[Pool, str]] = []
    for metric, what, p, good in _promises(objectives):
        parts = [x for x in results if x.answers_for(metric)]
        every = together(parts)
        if every is None or every.worst_share(good(every), p, objectives.window) >= p:
            continue
        own = [x for x in parts if x.outcome.worst_share(good(x.outcome), p, objectives.window) < p]
        found += [(pool, what) for x in own or parts for pool in _to_blame(x, good, results)]
    for name, limit in objectives.itl.items():
        parts = [x for x in results if x.answers_for("itl")]
        if parts and parts[0].whole.worst_window("itl", percentile(name), objectives.window)[0] > limit:
            found += [(x.pool, f"itl {name}") for x in parts]
    return found


def _to_blame(x: Replayed, good: Good, results: list[Replayed]) -> list[Pool]:
    """The pool that missed, or the encode pools before it, if most of those misses took longer there than their share."""
    share, o = x.pool.column.layout.encode_share, x.outcome
    if not x.pool.column.layout.fed:
        return [x.pool]
    late = ~good(o) & np.isfinite(o.encoded)
    before = [
        y.pool for y in results if y.pool.column.layout.role == "encode" and y.pool.column.layout.encode_share == share
        and np.any(y.mine & x.mine)
    ]  # fmt: skip
    longer = (o.encoded - o.arrival)[late] > share * o.ttft[late]
    return before if before and longer.sum() > 0.5 * max((~good(o)).sum(), 1) else [x.pool]


def _promises(objectives: Objectives) -> Iterator[tuple[str, str, float, Good]]:
    """(metric whose pools are to blame, what is promised, for which share of requests, which requests keep it)."""
    for metric in ("ttft", "tpot", "longest_gap", "e2e"):
        limits: dict[str, Limit] = getattr(objectives, metric)
        for name, limit in limits.items():
            yield metric, f"{metric} {name}", percentile(name), partial(_keeps, limits={metric: limit})
    joint = objectives.attainment
    if joint is not None:
        for metric in ("ttft", "tpot"):
            yield metric, "attainment", joint.share, partial(_keeps, limits={"ttft": joint.ttft, "tpot": joint.tpot})


def _keeps(outcome: Outcome, limits: dict[str, Limit | None]) -> np.ndarray:
    return outcome.met(**limits)
