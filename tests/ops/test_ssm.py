"""Recurrent mixers by hand: state size, scan FLOPs and traffic."""

from __future__ import annotations

import pytest

from perfmodel.ops.shard import Formats, Group, Parallelism, Shard
from perfmodel.ops.ssm import Recurrent, recurrent_mixer, recurrent_state
from perfmodel.ops.traffic import Op
from perfmodel.spec.formats import get_format
from perfmodel.spec.model import GatedDeltaNet, Lightning, Mamba1, Mamba2

BF16 = Formats(*[get_format("bf16")] * 4)
# Mamba-2 2.7B: hidden 2560, inner 5120 = 80 heads of 64, state 128, one group (arXiv:2405.21060, table 10).
MAMBA2 = Mamba2(heads=80, head_dim=64, state=128)
# Qwen3-Next: 16 key heads and 32 value heads of 128.
DELTA = GatedDeltaNet(key_heads=16, value_heads=32, key_dim=128, value_dim=128)
MAMBA1 = Mamba1(inner=8192, state=16, dt_rank=256)
LIGHTNING = Lightning(heads=64, head_dim=128)


def scan(mixer: Recurrent, hidden: int, group: Group, **degrees: int) -> Op:
    ops = recurrent_mixer(mixer, Shard(hidden, (group,), Parallelism(**degrees), BF16))
    return next(op for op in ops if op.name == "scan")


def test_mamba2_prefill_scan_by_hand() -> None:
    """1024 tokens in chunks of 256, causal half within: 80 heads read out 256 * 64, one group scores 256 * 128; 4 * 64 * 128 state."""
    op = scan(MAMBA2, 2560, Group(1, 1024, 0))
    assert op.flops["bf16"] == pytest.approx(1024 * (80 * 256 * 64 + 1 * 256 * 128 + 80 * 4 * 64 * 128))


def test_mamba2_decode_scan_reads_and_writes_the_state() -> None:
    """Three sequences: 80 * 64 * 128 FP32 each way; six vector operations an element (decay, outer product, add, read-out)."""
    op = scan(MAMBA2, 2560, Group(3, 1, 500, decode=True))
    assert op.bytes(tensor="state") == 2 * 3 * 80 * 64 * 128 * 4
    assert op.flops == {"vector": 3 * 6 * 80 * 64 * 128}


def test_a_short_prompt_is_one_chunk_of_its_own_length() -> None:
    op = scan(MAMBA2, 2560, Group(1, 32, 0))
    assert op.flops["bf16"] == pytest.approx(32 * (80 * 32 * 64 + 32 * 128 + 80 * 4 * 64 * 128))


def test_delta_rule_prefill_scan_by_hand() -> None:
    """Chunks of 64, causal halves: K K^T, Q K^T, scores V', and solved K and V: 64 (3 * 128 + 2 * 128); state 6 * 128 * 128."""
    op = scan(DELTA, 2048, Group(2, 640, 0))
    assert op.flops["bf16"] == 1280 * 32 * (64 * 5 * 128 + 6 * 128 * 128)


def test_lightning_prefill_scan_by_hand() -> None:
    """Every head has keys of its own: 256 * (128 + 128) within the chunk, 4 * 128 * 128 on the state."""
    assert scan(LIGHTNING, 6144, Group(1, 512, 0)).flops["bf16"] == 512 * 64 * (256 * 256 + 4 * 128 * 128)


def test_mamba1_scan_shares_b_and_c_over_channels() -> None:
    """Per token: x and dt of 8192 channels in, B and C of 16 each, y out; sequential on the vector units."""
    op = scan(MAMBA1, 4096, Group(1, 100, 0))
    assert op.flops == {"vector": 100 * 6 * 8192 * 16}
    assert op.bytes(tensor="activations") == pytest.approx(100 * (3 * 8192 + 2 * 16) * 2)


@pytest.mark.parametrize("mixer", [MAMBA2, DELTA, MAMBA1, LIGHTNING], ids=lambda m: m.kind)
def test_scan_depends_on_new_tokens_only(mixer: Recurrent) -> None:
    assert scan(mixer, 2048, Group(2, 64, 0)) == scan(mixer, 2048, Group(2, 64, 99_999))


@pytest.mark.parametrize("mixer", [MAMBA2, DELTA, MAMBA1, LIGHTNING], ids=lambda m: m.kind)
@pytest.mark.parametrize("degree", ["tp", "cp"])
def test_scan_work_divides(mixer: Recurrent, degree: str) -> None:
    """Heads over tensor ranks, tokens over context ranks: four together do the work of one."""
    one, four = (scan(mixer, 2048, Group(1, 1024, 0), **{degree: n}) for n in (1, 4))
    for unit, count in one.flops.items():
        assert 4 * four.flops[unit] == pytest.approx(count)


def test_stored_state_by_hand() -> None:
    """Mamba-2 2.7B, one layer and sequence: 80 * 64 * 128 FP32, and 3 inputs of 5120 + 2 * 128 convolution channels in bf16."""
    state, conv = recurrent_state(MAMBA2, 1, 1, 4, 2, "mamba")
    assert state.bytes == 80 * 64 * 128 * 4
    assert conv.bytes == 3 * (5120 + 256) * 2
