"""Fused attention: query tiles and context splits over the units of a device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from perfmodel.kernels.base import Demands, matrix_dtype, streaming
from perfmodel.machine import Machine
from perfmodel.ops.traffic import Op
from perfmodel.symbols import Num

_KEY_BLOCK = 128  # keys one step of the inner loop multiplies
_FEWEST_KEYS = 1e-9  # of a row whose keys all lie elsewhere: no work, and nothing to divide by
_DECODE_ROWS = 64  # query rows of kernels made for decode: one matrix instruction of a group of warps
_HEAD_STEP = 32  # elements of a head that kernels multiply together
_SAME = 1e-6  # by how much groups of one size may differ
_SLOTS = 64  # devices with a few large units (TPUs, Gaudi) pipeline the items of one unit
_WIDE = ("bf16", "fp16", "tf32", "fp32", "fp64")


def attention(op: Op, m: Machine) -> Demands:
    """Demands of one fused attention.

    A work item is one query tile of one KV head of one sequence. Its unit is busy for a start (loads of the queries and
    the first keys), the padded products, and the store of the output where no other item hides it; the whole kernel for
    the longest item, or for an even share of all items and half an item more. Memory is shared by the units that load,
    none faster than `attention_load_rate`; what a kernel of its own copies before (`copied`) streams at the whole rate.
    """
    d = streaming(op, m)
    w = _work(op, m)
    rate = m.bandwidth * m.bandwidth_efficiency
    # Keys and values are long runs read in order: only a part of what other kernels lose is lost.
    runs = (1 - m.law["attention_read_loss"] * (1 - m.bandwidth_efficiency)) / m.bandwidth_efficiency
    share = np.minimum(np.minimum(1.0, w.parts / m.units) * runs, m.units * m.law["attention_load_rate"] / rate)
    # The kernel lasts until its fullest unit is done; pages that lie apart are read more slowly.
    uneven = op.shape.get("uneven", 1.0)
    copied = op.shape.get("copied", 0.0) / rate
    scattered = op.shape.get("scattered", 1.0)
    streamed = d.memory - copied
    d.memory = streamed / share * uneven * scattered
    if scattered < 1:
        # A kernel faster than the calibrated ones still reads no faster than the memory delivers.
        d.memory = np.maximum(d.memory, streamed * m.bandwidth_efficiency)
    d.apart = copied + op.shape.get("lag", 0.0) / rate
    tail = w.tail * uneven
    starts = m.law["attention_item_start"] * np.maximum(w.items / np.maximum(m.units, _SLOTS) / w.together, 1.0)
    stored = sum((t.bytes for t in op.traffic if t.direction == "write"), start=0.0)
    d.compute = starts + np.where(w.together > 1, 0.0, stored) / rate
    dtype, padding = matrix_dtype(op), w.padding
    again: Num = 0.0
    if dtype is not None:
        # Keys and values that are rebuilt fill whole tiles of their own.
        rebuilt = op.shape.get("rebuild", 0.0)
        padded = (op.flops[dtype] - rebuilt) * w.padding * _widened(op) / _rate(dtype, m)
        plain = (op.flops[dtype] - rebuilt) / (m.vector * m.vector_efficiency)
        chosen = np.asarray((m.law["attention_packing"] > 0) & (op.shape.get("library", 0.0) == 0))
        on_matrix = ~w.alone & (chosen | ~w.decode | (padded <= plain))
        d.compute = d.compute + tail * (np.where(on_matrix, padded, np.where(w.alone, 0.0, plain)) + rebuilt / _rate(dtype, m))
        padding = np.where(on_matrix, w.padding, 1.0)
        again = np.where(w.alone, plain + unpacking(op, m) * (op.shape["heads"] / op.shape["kv_heads"] - 1), 0.0)
    if "joined" in op.shape:
        # Two items of a unit: one multiplies while the other adds up.
        power, joined = np.where(w.together > 1, m.law["overlap_power"], 1.0), op.shape["joined"] * tail
        d.compute = (d.compute**power + joined**power) ** (1 / power)
    d.vector = d.vector * padding * tail + (unpacking(op, m) + again) * tail
    d.latency = d.latency + m.law["attention_latency"]
    return d


def unpacking(op: Op, m: Machine) -> Num:
    """Seconds the vector units spend on widening stored keys and values before they can be multiplied."""
    return op.shape.get("unpack", 0.0) / (m.vector * m.vector_efficiency)


def _widened(op: Op) -> Num:
    """Head dimensions as kernels multiply them, whole multiples of 32 elements, over those of the model.

    Head size of the FlashAttention family rounded up in csrc/flash_attn/flash_api.cpp (arXiv:2307.08691): 40 as 64, 72 as 96.
    """
    sizes = (op.shape["head_dim"], op.shape["v_dim"])
    return sum(np.ceil(x / _HEAD_STEP) * _HEAD_STEP for x in sizes) / sum(sizes)


def _rate(dtype: str, m: Machine) -> Num:
    """Matrix FLOP/s inside attention, where 8-bit operands gain less than in plain products."""
    narrow = m.law["attention_narrow_efficiency"] if dtype not in _WIDE and m.native(dtype) else 1.0
    return m.peak(dtype) * m.attention_efficiency * narrow


class _Work(NamedTuple):
    """How one attention divides."""

    decode: np.ndarray
    """Few queries over a longer cache."""
    alone: np.ndarray
    """Every query head of a decode step multiplies, and unpacks what it reads, by itself on the vector units."""
    items: Num
    together: Num
    """Items one unit works on at a time, hiding each other's starts."""
    parts: Num
    """Items, or the pieces they are split into along the context where the units would idle otherwise."""
    padding: Num
    """Computed over wanted query-key pairs."""
    tail: Num
    """Time of the products over that of an even share for every unit."""


