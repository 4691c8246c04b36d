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


def test_prompts_of_a_static_batch_pass_together() -> None:
    """QServe's README batches Qwen1.5-72B 32 at a time on an A100: 1,024 tokens in, 512 out, 4 bits of both kinds."""
    four = {"kind": "weight-quantization", "bits": 4, "group": 0, "act_bits": 8}
    narrow = {"kind": "kv-quantization", "bits": 4, "group": 128}
    fields = {"model": "qwen1.5-72b", "mem_fraction": 0.95, "batch": "max", "input": 1024, "output": 512, "techniques": [four, narrow]}
    m = _measured(batching="static", **fields)
    assert m.max_batch == pytest.approx(32, abs=1)
    alive = 1024 * 2 * (5 * 8192 + 3 * 24576)  # bytes of a prompt's intermediates in one layer
    assert m.prompt_activations * 1024 == pytest.approx(alive)
    free = 0.95 * m.capacity - m.weights - 0.5e9
    assert m.max_batch == pytest.approx(free / (m.kv_sequence + alive), abs=1.5)
    assert m.max_batch < _measured(batching="continuous", **fields).max_batch


def test_prompts_in_turn_leave_room_for_one() -> None:
    """Intermediates of one prompt beside all caches; the batch waits for every prompt."""
    fields = {"batch": "max", "input": 16384, "output": 100}
    together, turns = (_measured(batching=b, **fields) for b in ("static", "in-turn"))
    free = turns.capacity - turns.weights - turns.prompt_activations * 16384
    assert turns.max_batch == pytest.approx(free / turns.kv_sequence, rel=0.15)
    assert turns.max_batch > together.max_batch
    one = _measured(batching="static", **{**fields, "batch": 1})
    assert turns.latency - 99 * turns.tpot == pytest.approx(turns.max_batch * (one.latency - 99 * one.tpot))


def test_without_a_mask_every_token_attends_every_other() -> None:
    m = _measured(input=8192, output=1)
    # Twice the pairs, less the diagonal, and no padding along it.
    assert m.unmasked_attention / m.prefill_attention == pytest.approx(2 * 8192 / 8193, rel=0.05)
