"""The streaming law against hand arithmetic on a machine of round numbers, and against measured kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perfmodel.kernels.base import streaming
from perfmodel.machine import Machine, machine
from perfmodel.ops import elementwise
from perfmodel.ops.traffic import Op
from perfmodel.roofline import op_cost

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def round_machine() -> Machine:
    """1 TB/s; 100 MB of cache, 40 % of it warm, at twice the memory rate; 100 units of 25 B/clock at 2 GHz."""
    m = machine("h100-sxm")
    compute = m.device.compute
    assert compute is not None
    device = m.device.model_copy(update={"compute": compute.model_copy(update={"clock": 2e9})})
    law = m.law | {"cache_share": 0.4, "cache_ratio": 2.0, "row_bytes_per_clock": 25.0}
    return replace(
        m, device=device, law=law, bandwidth=1e12, bandwidth_efficiency=1.0, cache=100e6, units=100.0,
        vector=1e18, exp=1e18, memory_latency=0.0, kernel_latency=0.0,
    )  # fmt: skip


def total(op: Op, m: Machine) -> float:
    d = streaming(op, m)
    return float(d.memory + d.cache)


def test_activations_that_fit_come_at_the_cache_rate(round_machine: Machine) -> None:
    # 5 M elements x (1 read + 1 write) x 2 B = 20 MB, all warm: 20e6 / 2e12 = 10 us.
    assert total(elementwise.pointwise("x", 5e6, 2), round_machine) == pytest.approx(10e-6)


def test_larger_ones_keep_the_warm_share(round_machine: Machine) -> None:
    # 50 M elements x 4 B = 200 MB: 40 MB warm (20 us) and 160 MB from memory (160 us).
    d = streaming(elementwise.pointwise("x", 50e6, 2), round_machine)
    assert d.memory == pytest.approx(160e-6)
    assert d.cache == pytest.approx(20e-6)


def test_weights_are_never_warm(round_machine: Machine) -> None:
    # 1,000 rows of 1,000 bf16 elements from the table (2 MB at 1 TB/s), written to the warm cache (2 MB at 2 TB/s).
    d = streaming(elementwise.embedding(1000.0, 1000.0, 2.0, 2.0), round_machine)
    assert d.memory == pytest.approx(2e-6)
    assert d.cache == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        # One unit moves 25 B x 2 GHz = 50 GB/s. A row of 10,000 elements, 4 streams of 2 B: 80 kB in 1.6 us.
        (1, 1.6e-6),
        # 30 rows on 30 of the 100 units last as long (the cache alone: 2.4 MB at 2 TB/s).
        (30, 1.6e-6),
        # 1,000 rows: 80 MB over 100 units would take 16 us, but 40 MB / 2 TB/s + 40 MB / 1 TB/s = 60 us.
        (1000, 60e-6),
    ],
)
def test_few_rows_leave_units_idle(round_machine: Machine, rows: float, seconds: float) -> None:
    assert total(elementwise.norm("n", rows, 10_000.0, 2.0), round_machine) == pytest.approx(seconds)


def test_a_flat_map_uses_all_units(round_machine: Machine) -> None:
    # The 80 kB of one row above without rows: 80e3 / 2e12.
    flat = elementwise.pointwise("x", 10_000.0, 2.0, reads=2, writes=2)
    assert total(flat, round_machine) == pytest.approx(40e-9)


def test_devices_of_few_wide_cores_divide_a_row() -> None:
    tpu = machine("tpu-v5e")
    row, flat = elementwise.norm("n", 1.0, 8192.0, 2.0), elementwise.pointwise("x", 8192.0, 2.0, reads=2, writes=2)
    assert total(row, tpu) == pytest.approx(total(flat, tpu))
    assert total(row, machine("h100-sxm")) > total(flat, machine("h100-sxm"))


def test_arrays_of_shapes_and_of_parameters_agree_with_scalars() -> None:
    m = machine("a100-sxm-80gb")
    tokens = np.array([1.0, 64.0, 4096.0])
    op = elementwise.norm("n", tokens, 8192.0, 2.0)
    many = np.asarray(op_cost(op, m).seconds)
    assert many.tolist() == [float(op_cost(elementwise.norm("n", t, 8192.0, 2.0), m).seconds) for t in tokens]
    grid = np.asarray(op_cost(op, m.perturbed(column=True)).seconds)
    assert grid.shape == (len(m.sigma) + 1, 3)
    assert grid[0].tolist() == many.tolist()


# Medians of PyTorch's addition of two fp16 tensors of tokens x hidden, one write [us] (Vidur's profiles, MIT licence).
ADDITIONS = [
    ("a100-sxm-80gb", 4096, 8192, 112.0),
    ("a100-sxm-80gb", 4096, 4096, 55.0),
    ("a100-sxm-80gb", 1024, 8192, 27.0),
    ("h100-sxm", 4096, 8192, 62.5),
    ("h100-sxm", 1024, 8192, 14.0),
]


@pytest.mark.parametrize(("device", "tokens", "hidden", "measured"), ADDITIONS)
def test_measured_additions(device: str, tokens: int, hidden: int, measured: float) -> None:
    # A profiler sees the kernel without its launch.
    op = elementwise.pointwise("add", float(tokens * hidden), 2.0, reads=2)
    seconds = float(op_cost(op, replace(machine(device), kernel_latency=0.0)).seconds)
    assert seconds * 1e6 == pytest.approx(measured, rel=0.2)
