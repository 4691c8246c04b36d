"""Seconds of collectives: alpha + bytes/beta by algorithm, the fastest available one, as libraries choose."""

from __future__ import annotations

import numpy as np

from perfmodel.machine import Machine
from perfmodel.symbols import Num

# Ranks and bytes up to which serving engines use their own one-shot and two-shot kernels over peer-to-peer loads
# (vLLM's custom all-reduce: at most 8 ranks and 8 MiB).
_CUSTOM_RANKS = 8
_CUSTOM_BYTES = 8 * 2**20


def in_node(ranks: Num, stride: Num, m: Machine) -> Num:
    """How many of a group's ranks share a node. A device without a node meets the others on its own port."""
    if m.node is None:
        return ranks
    return np.minimum(ranks, np.maximum(m.devices_per_node / stride, 1))


def collective_seconds(kind: str, message: Num, sent: Num, ranks: Num, m: Machine, local: Num) -> Num:
    """Time of one collective of `message` bytes over `ranks` devices of which each sends `sent` bytes.

    `local` ranks share a node. Inside it: ring (2(n-1) or n-1 hops), tree (2 log2 n hops), one-shot, two-shot or
    in-switch reduction, whichever is fastest. Across nodes: two levels, with the part between nodes at the NIC's rate.
    """
    if np.any(ranks > local):
        return _two_level(kind, message, sent, ranks, m, local)
    return _inside(kind, message, sent, ranks, m)


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


def link_rate(m: Machine) -> Num:
    """Achieved bytes/s per device and direction between devices of a node."""
    if m.p2p:
        return m.link * m.link_efficiency
    return m.host_link * m.law["staging_efficiency"]


def _inside(kind: str, message: Num, sent: Num, ranks: Num, m: Machine) -> Num:
    rate = link_rate(m)
    # Staged copies pass two queues (down, up) where a peer-to-peer store passes one.
    hop = m.link_latency * (1 if m.p2p else 4)
    start = m.kernel_latency + hop
    if kind == "p2p":
        return start + message / rate
    if kind == "all_to_all":
        return start + hop * np.log2(np.maximum(ranks, 2)) + sent / rate
    rounds = 2 if kind == "all_reduce" else 1
    best = start + rounds * (ranks - 1) * hop + sent / rate
    if kind == "all_reduce":
        tree = start + 2 * np.ceil(np.log2(np.maximum(ranks, 2))) * hop + 2 * message / rate
        best = np.minimum(best, tree)
    if not m.p2p:
        return best
    small = np.where((ranks <= _CUSTOM_RANKS) & (message <= _CUSTOM_BYTES), 1.0, np.inf)
    if kind == "all_reduce":
        one_shot = start + hop + (ranks - 1) * message / rate
        two_shot = start + 2 * hop + sent / rate
        best = np.minimum(best, small * np.minimum(one_shot, two_shot))
        if m.in_switch:
            best = np.minimum(
                best, start + 2 * hop + message * (ranks + 1) / ranks / (rate * m.law["in_switch_efficiency"])
            )
    else:
        best = np.minimum(best, small * (start + hop + sent / rate))
    return best


def _two_level(kind: str, message: Num, sent: Num, ranks: Num, m: Machine, local: Num) -> Num:
    """Inside each node, then between nodes on 1/local of the data, then inside again (hierarchical rings)."""
    wire = m.network * m.network_efficiency
    alpha = m.network_latency
    crossing = fewest_bytes(kind, message, sent, ranks, m, local) / wire
    if kind == "p2p":
        return m.kernel_latency + alpha + crossing
    if kind == "all_to_all":
        return m.kernel_latency + alpha * np.maximum(np.log2(ranks), 1) + crossing
    hops = (2 if kind == "all_reduce" else 1) * (ranks / local - 1) * alpha
    share = (local - 1) / local * message
    phases = ("reduce_scatter", "all_gather") if kind == "all_reduce" else (kind,)
    if np.all(local == 1):
        return m.kernel_latency + hops + crossing
    return sum(_inside(phase, message, share, local, m) for phase in phases) + hops + crossing
