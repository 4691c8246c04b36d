"""Products in memory banks: bank time by hand, the batch at which the gain is gone, and where weights lie."""

from functools import lru_cache

import numpy as np
import pytest

from perfmodel import roofline
from perfmodel.cost import pass_energy
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode, prefill
from perfmodel.schedule import operators

LAYERS = 6_979_321_856  # weights of the 32 layers of Llama-3.1-8B that are multiplied: 32 x (41,943,040 + 3 x 4,096 x 14,336)


@lru_cache(maxsize=32)
def built(*techniques: str) -> Estimator:
    return Estimator("llama-3.1-8b", "a100-sxm-80gb", techniques=techniques)


def busy(e: Estimator, batch: float, place: str = "pim") -> float:
    found = ((op, n) for op, n, _ in operators(e.lower(decode(batch, 127)).schedule) if op.on == place)
    return float(sum(n * roofline.op_cost(op, e.machine).seconds for op, n in found))


def test_banks_read_weights_once_per_vector():
    # 16 chips x 1.02 TB/s = 16.32 TB/s; 13.96 GB: 0.855 ms for one vector, eight times that for eight.
    e = built("near-memory:count=16")
    once = 2 * LAYERS / 16.32e12
    assert busy(e, 1) == pytest.approx(once, rel=2e-3)
    assert busy(e, 8) == pytest.approx(8 * once, rel=2e-3)
    # A mapping that fills 80 % of the banks; macros that keep a tile for four vectors.
    assert busy(built("near-memory:count=16,utilisation=0.8"), 1) == pytest.approx(once / 0.8, rel=2e-3)
    assert busy(built("near-memory:count=16,reuse=4,flops=1e14"), 8) == pytest.approx(2 * once, rel=2e-3)
    # With the arithmetic of the chips, 2 x 6.98 G FLOPs a vector at 16.32 TFLOP/s, reuse gains nothing.
    assert busy(built("near-memory:count=16,reuse=4"), 8) == pytest.approx(8 * once, rel=2e-3)


def test_compute_in_memory_streams_from_the_device():
    # EdgeCIM's law: max(bytes / DRAM rate, FLOPs / CIM rate). 13.96 GB at 2,039 GB/s; at 1 TFLOP/s 13.96 ms of arithmetic.
    slow = built("near-memory:source=device,reuse=1e9,count=1,flops=1e12")
    fast = built("near-memory:source=device,reuse=1e9,count=1,flops=1e15")
    rate = fast.machine.bandwidth
    assert busy(fast, 1) == pytest.approx(2 * LAYERS / rate, rel=2e-3)
    assert busy(slow, 1) == pytest.approx(2 * LAYERS / 1e12, rel=2e-3)
    assert busy(fast, 8) == pytest.approx(busy(fast, 1), rel=1e-6)


def test_gains_vanish_with_the_batch():
    plain, pim = built(), built("near-memory:count=16")
    ratio = [plain.decode(b, 512) / pim.decode(b, 512) for b in (1, 4, 16, 64)]
    assert ratio[0] > 1.5
    assert np.all(np.diff(ratio) < 0)
    assert ratio[-1] < 1
    # Prefill stays on the device.
    assert pim.prefill(1, 1024) == pytest.approx(plain.prefill(1, 1024))


def test_attention_in_the_banks():
    # 64 sequences of 8,192 tokens x 131,072 B = 68.7 GB over 32 chips x 1.02 TB/s = 2.1 ms.
    e = built("near-memory:count=32,place=attention")
    ops = [(op, n) for op, n, _ in operators(e.lower(decode(64, 8191)).schedule) if op.on == "pim"]
    size = sum(float(t.bytes) * n for op, n in ops for t in op.traffic)
    assert size == pytest.approx(64 * 8192 * 131_072)
    assert e.decode(64, 8192) < built().decode(64, 8192)


def test_weights_that_lie_apart_leave_the_device():
    e = built("near-memory:count=32,apart=true,passes=all")
    # Embedding and head stay: 2 x 128,256 x 4,096 x 2 B = 2.10 GB.
    assert float(e.memory(1, 1).weights) == pytest.approx(2.10e9, rel=0.02)
    with pytest.raises(SpecError, match="passes=all"):
        built("near-memory:apart=true")
    with pytest.raises(SpecError, match="gddr6-aim"):
        built("near-memory:module=nvme-gen4")


def test_energy_of_arrays_by_hand():
    # Llama-2-7B: 32 x (4 x 4,096^2 + 3 x 4,096 x 11,008) = 6,476,005,376 weights of a layer's products, 2 bytes and one
    # multiply-accumulate each: 12.952 GB x 10 pJ + 6.476e9 x 1 pJ = 0.12952 + 0.00648 = 0.13600 J
    base = "near-memory:place=weights,count=8"
    plain, e = (Estimator("llama-2-7b", "a100-sxm-80gb", techniques=[t]) for t in (base, f"{base},byte_energy=1e-11,mac_energy=1e-12"))
    assert e.decode(1, 512) == plain.decode(1, 512)
    joules = [pass_energy(x, decode(1, 511), 0.01) for x in (plain, e)]
    assert joules[1] - joules[0] == pytest.approx(0.13600, rel=1e-3)
    # two vectors at a time read the arrays twice
    two = [pass_energy(x, decode(2, 511), 0.01) for x in (plain, e)]
    assert two[1] - two[0] == pytest.approx(2 * 0.13600, rel=1e-3)
    # prefill stays on the device
    assert pass_energy(e, prefill(1, 64), 0.01) == pass_energy(plain, prefill(1, 64), 0.01)
