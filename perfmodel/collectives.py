"""Seconds of collectives and expert exchanges: start + hops + bytes in chunks, by the fastest algorithm there is."""

from __future__ import annotations

import numpy as np

from perfmodel.machine import Machine
from perfmodel.symbols import Num

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
# Ranks up to which a library chains all ranks; beyond it chains of this length meet in a tree.
_CHAIN = 8
# A copy to one peer passes half the stages of a collective, whose ranks receive and send on.
_COPY = 0.5
# Warps of a full thread block.
_WARPS = 32


def in_node(ranks: Num, stride: Num, m: Machine) -> Num:
    """How many of a group's ranks share a node. A device without node or network meets the others on its own port."""
    if m.node is None and not m.network:
        return ranks
    return np.minimum(ranks, np.maximum(m.devices_per_node / stride, 1))


def collective_seconds(
    kind: str, message: Num, sent: Num, ranks: Num, m: Machine, local: Num, *, library: bool = False
) -> Num:
    """Time [s] of one collective of `message` bytes over `ranks` devices of which each sends `sent` bytes.

    `local` ranks share a node. `library`: a general library (NCCL) alone; else the engine's own kernels, which read
    peer memory directly, compete with it. Conventions of `message` are those of `ops.collective`.
    """
    inside = _inside(kind, message, sent, ranks, m, library)
    if not np.any(ranks > local):
        return inside
    return np.where(ranks > local, _across(kind, message, sent, ranks, m, local), inside)


def fewest_bytes(kind: str, message: Num, sent: Num, ranks: Num, m: Machine, local: Num) -> Num:
    """Bytes each device must put on the slowest path whatever the algorithm: NIC across nodes, else the link."""
    if not np.any(ranks > local):
        # A switch that adds sends every device's buffer up once.
        return np.minimum(sent, message) if kind == "all_reduce" and m.in_switch else sent
    remote = ranks / local
    match kind:
        case "p2p":
            return message
        case "all_to_all":
            return sent * (ranks - local) / (ranks - 1)
        case "all_reduce":
            return 2 * (remote - 1) / remote * message / local
        case _:
            return (remote - 1) / remote * message / local


def path(m: Machine, ranks: Num) -> tuple[Num, Num]:
    """Achieved bytes/s per device and direction, and seconds of one hop, among `ranks` devices of a node.

    A mesh lends a group only the links between its members; of bridged pairs, groups beyond two meet over PCIe;
    without peer-to-peer copies every byte passes host memory, down one queue and up another.
    """
    rate, hop = m.link * m.link_efficiency, m.link_latency
    if not m.p2p:
        staged = m.host_link * m.law["staging_efficiency"]
        # A device without any port is alone, and what it would exchange is nothing.
        return np.where(staged > 0, staged, np.inf), 2 * hop
    topology = _topology(m)
    if topology == "mesh":
        return rate * np.minimum((np.maximum(ranks, 2) - 1) / (m.devices_per_node - 1), 1), hop
    if topology == "pairs":
        bridged = np.asarray(ranks) <= 2
        return np.where(bridged, rate, m.host_link * m.link_efficiency), np.where(bridged, hop, 2 * hop)
    return rate, hop


def _topology(m: Machine) -> str:
    """Of the node; cards without one join in pairs by NVLink bridges, other devices through a switch."""
    if m.node is not None:
        return m.node.fabric.topology
    port = m.device.links.get("scale_up")
    bridged = m.device.form_factor == "pcie" and port is not None and port.technology.startswith("nvlink")
    return "pairs" if bridged else "switch"


def _chunked(seconds: Num, hop: Num, m: Machine, filled: float = 1.0) -> Num:
    """Time of a transfer that takes `seconds` at full rate and is cut into chunks to fill a pipeline.

    N chunks of c seconds cost N hops and, to fill p stages, p c: b + (b/c) hop + p c is least, at c = sqrt(b hop/p),
    with b + 2 sqrt(p hop b). `filled`: the share of a collective's stages there are.
    """
    return seconds + 2 * np.sqrt(filled * m.law["pipeline_stages"] * hop * seconds)


def _hops(ranks: Num) -> Num:
    """Steps of a chain through the ranks, or of a tree of chains: 8 ranks 7, 64 ranks 7 + 3."""
    return np.minimum(ranks, _CHAIN) - 1 + np.log2(np.maximum(ranks / _CHAIN, 1))