def _work(op: Op, m: Machine) -> _Work:
    """Items of one attention, their padding and how evenly they fill the units.

    Kernels of the FlashAttention family pack the query heads that share a KV head into one tile, in prefill and decode
    (`attention_packing` 1). Others (0) treat every query head alone in prefill; their decode kernels work on two items of
    fewer rows at a time on each unit, or on the vector units where few rows would waste the matrix units. A tile
    multiplies the union of what its rows see: with a causal mask half a tile more than its mean row, with a window a
    tile and a partial block more. A kernel that packs groups of one size (`packs` of the shape) takes the query heads of
    others one by one.
    """
    s, law = op.shape, m.law
    n, q, kv_len, heads = s["n"], s["q"], s["kv_len"], s["heads"]
    tile, group = law["attention_tile"], heads / s["kv_heads"]
    packs = law["attention_packing"]
    decode = np.asarray((kv_len > q) & (group * q <= tile))
    packed = s.get("packs", 0.0)
    alone = decode & (packed > 0) & (np.abs(group - packed) > _SAME)
    shared = np.where((group > law["attention_largest_group"]) | alone, 1.0, group)
    shared = np.where(decode, shared, group**packs)
    rows = shared * q
    tiles = np.ceil(rows / tile)
    pieces = s.get("pieces", 1.0)  # of the context, each an item of its own
    items = n * heads / shared * tiles * pieces
    together = np.maximum(law["attention_blocks"], np.where(decode, 2.0 - packs, 1.0))
    height = np.where(decode & (packs == 0), np.minimum(_DECODE_ROWS, tile), tile)

    seen = np.maximum(s["pairs"] / (n * q), _FEWEST_KEYS)  # keys of the mean query row
    slope = np.clip((kv_len - seen) / np.maximum(q - 1, 1), 0.0, 1.0)  # by how many tokens its window moves on a row
    full = np.maximum(np.ceil(kv_len / _KEY_BLOCK), 1) * _KEY_BLOCK
    union = seen + slope * (np.minimum(tile / shared, q) - 1) + _KEY_BLOCK * np.maximum(2 * slope - 1, 0.0)
    union = np.clip(union, _KEY_BLOCK, full)
    longest = union + (full - union) * np.clip(2 - 2 * slope, 0.0, 1.0)
    padding = np.ceil(rows / height) * height / rows * union / seen

    divisible = np.where(decode, kv_len, kv_len - q) / pieces
    parts = items * np.maximum(np.minimum(divisible / law["decode_chunk"], 2 * m.units / items), 1.0)

    def stretch(count: Num, uneven: Num) -> Num:
        """Time over an even share of the work."""
        each = count / m.units
        return np.maximum(uneven / each, 1 + 0.5 * uneven / each * (each > 1))

    tail = np.minimum(stretch(items, longest / union), stretch(parts, longest / union))
    return _Work(decode, alone, items, together, parts, padding, tail)
