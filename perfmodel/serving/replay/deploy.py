"""From a deployment to a fleet that can be replayed: estimators, clocks, cache sizes, hand-off, front end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perfmodel import memory
from perfmodel.catalog import load_model
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.serving import frontend, handoff
from perfmodel.serving.clock import kv_tokens
from perfmodel.serving.encode import BOUNDLESS, embedding_seconds, encode_clock
from perfmodel.serving.images import LABEL, image_tokens
from perfmodel.serving.modes import policy_clock
from perfmodel.serving.queueing import Mix
from perfmodel.serving.replay.encoder import Embeddings
from perfmodel.serving.replay.fleet import Fleet, Pool
from perfmodel.serving.replay.handoff import Handoff
from perfmodel.serving.replay.prefix import Tier
from perfmodel.serving.replay.settings import Settings
from perfmodel.serving.requests import Requests, check_positions
from perfmodel.spec.deployment import Deployment, PoolSpec
from perfmodel.techniques.base import beforehand

_MOST_INSTANCES = 100_000  # each takes memory of its own


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
    image: tuple[int, int] | None = None
    """Pixels of the images that requests carry, height and width; None: the deployment's."""


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
    check_positions(requests, load_model(d.model))
    if (instances := sum(p.replicas for p in d.pools)) > _MOST_INSTANCES:
        raise SpecError(f"{instances:,} instances are more than the {_MOST_INSTANCES:,} that replay simulates")
    ones = np.full(len(requests), 1 / len(requests))
    context = Mix(requests.input.astype(float), requests.output.astype(float), ones).context
    estimators = []
    for pool in d.pools:
        if progress is not None:
            progress(f"{d.model} on {pool.hardware}")
        estimators.append(_estimator(d, pool))
    pools = [_pool(d, p, e, context, requests, extras) for p, e in zip(d.pools, estimators, strict=True)]
    decodes = [e for p, e in zip(d.pools, estimators, strict=True) if p.role == "decode"]
    fed = [e for p, e in zip(d.pools, estimators, strict=True) if d.fed(p)]
    for i, (p, e) in enumerate(zip(d.pools, estimators, strict=True)):
        if p.role == "encode" and fed:
            image = extras.image or d.image
            assert image is not None
            pools[i] = replace(pools[i], embeddings=embeddings(e, fed, image))
        if p.role == "prefill" and decodes:
            near = _one_node(d, estimators)
            pools[i] = replace(pools[i], handoff=link(e, decodes[0], float(requests.input.mean()), same_node=near))
    return Deployed(Fleet(tuple(pools), d.routing), tuple(estimators))


def _estimator(d: Deployment, p: PoolSpec) -> Estimator:
    e = Estimator(
        d.model, p.hardware, tp=p.tp, pp=p.pp, dp=p.dp, cp=p.cp, ep=p.ep, engine=d.engine, weight_dtype=p.weight_dtype,
        kv_dtype=p.kv_dtype, mem_fraction=d.mem_fraction, techniques=p.techniques,
    )  # fmt: skip
    e.model.require_next_token()
    if kind := beforehand(e.techniques):
        raise SpecError(
            f"a replay finds cached prompt tokens itself (prefix_caching: true), and knows no other look-ups, waits or stored "
            f"answers; leave {kind} out of the techniques"
        )
    if p.role != "encode":
        e.require_fit()
    return e


def _pool(d: Deployment, p: PoolSpec, e: Estimator, context: float, requests: Requests, extras: Extras) -> Pool:
    image = extras.image or d.image
    if p.role == "encode":
        if image is None:
            raise SpecError("an encode pool needs to know how large images are: `image: [height, width]`, or --image")
        return Pool(encode_clock(e, image), BOUNDLESS, p.replicas, p.role, input_tokens=p.input_tokens, share=p.share,
                    routes=tuple((*r.input_tokens, r.share) for r in p.routes))  # fmt: skip
    seen = image is not None and LABEL in requests.labels and bool(requests.labels[LABEL].any())
    tower = encode_clock(e, image) if image is not None and seen and p.role != "decode" and not d.fed(p) else None
    clock = policy_clock(
        e, context, p.policy, chunk=p.chunk, max_batch=p.max_batch, longest=float(requests.input.max()),
        prefill_share=p.prefill_share,
    )  # fmt: skip
    whole = float(memory.kv_bytes_per_token(e.model, e.formats, max(context, 1.0)))
    tiers = tuple(Tier(t.name, t.size / whole, whole / t.bandwidth) for t in extras.tiers)
    swap = None if extras.swap_bandwidth is None else whole / extras.swap_bandwidth
    settings = Settings(
        p.policy, swap_seconds_per_token=swap, timeout=extras.timeout, prefix_caching=d.prefix_caching, tiers=tiers,
        fetch_overlaps=extras.fetch_overlaps,
    )
    routes = tuple((*r.input_tokens, r.share) for r in p.routes)
    return Pool(clock, kv_tokens(e, context), p.replicas, p.role, settings, p.input_tokens, p.share, routes, tower=tower)


def embeddings(encode: Estimator, fed: Sequence[Estimator], image: tuple[int, int]) -> Embeddings:
    """An encode pool's link as a replay shares it, to the pool that takes longest (`serving.encode.embedding_seconds`)."""
    tokens = image_tokens(encode.model, *image)[1]
    alone, one = (max(float(embedding_seconds(encode, e, n)) for e in fed) for n in (0, tokens))
    return Embeddings(one - alone, alone)


def _one_node(d: Deployment, estimators: Sequence[Estimator]) -> bool:
    """Whether all instances of a deployment stand in one node, so that caches move over its links."""
    m = estimators[0].machine
    devices = sum(p.replicas * int(e.par.devices) for p, e in zip(d.pools, estimators, strict=True))
    return {e.machine.name for e in estimators} == {m.name} and devices <= m.devices_per_node


def link(prefill: Estimator, decode: Estimator, tokens: float, *, same_node: bool = False, block_tokens: int = 0) -> Handoff:
    """Hand-off between two pools in the numbers a replay needs, at a typical prompt (`serving.handoff.handoff`)."""
    found = handoff.handoff(
        prefill, decode, np.array([tokens]), np.zeros(1), same_node=same_node, overlapped=False, block_tokens=block_tokens
    )
    seconds = float(found.link_s[0])
    layers = max(1, prefill.model.n_layers // int(prefill.par.pp))
    block = block_tokens or min(prefill.engine.block_tokens, decode.engine.block_tokens)
    return Handoff(seconds / tokens, float(found.exposed_s[0]) - seconds, block, layers)