def _inside(kind: str, message: Num, sent: Num, ranks: Num, m: Machine, library: bool) -> Num:
    # Of a mesh, a copy to the next stage has one link; among bridged pairs some next stage lies across PCIe.
    rate, hop = path(m, 2 if kind == "p2p" and _topology(m) == "mesh" else ranks)
    start = m.kernel_latency + m.law["library_hops"] * hop
    if kind == "p2p":
        return start + hop + _chunked(message / rate, hop, m, _COPY)
    # Each device also copies its own share from the input to the output buffer.
    own = message / ranks / (rate * m.law["own_copy_ratio"])
    wire = sent / rate + own
    if kind == "all_to_all":
        return start + hop * np.log2(np.maximum(ranks, 2)) + _chunked(wire, hop, m)
    rounds = 2 if kind == "all_reduce" else 1
    start = start + rounds * _hops(ranks) * hop
    best = start + _chunked(wire, hop, m)
    if kind == "all_reduce" and m.in_switch:
        # The buffer goes up once and the sum of a share comes down to everyone.
        summed = message * (ranks + 1) / ranks / (rate * m.law["in_switch_efficiency"])
        best = np.minimum(best, start + _chunked(summed, hop, m))
    if library or not m.p2p:
        return best
    begin = m.kernel_latency + m.law["peer_kernel_hops"] * hop
    if kind != "all_reduce":
        return np.minimum(best, begin + wire)
    one_shot = begin + ((ranks - 1) * message) / rate + ranks * own
    two_shot = begin + hop + _chunked(wire + own, hop, m)
    return np.minimum(best, np.minimum(one_shot, two_shot))


def _across(kind: str, message: Num, sent: Num, ranks: Num, m: Machine, local: Num) -> Num:
    """Rings that enter and leave each node over its `local` NICs, in a tree of chains; links and NICs work at once."""
    rate, hop = path(m, local)
    wire = m.network * m.network_efficiency
    start = m.kernel_latency + m.law["library_hops"] * hop
    if kind == "p2p":
        return start + m.network_latency + _chunked(message / wire, hop, m, _COPY)
    nodes = np.maximum(ranks / local, 1)
    if kind == "all_to_all":
        outside = sent * np.maximum(ranks - local, 0) / (ranks - 1)
        steps = hop * np.log2(np.maximum(local, 1)) + m.network_latency * np.log2(nodes)
        return start + steps + _chunked(np.maximum(outside / wire, (sent - outside) / rate), hop, m)
    rounds = 2 if kind == "all_reduce" else 1
    steps = rounds * (_hops(local) * hop + np.log2(nodes) * m.network_latency)
    slower = np.maximum(sent / local / wire, np.where(local > 1, sent / rate, 0.0))
    return start + steps + _chunked(slower, hop, m)


def exchange_seconds(
    held: Num, tokens: Num, top_k: Num, experts: Num, ranks: Num, visited: Num, nodes_visited: Num, m: Machine,
    local: Num, *, combine: bool, units: Num, low_latency: bool | None = None,
) -> Num:  # fmt: skip
    """Time [s] of one expert dispatch or combine in which each rank moves `tokens` tokens of `held` bytes in all.

    A token visits `top_k` experts on `visited` distinct ranks and `nodes_visited` distinct nodes. Low-latency kernels
    send one copy per expert with every unit; normal kernels send one per rank (per node over the network) with
    `units` units. `low_latency` None: the faster of the two. The kernels are those of DeepEP (arXiv:2412.19437, 3.2).
    """
    quick = _low_latency(held, tokens, top_k, experts, ranks, m, local, combine)
    if low_latency:
        return quick
    normal = _normal(held, tokens, ranks, visited, nodes_visited, m, local, combine, units)
    return np.minimum(quick, normal) if low_latency is None else normal


def _low_latency(
    held: Num, tokens: Num, top_k: Num, experts: Num, ranks: Num, m: Machine, local: Num, combine: bool
) -> Num:  # fmt: skip
    rate, hop = path(m, local)
    copies = held * top_k
    remote = copies * (ranks - local) / ranks
    near = copies * (local - 1) / ranks / rate + copies / (rate * m.law["own_copy_ratio"])
    far = np.where(remote > 0, remote / np.maximum(m.network * m.network_efficiency, 1.0), 0.0)
    away = np.where(ranks > local, m.network_latency, 0.0)
    start = m.kernel_latency + m.law["exchange_hops"] * hop
    if not combine:
        # One thread block serves whole experts, as many as it takes for all to run at once; it casts tokens in turn.
        blocks = np.ceil(experts / np.ceil(experts / m.units))
        start = start + m.law["exchange_token"] * tokens / blocks
    return start + away + np.maximum(near, far)


def _normal(
    held: Num, tokens: Num, ranks: Num, visited: Num, nodes_visited: Num, m: Machine, local: Num, combine: bool,
    units: Num,
) -> Num:  # fmt: skip
    rate, hop = path(m, local)
    copies = held * visited
    # Across nodes a token arrives once per node and every copy is forwarded over the links.
    near = copies * (local - 1) / np.minimum(ranks, local) / rate
    remote = held * nodes_visited * (1 - local / ranks)
    far = np.where(remote > 0, remote / np.maximum(m.network * m.network_efficiency, 1.0), 0.0)
    moved = copies / (units * m.law["exchange_unit_rate"])
    away = np.where(ranks > local, m.network_latency * ranks / local, 0.0)
    start = m.kernel_latency + 2 * m.law["exchange_hops"] * hop
    if combine:
        # One warp of a block adds up a token's copies.
        start = start + held / tokens * _WARPS / m.law["exchange_unit_rate"]
    return start + away + _chunked(np.maximum(np.maximum(near, far), moved), hop, m)
