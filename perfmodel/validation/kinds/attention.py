"""Softmax attention kernels: prefill (causal) and decode, windows, narrow key-value caches, FlashAttention benchmarks."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from perfmodel.machine import Machine
from perfmodel.ops.attention import softmax_attention
from perfmodel.ops.elementwise import softmax
from perfmodel.ops.gemm import quantise
from perfmodel.ops.shard import Group
from perfmodel.ops.traffic import Op, read, write
from perfmodel.spec.formats import get_format
from perfmodel.symbols import Num
from perfmodel.validation.kinds.base import (
    Kind,
    Outcome,
    batched,
    engine_machine,
    rates,
    seconds_with_spread,
    times,
    with_law,
)
from perfmodel.validation.rows import Refused, Row

# Engines whose timed call also writes the new keys and values into the paged cache.
_PAGED = ("vllm", "sglang", "trtllm")
_SHORTER = 4  # tiles of portable kernels, compiled without knowledge of a device's registers, by this factor
# The FlashAttention benchmark where a row does not say (arXiv:2307.08691, section 4.1): heads x head_dim, tokens of all
# sequences, and for tables of the best rate alone the length.
_MODEL_WIDTH, _TOKENS, _LONG, _HEAD_DIM = 2048, 16384.0, 8192.0, 128.0


class _Case(NamedTuple):
    """What rows priced together have in common."""

    hardware: str
    engine: str
    dtype: str
    kv: str
    window: float
    decode: bool
    causal: bool
    rate: bool
    """Measured in FLOP/s, not in seconds."""
    steps: bool
    """A decode kernel that serves as prefill of single tokens."""
    portable: bool
    """Compiled for any device (Triton): below hand-written kernels, computes masked tiles, dequantises a narrow cache."""
    casts: bool
    """Queries are cast to the format of the cache inside the timed call."""
    synchronous: bool
    """FlashAttention-2: matrix instructions that block, half the rate of the asynchronous ones of later devices."""
    fused: bool
    """Keeps the scores on chip; otherwise they are a matrix in memory, between two products."""


_MASKED = re.compile(r"(?<!non-)(?<!non_)(?<!non )(?<!not )causal(?!\W*(false|no|0))")


def _key(row: Row) -> Hashable:
    kernel, kv = row.text("kernel"), row.text("kv_dtype") or row.text("dtype") or "bf16"
    named = " ".join(row.text(c) for c in ("op", "kernel", "engine", "note")).lower()
    if re.search(r"bwd|backward", row.text("op").lower()):
        raise Refused("backward passes are not modelled")
    dtype = row.text("dtype") or "bf16"
    in_engine = row.text("op") in ("generation_attention", "context_attention")
    stated = f"causal {row.text('causal')}".lower() if row.text("causal") else named
    narrow = get_format(kv).width < 2
    return _Case(
        row.hardware, row.text("engine"), dtype, kv, row.number("window", 0),
        decode="generation" in row.text("op") or "decode" in row.text("op"),
        causal=in_engine or bool(_MASKED.search(stated)),
        rate=_is_rate(row),
        steps="decode" in kernel,
        portable="triton" in named,
        casts="sglang" in named and narrow and (get_format(dtype).width >= 2 or "trtllm" in kernel),
        synchronous=bool(re.search(r"fa_?2|flash_?-?attn_?-?(v_?)?2|flash_?-?attention_?-?(v_?)?2", named)),
        fused=in_engine or not re.search(r"py_?torch|eager|naive|math|unfused|standard", named),
    )  # fmt: skip


def _is_rate(row: Row) -> bool:
    return row.unit >= 1e9


def _heads(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(query heads, KV heads, head dimension) of each row."""
    dim = np.array([r.number("head_dim", _HEAD_DIM if _is_rate(r) else None) for r in rows])
    heads = np.array([
        r.number("n_heads", max(1.0, r.number("hidden", _MODEL_WIDTH) / d)) for r, d in zip(rows, dim, strict=True)
    ])  # fmt: skip
    return heads, np.array([r.number("n_kv_heads", h) for r, h in zip(rows, heads, strict=True)]), dim


