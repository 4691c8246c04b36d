"""Keys and values computed again from cached inputs: bytes and FLOPs by hand."""

from __future__ import annotations

import pytest
from cache_by_hand import bytes_per_column, estimator, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.graph import decode
from perfmodel.techniques.registry import techniques

LLAMA2 = "llama-2-7b"  # hidden 4096, kv_dim 4096


def test_inputs_of_multi_head_attention() -> None:
    e = estimator("kv-rematerialisation:bits=4", model=LLAMA2)
    # hidden x 0.5 B in each of 32 layers, where keys and values take 2 x 4096 x 2 B
    assert e.memory(1, 1600).kv == pytest.approx(1600 * 32 * 4096 * 0.5)
    op = kernel(e, decode(3, 999))
    assert op.shape["rebuild"] == pytest.approx(3 * 1000 * 4 * 4096 * 4096)
    assert op.bytes(tensor="kv") == pytest.approx(3 * 1000 * 4096 * 0.5)


def test_latents_of_grouped_queries() -> None:
    # Llama-3.1-8B: kv_dim 1024 each: as many elements as keys and values, at 4 bits and scales: (4 + 32/128)/8 B
    spec = "kv-rematerialisation:bits=4,group=128"
    assert bytes_per_column((spec,), 1000) == pytest.approx(1000 * 4.25 / 8)
    assert kernel(estimator(spec), decode(1, 999)).shape["rebuild"] == pytest.approx(1000 * 2 * 1024 * 2048)
    whole = kernel(estimator(spec + ",latent=false"), decode(1, 999))
    assert whole.shape["rebuild"] == pytest.approx(1000 * 4 * 4096 * 1024)


def test_every_rank_needs_all_inputs() -> None:
    one, four = (estimator("kv-rematerialisation:bits=4", model=LLAMA2, tp=tp) for tp in (1, 4))
    assert four.memory(1, 1600).kv == pytest.approx(one.memory(1, 1600).kv)
    rebuilt = [kernel(e, decode(1, 999)).shape["rebuild"] for e in (one, four)]
    assert rebuilt[0] == pytest.approx(4 * rebuilt[1])


def test_the_running_sum_passes_memory_twice() -> None:
    # 2 bits of delta stored; 4 bits of the sum read and written
    op = kernel(estimator("kv-rematerialisation:bits=2,accumulator_bits=4", model=LLAMA2), decode(1, 999))
    assert op.bytes(tensor="kv") == pytest.approx(1000 * 4096 * (0.25 + 0.5 + 0.5))


def test_breaks_even_where_rebuilding_is_hidden() -> None:
    # FLOPs per byte saved are the same at any context, so a slow memory gains and a step with compute to spare too.
    e, plain = estimator("kv-rematerialisation:bits=4", model=LLAMA2), estimator(model=LLAMA2)
    flops = 4 * 4096 * 4096
    saved = 2 * 4096 * 2 - 4096 * 0.5
    pays = flops / e.machine.peak("bf16") < saved / e.machine.bandwidth
    assert not pays  # 67 MFLOP at 989 TFLOP/s are 68 ns, 14 kB at 3.35 TB/s are 4 ns
    assert e.decode(4, 4000) > plain.decode(4, 4000)


@given(bits=st.floats(1, 15), more=st.floats(0.1, 1))
@settings(max_examples=12, deadline=None)
def test_more_bits_never_take_less(bits: float, more: float) -> None:
    one, two = (estimator(f"kv-rematerialisation:bits={b}", model=LLAMA2) for b in (bits, bits + more))
    assert one.memory(4, 2000).kv < two.memory(4, 2000).kv
    assert one.decode(4, 2000) <= two.decode(4, 2000)


def test_recent_tokens_stay_keys_and_values() -> None:
    spec = "kv-rematerialisation:bits=4,recent=128"
    assert bytes_per_column((spec,), 1000) == pytest.approx(872 * 0.5 + 128 * 2)


def test_commutes_with_eviction() -> None:
    parts = ["kv-rematerialisation:bits=4,recent=64", "kv-eviction:budget=900"]
    assert estimator(*parts).decode(4, 30_000) == pytest.approx(estimator(*parts[::-1]).decode(4, 30_000))


def test_what_cannot_be() -> None:
    with pytest.raises(SpecError, match="give the bits of X"):
        techniques(["kv-rematerialisation", "kv-quantization:bits=2"])
    with pytest.raises(SpecError, match="no key and value projections"):
        estimator("kv-rematerialisation", model="deepseek-v2-lite")
