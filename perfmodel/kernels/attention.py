"""Fused attention: query tiles and context splits over the units of a device."""

from __future__ import annotations

import numpy as np

from perfmodel.kernels.base import Demands, matrix_dtype, streaming
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op
from perfmodel.symbols import Num

_SMALLEST_ROWS = 16  # rows of the matrix instruction that short query groups are padded to


def attention(op: Op, m: Machine) -> Demands:
    """Demands of one fused attention."""
    d = streaming(op, m)
    d.compute, loading, d.vector = _tiled(op, m, d.vector)
    d.memory = d.memory / loading
    d.latency = d.latency + m.law["attention_latency"] + _item_starts(op, m)
    return d


def _tiled(op: Op, m: Machine, vector: Num) -> tuple[Num, Num, Num]:
    """(compute seconds, share of the memory rate, vector seconds) of fused attention.

    The query rows that share a KV head fill tiles, the last one padded (below one tile, to the matrix instruction).
    Work items are one per sequence, KV head and tile; groups shorter than a tile, and the cached context of any, are also
    split along the context to fill the units where that is faster. The time is that of the longest item (with a causal
    mask up to twice the mean) or of an even share of the work plus half an item for the last wave.
    """
    s, law = op.shape, m.law
    dtype = matrix_dtype(op)
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
