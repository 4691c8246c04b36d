"""Layers of experts against hand arithmetic, simulated routing and datasheet rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perfmodel.kernels.grouped import expert_passes, grouped_gemm, tiles_per_expert
from perfmodel.machine import Machine, machine
from perfmodel.ops.moe import Routed, routed_experts
from perfmodel.ops.traffic import Op, read, write
from perfmodel.roofline import op_cost
from perfmodel.spec.formats import get_format

pytestmark = pytest.mark.filterwarnings("ignore")
BF16 = get_format("bf16")


@pytest.fixture
def h100() -> Machine:
    """132 units at 1 TFLOP/s each, 1 TB/s, and round parameters."""
    m = machine("h100-sxm")
    law = m.law | {
        "tile_overhead": 1e-6, "expert_efficiency": 1.0, "portable_efficiency": 0.5,
        "expert_feed": 1e9, "expert_latency": 10e-6, "portable_expert_latency": 30e-6, "expert_call": 2e-6,
        "expert_token_bytes": 10.0, "portable_pass_bytes": 1.0,
    }  # fmt: skip
    return replace(
        m, law=law, matrix={"bf16": 132e12, "fp8": 264e12}, matrix_efficiency=1.0, bandwidth=1e12,
        bandwidth_efficiency=1.0, kernel_latency=0.0,
    )  # fmt: skip


def layer(r: Routed, hidden: float = 4096, inter: float = 1024, weight: str = "bf16", **kernels: bool) -> dict[str, Op]:
    found = routed_experts(
        r, hidden, inter, gated=True, weight=get_format(weight), act=BF16, dtype="bf16", **kernels
    )  # fmt: skip
    return {op.name.removeprefix("experts."): op for op in found}


def test_touched_experts_are_read_once(h100: Machine) -> None:
    """4 experts of 4096 x 1024 in bf16 behind one row each: 4 x 8.39 MB and (1024 + 4096) x 4 x 2 B over 1 TB/s = 33.6 us."""
    d = grouped_gemm(layer(Routed(4, 4, 4))["down_proj"], h100)
    assert d.memory == pytest.approx((4 * 4096 * 1024 * 2 + 4 * (4096 + 1024) * 2) / 1e12)
    assert d.memory == pytest.approx(33.6e-6, rel=0.002)


def test_full_tiles_of_many_waves(h100: Machine) -> None:
    """132 experts with 2048 rows, n = 256: 16 x 2 tiles of 128 x 128 each are 32 waves over 132 units, and half a wave.

    A wave: 2 x 128 x 128 x 4096 FLOP at 1 TFLOP/s = 134.2 us, and 1 us.
    """
    op = layer(Routed(132 * 2048, 132, 2048, even=1), inter=128)["gate_up_proj"]
    assert op.shape["n"] == 256
    assert grouped_gemm(op, h100).compute == pytest.approx(32.5 * (2 * 128 * 128 * 4096 / 1e12 + 1e-6))


def test_few_rows_take_the_narrowest_tile(h100: Machine) -> None:
    """8 experts, 5 rows each, n = 2048: 8 x 16 tiles of 16 rows are one wave.

    2 x 16 x 128 x 4096 FLOP at (1/8)^(1/4) = 0.595 TFLOP/s, and 1 us / 8.
    """
    d = grouped_gemm(layer(Routed(40, 8, 40, even=1))["gate_up_proj"], h100)
    assert d.compute == pytest.approx(2 * 16 * 128 * 4096 / 0.5946e12 + 0.125e-6, rel=1e-3)


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("tokens", [64, 512, 4096])
def test_tiles_of_random_routing_by_simulation(tile: int, tokens: int) -> None:
    """64 experts of popularity log-uniform over two decades, 8 choices a token; mean of 200 draws within 15 %."""
    rng = np.random.default_rng(5)
    counted, expected = [], []
    for _ in range(200):
        popularity = 10 ** rng.uniform(0, 2, 64)
        load = rng.multinomial(8 * tokens, popularity / popularity.sum())
        counted.append(np.ceil(load / tile).sum())
        touched = np.count_nonzero(load)
        expected.append(touched * tiles_per_expert(8 * tokens / touched, tile, 0))
    assert np.mean(expected) == pytest.approx(np.mean(counted), rel=0.15)


@pytest.mark.parametrize(("device", "share"), [("a100-sxm-80gb", 1.0), ("h100-sxm", 0.5)])
def test_warp_level_rate_against_datasheets(device: str, share: float) -> None:
    """The warp-level instruction is all of an A100's 312 TFLOP/s, and half of an H100's 989."""
    m = machine(device)
    law = m.law | {"portable_efficiency": 1.0, "tile_overhead": 0.0}
    op = layer(Routed(2**22, 128, 2**20), weight="int4", portable=True)["gate_up_proj"]
    rate = op.flops["bf16"] / grouped_gemm(op, replace(m, law=law)).compute
    assert rate == pytest.approx(share * m.peak("bf16"), rel=0.05)


def test_default_kernels_expand_what_the_device_cannot_multiply(h100: Machine) -> None:
    """MXFP4 experts: portable kernels on Hopper, native ones where fp4 is multiplied; bf16 never needs expanding."""
    ours, b200 = layer(Routed(64, 32, 16), weight="mxfp4")["passes"], machine("b200-sxm")
    assert expert_passes(ours, h100).latency == pytest.approx(32e-6)
    assert expert_passes(ours, b200).latency == pytest.approx(b200.law["expert_latency"] + b200.law["expert_call"])
    assert expert_passes(layer(Routed(64, 32, 16))["passes"], h100).latency == pytest.approx(12e-6)


def test_passes_of_native_kernels_by_hand(h100: Machine) -> None:
    """100 tokens, 200 pairs, hidden 4096, inter 1024 in bf16.

    Activation: 200 x (2048 + 1024) x 2 B; sum: (200 + 100) x 4096 x 2 B; 10 B for each of 100 x 4096 elements.
    """
    moved = 200 * 3072 * 2 + 300 * 4096 * 2 + 10 * 100 * 4096
    assert expert_passes(layer(Routed(200, 50, 100))["passes"], h100).memory == pytest.approx(moved / 1e12)


def test_portable_passes_are_bound_by_the_units(h100: Machine) -> None:
    """1 byte per unit and clock over 132 units; a row for each of 800 slots, however few are this rank's own."""
    compute = h100.device.compute
    assert compute is not None
    moved = 800 * 3072 * 2 + 900 * 4096 * 2
    op = layer(Routed(200, 50, 100, slots=800), portable=True)["passes"]
    assert expert_passes(op, h100).memory == pytest.approx(moved / (132 * compute.clock))


