"""Denoising passes against published counts and hand arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel import catalog
from perfmodel.denoising import denoise
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group
from perfmodel.parameters import block_weights, parameters_total
from perfmodel.schedule import operators

DIT = Estimator("dit-xl-2", "a100-sxm-80gb")


@pytest.mark.parametrize(("tokens", "published"), [(256, 119e9), (1024, 525e9)])
def test_multiply_adds_of_a_diffusion_transformer(tokens: int, published: float) -> None:
    """The authors give 119 and 525 G multiply-adds for images of 256 and 512 (arXiv:2212.09748 and their repository)."""
    schedule = DIT.lower(Phase((Group(1, tokens, 0),), logits="all", causal=False)).schedule
    flops = sum(float(t * f) for op, t, _ in operators(schedule) for u, f in op.flops.items() if u not in ("vector", "exp"))
    assert flops / 2 == pytest.approx(published, rel=0.005)


def test_parameters_of_a_diffusion_transformer() -> None:
    # 28 layers of 18 h^2 + 15 h (qkv, output, two of 4 h, six modulations, biases), patches, time, class, final layer.
    h = 1152
    layers = 28 * (18 * h * h + 15 * h)
    outer = 17 * h + (257 * h + h * h + h) + 1001 * h + (2 * h * h + 2 * h) + (h + 1) * 32
    assert parameters_total(catalog.load_model("dit-xl-2")) == layers + outer


def test_modulation_is_per_sequence() -> None:
    schedule = DIT.lower(Phase((Group(4, 256, 0),), causal=False)).schedule
    op = next(op for op, _, _ in operators(schedule) if op.name == "modulation")
    assert op.flops["fp16"] == 2 * 4 * 6 * 1152 * 1152
    assert op.bytes("hbm", "weights") == 6 * 1152 * 1152 * 2
    model = catalog.load_model("llama-3-8b")
    assert not any(w.name == "modulation" for b in model.blocks.values() for w in block_weights(b, model.hidden))


def test_time_of_a_generation() -> None:
    one, fifty = denoise(DIT, 8, 256, 1), denoise(DIT, 8, 256, 50)
    assert fifty.seconds == pytest.approx(50 * one.seconds)
    assert one.seconds > 8 * 2 * 118.5e9 / 312e12
    assert fifty.lower <= fifty.seconds
    assert denoise(DIT, 4, 256, 50, guidance=2).seconds == pytest.approx(fifty.seconds)
    assert denoise(DIT, 8, 256, 50, beside=1.5).seconds == pytest.approx(fifty.seconds + 1.5)


def test_arrays_give_arrays() -> None:
    found = denoise(DIT, np.array([1, 8]), 256, np.array([10, 50]))
    assert found.seconds == pytest.approx([denoise(DIT, 1, 256, 10).seconds, denoise(DIT, 8, 256, 50).seconds])


def test_a_bidirectional_language_model_computes_the_whole_square() -> None:
    e = Estimator("llada-8b", "a100-sxm-80gb")
    schedule = e.lower(Phase((Group(1, 1000, 24),), causal=False)).schedule
    op = next(op for op, _, _ in operators(schedule) if op.name == "attention")
    assert op.flops["bf16"] == 4 * 32 * 128 * 1000 * 1024


def test_stages_and_bad_input_are_refused() -> None:
    with pytest.raises(SpecError, match="--pp"):
        denoise(Estimator("llada-8b", "a100-sxm-80gb", pp=2), 1, 1024, 8)
    with pytest.raises(SpecError, match="at least 1"):
        denoise(DIT, 1, 0, 8)
