"""Heads that keep sinks and a window: tokens by hand, whole heads on ranks, pairs of a prefill by counting."""

from __future__ import annotations

import numpy as np
import pytest
from cache_by_hand import bytes_per_column, estimator, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.graph import decode, prefill

HALF = "streaming-heads:share=0.5,sinks=64,recent=256"


def test_stored_and_read_by_hand() -> None:
    # 4 of 8 heads keep 320 tokens
    assert bytes_per_column((HALF,), 20_000) == pytest.approx((20_000 + 320) / 2 * 2)
    assert kernel(estimator(HALF), decode(3, 19_999)).bytes(tensor="kv") == pytest.approx(3 * 2048 * (20_000 + 320))


def test_compensation_token_and_strides() -> None:
    assert bytes_per_column((HALF + ",extra=1",), 20_000) == pytest.approx((20_000 + 321) / 2 * 2)
    assert bytes_per_column((HALF + ",kept=0.1",), 20_000) == pytest.approx((20_000 + 320 + 2000) / 2 * 2)


def test_heads_are_whole_on_ranks() -> None:
    # 3 of 8 heads are full. tp 4 deals 2 heads to a rank: balanced, the fullest rank has 1 full head; unbalanced, 2.
    spec = "streaming-heads:share=0.625,sinks=64,recent=256"
    assert bytes_per_column((spec,), 20_000) == pytest.approx((3 * 20_000 + 5 * 320) / 8 * 2)
    assert bytes_per_column((spec,), 20_000, tp=4) == pytest.approx((20_000 + 320) / 2 * 2)
    assert bytes_per_column((spec + ",balanced=false",), 20_000, tp=4) == pytest.approx(20_000 * 2)


def test_prefill_pairs_against_a_count() -> None:
    full, cut = 8192 * 8193 / 2, sum(min(i, 320) for i in range(1, 8193))
    assert kernel(estimator(HALF), prefill(1, 8192)).shape["pairs"] == pytest.approx((full + cut) / 2)
    # with 4096 tokens cached: queries stand at 4097 and later
    full, cut = sum(range(4097, 5121)), 1024 * 320
    assert kernel(estimator(HALF), prefill(1, 1024, 4096)).shape["pairs"] == pytest.approx((full + cut) / 2)
    after = kernel(estimator(HALF + ",prefill=false"), prefill(1, 8192))
    assert after.shape["pairs"] == pytest.approx(8192 * 8193 / 2)


@given(batch=st.integers(1, 32), context=st.integers(1, 40_000))
@settings(max_examples=15, deadline=None)
def test_no_streaming_head_changes_nothing(batch: int, context: int) -> None:
    same = estimator("streaming-heads:share=0")
    assert same.decode(batch, context) == pytest.approx(estimator().decode(batch, context))
    assert same.prefill(1, context) == pytest.approx(estimator().prefill(1, context))
    assert same.memory(batch, context).kv == pytest.approx(estimator().memory(batch, context).kv)


@given(share=st.floats(0, 1), more=st.floats(0, 1), context=st.integers(2000, 40_000))
@settings(max_examples=15, deadline=None)
def test_more_streaming_heads_never_take_more(share: float, more: float, context: int) -> None:
    one, two = (estimator(f"streaming-heads:share={s}") for s in (max(share, more), min(share, more)))
    assert one.memory(4, context).kv <= two.memory(4, context).kv
    assert one.decode(16, context) <= two.decode(16, context) * (1 + 1e-9)


def test_arrays_and_models_without_kv_heads() -> None:
    e = estimator(HALF)
    rows = e.decode(np.array([1, 4, 16]), np.array([100, 1000, 30_000]))
    assert rows == pytest.approx([e.decode(1, 100), e.decode(4, 1000), e.decode(16, 30_000)])
    with pytest.raises(SpecError, match="no KV heads"):
        estimator(HALF, model="deepseek-v2-lite")
