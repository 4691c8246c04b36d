"""Dropped prompt tokens: counts by hand in the layers they leave and in the cache."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.estimator import Estimator
from perfmodel.schedule import operators

MODEL, GPU, KV = "llama-3-8b", "h100-sxm", 131072
PLAIN = Estimator(MODEL, GPU)


def built(*texts: str) -> Estimator:
    return Estimator(MODEL, GPU, techniques=texts)


def flops(e: Estimator, new: float, context: float, name: str) -> float:
    """Matrix FLOPs of an operator in all layers of a prefill of one sequence."""
    found = operators(e.lower(e._phase(1.0, new, context, False)).schedule)
    return sum(float(op.flops.get("bf16", 0)) * float(times) for op, times, _ in found if op.name == name)


def test_layers_beyond_the_second_compute_what_is_kept() -> None:
    """576 image tokens after 35 of text, a quarter kept from layer 2 of 32 on, 1000 tokens in all."""
    e = built("token-reduction:tokens=576,after=35,keep=0.25,spare_layers=2")
    per_token = 2 * 4096 * 2 * 14336  # gate and up
    assert flops(e, 1000, 0, "gate_up_proj") == pytest.approx(per_token * (2 * 1000 + 30 * (1000 - 432)))
    short = 1000 - 432
    pairs = 2 * 1000 * 1001 / 2 + 30 * short * (short + 1) / 2
    assert flops(e, 1000, 0, "attention") == pytest.approx(4 * 32 * 128 * pairs)
    # Layers that spare the tokens cache them all.
    assert e.memory(1, 1600).kv == pytest.approx((2 * 1600 + 30 * (1600 - 432)) * KV / 32)
    assert e.decode(1, 5000) < PLAIN.decode(1, 5000)


def test_before_the_model_they_are_a_shorter_prompt() -> None:
    e = built("token-reduction:tokens=576,keep=0.5")
    assert e.prefill(4, 1000) == pytest.approx(PLAIN.prefill(4, 712), rel=0.01)
    assert e.memory(4, 1600).kv == pytest.approx(4 * (1600 - 288) * KV)


def test_chunks_drop_the_tokens_they_hold() -> None:
    """Chunks of 400: 35 + 365 image tokens, then the other 211, then none; behind what is left of the context."""
    e = built("token-reduction:tokens=576,after=35,keep=0")
    for context, new, kept in ((0, 400, 35), (400, 400, 189), (800, 200, 200)):
        assert flops(e, new, context, "gate_up_proj") == pytest.approx(2 * 4096 * 2 * 14336 * 32 * kept)
    # The last chunk's 200 queries see the 224 tokens that are left of 800.
    assert flops(e, 200, 800, "attention") == pytest.approx(4 * 32 * 128 * 32 * (200 * 224 + 200 * 201 / 2))


def test_scores_that_choose() -> None:
    added = {
        how: flops(built(f"token-reduction:tokens=576,keep=0.5,selection={how}"), 1000, 0, "token_scores_0")
        for how in ("last", "halves", "pairs")
    }
    assert added["last"] == 2 * 4096 * 576
    assert added["halves"] == 2 * 4096 * 288**2
    assert added["pairs"] == 2 * 4096 * 576**2


def test_a_compressor_reads_first() -> None:
    e = built("token-reduction:tokens=8000,keep=0.2,compressor=llama-3.2-1b")
    reader = Estimator("llama-3.2-1b", GPU)
    assert e.prefill(1, 9000) == pytest.approx(PLAIN.prefill(1, 2600) + reader.prefill(1, 8000), rel=0.01)
    assert e.memory(1, 16).weights == pytest.approx(PLAIN.memory(1, 16).weights + 1_235_814_400 * 2, rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(0, 3000), keep=st.floats(0, 1), less=st.floats(0, 1))
def test_keeping_less_is_never_slower(tokens: int, keep: float, less: float) -> None:
    one, two = (built(f"token-reduction:tokens={tokens},keep={x}") for x in (keep, keep * less))
    assert two.prefill(1, 2000) <= one.prefill(1, 2000) * 1.01
    assert two.memory(4, 2000).kv <= one.memory(4, 2000).kv + 1
    assert one.memory(4, 2000).kv <= PLAIN.memory(4, 2000).kv * (1 + 1e-12)


def test_identity_and_commutation() -> None:
    none = built("token-reduction:tokens=576,keep=1,selection=pairs")
    assert none.prefill(2, 900) == pytest.approx(PLAIN.prefill(2, 900), rel=1e-12)
    assert none.memory(2, 900) == PLAIN.memory(2, 900)
    pair = ("token-reduction:tokens=576,keep=0.25", "kv-quantization:bits=4,residual=64")
    one, other = built(*pair), built(*pair[::-1])
    assert one.memory(3, 1600).kv == pytest.approx(other.memory(3, 1600).kv) == pytest.approx(
        3 * ((1600 - 432 - 64) / 4 + 64) * KV
    )
    assert one.decode(3, 1600) == pytest.approx(other.decode(3, 1600))


def test_fastv_as_published() -> None:
    """LLaVA-1.5-13B (the shapes of Llama-2-13B), half of 576 image tokens after layer 2: 45 % fewer FLOPs (abstract);
    before them 35 tokens, after them a short question."""
    plain, e = (Estimator("llama-2-13b", GPU, techniques=t) for t in ([], ["fastv"]))

    def total(x: Estimator) -> float:
        found = operators(x.lower(x._phase(1.0, 35.0 + 576 + 9, 0.0, False)).schedule)
        return sum(float(n) * float(times) for op, times, _ in found for unit, n in op.flops.items() if "16" in unit)

    assert 1 - total(e) / total(plain) == pytest.approx(0.45, abs=0.02)