def _price(key: Hashable, rows: list[Row]) -> list[Outcome]:
    assert isinstance(key, _Case)
    m = engine_machine(key.hardware, key.engine)
    context = np.array([r.number("context_len", r.number("input_len", _LONG if key.rate else 0)) for r in rows])
    if not np.all(context > 0):
        raise Refused("context_len not stated")
    batch = np.array([
        r.number("batch", max(1.0, _TOKENS / c) if key.rate else None) for r, c in zip(rows, context, strict=True)
    ])  # fmt: skip
    # A decode kernel that is handed first tokens sees them as cached.
    group = Group(batch, 1, context - 1, decode=True) if key.decode else Group(batch, context, 1 if key.steps else 0)
    heads, kv_heads, dim = _heads(rows)
    if key.portable:
        slower = m.attention_efficiency * m.law["portable_attention_rate"]
        tile = m.law["attention_tile"] / _SHORTER
        m = with_law(replace(m, attention_efficiency=slower), attention_packing=0.0, attention_tile=tile)
    if key.synchronous and "synchronous_attention_efficiency" in m.law:
        slower = np.minimum(m.attention_efficiency, m.law["synchronous_attention_efficiency"])
        m = replace(m, attention_efficiency=slower)
    ops = _attention(key, group, heads, kv_heads, dim) if key.fused else _unfused(key, group, heads, dim)
    ops += _around(key, m, group.tokens, heads, kv_heads, dim)
    spread = seconds_with_spread(ops, m, "attention_decode" if key.decode else "attention_prefill")
    if key.rate:
        pairs = group.n * group.q * (group.c + group.q) / (2 if key.causal else 1)  # how the benchmarks count
        return rates(rows, 4 * heads * dim * pairs, *spread)
    return times(rows, *spread)


def _attention(key: _Case, group: Group, heads: Num, kv_heads: Num, dim: Num) -> list[Op]:
    act, kv = get_format(key.dtype), get_format(key.kv)
    narrow = kv.width < 2 and not key.portable  # queries are cast to the format of the cache
    op = softmax_attention(
        "attention", group, heads=heads, kv_heads=kv_heads, qk_dim=dim, v_dim=dim, kv_elements=2 * kv_heads * dim,
        kv_width=kv.width, act_width=max(act.width, 2), dtype=str((kv if narrow else act).matrix),
        window=None if key.portable and not key.decode else key.window or None, causal=key.causal,
    )  # fmt: skip
    # A benchmark repeats one call: what fits in the cache stays there, keys and values too.
    return [replace(op, traffic=tuple(replace(t, tensor="activations") for t in op.traffic))]


def _unfused(key: _Case, group: Group, heads: Num, dim: Num) -> list[Op]:
    """Scores and their softmax as matrices in memory: a product per head on either side of a softmax."""
    act, groups, context = get_format(key.dtype), group.n * heads, group.c + group.q

    def product(name: str, n: Num, k: Num) -> Op:
        traffic = (
            read("kv", groups * n * k, act.width), read("activations", groups * group.q * k, act.width),
            write("activations", groups * group.q * n, act.width),
        )  # fmt: skip
        flops = {str(act.matrix): 2 * groups * group.q * n * k}
        return Op(name, "grouped_gemm", flops, traffic, {"m": group.q, "n": n, "k": k, "groups": groups})

    probabilities = softmax("softmax", groups * group.q, context, act.width)
    return [product("scores", context, dim), probabilities, product("values", dim, context)]


def _around(key: _Case, m: Machine, tokens: Num, heads: Num, kv_heads: Num, dim: Num) -> list[Op]:
    """What an engine's attention call runs besides the attention kernel.

    New keys and values are scattered into the paged cache; TensorRT-LLM also rotates the queries there, with one block
    for each query head whether or not it has keys to write, and before a prefill a kernel of its own lays out the
    sequences. SGLang casts queries where the cache is narrow.
    """
    engine = next((e for e in _PAGED if key.engine.lower().startswith(e)), None)
    if engine is None:
        return []
    rotates = engine == "trtllm"
    elements = tokens * dim * (3 * heads if rotates else 2 * kv_heads)
    # Bound by elements, not by the bytes stored: 2 bytes read and 2 at most written.
    reached = np.minimum(1.0, m.units * m.law["scatter_rate"] / m.bandwidth)
    scatter = Op("cache_write", "elementwise", {}, (write("kv", elements, 4 / reached),), {})
    layout = Op("layout", "elementwise", {}, (), {})
    if key.casts:
        return [scatter, quantise("query_cast", tokens * heads * dim, get_format("bf16"), 1)]
    return [scatter, layout] if rotates and not key.decode else [scatter]


def _predict(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


def _held_out(row: Row) -> Hashable:
    return row.text("n_heads"), row.text("n_kv_heads"), row.text("head_dim")


DECODE = Kind(
    "decode attention", lambda r: r.text("op") == "generation_attention", _predict, _held_out,
    ("law.attention_latency", "law.attention_item_start", "law.attention_read_loss", "law.decode_chunk",
     "architecture.*.attention_load_rate"),
)  # fmt: skip
PREFILL = Kind(
    "prefill attention", lambda r: r.text("phase") == "attention", _predict, _held_out,
    ("architecture.*.attention_efficiency", "architecture.*.vector_efficiency", "law.attention_narrow_efficiency",
     "law.portable_attention_rate", "law.scatter_rate", "engine.vllm.scatter_rate"),
)  # fmt: skip