def test_narrow_products_cast_their_inputs() -> None:
    """fp8: 100 x 4096 and 200 x 1024 elements are read in 2 bytes and written in 1; each product reads 1 byte."""
    r, fp8 = Routed(200, 50, 100), get_format("fp8")
    plain = routed_experts(r, 4096, 1024, gated=True, weight=fp8, act=BF16, dtype="fp8", narrow=1.0)
    wide = routed_experts(r, 4096, 1024, gated=True, weight=BF16, act=BF16, dtype="bf16")
    assert plain[0].bytes() - wide[0].bytes() == 3 * (100 * 4096 + 200 * 1024)
    assert wide[1].bytes(tensor="activations") - plain[1].bytes(tensor="activations") == 200 * 4096


def test_arrays_and_perturbed_machines_agree_with_scalars() -> None:
    m = machine("b200-sxm")
    shaken = m.perturbed(column=True)
    tokens = np.array([1.0, 60.0, 5000.0])
    many = layer(Routed(8 * tokens, np.minimum(8 * tokens, 256), tokens), weight="mxfp4")
    for name, op in many.items():
        all_rows = op_cost(op, shaken).seconds
        assert np.shape(all_rows) in ((len(m.sigma) + 1, 3), (1, 3), (3,))
        for i, t in enumerate(tokens):
            one = layer(Routed(8 * t, min(8 * t, 256), t), weight="mxfp4")[name]
            assert op_cost(one, m).seconds == pytest.approx(np.broadcast_to(all_rows, (len(m.sigma) + 1, 3))[0, i])


def test_a_plain_batch_of_products_routes_nothing() -> None:
    """Scores of 32 heads, one row each: no expert's share of sorting in a kernel that is bound by 67 MB of keys."""
    m = machine("h100-sxm")
    moved = (read("kv", 32 * 8192 * 128, 2), read("activations", 32 * 128, 2), write("activations", 32 * 8192, 2))
    op = Op("scores", "grouped_gemm", {"bf16": 2 * 32 * 8192 * 128}, moved, {"m": 1, "n": 8192, "k": 128, "groups": 32})
    ideal = sum(t.bytes for t in moved) / m.bandwidth
    assert ideal < float(op_cost(op, m).seconds) < ideal / 0.88 + 10e-6


@pytest.mark.parametrize("device", ["tpu-v5e", "mi300x", "gaudi3"])
def test_other_kinds_of_devices_are_bound_by_memory(device: str) -> None:
    """One token of an 8-expert layer: no slower than five times its weights at the datasheet rate, and 100 us."""
    m = machine(device)
    ops = layer(Routed(2, 2, 1), hidden=4096, inter=14336).values()
    seconds = sum(float(op_cost(op, m).seconds) for op in ops)
    weights = 2 * 3 * 4096 * 14336 * 2 / m.bandwidth
    assert weights < seconds < 5 * weights + 100e-6
