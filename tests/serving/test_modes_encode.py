"""Vision towers and the three pools of encode, prefill and decode."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.schedule import operators
from perfmodel.serving.encode import embedding_seconds, encode_seconds, tower_program
from perfmodel.serving.images import image_tokens


@pytest.fixture(scope="module")
def qwen():
    return Estimator("qwen2.5-vl-7b", "h100-sxm")


def matrix_flops(node):
    return sum(f * n for op, n, _ in operators(node) for unit, f in op.flops.items() if unit not in ("vector", "exp"))


def test_tokens_of_an_image_by_hand(qwen):
    """1024 x 1024 at patch 14, merged 2 x 2: 1024 // 28 = 36 tokens a side."""
    assert image_tokens(qwen.model, 1024, 1024) == (72 * 72, 36 * 36)
    assert image_tokens(qwen.model, 10, 10) == (4, 1)


def test_flops_of_the_tower_by_hand(qwen):
    """32 layers x (4 x 1280^2 + 3 x 1280 x 3420) x 2 + patches (3 x 2 x 14^2 x 1280) x 2 per patch, attention 4 P^2 1280 a
    layer over the full rectangle, the merger (5120 x 5120 + 5120 x 3584) x 2 per token of the language model."""
    patches = 5184
    layer = 4 * 1280**2 + 3 * 1280 * 3420
    expected = 2 * patches * (32 * layer + 3 * 2 * 14**2 * 1280) + 32 * 4 * patches**2 * 1280
    expected += 2 * patches / 4 * (5120 * 5120 + 5120 * 3584)
    assert matrix_flops(tower_program(qwen, 1.0, float(patches))) == pytest.approx(expected, rel=0.002)


def test_seconds_grow_with_images_and_faster_than_patches(qwen):
    one, two, eight = encode_seconds(qwen, np.array([1.0, 2.0, 8.0]), 5184.0)
    assert one < two < 2.1 * one
    assert eight == pytest.approx(8 * one, rel=0.15)
    small, large = encode_seconds(qwen, 4.0, np.array([2500.0, 10000.0]))
    assert large > 4 * small
    # 11 TFLOP at 989 TFLOP/s is 11 ms at best.
    assert 0.011 < one < 0.04


def test_two_ranks_share_the_tower(qwen):
    two = Estimator("qwen2.5-vl-7b", "h100-sxm", tp=2)
    assert matrix_flops(tower_program(two, 4.0, 5184.0)) == pytest.approx(
        matrix_flops(tower_program(qwen, 4.0, 5184.0)) / 2, rel=0.01
    )
    assert encode_seconds(two, 4.0, 5184.0) < encode_seconds(qwen, 4.0, 5184.0)


def test_embeddings_by_hand(qwen):
    """1,296 tokens x 3,584 x 2 B = 9.29 MB over one 50 GB/s adapter."""
    m = qwen.machine
    assert embedding_seconds(qwen, qwen, 1296.0) == pytest.approx(
        m.network_latency + 1296 * 3584 * 2 / (50e9 * m.network_efficiency)
    )


def test_a_model_without_eyes_is_refused(estimator):
    with pytest.raises(SpecError, match="no vision tower"):
        encode_seconds(estimator, 1.0, 576.0)
