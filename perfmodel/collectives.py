"""Seconds of collectives: alpha + bytes/beta by algorithm, the fastest available one, as libraries choose."""

from __future__ import annotations

import numpy as np

from perfmodel.machine import Machine
from perfmodel.symbols import Num

# Ranks up to which serving engines use their own one-shot and two-shot kernels over peer-to-peer loads.
_CUSTOM_RANKS = 8


def collective_seconds(kind: str, message: Num, sent: Num, ranks: Num, m: Machine, *, spans_nodes: bool) -> Num:
    """Time of one collective of `message` bytes over `ranks` devices of which each sends `sent` bytes.

    Inside a node: ring (2(n-1) or n-1 hops), one-shot, two-shot or in-switch reduction, whichever is
    fastest. Across nodes: two levels, with the part between nodes at the NIC's rate.
    """
    if spans_nodes:
        return _two_level(kind, message, sent, ranks, m)
    return _inside(kind, message, sent, ranks, m)


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
    ring = start + rounds * (ranks - 1) * hop + sent / rate
    if not m.p2p:
        return ring
    best = ring
    small = np.where(ranks <= _CUSTOM_RANKS, 1.0, np.inf)
    if kind == "all_reduce":
        one_shot = start + hop + (ranks - 1) * message / rate
        two_shot = start + 2 * hop + sent / rate
        best = np.minimum(best, small * np.minimum(one_shot, two_shot))
        if m.in_switch:
            best = np.minimum(best, start + 2 * hop + message * (ranks + 1) / ranks / rate)
    else:
        best = np.minimum(best, small * (start + hop + sent / rate))
    return best


def _two_level(kind: str, message: Num, sent: Num, ranks: Num, m: Machine) -> Num:
    """Inside each node, then between nodes on 1/local of the data, then inside again (hierarchical rings)."""
    local = np.minimum(ranks, m.devices_per_node)
    remote = np.maximum(ranks / local, 1)
    wire = np.where(m.network > 0, m.network * m.network_efficiency, np.nan)
    alpha = m.network_latency
    if kind == "p2p":
        return m.kernel_latency + alpha + message / wire
    if kind == "all_to_all":
        away = (remote - 1) / remote
        return m.kernel_latency + alpha * np.maximum(np.log2(ranks), 1) + sent * away / wire
    inner_share = (local - 1) / local * message
    if kind == "all_reduce":
        inner = _inside("reduce_scatter", message, inner_share, local, m) + _inside(
            "all_gather", message, inner_share, local, m
        )
        shard = message / local
        outer = 2 * (remote - 1) * alpha + 2 * (remote - 1) / remote * shard / wire
    else:
        inner = _inside(kind, message, inner_share, local, m)
        outer = (remote - 1) * alpha + (remote - 1) / remote * message / local / wire
    return inner + outer
