"""Budgets of tokens: what is stored and read by hand, layers and heads apart, prefill kept or cut."""

from __future__ import annotations

import numpy as np
import pytest
from cache_by_hand import bytes_per_column, estimator, kernel, named
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode, prefill


def test_budget_bounds_what_is_stored_and_read() -> None:
    assert bytes_per_column(("kv-eviction:budget=512",), 4096) == 512 * 2
    assert bytes_per_column(("kv-eviction:budget=512",), 300) == 300 * 2
    # 5 sequences x 512 tokens x 2048 elements x 2 B
    assert kernel(estimator("kv-eviction:budget=512"), decode(5, 9999)).bytes(tensor="kv") == 5 * 512 * 2048 * 2


def test_generated_tokens_beside_the_budget() -> None:
    # SnapKV at 16000 prompt tokens: 1024 of them, and 500 generated ones.
    spec = "kv-eviction:budget=1024,generated=false,prompt=16000"
    assert bytes_per_column((spec,), 16_500) == (1024 + 500) * 2
    # 0.2 of the prompt, and at most 256 of the generated ones
    spec = "kv-eviction:share=0.2,generated=false,prompt=16000,generated_budget=256"
    assert bytes_per_column((spec,), 16_500) == (3200 + 256) * 2


def test_a_pyramid_of_layers_against_its_layers() -> None:
    # 32 layers, mean budget 1000, from 1800 down to 200: mean of min(T, b) over 100 000 even steps
    budgets = np.linspace(200, 1800, 100_001)
    for tokens in (100, 700, 1500, 5000):
        mean = np.minimum(tokens, budgets).mean()
        assert bytes_per_column(("kv-eviction:budget=1000,pyramid=1.8",), tokens) == pytest.approx(2 * mean, abs=2.1)


def test_pyramid_makes_the_first_stage_the_fullest() -> None:
    e = Estimator("llama-3.1-8b", "h100-sxm", pp=2, techniques=["kv-eviction:budget=1000,pyramid=1.8"])
    # The upper half of the ramp from 1800 to 200 is 1800..1000: 1400 on average, 16 layers, 2048 x 2 B each.
    assert e.memory(1, 100_000).kv == pytest.approx(1400 * 16 * 2048 * 2)


def test_head_budgets_under_tensor_parallelism() -> None:
    # One of 8 heads has 3 times the mean of 1024, the others (8 - 3)/7 each.
    spec = "kv-eviction:budget=1024,imbalance=3"
    assert bytes_per_column((spec,), 50_000) == pytest.approx(1024 * 2, abs=2)
    assert bytes_per_column((spec,), 50_000, tp=8) == pytest.approx(3072 * 2, abs=2)
    fullest = (3 + (8 - 3) / 7) / 2
    assert bytes_per_column((spec,), 50_000, tp=4) == pytest.approx(1024 * fullest * 2, abs=2.1)


def test_prefill_scores_by_hand() -> None:
    # 32 heads x 64 rows x (8192 - 31.5) keys x 2 x 128 FLOPs
    op = named(estimator("kv-eviction:budget=1024,scores=true,window=64"), prefill(1, 8192), "eviction_scores")
    assert op.flops["bf16"] == pytest.approx(32 * 64 * (8192 - 31.5) * 256)
    every = named(estimator("kv-eviction:share=0.2,scores=true"), prefill(1, 8192), "eviction_scores")
    assert every.flops["exp"] == pytest.approx(32 * 8192 * 8193 / 2)


def test_prefill_that_evicts_as_it_goes_against_a_count() -> None:
    # A query meets min(its position, budget + chunk) keys.
    met = sum(min(i, 2048 + 1024) for i in range(1, 8193))
    plain = kernel(estimator(), prefill(1, 8192))
    cut = kernel(estimator("kv-eviction:budget=2048,chunk=1024"), prefill(1, 8192))
    assert cut.shape["pairs"] == pytest.approx(met)
    assert cut.flops["bf16"] / plain.flops["bf16"] == pytest.approx(met / (8192 * 8193 / 2))
    kept = kernel(estimator("kv-eviction:budget=2048"), prefill(1, 8192))
    assert kept.flops == plain.flops


