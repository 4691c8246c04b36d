"""Peaks of frameworks that allocate as they go: logits of every position, whole prompts, whole score matrices."""

from __future__ import annotations

import pytest

from perfmodel.papers.metrics import Measured
from perfmodel.papers.run import Runner
from perfmodel.spec.paper import Paper


def _measured(**fields: object) -> Measured:
    paper = Paper.model_validate({
        "id": "p", "title": "P", "family": "f", "relation": "core", "mechanism": "m",
        "settings": {"a": {"model": "llama-2-7b", "hardware": "a100-sxm-80gb", "system": "hf-flash-2024", **fields}},
    })  # fmt: skip
    return Runner(paper).setting("a", {}, Measured)


def test_logits_of_every_prompt_position_bind_short_answers() -> None:
    m = _measured(batch=2, input=16384, output=1)
    # 2 x 16,384 x 32,000 logits of 2 + 4 bytes beside 512 KiB a token of keys and values.
    assert m.eager_memory == pytest.approx(m.weights + 2 * 16384 * (32000 * 6 + 2**19))
    # Softmax upcasts: 2 bytes in, 4 out, 2 of the copy cast back.
    assert m.prompt_scores == pytest.approx(2 * 32 * 16384**2 * 8)


def test_long_answers_bind_by_their_own_cache() -> None:
    m = _measured(batch=8, input=16, output=2048)
    assert m.eager_memory == pytest.approx(m.weights + 8 * 2064 * 2**19)


def test_longest_eager_prompt_by_hand() -> None:
    m = _measured()
    free = m.capacity - m.weights - 536.9e6
    assert m.eager_context == pytest.approx(free / (2**19 + 32000 * 6), rel=0.01)
    assert m.prompt_activations == pytest.approx(2 * (5 * 4096 + 3 * 11008))


def test_two_prompts_together_are_half_as_long() -> None:
    assert _measured(batch=2).eager_context == pytest.approx(_measured().eager_context / 2, rel=0.001)
