"""Counts and a machine in, seconds out: expected time, both bounds, and which resource binds.

One law for every operator on a device: the time of a kernel is the p-norm of its compute, vector and memory times,
each at the rate that its shape can reach, plus a launch. NumPy only; every argument may be an array.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from perfmodel.collectives import collective_seconds, fewest_bytes, in_node
from perfmodel.machine import Machine
from perfmodel.ops.moe import distinct_ranks
from perfmodel.ops.traffic import Op
from perfmodel.schedule import Node, Par, Repeat, Seq
from perfmodel.symbols import Num

# Output tiles (rows, columns) and k-splits that matrix libraries choose between.
_TILES = ((64, 64), (64, 128), (128, 128), (128, 256))
_SPLITS = (1, 2, 4, 8)
_SMALLEST_ROWS = 16  # rows of the matrix instruction that short query groups are padded to

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
            contended = [total.busy[r] for r in node.shared if r in total.busy]
            total.seconds = _largest([b.seconds for b in branches] + contended) * node.interference
            return total


def op_cost(op: Op, m: Machine) -> Cost:
    """Cost of one operator."""
    if op.kind in ("collective", "p2p"):
        return _collective(op, m)
    compute, vector, memory, from_cache, latency = _demands(op, m)
    p = m.law["overlap_power"]
    together = (compute**p + vector**p + (memory + from_cache) ** p) ** (1 / p)
    launch = m.kernel_latency * op.launches
    busy = {"compute": compute, "vector": vector, "hbm": memory, "cache": from_cache, "launch": launch + latency}
    return Cost(together + launch + latency, op.launches, busy, _peaks(op, m))


def _peaks(op: Op, m: Machine) -> dict[str, Num]:
    """Demand over datasheet rates."""
    compute = sum((f / m.peak(unit) for unit, f in op.flops.items() if unit not in ("vector", "exp")), start=0.0)
    vector = np.maximum(op.flops.get("vector", 0.0) / m.vector, op.flops.get("exp", 0.0) / m.exp)
    # Activations may never leave the cache; weights and cached keys and values come from memory at least once.
    stored = sum((t.bytes for t in op.traffic if t.path == "hbm" and t.tensor in _STORED), start=0.0)
    return {"compute": compute, "vector": vector, "hbm": stored / m.bandwidth}


_STORED = ("weights", "experts", "kv", "state")


def _demands(op: Op, m: Machine) -> tuple[Num, Num, Num, Num, Num]:
    """(compute, vector, memory, cache, extra latency) seconds of one operator at achieved rates."""
    vector = np.maximum(
        op.flops.get("vector", 0.0) / (m.vector * m.vector_efficiency),
        op.flops.get("exp", 0.0) / (m.exp * m.vector_efficiency),
    )
    stored = sum((t.bytes for t in op.traffic if t.path == "hbm" and t.tensor in _STORED), start=0.0)
    passing = sum((t.bytes for t in op.traffic if t.path == "hbm" and t.tensor not in _STORED), start=0.0)
    # Activations stay in the last-level cache when they fill less than half of it.
    cached = passing <= m.cache / 2
    rate = m.bandwidth * m.bandwidth_efficiency
    memory = (stored + np.where(cached, 0.0, passing)) / rate
    from_cache = np.where(cached, passing, 0.0) / (rate * m.law["cache_ratio"])
    latency: Num = m.memory_latency
    match op.kind:
        case "gemm":
            compute, loading = _matrix_product(op, m, 1.0)
            memory = memory / loading
        case "grouped_gemm":
            groups = op.shape["groups"]
            compute, loading = _matrix_product(op, m, groups)
            memory = memory / loading
            latency = latency + m.law["moe_latency"] / 2 + m.law["expert_overhead"] * groups
        case "attention":
            compute, loading, vector = _attention(op, m, vector)
            memory = memory / loading
            latency = latency + m.law["attention_latency"] + _item_starts(op, m)
        case "scan":
            compute = _plain_compute(op, m)
        case _:
            compute = 0.0
    return compute, vector, memory, from_cache, latency


def _plain_compute(op: Op, m: Machine) -> Num:
    units = [u for u in op.flops if u not in ("vector", "exp")]
    return sum((op.flops[u] / m.matrix_rate(u) for u in units), start=0.0)


def _matrix_product(op: Op, m: Machine, groups: Num) -> tuple[Num, Num]:
    """(compute seconds, share of the memory rate that the working units can draw) of a tiled matrix product.

    tiles = ceil(m/tm) ceil(n/tn) split per group; waves = ceil(tiles/units); each wave lasts one tile:
    2 tm tn (k/split) / (peak e / units) + overhead. The best of a few tile shapes and k-splits is taken.
    """
    dtype = next(u for u in op.flops if u not in ("vector", "exp"))
    rows, cols, depth = op.shape["m"], op.shape["n"], op.shape["k"]
    flops = op.flops[dtype]
    per_unit = m.matrix_rate(dtype) / m.units
    best: Num = np.inf
    most_tiles: Num = 0.0
    for tile_m, tile_n in _TILES:
        grid = np.ceil(rows / tile_m) * np.ceil(cols / tile_n) * groups
        # Narrow tiles reuse each operand less and run the matrix units below their best.
        reuse = (tile_m * tile_n / (tile_m + tile_n)) / (128 * 256 / (128 + 256))
        per_flop = 2 * tile_m * tile_n / (per_unit * reuse**0.25)
        for split in _SPLITS:
            # Only a grid that leaves units idle is split along k.
            useful = (split == 1) | (grid < m.units)
            if not np.any(useful):
                continue
            tiles = grid * split
            waves = np.ceil(tiles / m.units)
            seconds = waves * (per_flop * depth / split + m.law["tile_overhead"])
            best = np.minimum(best, np.where(useful, seconds, np.inf))
            most_tiles = np.maximum(most_tiles, np.where(useful, tiles, 0.0))
    loading = np.minimum(1.0, most_tiles / (m.units * m.law["units_to_saturate_memory"]))
    # A few rows need no tile: matrix-vector kernels run on the vector units, without padding.
    best = np.minimum(best, flops / (m.vector * m.vector_efficiency))
    return np.maximum(best, flops / m.matrix_rate(dtype)), loading


def _attention(op: Op, m: Machine, vector: Num) -> tuple[Num, Num, Num]:
    """(compute seconds, share of the memory rate, vector seconds) of fused attention.

    The query rows that share a KV head fill tiles, the last one padded (below one tile, to the matrix instruction).
    Work items are one per sequence, KV head and tile; groups shorter than a tile, and the cached context of any, are also
    split along the context to fill the units where that is faster. The time is that of the longest item (with a causal
    mask up to twice the mean) or of an even share of the work plus half an item for the last wave.
    """
    s, law = op.shape, m.law
    dtype = next((u for u in op.flops if u not in ("vector", "exp")), None)
    n, q, kv_len = s["n"], s["q"], s["kv_len"]
    packed = s["heads"] / s["kv_heads"] * q  # query rows that share one KV head
    tile = law["attention_tile"]
    tiles = n * s["kv_heads"] * np.ceil(packed / tile)
    step = np.where(packed < tile, _SMALLEST_ROWS, tile)
    padding = np.ceil(packed / step) * step / packed
    divisible = np.where(packed < tile, kv_len, kv_len - q)
    items = tiles * np.maximum(np.minimum(divisible / law["decode_chunk"], 2 * m.units / tiles), 1.0)
    uneven = np.clip(kv_len * n * q / s["pairs"], 1.0, 2.0)

    def stretch(count: Num) -> Num:
        """Time over an even share of the work."""
        full = count / m.units
        return np.maximum(uneven / full, 1 + 0.5 * uneven / full * (full > 1))

    tail = np.minimum(stretch(tiles), stretch(items))
    loading = np.minimum(1.0, items / (m.units * law["units_to_saturate_memory"]))
    if dtype is None:
        return 0.0, loading, vector
    rate = m.peak(dtype) * m.attention_efficiency
    return op.flops[dtype] * padding * tail / rate, loading, vector * tail


def _item_starts(op: Op, m: Machine) -> Num:
    """Seconds one unit spends starting and ending prefill tiles (query load, first keys, output store), not overlapped."""
    packed = op.shape["heads"] / op.shape["kv_heads"] * op.shape["q"]
    tile = m.law["attention_tile"]
    items = np.where(packed < tile, 0.0, op.shape["n"] * op.shape["kv_heads"] * packed / tile)
    return items / m.units * m.law["attention_tile_start"]


def _collective(op: Op, m: Machine) -> Cost:
    ranks = op.shape["ranks"]
    kind = next(k for k in op.shape if k not in ("ranks", "stride", "held"))
    message = op.shape[kind]
    sent = sum((t.bytes for t in op.traffic if t.path == "fabric"), start=0.0)
    local = in_node(ranks, op.shape["stride"], m)
    if op.routing is not None and np.any(ranks > local):
        # A token crosses the network once per distinct node and is forwarded inside (DeepEP; arXiv:2412.19437, 3.2).
        nodes = np.vectorize(partial(distinct_ranks, op.routing), otypes=[float])(ranks / local)
        sent = np.where(ranks > local, op.shape["held"] * nodes, sent)
    seconds = np.where(ranks > 1, collective_seconds(kind, message, sent, ranks, m, local), 0.0)
    resource, peak = ("network", m.network) if np.any(ranks > local) else ("link", m.link)
    return Cost(
        seconds, 1.0, {resource: seconds}, {resource: fewest_bytes(kind, message, sent, ranks, m, local) / peak}
    )
