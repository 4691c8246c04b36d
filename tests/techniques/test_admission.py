"""Room that sequences reserve: blocks, pages and maxima counted by hand, and evictions computed again."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.techniques.registry import technique

MODEL, GPU, KV = "llama-3-8b", "h100-sxm", 131072
PLAIN = Estimator(MODEL, GPU)


def built(*texts: str, **more: int) -> Estimator:
    return Estimator(MODEL, GPU, techniques=texts, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("knobs", "room"),
    [
        ("reserve=max,longest=8192", 8192),
        ("reserve=doubled", 4096),  # 2^12 is the first power of two from 2100
        ("reserve=block,block=256", 2304),  # 9 blocks
        # 2 MiB hold 1024 tokens of 8 heads x 128 x 2 bytes: 3 pages for keys, 3 for values.
        ("reserve=page", 3072),
        ("reserve=page,page=65536", 2112),  # 66 pages of 32 tokens
        ("reserve=predicted,overshoot=1.5,block=100", 3200),  # 3150 in buckets of 100
        ("reserve=used", 2112),  # the engine's own blocks of 16
    ],
)
def test_room_by_hand(knobs: str, room: int) -> None:
    e = built(f"kv-allocation:{knobs}")
    assert e.memory(8, 2100).kv == pytest.approx(8 * room * KV)
    assert e.max_batch(2100) == int(e.kv_free / (room * KV))
    # Attention still reads what is there.
    assert e.decode(8, 2100) == pytest.approx(PLAIN.decode(8, 2100), rel=1e-12)


def test_powers_of_two_stay() -> None:
    for tokens in (1, 2, 1024, 65536):
        assert technique("kv-allocation:reserve=doubled").allocated(float(tokens), None) == tokens  # type: ignore[arg-type]


def test_pages_hold_more_tokens_of_fewer_heads() -> None:
    """Cut over 4 devices, a 2 MiB page holds 4096 tokens of the two heads that are left."""
    e = built("kv-allocation:reserve=page", tp=4)
    assert e.memory(1, 2100).kv == pytest.approx(4096 * KV / 4)


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 30_000), block=st.integers(1, 4096))
def test_no_rule_holds_less_than_the_tokens(tokens: int, block: int) -> None:
    for rule in ("used", "doubled", "block", "predicted"):
        spec = technique({"kind": "kv-allocation", "reserve": rule, "block": block})
        room = float(spec.allocated(float(tokens), None))  # type: ignore[arg-type]
        assert tokens <= room < max(2 * tokens, tokens + block)
        if rule == "block":
            assert room == math.ceil(tokens / block) * block


def test_evictions_compute_contexts_again() -> None:
    """64 sequences, each evicted once in five lives of 400 tokens: 0.032 prefills of a context a step."""
    e = built("kv-allocation:evicted=0.2,output=400")
    again = 64 * 0.2 / 400 * PLAIN.prefill(1, 3000)
    assert e.decode(64, 3000) == pytest.approx(PLAIN.decode(64, 3000) + again, rel=1e-9)
    both = built("kv-allocation:evicted=0.2,output=400", "kv-quantization:bits=16")
    assert both.decode(64, 3000) == pytest.approx(e.decode(64, 3000), rel=1e-9)


def test_reservation_commutes_with_narrow_caches() -> None:
    pair = ("kv-allocation:reserve=max,longest=4096", "kv-quantization:bits=4")
    one, other = built(*pair), built(*pair[::-1])
    assert one.memory(3, 100).kv == pytest.approx(other.memory(3, 100).kv) == pytest.approx(3 * 4096 * KV / 4)


def test_refusals() -> None:
    with pytest.raises(SpecError, match="give longest"):
        technique("kv-allocation:reserve=max")
    with pytest.raises(SpecError, match="give output"):
        technique("kv-allocation:evicted=0.5")