def test_between_evictions_the_cache_grows() -> None:
    # peak: 1024 + 127; a step sees half of that on average
    spec = "kv-eviction:budget=1024,interval=128"
    assert bytes_per_column((spec,), 20_000) == (1024 + 127) * 2
    assert kernel(estimator(spec), decode(1, 19_999)).shape["kv_len"] == pytest.approx(1024 + 63.5, abs=0.6)


def test_one_layer_is_whole_while_it_is_cut() -> None:
    # 1024 kept, and (20000 - 1024)/32 of a column for the one layer that still is whole
    spec = "kv-eviction:budget=1024,transient=true"
    assert bytes_per_column((spec,), 20_000) == pytest.approx((1024 + (20_000 - 1024) / 32) * 2)
    assert estimator(spec).decode(4, 20_000) == pytest.approx(estimator("kv-eviction:budget=1024").decode(4, 20_000))


def test_state_is_stored_and_read() -> None:
    # 4 B per kept token and KV head: 8 heads x 32 layers x 1024 tokens
    spec = "kv-eviction:budget=1024,state=4"
    more = bytes_per_column((spec,), 20_000) - 1024 * 2
    assert more * 32 * 2048 == pytest.approx(4 * 8 * 32 * 1024)
    op = named(estimator(spec), decode(3, 19_999), "eviction_state")
    assert op.bytes(tensor="kv") == pytest.approx(3 * 4 * 8 * 1024)


def test_windows_are_not_cut_twice() -> None:
    # Gemma-2: every second layer has a window of 4096; a budget beyond it leaves those layers alone.
    e, plain = estimator("kv-eviction:budget=8192", model="gemma-2-9b"), estimator(model="gemma-2-9b")
    column = 2 * 8 * 256 * 2
    local = plain.memory(1, 100_000).kv - 21 * 100_000 * column
    assert e.memory(1, 100_000).kv == pytest.approx(local + 21 * 8192 * column)


@given(context=st.integers(1, 50_000), batch=st.integers(1, 64))
@settings(max_examples=15, deadline=None)
def test_keeping_everything_changes_nothing(context: int, batch: int) -> None:
    for same in (estimator("kv-eviction:share=1"), estimator("kv-eviction:budget=60000")):
        assert same.decode(batch, context) == pytest.approx(estimator().decode(batch, context))
        assert same.memory(batch, context).kv == pytest.approx(estimator().memory(batch, context).kv)
    assert estimator("kv-eviction:share=1").techniques[0].effects() == "exact"


@given(budget=st.integers(64, 8000), more=st.integers(1, 4000), context=st.integers(1, 20_000))
@settings(max_examples=15, deadline=None)
def test_larger_budgets_never_take_less(budget: int, more: int, context: int) -> None:
    one, two = (estimator(f"kv-eviction:budget={b},pyramid=1.5") for b in (budget, budget + more))
    assert one.memory(2, context).kv <= two.memory(2, context).kv
    assert one.decode(2, context) <= two.decode(2, context) * 1.02  # a shorter cache is split into fewer items


def test_what_cannot_be() -> None:
    with pytest.raises(SpecError, match="do not fit into a budget"):
        estimator("kv-eviction:budget=16,sinks=64")
    with pytest.raises(SpecError, match="give prompt=N"):
        estimator("kv-eviction:budget=512,generated=false")
    with pytest.raises(SpecError, match="imbalance lies between 1 and 8"):
        estimator("kv-eviction:budget=512,imbalance=20")
    with pytest.raises(SpecError, match="budgte.*did you mean"):
        estimator("kv-eviction:budgte=512")
