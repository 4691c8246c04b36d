"""Latents instead of keys and values: bytes, FLOPs of rebuilding and stored factors by hand."""

from __future__ import annotations

import pytest
from cache_by_hand import bytes_per_column, estimator, kernel, named
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.graph import decode, prefill, weight_residency

HALF = "kv-low-rank:key_rank=0.5,value_rank=0.5,group=4"


def test_half_the_rank_is_half_the_cache() -> None:
    assert bytes_per_column((HALF,), 1000) == pytest.approx(1000)
    # rank and bits multiply: 0.5 x 0.5 B
    assert bytes_per_column((HALF, "kv-quantization:bits=4"), 1000) == pytest.approx(250)
    assert bytes_per_column(("kv-quantization:bits=4", HALF), 1000) == pytest.approx(250)


def test_recent_tokens_are_stored_both_ways() -> None:
    # 968 latents of half the size; 32 tokens whole, and their latents
    assert bytes_per_column((HALF + ",recent=32",), 1000) == pytest.approx(2 * (968 * 0.5 + 32 * 1.5))
    read = kernel(estimator(HALF + ",recent=32"), decode(1, 999))
    assert read.bytes(tensor="kv") == pytest.approx(2048 * 2 * (968 * 0.5 + 32))
    assert read.shape["kv_len"] == pytest.approx(1000)


def test_rebuilt_keys_and_absorbed_values_by_hand() -> None:
    op = kernel(estimator(HALF), decode(1, 999))
    # Two groups of 4 heads x 128: latents of 256 to 512 elements, 2 x 256 x 512 FLOPs each per token.
    rebuilt = 1000 * 2 * 2 * 256 * 512
    # Scores: 32 heads x 128; outputs: 32 heads x 256 elements of the latent of four heads.
    attended = 1000 * 2 * 32 * (128 + 256)
    assert op.shape["rebuild"] == pytest.approx(rebuilt)
    assert op.flops["bf16"] == pytest.approx(rebuilt + attended)
    both = kernel(estimator(HALF + ",absorb_values=false"), decode(1, 999))
    assert both.flops["bf16"] == pytest.approx(2 * rebuilt + 1000 * 2 * 32 * 256)


def test_projections_by_hand() -> None:
    e = estimator(HALF)
    stored = {r.name.split(".")[-1]: r.elements / 32 for r in weight_residency(e.model, e.par, e.formats)}
    assert stored["k_proj"] == pytest.approx(512 * 4096 + 2 * 256 * 512)  # down to 512, up in two groups
    assert stored["v_proj"] == pytest.approx(512 * 4096)
    assert stored["o_proj"] == pytest.approx(4096 * 32 * 256)  # each head takes the latent of its group
    assert named(e, decode(1, 999), "qkv_proj").shape["n"] == pytest.approx(4096 + 2 * 512)
    assert named(e, decode(1, 999), "o_proj").shape["k"] == pytest.approx(32 * 256)
    # A prompt expands keys of its own tokens: 2 x 512 x 1024 FLOPs over two groups of rank 256.
    assert named(e, prefill(1, 100), "key_expand").flops["bf16"] == pytest.approx(100 * 2 * 256 * 1024)


def test_merged_key_heads() -> None:
    # CHAI: half the key heads: 0.5 (1 - 0.5) = a quarter less, and half the scores' FLOPs.
    spec = "kv-low-rank:merged_keys=0.5"
    assert bytes_per_column((spec,), 1000) == pytest.approx(2000 * 0.75)
    plain, merged = kernel(estimator(), decode(1, 999)), kernel(estimator(spec), decode(1, 999))
    assert merged.flops["bf16"] / plain.flops["bf16"] == pytest.approx(0.75)


def test_keys_alone_as_in_shadowkv() -> None:
    # rank 160 of 1024 for all eight heads; values whole
    spec = "kv-low-rank:key_rank=0.15625,group=0"
    assert bytes_per_column((spec,), 1000) == pytest.approx(2000 * (0.5 * 0.15625 + 0.5))
    assert kernel(estimator(spec), decode(1, 999)).shape["rebuild"] == pytest.approx(1000 * 2 * 160 * 1024)


@given(batch=st.integers(1, 32), context=st.integers(1, 40_000))
@settings(max_examples=12, deadline=None)
def test_full_rank_changes_nothing(batch: int, context: int) -> None:
    same = estimator("kv-low-rank:key_rank=1")
    assert same.decode(batch, context) == pytest.approx(estimator().decode(batch, context))
    assert same.memory(batch, context).kv == pytest.approx(estimator().memory(batch, context).kv)
    assert same.memory(batch, context).weights == pytest.approx(estimator().memory(batch, context).weights)


@given(rank=st.floats(0.05, 0.95), more=st.floats(0.0, 0.5))
@settings(max_examples=12, deadline=None)
def test_higher_rank_takes_more(rank: float, more: float) -> None:
    low, high = (estimator(f"kv-low-rank:key_rank={r},value_rank={r}") for r in (rank, min(rank + more, 1)))
    assert low.memory(4, 9000).kv <= high.memory(4, 9000).kv


def test_groups_must_fit_a_rank() -> None:
    with pytest.raises(SpecError, match="use group=2"):
        estimator(HALF, tp=4)
    with pytest.raises(SpecError, match="no keys and values"):
        estimator(HALF, model="deepseek-v2-lite")
