"""Another attention in the same model: parameters, cache and FLOPs by hand."""

from __future__ import annotations

import pytest
from cache_by_hand import estimator, kernel, named
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.graph import decode
from perfmodel.parameters import parameters_total

LLAMA2 = "llama-2-7b"  # 32 layers, hidden 4096, 32 heads of 128


def cached(*specs: str) -> float:
    """Elements of a token in one of 32 layers."""
    return float(estimator(*specs, model=LLAMA2).memory(1, 1600).kv) / 1600 / 32 / 2


def test_grouped_queries() -> None:
    e, plain = estimator("attention-layout:kv_heads=8", model=LLAMA2), estimator(model=LLAMA2)
    assert cached("attention-layout:kv_heads=8") == cached("attention-layout:kv_heads_over=4") == 2 * 8 * 128
    assert parameters_total(plain.model) - parameters_total(e.model) == 32 * 2 * (32 - 8) * 128 * 4096


def test_multi_matrix_factorisation() -> None:
    # 24 heads of 256, one KV head, queries through a factor of 256: S_q, K, V of 256 x 4096, Q_c and O of 24 x 256.
    spec = "attention-layout:heads=24,kv_heads=1,head_dim=256,q_rank=256"
    e, plain = estimator(spec, model=LLAMA2), estimator(model=LLAMA2)
    new = 3 * 256 * 4096 + 24 * 256 * 256 + 24 * 256 * 4096
    assert parameters_total(plain.model) - parameters_total(e.model) == 32 * (4 * 4096 * 4096 - new)
    assert cached(spec) == 2 * 256
    assert cached(spec + ",keys_as_values=true") == 256
    # 4 n_q head_dim FLOPs per token met
    assert kernel(e, decode(1, 999)).flops["fp16"] == 4 * 24 * 256 * 1000
    assert named(e, decode(1, 999), "qkv_proj").shape["n"] == 3 * 256
    assert named(e, decode(1, 999), "q_b_proj").flops["fp16"] == 2 * 256 * 24 * 256


def test_factored_queries_under_tensor_parallelism() -> None:
    e = estimator("attention-layout:heads=24,kv_heads=1,head_dim=256,q_rank=256", model=LLAMA2, tp=4)
    assert named(e, decode(1, 999), "qkv_proj").shape["n"] == 3 * 256  # shared factors on every rank
    assert named(e, decode(1, 999), "q_b_proj").shape["n"] == 24 * 256 / 4


def test_latent() -> None:
    spec = "attention-layout:kv_rank=512,rope_dim=64"
    assert cached(spec) == 512 + 64
    mixer = next(iter(estimator(spec, model=LLAMA2).model.blocks.values())).mixer
    assert (mixer.kind, mixer.nope_dim, mixer.v_dim) == ("latent", 64, 128)


@given(batch=st.integers(1, 32), context=st.integers(1, 4000))
@settings(max_examples=10, deadline=None)
def test_the_same_layout_changes_nothing(batch: int, context: int) -> None:
    plain = estimator(model=LLAMA2)
    for spec in ("attention-layout:kv_heads_over=1", "attention-layout:heads=32,kv_heads=32,head_dim=128"):
        same = estimator(spec, model=LLAMA2)
        assert same.decode(batch, context) == pytest.approx(plain.decode(batch, context))
        assert same.memory(batch, context).total == pytest.approx(plain.memory(batch, context).total)


def test_fewer_kv_heads_take_less() -> None:
    rows = [estimator(f"attention-layout:kv_heads={h}", model=LLAMA2) for h in (1, 2, 4, 8, 16, 32)]
    assert [e.memory(8, 4000).kv for e in rows] == sorted(e.memory(8, 4000).kv for e in rows)
    assert [e.decode(32, 4000) for e in rows] == sorted(e.decode(32, 4000) for e in rows)


def test_bits_apply_to_the_new_layout_in_either_order() -> None:
    parts = ["attention-layout:kv_heads=8", "kv-quantization:bits=4"]
    for order in (parts, parts[::-1]):
        assert cached(*order) == pytest.approx(2 * 8 * 128 / 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("attention-layout:kv_heads=5", "must divide 32"),
        ("attention-layout:kv_heads_over=64", "must divide 32"),
        ("attention-layout:kv_rank=512,rope_dim=128", "rope_dim below 128"),
        ("attention-layout:kv_heads=8,spare_layers=2", "leave spare_layers out"),
    ],
)
def test_what_cannot_be(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        estimator(spec, model=LLAMA2)


def test_values_are_read_off_the_keys_once() -> None:
    one = "attention-layout:kv_heads=8,keys_as_values=true"
    assert cached(one, "kv-sharing:group=2") == pytest.approx(8 * 128 / 2)
    with pytest.raises(SpecError, match="off the keys already"):
        estimator(one, "kv-sharing:keys_as_values=true", model=LLAMA2)
