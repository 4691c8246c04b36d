"""Dense matrix products against arithmetic by hand on a device of round numbers; sane on devices nobody measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perfmodel.kernels.base import Demands
from perfmodel.kernels.matrix import gemm as law
from perfmodel.kernels.matrix import ramped, tiled
from perfmodel.machine import Machine, machine
from perfmodel.ops.gemm import gemm
from perfmodel.ops.traffic import Op
from perfmodel.roofline import op_cost
from perfmodel.spec.formats import get_format
from perfmodel.symbols import Num

_BF16, _FP8, _FP4 = get_format("bf16"), get_format("fp8"), get_format("nvfp4")
# 100 units of 10 TFLOP/s each, which load 50 GB/s each from the cache.
_ROUND = {
    "overlap_power": 16.0, "tile_overhead": 1e-6, "split_overhead": 4e-6, "unit_loading": 5.0, "matrix_ramp": 2e-6,
    "narrow_matrix_efficiency": 0.5, "row_scale_latency": 0.0,
}  # fmt: skip


pytestmark = pytest.mark.filterwarnings("ignore")


def device(**law_values: float) -> Machine:
    """A device of round numbers; an overlap power of 16 is close to a hard maximum."""
    m = machine("h100-sxm")
    return replace(
        m, units=100.0, matrix={"bf16": 1e15, "fp8": 2e15, "fp4": 4e15}, matrix_efficiency=1.0, vector=1e12,
        vector_efficiency=1.0, bandwidth=1e12, bandwidth_efficiency=1.0, kernel_latency=0.0, law=m.law | _ROUND | law_values,
    )  # fmt: skip


def product(m: Num, n: Num, k: Num, dtype: str = "bf16") -> Op:
    weight = {"bf16": _BF16, "fp8": _FP8, "fp4": _FP4}[dtype]
    return gemm("gemm", m, n, k, weight=weight, act=_BF16, dtype=dtype)[-1]


def test_waves_of_tiles_by_hand() -> None:
    # 1280 x 2560 in tiles of 128 x 256: 10 x 10 = 100 tiles, one wave on 100 units. A tile is 2*128*256*4096 = 268.4 MFLOP,
    # 26.84 us at 10 TFLOP/s; its operands are (128 + 256)*4096*2 = 3.146 MB, 62.9 us at 50 GB/s. Plus 1 us.
    # In tiles of 128 x 128: 200 tiles, two waves of (128 + 128)*4096*2 / 50e9 = 41.9 us: slower.
    assert float(tiled(product(1280, 2560, 4096), device())) == pytest.approx(63.9e-6, rel=2e-3)
    # Units that load without limit leave the multiplication. Tiles of 64 x 64 take 8 waves of 3.36 us + 1 us: no better.
    quick = device(unit_loading=1e6)
    assert float(tiled(product(1280, 2560, 4096), quick)) == pytest.approx(27.84e-6, rel=2e-3)
    # One row more: 110 tiles of 128 x 256 need two waves (55.7 us). 11 x 20 = 220 of 128 x 128 take three of 14.42 us
    # (43.3 us), 21 x 40 = 840 of 64 x 64 nine of 4.36 us (39.2 us).
    assert float(tiled(product(1281, 2560, 4096), quick)) == pytest.approx(39.2e-6, rel=2e-3)


def test_few_tiles_are_split_along_k_where_that_pays() -> None:
    quick = device(unit_loading=1e6)
    # 256 x 256 in tiles of 64 x 64: 16 tiles; 4 splits use 64 units: 2*64*64*65536/4 FLOP at 10 TFLOP/s = 13.42 us,
    # + 1 us + 4 us to join the parts. Eight splits need two waves of 6.71 us + 1 us, + 4 us = 19.4 us.
    assert float(tiled(product(256, 256, 65536), quick)) == pytest.approx(18.42e-6, rel=2e-3)
    # At k = 256 one split takes 0.21 us + 1 us: joining parts would cost more than the product.
    assert float(tiled(product(256, 256, 256), quick)) == pytest.approx(1.21e-6, rel=2e-3)


def test_few_rows_use_part_of_a_tile() -> None:
    quick = device(unit_loading=1e6, tile_overhead=0.0, split_overhead=1.0)
    # 6400 columns are 100 tiles of 64. One row is padded to 16 on the matrix units: 2*16*64*4096 / 1e13 = 0.839 us; on the
    # vector units 2*1*64*4096 / 1e10 = 52 us. 40 rows pad to 48.
    assert float(tiled(product(1, 6400, 4096), quick)) == pytest.approx(0.839e-6, rel=2e-3)
    assert float(tiled(product(40, 6400, 4096), quick)) == pytest.approx(3 * 0.839e-6, rel=2e-3)
    # With vector units as fast as the matrix units the row needs no padding: 2*64*4096 / 1e13.
    assert float(tiled(product(1, 6400, 4096), replace(quick, vector=1e15))) == pytest.approx(0.0524e-6, rel=2e-3)


def test_each_halving_of_the_format_costs_efficiency() -> None:
    quick = device(unit_loading=1e6, tile_overhead=0.0)
    wide, eight, four = (float(tiled(product(1280, 2560, 4096, d), quick)) for d in ("bf16", "fp8", "fp4"))
    # Twice the peak at half the efficiency, and once more.
    assert eight == pytest.approx(wide)
    assert four == pytest.approx(wide)


def test_ramp_of_short_and_long_loads() -> None:
    # x + x r / (x + r) with r = 2 us: 2 us becomes 3 us, 2 ms becomes 2.002 ms, 2 ns becomes 4 ns.
    for x, expected in ((2e-6, 3e-6), (2e-3, 2.002e-3), (2e-9, 4e-9)):
        memory, cache = ramped(Demands(memory=0.75 * x, cache=0.25 * x), device())
        assert float(memory + cache) == pytest.approx(expected, rel=2e-3)
        assert float(memory) == pytest.approx(3 * float(cache))


def test_scales_of_rows_take_a_thread_block_each() -> None:
    m = device(row_scale_latency=1e-6)
    # 16384 rows on 100 units at 1 us each; formats scaled by blocks, and 16-bit products, find no scale of rows.
    assert float(law(product(16384, 1024, 1024, "fp8"), m).latency) == pytest.approx(163.84e-6)
    assert float(law(product(16384, 1024, 1024, "fp4"), m).latency) == 0
    assert float(law(product(16384, 1024, 1024), m).latency) == 0


def test_arrays_and_uncertain_machines_agree_with_scalars() -> None:
    m = machine("b200-sxm")
    rows = np.array([1.0, 17, 64, 300, 5000])
    together = op_cost(product(rows, 4096, 7168), m).seconds
    alone = [float(op_cost(product(float(r), 4096, 7168), m).seconds) for r in rows]
    assert together == pytest.approx(alone)
    shaken = m.perturbed(column=True)
    table = np.asarray(op_cost(product(rows, 4096, 7168), shaken).seconds)
    assert table.shape == (len(m.sigma) + 1, len(rows))
    assert table[0] == pytest.approx(alone)
    assert np.any(np.abs(table[1:] / table[0] - 1) > 0.01)


@pytest.mark.parametrize(
    "name",
    ["rtx-4090", "mi300x", "tpu-v5e", "tpu-v5p", "h20-sxm", "l40s", "a40", "ascend-910b1", "xeon-8480-plus", "gaudi2"],
)
def test_devices_known_by_their_datasheet_only(name: str) -> None:
    m = machine(name)
    # A large product runs at 25-95 % of the datasheet peak of its dtype.
    big = float(op_cost(product(8192, 8192, 8192), m).seconds)
    assert 0.25 < 2 * 8192**3 / m.peak("bf16") / big < 0.95
    # A matrix-vector product streams its weights at 30-95 % of the datasheet memory rate.
    vector = float(op_cost(product(1, 16384, 16384), m).seconds)
    assert 0.3 < 2 * 16384**2 / m.bandwidth / vector < 0.95
    # More work never takes clearly less time.
    steps = np.asarray(op_cost(product(np.arange(1.0, 4097, 37), 4096, 4096), m).seconds)
    assert np.all(steps[1:] > 0.9 * np.maximum.accumulate(steps)[:-1])
