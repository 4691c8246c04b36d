"""Fused attention against arithmetic by hand on a device of round numbers; published kernels; devices nobody measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perfmodel import catalog
from perfmodel.kernels.attention import attention
from perfmodel.machine import Machine, machine
from perfmodel.ops.attention import softmax_attention
from perfmodel.ops.shard import Group
from perfmodel.ops.traffic import Op
from perfmodel.roofline import op_cost
from perfmodel.symbols import Num

pytestmark = pytest.mark.filterwarnings("ignore")

_ROUND = {
    "attention_tile": 128, "attention_item_start": 1e-6, "attention_blocks": 1, "attention_packing": 1,
    "attention_largest_group": 1024, "attention_load_rate": 1e12, "attention_latency": 0.0,
    "attention_narrow_efficiency": 0.5, "decode_chunk": 256, "plain_attention_efficiency": 1.0,
}  # fmt: skip
_STEP = 4 * 128 * 128 * 128 / 10e12  # seconds of one unit for a tile of 128 queries and 128 keys of 128 elements


def device(**law: float) -> Machine:
    """100 units of 10 TFLOP/s (20 in fp8) and 10 GB/s each; vector units too slow to multiply."""
    m = machine("h100-sxm")
    return replace(
        m, units=100.0, matrix={"bf16": 1e15, "fp8": 2e15}, attention_efficiency=1.0, vector=1e6, vector_efficiency=1.0, cache=0.0,
        bandwidth=1e12, bandwidth_efficiency=1.0, memory_latency=0.0, kernel_latency=0.0, law=m.law | _ROUND | law,
    )  # fmt: skip


def core(
    group: Group, heads: Num, kv_heads: Num, *, window: Num | None = None, causal: bool = True, width: float = 2
) -> Op:
    return softmax_attention(
        "x", group, heads=heads, kv_heads=kv_heads, qk_dim=128, v_dim=128, kv_elements=2 * kv_heads * 128, kv_width=width,
        act_width=2, dtype="fp8" if width == 1 else "bf16", window=window, causal=causal,
    )  # fmt: skip


def products(op: Op, m: Machine) -> float:
    """Busy seconds of the units without starts and stores."""
    return float(attention(op, m).compute - attention(replace(op, flops={}), m).compute)


def test_one_full_tile_for_every_unit() -> None:
    """100 heads of 128 queries: half of the products are masked but done."""
    assert products(core(Group(1, 128, 0), 100, 100), device()) == pytest.approx(_STEP)


def test_starts_and_stores_are_not_overlapped() -> None:
    m, op = device(), core(Group(1, 128, 0), 200, 200)  # two items a unit; 200 x 128 x 128 x 2 bytes of output
    rest = float(attention(op, m).compute) - products(op, m)
    assert rest == pytest.approx(2e-6 + 200 * 128 * 128 * 2 / 1e12)
    two = device(attention_blocks=2)
    assert float(attention(op, two).compute) - products(op, two) == pytest.approx(1e-6)


def test_causal_tiles_are_of_unequal_length() -> None:
    """Two tiles a head see 128 and 256 keys. 50 heads fill the units once: the longest item. 5000 heads: nearly even."""
    m = device()
    assert products(core(Group(1, 256, 0), 50, 50), m) == pytest.approx(2 * _STEP)
    # 100 items a unit of 1.5 steps, and half of the longest item for the last wave.
    assert products(core(Group(1, 256, 0), 5000, 5000), m) == pytest.approx(100 * 1.5 * _STEP + _STEP)
    # Without a mask every item sees 256 keys.
    assert products(core(Group(1, 256, 0), 50, 50, causal=False), m) == pytest.approx(2 * _STEP)


def test_window_visits_its_own_blocks_only() -> None:
    """A tile of 128 queries that each see 128 keys touches 255, and a block more where the first key is not aligned."""
    op = core(Group(1, 12_800, 100_000), 1, 1, window=128)
    assert products(op, device(decode_chunk=1e12)) == pytest.approx((255 + 128) / 128 * _STEP, rel=0.01)


def test_packed_heads_share_a_tile() -> None:
    """Four query heads of 32 queries fill one tile of a packing kernel, and pad four tiles of another."""
    op = core(Group(1, 32, 0), 400, 100)
    assert products(op, device()) == pytest.approx(_STEP)
    assert products(op, device(attention_packing=0)) == pytest.approx(4 * _STEP + 0.5 * _STEP)


def test_decode_pads_the_group() -> None:
    """100 groups of 8 queries over 1280 keys: ten steps a unit, of 64 rows in kernels made for decode."""
    op = core(Group(100, 1, 1279), 8, 1)
    for packing, steps in ((1, 10), (0, 5)):
        assert products(op, device(decode_chunk=1e12, attention_packing=packing)) == pytest.approx(steps * _STEP)


def test_few_rows_run_on_the_vector_units_of_kernels_made_for_decode() -> None:
    """One query row: 4 x 128 x 1280 x 100 FLOP at 50 TFLOP/s beat 64 rows at 1000; a packing kernel has no choice."""
    op = core(Group(100, 1, 1279), 1, 1)
    own, packing = (replace(device(decode_chunk=1e12, attention_packing=p), vector=50e12) for p in (0, 1))
    assert products(op, own) == pytest.approx(4 * 128 * 1280 * 100 / 50e12)
    assert products(op, packing) == pytest.approx(10 * _STEP)


def test_group_beyond_the_largest_is_served_head_by_head() -> None:
    m = device(attention_largest_group=32)
    many = attention(core(Group(100, 1, 1279), 64, 1), m).compute
    few = attention(core(Group(100, 1, 1279), 32, 1), m).compute
    assert many - 64 * 100 * 256 / 1e12 == pytest.approx(64 * (1e-6 + 10 * _STEP) + 5 * _STEP)
    assert few < many / 30


def test_query_heads_of_other_groups_go_one_by_one_on_the_vector_units() -> None:
    """Four heads of 100 sequences are 400 items on 100 units, half an item more than an even share: 1.125 x the vector time
    of 2 x 2 x 128 FLOP and 3 operations of unpacking per key, value pair and head; a group of the packed size is as ever."""
    m = replace(device(decode_chunk=1e12), vector=50e12)
    op = core(Group(100, 1, 1279), 4, 1)
    op = replace(op, shape={**op.shape, "unpack": 3.0 * 100 * 1280 * 256})
    alone, packed = (replace(op, shape={**op.shape, "packs": p}) for p in (8.0, 4.0))
    twice = replace(alone, flops={**op.flops, "bf16": 2 * op.flops["bf16"]}, shape={**alone.shape, "unpack": 2 * op.shape["unpack"]})
    more = float(attention(twice, m).vector - attention(alone, m).vector)
    assert more == pytest.approx(1.125 * 4 * (2 + 3) * 256 * 1280 * 100 / 50e12)
    assert products(alone, m) == 0
    assert attention(packed, m) == attention(op, m)


def test_prefill_is_packed_whatever_the_group() -> None:
    op = core(Group(4, 512, 0), 8, 2)
    assert attention(replace(op, shape={**op.shape, "packs": 8.0}), device()).compute == attention(op, device()).compute


def test_few_long_contexts_are_split_over_the_units() -> None:
    """One sequence of one head: 5 chunks of 256 keys load with 5 of 100 units, 200 chunks with all of them."""
    m = device()
    for context, share in ((1280, 0.05), (256_000, 1.0)):
        op = core(Group(1, 1, context - 1), 8, 1)
        moved = context * 2 * 128 * 2 + 2 * 8 * 128 * 2
        assert attention(op, m).memory == pytest.approx(moved / 1e12 / share, rel=1e-6)


def test_units_load_no_faster_than_they_can() -> None:
    """100 units of 5 GB/s see half of a memory of 1 TB/s."""
    op = core(Group(1000, 1, 999), 8, 1)
    full, half = (attention(op, device(attention_load_rate=r)).memory for r in (1e12, 5e9))
    assert half == pytest.approx(2 * full)


def test_long_reads_lose_less_than_other_kernels() -> None:
    """Where others reach 0.8 of the datasheet, a loss of half as much leaves 0.9."""
    op = core(Group(1000, 1, 999), 8, 1)
    m = replace(device(attention_read_loss=0.5), bandwidth_efficiency=0.8)
    moved = 1000 * (1000 * 2 * 128 * 2 + 2 * 8 * 128 * 2)
    assert attention(op, m).memory == pytest.approx(moved / 0.9e12)


def test_narrow_operands_gain_less_than_their_peak() -> None:
    """fp8 has twice the peak here and half the efficiency; without fp8 units its operands run at the 16-bit rate."""
    op, m = core(Group(1, 128, 0), 100, 100, width=1), device()
    assert products(op, m) == pytest.approx(_STEP)
    assert products(op, replace(m, matrix={"bf16": 1e15})) == pytest.approx(_STEP)
    assert products(op, device(attention_narrow_efficiency=1.0)) == pytest.approx(_STEP / 2)


def test_softmax_is_slower_in_narrow_heads() -> None:
    """Exponentials per FLOP grow as the head shrinks: an H100 with heads of 64 is bound by them, with 256 by products."""
    m = machine("h100-sxm")
    demands = []
    for dim in (64, 256):
        op = softmax_attention(
            "x", Group(1, 16384, 0), heads=32, kv_heads=8, qk_dim=dim, v_dim=dim, kv_elements=16 * dim, kv_width=2,
            act_width=2, dtype="bf16",
        )  # fmt: skip
        demands.append(attention(op, m))
    assert demands[0].vector > demands[0].compute
    assert demands[1].vector < demands[1].compute


@pytest.mark.parametrize(
    ("name", "tokens", "dim", "published", "tolerance"),
    [
        # FlashAttention-2 (arXiv:2307.08691, section 4.1): up to 230 TFLOP/s on A100. Engines reach 145 to 205.
        ("a100-sxm-80gb", 16384, 128, 230e12, 0.3),
        # FlashAttention-3 (arXiv:2407.08608): up to 740 TFLOP/s on H100 in 16 bits.
        ("h100-sxm", 16384, 256, 740e12, 0.2),
    ],
)
def test_published_kernels(name: str, tokens: int, dim: int, published: float, tolerance: float) -> None:
    heads = 2048 // dim
    op = softmax_attention(
        "x", Group(4, tokens, 0), heads=heads, kv_heads=heads, qk_dim=dim, v_dim=dim, kv_elements=4096, kv_width=2,
        act_width=2, dtype="bf16", causal=False,
    )  # fmt: skip
    assert op.flops["bf16"] / float(op_cost(op, machine(name)).seconds) == pytest.approx(published, rel=tolerance)


def test_decode_is_bound_by_memory_on_devices_without_large_matrix_units() -> None:
    """Servers of two DDR5 sockets and laptops decode at the memory rate: no padding to matrix tiles there."""
    for name in ("epyc-9654", "m1-max", "m2-ultra", "tpu-v6e", "mi300x"):
        cost = op_cost(core(Group(16, 1, 4095), 32, 8), machine(name))
        assert float(cost.seconds) < 2.5 * float(cost.peak["hbm"]), name


def test_any_device_any_shape() -> None:
    """Finite and no faster than the datasheet, for shapes as arrays and parameters as a column."""
    n, q, c = (x.ravel().astype(float) for x in np.meshgrid([1, 64], [1, 3, 200, 4096], [0, 1, 5000]))
    for name in ("tpu-v6e", "mi300x", "ascend-910b2", "rtx-4090", "epyc-9654", "gaudi3", "v100-sxm", "h20-sxm"):
        assert catalog.load_device(name)
        m = machine(name)
        for window in (None, 1.0, 128.0):
            op = core(Group(n, q, c), 40, 8, window=window)
            cost = op_cost(op, m.perturbed(column=True))
            assert cost.seconds.shape == (len(m.sigma) + 1, n.size)
            assert np.all(np.isfinite(cost.seconds))
            assert np.all(op_cost(op, m).seconds >= np.maximum(*(cost.peak[r] for r in ("compute", "hbm"))))


@pytest.mark.parametrize(("head", "multiplied"), [(40, 64), (64, 64), (72, 96), (80, 96), (128, 128)])
def test_heads_are_multiplied_in_whole_steps(head: int, multiplied: int) -> None:
    """100 heads of 128 queries on 100 units; FlashAttention rounds the head size up to 32 (csrc/flash_attn/flash_api.cpp)."""
    op = softmax_attention("x", Group(1, 128, 0), heads=100, kv_heads=100, qk_dim=head, v_dim=head, kv_elements=200 * head,
                           kv_width=2, act_width=2, dtype="bf16")  # fmt: skip
    assert products(op, device()) == pytest.approx(_STEP * multiplied / 128)
