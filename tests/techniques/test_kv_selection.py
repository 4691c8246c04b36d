"""Everything stored, little read: pages, summaries and their scores by hand."""

from __future__ import annotations

import numpy as np
import pytest
from cache_by_hand import bytes_per_column, estimator, kernel, named
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.graph import decode, prefill
from perfmodel.schedule import operators

QUEST = "kv-selection:budget=2048,page=16,summaries=2"


def test_stored_is_all_and_summaries() -> None:
    # Two key vectors per 16 tokens of keys and values: 1 + 2 / (2 x 16) of the cache.
    assert bytes_per_column((QUEST,), 32_000) == pytest.approx(32_000 * 2 * (1 + 1 / 16))


def test_read_is_the_budget_and_the_summaries() -> None:
    e = estimator(QUEST)
    assert kernel(e, decode(3, 31_999)).bytes(tensor="kv") == pytest.approx(3 * 2048 * 2048 * 2)
    scan = named(e, decode(3, 31_999), "kv_summaries")
    # 2000 pages x 2 x 8 heads x 128 elements x 2 B
    assert scan.bytes(tensor="kv") == pytest.approx(3 * 2000 * 2 * 8 * 128 * 2)
    # Each of 32 query heads scores each page: 2 vectors x 128 x 2 FLOPs, and 4 more per score for the top-k.
    assert scan.flops["vector"] == pytest.approx(3 * 2000 * 32 * (2 * 128 * 2 + 4))


def test_lower_bound_of_quest_by_its_own_formula() -> None:
    # model of the paper per layer: (L / page) 2 d + K page 2 d elements instead of 2 L d
    e = estimator(QUEST)
    parts = e.parts(16, 1, 31_999, is_decode=True)
    read = 16 * 32 * 8 * 128 * 2 * (2 * 32_000 / 16 + 2 * 2048)
    assert parts.lower >= read / e.machine.bandwidth


def test_pages_are_read_whole() -> None:
    op = kernel(estimator("kv-selection:budget=1000,page=64,summaries=0"), decode(1, 9_999))
    assert op.shape["kv_len"] == pytest.approx(1024)
    shared = kernel(estimator("kv-selection:budget=1000,page=1,union=1.5,summaries=0"), decode(1, 9_999))
    assert shared.shape["kv_len"] == pytest.approx(1500)


def test_reuse_of_a_selection_divides_its_cost() -> None:
    once, often = (named(estimator(f"{QUEST},every={n}"), decode(1, 31_999), "kv_summaries") for n in (4, 1))
    assert once.bytes(tensor="kv") * 4 == pytest.approx(often.bytes(tensor="kv"))
    assert once.launches * 4 == often.launches


def test_scores_on_the_matrix_units() -> None:
    scan = named(estimator(f"{QUEST},tensor_cores=true"), decode(1, 31_999), "kv_summaries")
    assert scan.flops["bf16"] == pytest.approx(2000 * 32 * 2 * 128 * 2)
    fast, slow = estimator(f"{QUEST},tensor_cores=true"), estimator(QUEST)
    assert fast.decode(64, 32_000) < slow.decode(64, 32_000)


def test_hashes_by_hand() -> None:
    # MagicPIG: K = 10 bits in each of L = 150 tables for every token and KV head
    spec = "kv-selection:share=0.02,page=1,summaries=0,hash_bits=1500"
    more = bytes_per_column((spec,), 10_000) / (10_000 * 2) - 1
    assert more == pytest.approx(1500 / 8 / (2 * 128 * 2))


def test_sinks_and_recent_tokens_count() -> None:
    spec = "kv-selection:budget=1024,page=1,sinks=64,recent=256,summaries=0"
    assert kernel(estimator(spec), decode(1, 19_999)).shape["kv_len"] == pytest.approx(1024)
    with pytest.raises(SpecError, match="exceed the budget"):
        estimator("kv-selection:budget=128,sinks=64,recent=256")


