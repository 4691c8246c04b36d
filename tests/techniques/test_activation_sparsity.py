"""Skipped channels: what one token reads, what a batch reads, and what choosing costs."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode
from perfmodel.schedule import operators

ONE = 4096 * 11008 * 2 * 32  # bytes of one of the three feed-forward matrices of Llama-2-7B, all layers


@lru_cache(maxsize=64)
def built(*techniques: str) -> Estimator:
    return Estimator("llama-2-7b", "a100-sxm-80gb", techniques=techniques)


def read(e: Estimator, batch: float, *names: str) -> float:
    every = operators(e.lower(decode(batch, 255)).schedule)
    return sum(float(op.bytes("hbm", "weights")) * n for op, n, _ in every if op.name in names)


def test_one_token_skips_nine_tenths():
    # ProSparse on Llama-2-7B: 89.32 % of the channels are zero. The gate is computed whole, a tenth of up and down read.
    e = built("activation-sparsity:ffn=0.8932")
    assert read(e, 1, "gate_up_proj") == pytest.approx(ONE * (1 + 0.1068))
    assert read(e, 1, "down_proj") == pytest.approx(ONE * 0.1068)
    # A predictor spares the gate as well, and reads its own 2 x rank x (h + f) bytes.
    p = built("activation-sparsity:ffn=0.8932,predictor=1024")
    assert read(p, 1, "gate_up_proj") == pytest.approx(2 * ONE * 0.1068)
    assert read(p, 1, "sparsity_predictor_in", "sparsity_predictor_out") == pytest.approx(2 * 1024 * (4096 + 11008) * 32)
    assert float(p.memory(1, 1).weights - e.memory(1, 1).weights) == pytest.approx(2 * 1024 * (4096 + 11008) * 32)
    # A recall of 80 % names a quarter more.
    r = built("activation-sparsity:ffn=0.9,predictor=1024,recall=0.8")
    assert read(r, 1, "down_proj") == pytest.approx(ONE * 0.125)


def test_a_batch_reads_the_union():
    # Independent: 1 - 0.9^8 = 0.5695; the same channels: 0.1; half correlated: 1 - 0.9^4.5 = 0.3776.
    for text, share in (("", 1 - 0.9**8), (",correlation=1", 0.1), (",correlation=0.5", 1 - 0.9**4.5)):
        assert read(built(f"activation-sparsity:ffn=0.9{text}"), 8, "down_proj") == pytest.approx(ONE * share)


def test_the_union_by_brute_force():
    rng = np.random.default_rng(7)
    active = rng.random((8, 200_000)) < 0.1
    assert read(built("activation-sparsity:ffn=0.9"), 8, "down_proj") / ONE == pytest.approx(active.any(axis=0).mean(), rel=0.01)


def test_thresholds_on_inputs():
    # TEAL at 50 %: half of q, k, v, o, of gate, up and down; at 80 % of the dense rate 0.625.
    e = built("activation-sparsity:ffn=0.5,inputs=0.5,attention=0.5,efficiency=0.8")
    assert read(e, 1, "qkv_proj", "o_proj") == pytest.approx(0.625 * 4 * 4096 * 4096 * 2 * 32)
    assert read(e, 1, "down_proj") == pytest.approx(0.625 * ONE)


@settings(max_examples=15, deadline=None)
@given(skipped=st.floats(0, 0.99), efficiency=st.floats(0.1, 1), batch=st.integers(1, 64))
def test_never_more_than_dense_nor_less_than_needed(skipped, efficiency, batch):
    e = built()
    s = Estimator(e.model, "a100-sxm-80gb", techniques=[f"activation-sparsity:ffn={skipped},efficiency={efficiency}"])
    assert (1 - skipped) * ONE <= read(s, batch, "down_proj") * (1 + 1e-9)
    assert read(s, batch, "down_proj") <= ONE * (1 + 1e-9)


def test_no_sparsity_and_large_batches_change_nothing():
    b = np.array([1.0, 16, 64])
    assert built("activation-sparsity").decode(b, 512) == pytest.approx(built().decode(b, 512))
    assert built("activation-sparsity:ffn=0.5").decode(256, 512) == pytest.approx(built().decode(256, 512), rel=1e-6)
    times = [built(f"activation-sparsity:ffn={x}").decode(1, 512) for x in (0.9, 0.5, 0.1)]
    assert times == sorted(times)


def test_what_cannot_be():
    with pytest.raises(SpecError, match="router already picks"):
        Estimator("mixtral-8x7b", "h200-sxm", techniques=["activation-sparsity:ffn=0.5"])
