"""Moving a prompt's cache from the instance that prefilled it to the one that decodes it.

Layer by layer, while later layers and chunks still compute (Splitwise, arXiv:2311.18677, 4.2; Mooncake,
arXiv:2407.00079, 5.2), in messages of one block of one layer, re-sharded between the ranks of both sides, and held on the
prefill side until the other acknowledges. A link takes the longer of its bytes over its rate and its messages times
`transfer_message`, the time to post one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from perfmodel import collectives, memory
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import cache_residency
from perfmodel.machine import Machine
from perfmodel.ops.shard import Parallelism


@dataclass(frozen=True)
class Handoff:
    """Per request [request]."""

    bytes: np.ndarray
    """Over all links together; caches that several receiving ranks keep whole count for each of them."""
    link_s: np.ndarray
    """Seconds the busiest link (a sender's or a receiver's port) works."""
    exposed_s: np.ndarray
    """From the end of prefill until decode can begin, on idle links."""
    held_token_s: np.ndarray
    """Cached token-seconds that prefill keeps after it has ended, until the acknowledgement."""
    message_bytes: float
    """One block of the keys, the values, the latent or the state of one layer, between one sender and one receiver."""
    senders: int
    receivers: int

    def wait(self, rate: float, weight: np.ndarray | None = None, dispersion: float = 1.0) -> tuple[float, float]:
        """(utilisation of the busiest link, mean seconds a hand-off waits for others) at `rate` of these per second.

        M/G/1: rate E[X^2] / (2 (1 - u)), times (dispersion + c^2)/(1 + c^2) for bursts (Allen-Cunneen), X the link
        seconds and c their coefficient of variation. rate: of one instance. Infinite at u >= 1.
        """
        share = np.full(self.link_s.shape, 1 / self.link_s.size) if weight is None else weight
        first, second = float(share @ self.link_s), float(share @ self.link_s**2)
        u = rate * first
        if u >= 1:
            return u, float("inf")
        spread = max(second / max(first**2, 1e-30) - 1, 0.0)
        return u, rate * second / (2 * (1 - u)) * (dispersion + spread) / (1 + spread)


@dataclass(frozen=True)
class Path:
    """Between the two sides: bytes/s of one sending and of one receiving device, seconds of one way."""

    send: float
    receive: float
    latency: float


def handoff(
    prefill: Estimator, decode: Estimator, inputs: np.ndarray, prefill_seconds: np.ndarray, *,
    same_node: bool = False, overlapped: bool = True, block_tokens: int = 0,
) -> Handoff:  # fmt: skip
    """Hand-off of prompts of `inputs` tokens whose prefill steps last `prefill_seconds` [both per request].

    same_node: both instances share a node and its links; else over the network. overlapped: layer by layer beside the
    prefill; else after it. block_tokens: of a message; 0: the smaller block of the two engines.
    Raises SpecError where the two cannot exchange a cache: other models or formats, no path, too many devices for a node.
    """
    _check(prefill, decode)
    path = _inside(prefill, decode) if same_node else network_path(prefill.machine, decode.machine)
    sides = [replace(x.par, dp=1) for x in (prefill, decode)]
    senders, receivers = (int(p.devices) for p in sides)
    tokens = np.asarray(inputs, float)
    received = np.asarray(memory.cache_bytes(decode.model, sides[1], decode.formats, 1, tokens), float)
    moved = received * receivers
    block = block_tokens or min(prefill.engine.block_tokens, decode.engine.block_tokens)
    message = _message_bytes(prefill, sides[0], sides[1], float(np.mean(tokens)), block)
    post = float(prefill.machine.law["transfer_message"])
    link = np.maximum(
        np.maximum(moved / senders / path.send, received / path.receive),
        np.maximum(moved / senders, received) / message * post,
    )
    exposed = path.latency + (_behind(prefill, tokens, link, prefill_seconds) if overlapped else link)
    # The acknowledgement travels back once.
    return Handoff(moved, link, exposed, tokens * (exposed + path.latency), message, senders, receivers)


def _check(prefill: Estimator, decode: Estimator) -> None:
    if prefill.model.name != decode.model.name:
        raise SpecError(f"prefill runs {prefill.model.name} and decode {decode.model.name}: their caches differ")
    ours, theirs = prefill.formats.kv.name, decode.formats.kv.name
    if ours != theirs:
        raise SpecError(f"prefill caches in {ours} and decode in {theirs}; give both pools one --kv-dtype")


def network_path(prefill: Machine, decode: Machine) -> Path:
    """Over the network: each device's share of its node's adapters; the slower side's adapters set the latency."""
    for m in (prefill, decode):
        if not m.network:
            raise SpecError(f"{m.name} has no network to hand a cache over; pools in one node can use its links")
    rates = [float(m.network * m.network_efficiency) for m in (prefill, decode)]
    return Path(rates[0], rates[1], float(max(prefill.network_latency, decode.network_latency)))


def _inside(prefill: Estimator, decode: Estimator) -> Path:
    """Over the links of one node, among the devices of both instances."""
    m, devices = prefill.machine, int(prefill.par.devices + decode.par.devices)
    if m.name != decode.machine.name:
        raise SpecError(f"{m.name} and {decode.machine.name} are different nodes: their pools meet over the network")
    if devices > m.devices_per_node:
        raise SpecError(f"both instances take {devices} devices, and {m.name} has {m.devices_per_node}")
    rate, hop = collectives.path(m, devices)
    return Path(float(rate), float(rate), float(hop))


def _message_bytes(e: Estimator, sender: Parallelism, receiver: Parallelism, tokens: float, block: int) -> float:
    """Mean bytes of a message over the layers of a prompt of `tokens` tokens.

    What one sender has for one receiver: the narrower shard of the two. Keys and values are two tensors.
    """
    sizes = [cache_residency(e.model, replace(p, pp=1, cp=1), e.formats, 1, tokens) for p in (sender, receiver)]
    blocks = max(tokens / block, 1.0)
    total = messages = 0.0
    for mine, theirs in zip(*sizes, strict=True):
        name = mine.name.split(".")[0]
        tensors = 2 if mine.name.endswith(".kv") else 1
        total += min(float(mine.bytes), float(theirs.bytes))
        messages += e.model.block_counts()[name] * tensors * (blocks if mine.tensor == "kv" else 1.0)
    return total / messages


def _behind(e: Estimator, tokens: np.ndarray, link: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds that the transfer ends after the prefill that feeds it.

    A device has n chunks x L layers to send, ready at equal intervals while its stage works: the last starts when it is
    ready or when the others are through, whichever is later. A stage works n of the n + pp - 1 rounds of a pipeline.
    """
    chunks = np.ceil(tokens / e.engine.chunk_tokens)
    units = chunks * np.ceil(e.model.n_layers / e.par.pp)
    working = np.asarray(seconds, float) * chunks / (chunks + e.par.pp - 1)
    return np.maximum(link / units, link - working * (units - 1) / units)
