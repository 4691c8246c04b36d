"""Bits of the cache: bytes by hand, what commutes, what identity leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from cache_by_hand import bytes_per_column, estimator, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.graph import decode, prefill
from perfmodel.memory import longest_context, weight_bytes
from perfmodel.schedule import operators
from perfmodel.techniques.registry import techniques

EVICT, NARROW = "kv-eviction:budget=512", "kv-quantization:bits=2,residual=128"


@pytest.mark.parametrize("order", [(EVICT, NARROW), (NARROW, EVICT)])
def test_hand_test_of_the_design_in_both_orders(order: tuple[str, str]) -> None:
    # 4096 tokens, 512 kept: 384 old ones of 2 bits = 0.25 B, 128 new ones of 16 bits = 2 B: 96 + 256 = 352 B.
    assert bytes_per_column(order, 4096) == pytest.approx(384 * 0.25 + 128 * 2)


def test_what_is_read_is_what_is_stored() -> None:
    # Llama-3.1-8B: 2 x 8 x 128 = 2048 elements per token and layer; 3 sequences of 352 B per column.
    op = kernel(estimator(EVICT, NARROW), decode(3, 4095))
    assert sum(t.bytes for t in op.traffic if t.tensor == "kv") == pytest.approx(3 * 2048 * 352)


def test_scales_and_outliers_by_hand() -> None:
    # (2 + 32/32 + 0.01 x 32) / 8 = 0.415 B per element
    spec = "kv-quantization:bits=2,group=32,outliers=0.01"
    assert bytes_per_column((spec,), 1000) == pytest.approx(415)


def test_keys_and_values_of_different_bits() -> None:
    # mean of 4 and 2 bits: 3/8 B
    assert bytes_per_column(("kv-quantization:key_bits=4,value_bits=2",), 1000) == pytest.approx(375)


def test_salient_tokens_commute_with_eviction() -> None:
    # 60 % of tokens at 4 bits, the others at 2 (ZipCache): 3.2 bits on average, whichever tokens remain.
    salient = "kv-quantization:bits=2,salient=0.6,high_bits=4"
    for order in ((salient, EVICT), (EVICT, salient)):
        assert bytes_per_column(order, 4096) == pytest.approx(512 * 3.2 / 8)


def test_error_correction_of_low_rank_by_hand() -> None:
    # rank 4 of a head of 128: 4 x 2 B for 128 elements beside 4 bits; 2 x 2 x 4 x 128 FLOPs per KV head for keys and values
    e = estimator("kv-quantization:bits=4,error_rank=4")
    assert bytes_per_column(("kv-quantization:bits=4,error_rank=4",), 1000) == pytest.approx(1000 * (0.5 + 8 / 128))
    plain, corrected = kernel(estimator(), decode(1, 999)), kernel(e, decode(1, 999))
    more = corrected.flops["bf16"] - plain.flops["bf16"] * 999 / 1000
    assert more == pytest.approx(1000 * 8 * 4 * 4 * 128, rel=5e-3)
    apart = kernel(estimator("kv-quantization:key_bits=4,value_bits=2,error_rank=4"), decode(1, 999))
    assert apart.shape["rebuild"] == corrected.shape["rebuild"] == 1000 * 8 * 4 * 4 * 128


def test_wide_heads_are_counted_whole_on_the_fullest_rank() -> None:
    # 1/8 of 8 KV heads stays wide; at tp 4 a rank has 2 heads, and one rank has the wide one: (2 + 0.25)/2 B per element.
    spec = "kv-quantization:bits=2,wide_heads=0.125"
    assert bytes_per_column((spec,), 1000) == pytest.approx(1000 * (2 + 7 * 0.25) / 8)
    assert bytes_per_column((spec,), 1000, tp=4) == pytest.approx(1000 * (2 + 0.25) / 2)


def test_unfused_unpacking_reads_and_writes_copies() -> None:
    # 0.25 B stored, and 2 B written plus 2 B read per element
    fused, apart = (kernel(estimator(f"kv-quantization:bits=2,fused={x}"), decode(1, 4095)) for x in ("true", "false"))
    assert apart.bytes(tensor="kv") / fused.bytes(tensor="kv") == pytest.approx(4.25 / 0.25)
    assert apart.launches == fused.launches + 1
    slow, fast = estimator("kv-quantization:bits=2,fused=false"), estimator("kv-quantization:bits=2")
    assert slow.decode(16, 32768) > estimator().decode(16, 32768) > fast.decode(16, 32768)


@given(batch=st.integers(1, 64), context=st.integers(1, 40_000))
@settings(max_examples=15, deadline=None)
def test_full_width_changes_nothing(batch: int, context: int) -> None:
    same = estimator("kv-quantization:bits=16")
    assert same.decode(batch, context) == pytest.approx(estimator().decode(batch, context))
    assert same.memory(batch, context).kv == pytest.approx(estimator().memory(batch, context).kv)
    assert same.techniques[0].effects() == "exact"


@given(bits=st.floats(1, 15), more=st.floats(0.1, 1), context=st.integers(2, 40_000))
@settings(max_examples=15, deadline=None)
def test_more_bits_never_take_less(bits: float, more: float, context: int) -> None:
    one, two = (estimator(f"kv-quantization:bits={b},unpack=4") for b in (bits, min(bits + more, 15.9)))
    assert one.memory(4, context).kv <= two.memory(4, context).kv
    assert one.decode(4, context) <= two.decode(4, context) * (1 + 1e-9)


def test_lower_bound_still_reads_what_is_stored() -> None:
    e = estimator("kv-quantization:bits=2,group=32")
    parts = e.parts(16, 1, 32767, is_decode=True)
    read = float(e.memory(16, 32767).kv)
    assert parts.lower * e.machine.bandwidth >= read


def test_arrays_agree_with_numbers() -> None:
    e = estimator(NARROW, EVICT)
    rows = e.decode(np.array([1, 4, 16]), np.array([100, 1000, 30_000]))
    assert rows == pytest.approx([e.decode(1, 100), e.decode(4, 1000), e.decode(16, 30_000)])


def test_probes_cost_a_share_of_the_score_matrix() -> None:
    e = estimator("kv-quantization:bits=4,probes=0.1")
    ops = [o for o, _, _ in operators(e.lower(prefill(1, 4096)).schedule) if o.name == "probe_scores"]
    # 32 heads x 410 rows x 4096 keys x 2 x 128 FLOPs
    assert ops[0].flops["bf16"] == pytest.approx(32 * 409.6 * 4096 * 256)


def test_codebooks_are_stored_once() -> None:
    # 32 layers x 8 KV heads x 1 MB
    e, plain = estimator("kv-quantization:codebook=1e6"), estimator()
    more = weight_bytes(e.model, e.par, e.formats) - weight_bytes(plain.model, plain.par, plain.formats)
    assert more == pytest.approx(32 * 8 * 1e6)


def test_a_cache_is_quantised_once() -> None:
    with pytest.raises(SpecError, match="quantised once"):
        techniques(["kv-quantization:bits=2", "kv-quantization:bits=4"])


def test_longest_context_follows_from_the_bytes() -> None:
    # Free bytes over those of a token: what fits is within one token of the plain division, residual and all.
    e = estimator(NARROW)
    free = 1e9
    tokens = longest_context(e.model, e.par, e.formats, free, 1)
    column = 32 * 2048
    assert tokens == pytest.approx((free / column - 128 * 2) / 0.25 + 128, abs=1)
