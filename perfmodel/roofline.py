"""Counts and a machine in, seconds out: expected time, both bounds, and which resource binds.

One law for every operator on a device: the time of a kernel is the p-norm of its compute, vector and memory times,
each at the rate that its shape can reach, plus a launch. NumPy only; every argument may be an array.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from perfmodel.collectives import COLLECTIVES, collective_seconds, exchange_seconds, fewest_bytes, in_node
from perfmodel.kernels import LAWS, STORED
from perfmodel.kernels.elsewhere import copy_seconds, work_seconds
from perfmodel.kernels.grouped import as_served
from perfmodel.machine import Machine
from perfmodel.ops.moe import distinct_ranks
from perfmodel.ops.traffic import Op, copied_over
from perfmodel.schedule import EVERYTHING, Node, Par, Repeat, Seq
from perfmodel.symbols import Num

RESOURCES = ("compute", "vector", "hbm", "cache", "link", "network", "launch", "host")


@dataclass
class Cost:
    """Seconds of a part of a schedule on one device.

    busy: seconds each resource works at the rate it achieves. peak: the same at datasheet rates, for the lower
    bound. `seconds` is the expected time with the overlap the law and the schedule allow.
    """

    seconds: Num = 0.0
    launches: Num = 0.0
    busy: dict[str, Num] = field(default_factory=dict)
    peak: dict[str, Num] = field(default_factory=dict)

    def add(self, other: Cost, times: Num = 1) -> None:
        """Append another part that runs after this one, `times` over."""
        self.seconds = self.seconds + times * other.seconds
        self.launches = self.launches + times * other.launches
        for mine, theirs in ((self.busy, other.busy), (self.peak, other.peak)):
            for resource, seconds in theirs.items():
                mine[resource] = mine.get(resource, 0.0) + times * seconds

    @property
    def lower(self) -> Num:
        """Perfect overlap at peak rates: the busiest resource."""
        return _largest(list(self.peak.values()))

    @property
    def upper(self) -> Num:
        """No overlap at all at achieved rates: resources one after the other, never below the expected time."""
        return np.maximum(sum(self.busy.values()), self.seconds)

    def bottleneck(self) -> str:
        """The resource that is busy longest (scalars only)."""
        return max(self.busy, key=lambda r: float(np.max(self.busy[r])))


def _largest(values: list[Num]) -> Num:
    result: Num = 0.0
    for value in values:
        result = np.maximum(result, value)
    return result


def cost(node: Node, m: Machine, contextual: bool | None = None) -> Cost:
    """Cost of a schedule: sums along Seq, the longest branch or the busiest shared resource in Par.

    `contextual` keeps only the operators that do (or do not) depend on the cached context.
    """
    match node:
        case Op():
            return op_cost(node, m) if contextual in (None, node.contextual) else Cost()
        case Repeat():
            total = Cost()
            total.add(cost(node.body, m, contextual), node.times)
            return total
        case Seq():
            total = Cost()
            for item in node.items:
                total.add(cost(item, m, contextual))
            return total
        case Par():
            branches = [cost(b, m, contextual) for b in node.branches]
            total = Cost()
            for branch in branches:
                total.add(branch)
            shared = set(total.busy) - {"launch"} if node.shared == EVERYTHING else node.shared
            contended = [total.busy[r] for r in shared if r in total.busy]
            total.seconds = _largest([b.seconds for b in branches] + contended) * node.interference
            return total


def op_cost(op: Op, m: Machine) -> Cost:
    """Cost of one operator."""
    if op.kind in ("collective", "p2p"):
        return _collective(op, m)
    if op.kind == "copy":
        seconds, least = copy_seconds(op, m)
        return Cost(seconds, 0.0, {copied_over(op): seconds}, {copied_over(op): least})
    if op.kind == "elsewhere":
        seconds, least = work_seconds(op, m)
        return Cost(seconds, 0.0, {op.on: seconds}, {op.on: least})
    if op.kind == "grouped_gemm" and "experts" in op.shape:
        op = as_served(op, m)
    d = LAWS["stage" if "stage" in op.shape else op.kind](op, m)
    p = m.law["overlap_power"]
    together = (d.compute**p + d.vector**p + (d.memory + d.cache) ** p) ** (1 / p)
    # What runs inside another kernel, or in some steps only, waits no more often than it is launched.
    started = m.kernel_latency * op.launches + d.latency * np.minimum(op.launches, 1.0)
    busy = {"compute": d.compute, "vector": d.vector, "hbm": d.memory + d.apart, "cache": d.cache, "launch": started}
    return Cost(together + d.apart + started, op.launches, busy, _peaks(op, m))


def _peaks(op: Op, m: Machine) -> dict[str, Num]:
    """Demand over datasheet rates."""
    compute = sum((f / m.peak(unit) for unit, f in op.flops.items() if unit not in ("vector", "exp")), start=0.0)
    vector = np.maximum(op.flops.get("vector", 0.0) / m.vector, op.flops.get("exp", 0.0) / m.exp)
    # Activations may never leave the cache; weights and cached keys and values come from memory at least once.
    stored = sum((t.bytes for t in op.traffic if t.path == "hbm" and t.tensor in STORED), start=0.0)
    return {"compute": compute, "vector": vector, "hbm": stored / m.bandwidth}


def _collective(op: Op, m: Machine) -> Cost:
    ranks = op.shape["ranks"]
    local = in_node(ranks, op.shape["stride"], m)
    sent = sum((t.bytes for t in op.traffic if t.path == "fabric"), start=0.0)
    resource, peak = ("network", m.network) if np.any(ranks > local) else ("link", m.link)
    if "exchange" in op.shape:
        seconds, least = _exchange(op, m, local, sent)
    else:
        kind = next(k for k in op.shape if k in COLLECTIVES)
        message = op.shape[kind]
        if op.routing is not None and np.any(ranks > local):
            # A token crosses the network once per distinct node and is forwarded inside (arXiv:2412.19437, 3.2).
            nodes = np.vectorize(partial(distinct_ranks, op.routing), otypes=[float])(ranks / local)
            sent = np.where(ranks > local, op.shape["held"] * nodes, sent)
        library = bool(op.shape.get("library", 0))
        seconds = collective_seconds(kind, message, sent, ranks, m, local, library=library)
        if op.shape.get("eager", 0):
            # An engine's eager all-reduce leaves its input intact: the kernel follows a copy.
            copied = 0.0 if library else 2 * message / (m.bandwidth * m.bandwidth_efficiency)
            seconds = np.maximum(m.law["framework_call"], seconds + copied)
        least = fewest_bytes(kind, message, sent, ranks, m, local)
    seconds = np.where(ranks > 1, seconds, 0.0)
    return Cost(seconds, 1.0, {resource: seconds}, {resource: least / peak})


def _exchange(op: Op, m: Machine, local: Num, sent: Num) -> tuple[Num, Num]:
    """Seconds of an expert exchange, and the bytes a device must put on the NIC (on the link inside a node)."""
    s = op.shape
    kernel = s.get("low_latency")
    seconds = exchange_seconds(
        s["exchange"], s["tokens"], s["top_k"], s["experts"], s["ranks"], s["visited"], s["nodes_visited"], m, local,
        combine=bool(s["combine"]), units=s["units"], low_latency=None if kernel is None else bool(kernel),
    )  # fmt: skip
    remote = s["exchange"] * s["nodes_visited"] * (1 - local / s["ranks"])
    return seconds, np.where(s["ranks"] > local, remote, sent)
