"""From a deployment to a fleet that can be replayed: estimators, clocks, cache sizes, hand-off, front end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from perfmodel import memory
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving import frontend, handoff
from perfmodel.serving.clock import kv_tokens
from perfmodel.serving.modes import policy_clock
from perfmodel.serving.queueing import Mix
from perfmodel.serving.replay.fleet import Fleet, Pool
from perfmodel.serving.replay.handoff import Handoff
from perfmodel.serving.replay.prefix import Tier
from perfmodel.serving.replay.settings import Settings
from perfmodel.serving.requests import Requests
from perfmodel.spec.deployment import Deployment, PoolSpec


@dataclass(frozen=True)
class TierSpec:
    """A slower memory of every instance: capacity [byte] and fetch bandwidth [byte/s]."""

    name: str
    size: float
    bandwidth: float


@dataclass(frozen=True)
class Extras:
    """What a replay may add to a deployment."""

    swap_bandwidth: float | None = None
    """Preempted caches move to host memory at this rate [byte/s] and back; None: they are recomputed."""
    timeout: float = float("inf")
    tiers: tuple[TierSpec, ...] = ()
    fetch_overlaps: bool = True


@dataclass(frozen=True)
class Deployed:
    """A fleet, and what it is made of."""

    fleet: Fleet
    estimators: tuple[Estimator, ...]
    """Of each pool."""

    @property
    def devices(self) -> int:
        """Devices of all instances."""
        counts = [int(e.par.devices) * p.replicas for e, p in zip(self.estimators, self.fleet.pools, strict=True)]
        return sum(counts)

    def front(self, requests: Requests) -> np.ndarray:
        """Seconds of each request outside the engine's steps, without load (`frontend.ttft_overhead`)."""
        return frontend.unloaded(self.estimators[0].engine, requests.input)


def deploy(
    d: Deployment, requests: Requests, extras: Extras | None = None, progress: Callable[[str], None] | None = None
) -> Deployed:
    """Build the pools of a deployment for the lengths of some requests.

    Raises Infeasible where the weights do not fit, SpecError for what replay cannot simulate.
    """
    extras = extras or Extras()
    ones = np.full(len(requests), 1 / len(requests))
    context = Mix(requests.input.astype(float), requests.output.astype(float), ones).context
    estimators = []
    for pool in d.pools:
        if progress is not None:
            progress(f"{d.model} on {pool.hardware}")
        estimators.append(_estimator(d, pool))
    pools = [_pool(d, p, e, context, requests, extras) for p, e in zip(d.pools, estimators, strict=True)]
    decodes = [e for p, e in zip(d.pools, estimators, strict=True) if p.role == "decode"]
    for i, (p, e) in enumerate(zip(d.pools, estimators, strict=True)):
        if p.role == "prefill" and decodes:
            pools[i] = replace(pools[i], handoff=link(e, decodes[0], float(requests.input.mean())))
    return Deployed(Fleet(tuple(pools), d.routing), tuple(estimators))


def _estimator(d: Deployment, p: PoolSpec) -> Estimator:
    if p.role == "encode":
        raise SpecError("replay does not simulate encode pools: traces do not say what images requests carry")
    e = Estimator(
        d.model, p.hardware, tp=p.tp, pp=p.pp, dp=p.dp, cp=p.cp, ep=p.ep, engine=d.engine, weight_dtype=p.weight_dtype,
        kv_dtype=p.kv_dtype, mem_fraction=d.mem_fraction,
    )  # fmt: skip
    e.require_fit()
    return e


def _pool(d: Deployment, p: PoolSpec, e: Estimator, context: float, requests: Requests, extras: Extras) -> Pool:
    clock = policy_clock(
        e, context, p.policy, chunk=p.chunk, max_batch=p.max_batch, longest=float(requests.input.max()),
        prefill_share=p.prefill_share,
    )  # fmt: skip
    whole = float(memory.kv_bytes_per_token(e.model, e.formats))
    tiers = tuple(Tier(t.name, t.size / whole, whole / t.bandwidth) for t in extras.tiers)
    swap = None if extras.swap_bandwidth is None else whole / extras.swap_bandwidth
    settings = Settings(
        p.policy, swap_seconds_per_token=swap, timeout=extras.timeout, prefix_caching=d.prefix_caching, tiers=tiers,
        fetch_overlaps=extras.fetch_overlaps,
    )
    routes = tuple((*r.input_tokens, r.share) for r in p.routes)
    return Pool(clock, kv_tokens(e, context), p.replicas, p.role, settings, p.input_tokens, p.share, routes)


def link(prefill: Estimator, decode: Estimator, tokens: float) -> Handoff:
    """Hand-off between two pools in the numbers a replay needs, at a typical prompt (`serving.handoff.handoff`)."""
    found = handoff.handoff(prefill, decode, np.array([tokens]), np.zeros(1), overlapped=False)
    seconds = float(found.link_s[0])
    layers = max(1, prefill.model.n_layers // int(prefill.par.pp))
    block = min(prefill.engine.block_tokens, decode.engine.block_tokens)
    return Handoff(seconds / tokens, float(found.exposed_s[0]) - seconds, block, layers)
