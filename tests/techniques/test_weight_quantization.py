"""Weight and activation bits: stored and read bytes by hand, peaks that exist, unpacking, unfused passes."""

from functools import lru_cache

import numpy as np
import pytest

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode, prefill
from perfmodel.schedule import operators

LAYERS = 6_979_321_856  # elements of the matrices of Llama-3.1-8B's layers
KEPT = 2 * 128_256 * 4096  # table and head


@lru_cache(maxsize=64)
def built(*techniques: str, model: str = "llama-3.1-8b", device: str = "a100-sxm-80gb") -> Estimator:
    return Estimator(model, device, techniques=techniques)


def products(e: Estimator, phase, what) -> float:
    found = operators(e.lower(phase).schedule)
    return sum(float(what(op)) * n for op, n, where in found if op.kind in ("gemm", "grouped_gemm") and op.name != "lm_head")


def weight_bytes(e: Estimator, phase=None) -> float:
    every = operators(e.lower(phase or decode(8, 255)).schedule)
    return sum(float(op.bytes("hbm", "weights")) * n for op, n, _ in every if op.name not in ("lm_head", "embedding"))


def test_stored_and_read_bytes():
    # 4 bits and a 16-bit scale per 128: 0.515625 B a weight; table and head stay: 2 x 0.525 G x 2 B.
    e = built("weight-quantization:bits=4,group=128")
    assert weight_bytes(e) == pytest.approx(LAYERS * (4 + 16 / 128) / 8, rel=1e-6)
    assert float(e.memory(1, 1).weights) == pytest.approx(LAYERS * 0.515625 + KEPT * 2, rel=0.01)


def test_dfloat11():
    # arXiv:2504.11651: about 11 of 16 bits; 70 % stored, 70 % + 200 % moved in every pass, exact.
    e, plain = built("weight-quantization:bits=11.2,fused=false,lossless=true"), built()
    assert e.techniques[0].effects() == "exact"
    assert weight_bytes(e) == pytest.approx(weight_bytes(plain) * (0.7 + 2), rel=1e-6)
    assert e.decode(1, 256) > 2 * plain.decode(1, 256)
    assert e.max_batch(2048) > plain.max_batch(2048)
    # Spread over many tokens the cost is small.
    assert e.prefill(4, 4096) < 1.1 * plain.prefill(4, 4096)


def test_w4a8_meets_integer_units_and_a_third_roof():
    e, act16 = built("weight-quantization:bits=4,act_bits=8"), built("weight-quantization:bits=4")
    assert e.prefill(4, 2048) < act16.prefill(4, 2048)
    # Two operations a weight and tile of 128 rows: 8,192 rows make 64 tiles.
    third = built("weight-quantization:bits=4,act_bits=8,unpack=2")
    vector = products(third, prefill(4, 2048), lambda op: op.flops.get("vector", 0.0))
    assert vector == pytest.approx(2 * LAYERS * 64, rel=1e-6)
    assert third.prefill(4, 2048) > e.prefill(4, 2048)
    # Activations are read in one byte.
    inputs = products(e, decode(8, 255), lambda op: sum(t.bytes for t in op.traffic if t.tensor == "activations"
                                                        and t.direction == "read"))
    assert inputs == pytest.approx(8 * 32 * (4096 + 4096 + 4096 + 14336), rel=1e-6)


def test_comet_mixes_two_peaks():
    # 80 % of the channels at int4 (1,248 TOP/s), 20 % at int8 (624): FLOPs are conserved, time lies between.
    phase = prefill(8, 2048)
    low, mixed, high = (built(f"weight-quantization:bits=4,act_bits={a}{more}") for a, more in
                        ((4, ""), (4, ",high_share=0.2"), (8, "")))
    for unit, share in (("int4", 0.8), ("int8", 0.2)):
        assert products(mixed, phase, lambda op, u=unit: op.flops.get(u, 0.0)) == pytest.approx(
            share * products(low, phase, lambda op: op.flops.get("int4", 0.0)), rel=1e-9
        )
    assert low.prefill(8, 2048) < mixed.prefill(8, 2048) < high.prefill(8, 2048)
    assert weight_bytes(mixed) == pytest.approx(weight_bytes(low))
    uneven = built("weight-quantization:bits=4,act_bits=4,high_share=0.2,imbalance=1.3")
    assert uneven.prefill(8, 2048) > mixed.prefill(8, 2048)


def test_unfused_four_bits_can_be_slower_than_sixteen():
    slow, fast, plain = (built(*t) for t in (("weight-quantization:bits=4,fused=false",), ("weight-quantization:bits=4",), ()))
    assert fast.decode(1, 256) < plain.decode(1, 256) < slow.decode(1, 256)
    assert weight_bytes(slow) == pytest.approx(LAYERS * (0.5 + 2 + 2), rel=1e-6)


def test_sixteen_bits_change_nothing():
    b = np.array([1.0, 16, 64])
    assert built("weight-quantization:bits=16").decode(b, 512) == pytest.approx(built().decode(b, 512))
    assert built("weight-quantization:bits=16").max_batch(512) == built().max_batch(512)
    times = [built(f"weight-quantization:bits={x}").decode(1, 512) for x in (2, 4, 8)]
    assert times == sorted(times)


def test_experts_too():
    name = {"model": "mixtral-8x7b", "device": "h200-sxm"}
    whole, dense = built("weight-quantization:bits=4", **name), built("weight-quantization:bits=4,experts=false", **name)
    # 45.1 G elements of experts at half a byte instead of two.
    assert float(dense.memory(1, 1).weights - whole.memory(1, 1).weights) == pytest.approx(
        32 * 8 * 3 * 4096 * 14336 * 1.5, rel=0.01
    )


def test_what_cannot_be():
    with pytest.raises(SpecError, match="does not multiply int4"):
        built("weight-quantization:bits=4,act_bits=4", device="h100-sxm")
    with pytest.raises(SpecError, match="does not multiply fp8"):
        built("weight-quantization:bits=8,act_bits=8,number=float")
    with pytest.raises(SpecError, match="act_bits=16"):
        built("weight-quantization:bits=4,act_bits=8,fused=false")
    with pytest.raises(SpecError, match="high_share"):
        built("weight-quantization:bits=4,high_share=0.3")


def test_experts_are_unpacked_too():
    # Mixtral-8x7B, all 8 experts of a layer: 32 x 8 x 3 x 4,096 x 14,336 weights at 64 operations each on the vector units
    plain, e = (Estimator("mixtral-8x7b", "h200-sxm", techniques=[f"weight-quantization:bits=4{more}"]) for more in ("", ",unpack=64"))
    least = 32 * 8 * 3 * 4096 * 14336 * 64 / e.machine.vector
    longer = e.prefill(1, 64) - plain.prefill(1, 64)
    assert 0.7 * least < longer < 3 * least
    parts = e.parts(8, 1, 2047, is_decode=True)
    assert parts.lower <= parts.seconds
