"""Times of single operators by hand, bounds, and what must never happen when a machine or a shape grows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import catalog, graph
from perfmodel.machine import Machine, machine
from perfmodel.ops.attention import softmax_attention
from perfmodel.ops.elementwise import pointwise
from perfmodel.ops.gemm import gemm
from perfmodel.ops.shard import Formats, Group, Parallelism
from perfmodel.ops.traffic import Op
from perfmodel.roofline import cost, op_cost
from perfmodel.schedule import Par, Repeat, Seq
from perfmodel.spec.formats import get_format

BF16 = Formats(*[get_format("bf16")] * 4)
DEVICES = (
    "h100-sxm",
    "a100-sxm-80gb",
    "l40s",
    "rtx-4090",
    "mi300x",
    "v100-pcie",
    "tpu-v5e",
    "xeon-8480-plus",
    "m2-ultra",
)
MODELS = ("llama-3.1-8b", "deepseek-v3", "qwen3-30b-a3b", "gemma-2-2b", "mamba2-2.7b", "qwen3-next-80b-a3b")


def product(m: float, n: float, k: float) -> Op:
    (op,) = gemm("x", m, n, k, weight=get_format("bf16"), act=get_format("bf16"), dtype="bf16")
    return op


def core(n: float, q: float, c: float, heads: int = 32, kv_heads: int = 8) -> Op:
    return softmax_attention(
        "x", Group(n, q, c), heads=heads, kv_heads=kv_heads, qk_dim=128, v_dim=128, kv_elements=2 * kv_heads * 128,
        kv_width=2, act_width=2, dtype="bf16",
    )  # fmt: skip


def ideal(name: str = "h100-sxm") -> Machine:
    """A machine that reaches its datasheet, overlaps perfectly, starts kernels at once and loads operands for nothing."""
    m = machine(name)
    free = (
        "tile_overhead", "split_overhead", "matrix_ramp", "attention_latency", "attention_item_start", "cache_share",
        "expert_latency", "portable_expert_latency",
    )  # fmt: skip
    endless = {"unit_loading": 1e9, "attention_load_rate": 1e18, "row_bytes_per_clock": 1e9}
    assert (set(free) | set(endless)) <= set(m.law)
    return replace(
        m, law=m.law | dict.fromkeys(free, 0.0) | endless | {"overlap_power": 24.0, "narrow_matrix_efficiency": 1.0},
        matrix_efficiency=1.0, attention_efficiency=1.0, vector_efficiency=1.0, bandwidth_efficiency=1.0,
        kernel_latency=0.0, memory_latency=0.0,
    )  # fmt: skip


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_large_product_runs_at_the_peak_of_an_ideal_machine() -> None:
    """11 x 12 x 132 tiles of 128 x 256 fill 132 units exactly: 2 m n k / 989.4 TFLOP/s."""
    m = ideal()
    rows, cols, depth = 11 * 128, 12 * 132 * 256, 8192
    assert m.peak("bf16") == pytest.approx(989.4e12, rel=0.001)
    expected = 2 * rows * cols * depth / m.peak("bf16")
    assert op_cost(product(rows, cols, depth), m).seconds == pytest.approx(expected, rel=0.01)


def test_one_tile_past_a_full_wave_costs_a_wave() -> None:
    """132 units and as many tiles of 128 x 256, which are 1,056 tiles of 64 x 64: 8 waves. 1,064 tiles take 9."""
    m = ideal()
    full, more = (op_cost(product(128, tiles * 256, 8192), m).busy["compute"] for tiles in (132, 133))
    assert more / full == pytest.approx(9 / 8, rel=0.01)


def test_matrix_vector_product_runs_at_the_memory_rate() -> None:
    """One row against 8192 x 28672 bf16: the matrix is read once, at 3.35 TB/s."""
    m = ideal()
    expected = 8192 * 28672 * 2 / m.bandwidth
    assert m.bandwidth == 3.35e12
    assert op_cost(product(1, 28672, 8192), m).seconds == pytest.approx(expected, rel=0.01)


def test_long_prompt_attention_runs_at_the_peak() -> None:
    """32 heads of 128, 32,768 causal tokens: 4 * 32 * 128 FLOP for each of 32768 * 32769 / 2 pairs."""
    m = ideal()
    expected = 4 * 32 * 128 * (32768 * 32769 / 2) / m.peak("bf16")
    # The diagonal's tiles are computed whole and the last wave is not full: 2.6 % more.
    assert op_cost(core(1, 32768, 0), m).busy["compute"] == pytest.approx(expected, rel=0.03)


def test_decode_attention_reads_the_cache_at_the_memory_rate() -> None:
    """64 sequences of 8000 tokens, 8 KV heads of 128 in bf16: 4096 bytes a token."""
    m = ideal()
    found = op_cost(core(64, 1, 7999), m)
    # Queries and outputs of 64 x 32 heads of 128 add 1 MiB to 2.1 GB.
    assert found.busy["hbm"] == pytest.approx((64 * 8000 * 4096 + 2**20) / m.bandwidth, rel=1e-4)
    assert found.seconds == pytest.approx(found.busy["hbm"], rel=0.05)


def test_lower_bound_of_a_decode_step_by_hand() -> None:
    """Llama-3.1-8B, one sequence, 1000 cached tokens on an H100: all bytes once over 3.35 TB/s.

    Matrices: 8,030,261,248 parameters less the table (128256 * 4096) and 65 norms of 4096. One table row; 1001 keys and
    values read and one written, 131,072 bytes each.
    """
    matrices = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    stored = (matrices + 4096) * 2 + 1002 * 131_072
    program = graph.lower(catalog.load_model("llama-3.1-8b"), graph.decode(1, 1000), Parallelism(), BF16)
    assert cost(program.schedule, machine("h100-sxm")).lower == pytest.approx(stored / 3.35e12, rel=1e-12)


def test_kernels_join_by_the_p_norm() -> None:
    """Two terms of one second each: 2^(1/p) seconds between perfect overlap (1) and none (2)."""
    m = replace(ideal(), law=ideal().law | {"overlap_power": 3.0})
    elements = m.bandwidth / 4  # a read and a write of two bytes: one second
    op = pointwise("x", elements, 2, flops=m.vector / elements)
    assert op_cost(op, m).seconds == pytest.approx(2 ** (1 / 3))


def test_the_cache_holds_its_share_of_the_activations() -> None:
    """A read and a write of n two-byte elements: what fits in the warm share costs cache time, the rest memory time."""
    m = machine("h100-sxm")
    warm = m.law["cache_share"] * m.cache
    rate = m.bandwidth * m.bandwidth_efficiency
    small, large = (op_cost(pointwise("x", n, 2), m).busy for n in (warm / 8, 10 * warm))
    assert small["hbm"] == 0
    assert small["cache"] == pytest.approx(warm / 2 / (rate * m.law["cache_ratio"]))
    assert large["hbm"] == pytest.approx((40 * warm - warm) / rate)
    assert large["cache"] == pytest.approx(warm / (rate * m.law["cache_ratio"]))


def test_weights_come_from_memory_however_small() -> None:
    assert op_cost(product(1, 16, 16), machine("h100-sxm")).busy["hbm"] > 0


def test_schedule_adds_repeats_and_overlaps() -> None:
    m = machine("h100-sxm")
    a, b = product(64, 4096, 4096), product(64, 8192, 4096)
    one, two = op_cost(a, m).seconds, op_cost(b, m).seconds
    assert cost(Seq((a, b)), m).seconds == pytest.approx(one + two)
    assert cost(Repeat(a, 7), m).seconds == pytest.approx(7 * one)
    assert cost(Par((a, b)), m).seconds == pytest.approx(max(one, two))
    assert cost(Par((a, b), shared=("hbm",)), m).seconds == pytest.approx(
        max(one, two, op_cost(a, m).busy["hbm"] + op_cost(b, m).busy["hbm"])
    )
    assert cost(Par((a, b), interference=1.25), m).seconds == pytest.approx(1.25 * max(one, two))


# --- properties ------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 20_000), st.integers(16, 60_000), st.integers(16, 30_000))
CONTEXTS = st.tuples(st.integers(1, 300), st.integers(1, 5000), st.integers(0, 100_000))


@settings(max_examples=60)
@given(device=st.sampled_from(DEVICES), shape=SHAPES, context=CONTEXTS)
def test_expected_time_lies_between_the_bounds(device: str, shape: tuple[int, ...], context: tuple[int, ...]) -> None:
    for op in (product(*shape), core(*context)):
        found = op_cost(op, machine(device))
        assert 0 < found.lower <= found.seconds <= found.upper * (1 + 1e-12)


@settings(max_examples=60)
@given(
    device=st.sampled_from(DEVICES),
    shape=SHAPES,
    axis=st.integers(0, 2),
    more=st.integers(1, 500),
)
def test_larger_products_take_no_less_time(device: str, shape: tuple[int, int, int], axis: int, more: int) -> None:
    """Small matrices may gain up to 10 % when more tiles load at once."""
    larger = [n + more * (i == axis) for i, n in enumerate(shape)]
    m = machine(device)
    assert op_cost(product(*larger), m).seconds >= 0.9 * op_cost(product(*shape), m).seconds


@settings(max_examples=100)
@given(device=st.sampled_from(DEVICES), context=CONTEXTS, axis=st.integers(0, 2), more=st.integers(1, 300))
def test_more_attention_takes_no_less_time(device: str, context: tuple[int, int, int], axis: int, more: int) -> None:
    """Tiles of query rows are padded and contexts split, so a further row or token hardly ever makes the whole faster.

    Kernels made for decode and for prefill meet at a few rows, where one may win up to 5 % over the other.
    """
    larger = [n + more * (i == axis) for i, n in enumerate(context)]
    m = machine(device)
    assert op_cost(core(*larger), m).seconds >= 0.95 * op_cost(core(*context), m).seconds


@settings(max_examples=40)
@given(
    device=st.sampled_from(DEVICES),
    name=st.sampled_from(MODELS),
    field=st.sampled_from(
        ["bandwidth", "link", "matrix", "vector", "exp", "cache", "bandwidth_efficiency", "matrix_efficiency"]
    ),
    factor=st.floats(1, 4),
    is_decode=st.booleans(),
)
def test_a_better_machine_is_never_slower(device: str, name: str, field: str, factor: float, is_decode: bool) -> None:
    phase = graph.decode(16, 2000) if is_decode else graph.prefill(2, 600, 100)
    schedule = graph.lower(catalog.load_model(name), phase, Parallelism(), BF16).schedule
    m = machine(device)
    value = {k: v * factor for k, v in m.matrix.items()} if field == "matrix" else getattr(m, field) * factor
    better = replace(m, **{field: value})
    assert cost(schedule, better).seconds <= cost(schedule, m).seconds * (1 + 1e-12)
    if "efficiency" not in field:
        assert cost(schedule, better).lower <= cost(schedule, m).lower * (1 + 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_give_what_scalars_give(device: str) -> None:
    """One call on arrays of shapes equals a call for each, split products and padded tiles included."""
    m = machine(device)
    rng = np.random.default_rng(5)
    rows, cols, depth = (rng.integers(1, 9000, 40).astype(float) for _ in range(3))
    n, q, c = (
        rng.integers(1, 200, 40).astype(float),
        rng.integers(1, 900, 40).astype(float),
        rng.integers(0, 9000, 40).astype(float),
    )
    together = op_cost(product(rows, cols, depth), m).seconds, op_cost(core(n, q, c), m).seconds
    apart = (
        [op_cost(product(*shape), m).seconds for shape in zip(rows, cols, depth, strict=True)],
        [op_cost(core(*shape), m).seconds for shape in zip(n, q, c, strict=True)],
    )
    np.testing.assert_allclose(together, apart, rtol=1e-12)
