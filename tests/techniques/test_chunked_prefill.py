"""A prompt in chunks: pairs conserved, weights and earlier keys read again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.estimator import Estimator
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group
from perfmodel.schedule import operators


def _with(*texts: str) -> Estimator:
    return Estimator("llama-3-8b", "a100-sxm-80gb", techniques=list(texts))


def _sum(e: Estimator, group: Group, tensor: str = "", unit: str = "") -> float:
    layers = e.lower(Phase((group,))).schedule.items[1]  # type: ignore[union-attr]
    return float(sum(t * (op.bytes("hbm", tensor) if tensor else op.flops.get(unit, 0.0)) for op, t, _ in operators(layers)))  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(st.integers(64, 4096), st.integers(64, 8192), st.integers(0, 4096))
def test_work_is_conserved(chunk: int, q: int, c: int) -> None:
    plain, cut = _with(), _with(f"chunked-prefill:chunk={chunk}")
    assert _sum(cut, Group(1, q, c), unit="bf16") == pytest.approx(_sum(plain, Group(1, q, c), unit="bf16"), rel=1e-9)


def test_bytes_against_a_sum_over_chunks() -> None:
    plain, cut = _with(), _with("chunked-prefill:chunk=512")
    group = Group(1, 4096, 100)
    chunks = [Group(1, 512, 100 + 512 * i) for i in range(8)]
    for tensor in ("weights", "kv"):
        assert _sum(cut, group, tensor) == pytest.approx(sum(_sum(plain, g, tensor) for g in chunks))
    assert cut.memory(1, 4096).total == plain.memory(1, 4096).total


def test_smaller_chunks_take_longer() -> None:
    times = [_with(f"chunked-prefill:chunk={x}").prefill(1, 8192) for x in (8192, 2048, 512, 128)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(_with().prefill(1, 8192))


def test_decode_is_left_alone() -> None:
    assert _with("chunked-prefill:chunk=512").decode(8, 4096) == pytest.approx(_with().decode(8, 4096))
    assert _with("chunked-prefill").prefill(1, 4096) == pytest.approx(_with().prefill(1, 4096))