def test_first_layers_stay_dense() -> None:
    # 2 of 32 layers read all: Quest.
    e = estimator(f"{QUEST},spare_layers=2")
    read = [(n, op.shape["kv_len"]) for op, n, _ in operators(e.lower(decode(1, 31_999)).schedule) if op.kind == "attention"]
    assert read == [(2, 32_000), (30, pytest.approx(2048))]


def test_prefill_blocks_against_a_count() -> None:
    # MoBA-like: each query meets 2048 keys; routing scores q c / 2 / 128 blocks of 32 heads, 256 FLOPs each.
    e = estimator("kv-selection:prefill_budget=2048,prefill_page=128")
    met = sum(min(i, 2048) for i in range(1, 8193))
    assert kernel(e, prefill(1, 8192)).shape["pairs"] == pytest.approx(met)
    routing = named(e, prefill(1, 8192), "prefill_routing")
    assert routing.flops["bf16"] == pytest.approx(32 * 8192 * 8193 / 2 / 128 * 256)
    slow = named(estimator("kv-selection:prefill_budget=2048,prefill_page=128,prefill_choice=43"), prefill(1, 8192), "prefill_routing")
    # Per score of a head 43 operations of its top-k instead of 4.
    assert slow.flops["vector"] - routing.flops["vector"] == pytest.approx(39 * 32 * 8192 * 8193 / 2 / 128)
    assert e.decode(4, 30_000) == pytest.approx(estimator().decode(4, 30_000))


def test_commutes_with_streaming_heads_and_bits() -> None:
    parts = [QUEST, "streaming-heads:share=0.5,recent=256", "kv-quantization:bits=4,residual=64", "kv-eviction:budget=9000"]
    one, two = estimator(*parts), estimator(*parts[::-1])
    assert one.decode(4, 30_000) == pytest.approx(two.decode(4, 30_000))
    assert one.memory(4, 30_000).kv == pytest.approx(two.memory(4, 30_000).kv)


@given(batch=st.integers(1, 64), context=st.integers(1, 50_000))
@settings(max_examples=15, deadline=None)
def test_reading_all_costs_the_same_and_identity_changes_nothing(batch: int, context: int) -> None:
    plain = estimator()
    same, wide = estimator("kv-selection:share=1"), estimator("kv-selection:budget=60000")
    assert same.decode(batch, context) == pytest.approx(plain.decode(batch, context))
    assert same.memory(batch, context).kv == pytest.approx(plain.memory(batch, context).kv)
    assert wide.decode(batch, context) == pytest.approx(plain.decode(batch, context))


@given(budget=st.integers(64, 8000), more=st.integers(64, 4000))
@settings(max_examples=15, deadline=None)
def test_larger_budgets_read_more(budget: int, more: int) -> None:
    one, two = (kernel(estimator(f"kv-selection:budget={b}"), decode(2, 29_999)) for b in (budget, budget + more))
    assert one.bytes(tensor="kv") <= two.bytes(tensor="kv")


def test_arrays_agree_with_numbers() -> None:
    e = estimator(QUEST)
    rows = e.decode(np.array([1, 4, 16]), np.array([100, 3000, 30_000]))
    assert rows == pytest.approx([e.decode(1, 100), e.decode(4, 3000), e.decode(16, 30_000)])
    filled = e.prefill(1, np.array([100, 3000]))
    assert filled == pytest.approx([e.prefill(1, 100), e.prefill(1, 3000)])


def test_gathered_queries_pass_memory_once_per_chosen_block() -> None:
    moba = "kv-selection:prefill_budget=1024,prefill_page=128"
    gather = named(estimator(moba + ",prefill_gathered=true"), prefill(1, 16_384), "prefill_gather")
    # 8 blocks x 16,384 queries x 32 heads x 128 elements: 2 B in, and 4 B of the partial output read and written.
    assert gather.bytes() == pytest.approx(8 * 16_384 * 32 * 128 * (2 + 4 + 4))
    assert estimator(moba + ",prefill_gathered=true").prefill(1, 65_536) > estimator(moba).prefill(1, 65_536)
