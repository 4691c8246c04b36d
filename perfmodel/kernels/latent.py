"""Multi-head latent attention (arXiv:2405.04434): the heads of a sequence share one latent, or have expanded keys."""

from __future__ import annotations

import numpy as np

from perfmodel.kernels.attention import unpacking
from perfmodel.kernels.base import FEWEST_UNITS, Demands, matrix_dtype, stored_bytes, streaming
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op

# Rows of the matrix instructions that these kernels are built on; cached latents come in blocks of as many tokens.
_BLOCK = 64
# Elements of the queries and outputs of one full block of absorbed rows (DeepSeek-V2 and V3: 576 + 512 a row).
_BLOCK_ELEMENTS = _BLOCK * (576 + 512)
# Starts of plain attention items that one such block takes: rows more than four times as wide, in two round trips.
_BLOCK_STARTS = 2.0
# Devices of fewer, wider cores than this (TPU, Gaudi) work on as many tiles at a time as others have units.
_WIDE_TILES = 128.0


def latent_attention(op: Op, m: Machine) -> Demands:
    """Demands of one latent attention, absorbed (one latent for all heads) or expanded (keys and values per head).

    The rows that share keys, heads/kv_heads x q, fill tiles, and the context fills blocks, the last ones padded. Items of
    work = tiles x splits of the context: as many splits as fill the units, each of one block of tokens at least.
    compute = FLOPs x padding / (rate e) x the longest unit's share over an even one: ceil(items/units) units/items, or
    with a causal mask the longest item's. Each item starts with its queries and ends with its outputs, unoverlapped.
    Partial outputs of splits are written and read again in FP32, in the cache; so are the latents, once more for each
    further tile below 64 rows (those are taken where at most two hold all rows).

    Portable kernels take few rows a tile, make few splits, and wait for each block of latents: their tiles cost as full
    ones, at a rate of their own.
    """
    s, law = op.shape, m.law
    d = streaming(op, m)
    units = m.units if m.units >= FEWEST_UNITS else _WIDE_TILES
    absorbed = s["absorbed"] == 1
    # Nothing is left to attend where sequences share all of a context.
    n, q, kv_len = s["n"], s["q"], np.maximum(s["kv_len"], 1e-9)
    groups, rows = n * s["kv_heads"], s["heads"] / s["kv_heads"] * q
    portable = absorbed & (law["latent_portable"] > 0)
    small = law["latent_small_rows"]
    tile = np.where(rows <= 2 * small, small, _BLOCK)
    tile = np.where(absorbed, np.where(portable, law["latent_portable_rows"], tile), law["attention_tile"])
    tiles = groups * np.ceil(rows / tile)
    most = np.where(portable, law["latent_portable_splits"], np.where(absorbed, np.inf, 1.0))
    splits = np.maximum(np.floor(np.minimum(np.minimum(units / tiles, kv_len / _BLOCK), most)), 1.0)
    items = tiles * splits
    full = items / units
    dtype = matrix_dtype(op)
    if dtype is not None:
        charged = np.where(portable, _BLOCK, tile)
        padding = np.ceil(rows / tile) * charged / rows * np.ceil(kv_len / _BLOCK) * _BLOCK / kv_len
        uneven = np.clip(kv_len * n * q / np.maximum(s["pairs"], 1e-9), 1.0, 2.0)
        stretch = np.maximum(np.ceil(full), uneven) / full
        narrow = law["latent_narrow_efficiency"] if dtype == "fp8" and m.native("fp8") else 1.0
        own = m.attention_efficiency * law["latent_efficiency"]
        rate = m.peak(dtype) * narrow * np.where(portable, law["portable_efficiency"] * m.matrix_efficiency, own)
        rebuilt = op.shape.get("rebuild", 0.0)
        d.compute = ((op.flops[dtype] - rebuilt) * padding + rebuilt) / rate * stretch
    partial = np.where(splits > 1, groups * rows * splits * s["v_dim"] * 4 * 2, 0.0)
    again = np.where(absorbed & (tile < _BLOCK), np.ceil(rows / tile) - 1, 0.0) * stored_bytes(op)
    d.cache = d.cache + (partial + again) / (m.bandwidth * m.bandwidth_efficiency * law["cache_ratio"])
    loaded = np.maximum(tile, _BLOCK) * (s["head_dim"] + s["v_dim"]) / _BLOCK_ELEMENTS
    d.vector = d.vector + unpacking(op, m)
    d.latency = d.latency + np.where(absorbed & (most == 1), 0.0, law["attention_latency"])
    d.latency = d.latency + _BLOCK_STARTS * law["attention_item_start"] * loaded * np.maximum(full, 1.0)
    return d
