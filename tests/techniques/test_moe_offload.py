"""Experts outside the device: bytes of misses by hand, the split with the CPU, prefetching, conservation."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode, weight_residency
from perfmodel.kernels.elsewhere import rates
from perfmodel.machine import machine
from perfmodel.schedule import operators
from perfmodel.techniques.moe_offload import dealt

# Mixtral-8x7B: one expert has 3 x 4,096 x 14,336 = 176,160,768 elements, 352.3 MB; 8 in each of 32 layers, 2 for a token.
EXPERT = 3 * 4096 * 14336


@lru_cache(maxsize=64)
def built(*techniques: str) -> Estimator:
    return Estimator("mixtral-8x7b", "h200-sxm", techniques=techniques)


def experts(e: Estimator, batch: float, path: str = "host") -> float:
    return float(sum(
        t.bytes * n for op, n, _ in operators(e.lower(decode(batch, 255)).schedule) for t in op.traffic
        if t.path == path and t.tensor == "experts"
    ))


def test_misses_of_one_token_and_of_a_batch():
    # One token needs 2 experts of each layer; with 4 of 8 on the device and even routing one misses: 32 x 352.3 MB.
    assert experts(built("moe-offload:slots=4"), 1) == pytest.approx(32 * 2 * EXPERT, rel=1e-9)
    assert experts(built("moe-offload"), 1) == pytest.approx(2 * 32 * 2 * EXPERT, rel=1e-9)
    # 16 tokens reach 8 (1 - 0.75^16) = 7.92 of 8.
    union = 8 * (1 - 0.75**16)
    assert experts(built("moe-offload"), 16) == pytest.approx(union * 32 * 2 * EXPERT, rel=1e-9)
    assert experts(built("moe-offload:slots=2,hit=0.9"), 16) == pytest.approx(0.1 * union * 32 * 2 * EXPERT, rel=1e-9)
    # Streamed once per large batch.
    assert experts(built("moe-offload"), 512) == pytest.approx(8 * 32 * 2 * EXPERT, rel=1e-6)


def test_popular_experts_stay():
    # Zipf with z = 1 over 8: weights 1/i, sum 2.718; the lower four are chosen 2 (1/5 + 1/6 + 1/7 + 1/8) / 2.718 = 0.467.
    harmonic = sum(1 / i for i in range(1, 9))
    lower = sum(1 / i for i in range(5, 9))
    expected = 2 * lower / harmonic
    assert experts(built("moe-offload:slots=4,popularity=1"), 1) == pytest.approx(expected * 32 * 2 * EXPERT, rel=1e-6)


def test_fewer_bits_on_the_way():
    assert experts(built("moe-offload:slots=4,bits=4"), 1) == pytest.approx(32 * EXPERT / 2, rel=1e-9)
    assert built("moe-offload:slots=4,bits=4").decode(1, 256) < built("moe-offload:slots=4").decode(1, 256)


def test_few_bits_expanded_before_every_use():
    once, each = built("moe-offload:slots=4,bits=4"), built("moe-offload:slots=4,bits=4,expanded=use")
    # One token: 2 experts of 32 layers, each matrix in 7 kernels and 14 bytes an element.
    found = [(op, n) for op, n, _ in operators(each.lower(decode(1, 255)).schedule) if op.name.endswith(".expand")]
    assert sum(float(n * op.launches) for op, n in found) == pytest.approx(32 * 2 * 3 * 7)
    assert sum(float(n * t.bytes) for op, n in found for t in op.traffic) == pytest.approx(32 * 2 * EXPERT * 14)
    held = "moe-offload:slots=8,bits=4"
    assert built(f"{held},expanded=use").decode(1, 256) > built(held).decode(1, 256)
    # Half of the experts, and two more in all to fetch into, lie on the device in a quarter of the bytes.
    assert once.memory(0, 1).weights - each.memory(0, 1).weights == pytest.approx((4 * 32 + 2) * EXPERT * (2 - 0.5), rel=1e-6)


def test_link_bound_decode_matches_the_link():
    # 32 x 352.3 MB at 63 GB/s: 178.96 ms at the datasheet rate.
    e = built("moe-offload:slots=4")
    assert e.parts(1, 1, 255, is_decode=True).lower == pytest.approx(32 * 2 * EXPERT / 63e9, rel=1e-6)


def test_a_balanced_split_beats_both_ends():
    # Link and CPU work side by side: at balance neither waits for the other, so no other share is faster.
    times = {x: built(f"moe-offload:slots=4,cpu={x}").decode(1, 256) for x in ("0", "0.2", "0.8", "1", "balanced")}
    assert min(times, key=times.__getitem__) == "balanced"
    busy = built("moe-offload:slots=4,cpu=balanced").parts(1, 1, 255, is_decode=True).busy
    assert busy["cpu"] == pytest.approx(busy["host_link"], rel=0.05)
    # Everything on the CPU: 32 x 352.3 MB over its share of two sockets' memory, no weights on the link.
    whole = built("moe-offload:slots=4,cpu=1.0")
    assert experts(whole, 1) == 0
    assert experts(whole, 1, "cpu") == pytest.approx(32 * 2 * EXPERT, rel=1e-9)
    assert experts(whole, 1, "hbm") == pytest.approx(experts(built(), 1, "hbm") / 2, rel=1e-9)


def test_whole_experts_go_one_way_or_the_other():
    # Two needed, each missing by half, both ways a second: none, one or two miss by 1/4, 1/2 and 1/4, one second but for none.
    assert [float(x) for x in dealt(2, 0.5, 1.0, 1.0)] == pytest.approx([0.25, 0.75])
    # Of three misses the link, twice as fast, brings two while the CPU computes one.
    assert [float(x) for x in dealt(3, 1.0, 2.0, 1.0)] == pytest.approx([1, 2])
    # Many are shared out: 20 of 40 miss, 20 x 3 / 4 on the CPU.
    assert [float(x) for x in dealt(40, 0.5, 1.0, 3.0)] == pytest.approx([15, 15])
    shared, dealt_out = (built(f"moe-offload:slots=4,cpu=balanced,undivided={x}") for x in ("false", "true"))
    ends = [float(built(f"moe-offload:slots=4,cpu={x}").decode(1, 256)) for x in (0, 1)]
    assert float(shared.decode(1, 256)) < float(dealt_out.decode(1, 256)) < min(ends)


def test_a_cpu_that_reaches_half_of_its_memory_s_rate():
    half, all_of_it = (built(f"moe-offload:slots=0,cpu=1,gather={x}") for x in (0.5, 1))
    moved = 32 * 2 * EXPERT * 2 / rates("cpu", machine("h200-sxm")).bandwidth
    assert float(half.decode(1, 256) - all_of_it.decode(1, 256)) == pytest.approx(moved, rel=0.01)


def test_a_balanced_prefill_gives_the_cpu_less():
    # 2048 tokens: the CPU is bound by its arithmetic, so at balance the link takes most of the missed experts.
    times = {x: float(built(f"moe-offload:slots=4,cpu={x}").prefill(1, 2048)) for x in ("0", "0.1", "0.3", "0.92", "balanced")}
    assert times["balanced"] == pytest.approx(min(times.values()), rel=1e-9)
    busy = built("moe-offload:slots=4,cpu=balanced").parts(1, 2048, 0, is_decode=False).busy
    assert busy["cpu"] == pytest.approx(busy["host_link"], rel=0.05)


def test_a_pass_that_needs_all_experts_guesses_none_wrong():
    # 4096 tokens reach all 8 experts: whatever is fetched ahead is used, so nothing crosses the link twice.
    half, sure = built("moe-offload:slots=4,accuracy=0.5"), built("moe-offload:slots=4,accuracy=1")
    seconds = [float(e.prefill(1, 4096)) for e in (half, sure)]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-6)
    assert float(half.decode(1, 256)) > float(sure.decode(1, 256))


def test_prefetching():
    # A perfect predictor one layer ahead: all misses of 31 of 32 layers arrive early; wrong guesses cross for nothing.
    sure, half = built("moe-offload:slots=4,accuracy=1"), built("moe-offload:slots=4,accuracy=0.5")
    one = 32 * 2 * EXPERT
    assert experts(sure, 1) == pytest.approx(one, rel=1e-9)
    assert experts(half, 1) == pytest.approx((31 / 32 + 1 - 0.5 * 31 / 32) * one, rel=1e-9)
    # Prefetches start with the layer, fetches on demand after its router.
    assert sure.decode(1, 256) < built("moe-offload:slots=4").decode(1, 256)
    assert half.decode(1, 256) > sure.decode(1, 256)


@settings(max_examples=15, deadline=None)
@given(slots=st.integers(0, 8), pinned=st.booleans())
def test_elements_over_the_tiers(slots, pinned):
    e = Estimator("mixtral-8x7b", "h200-sxm", techniques=[f"moe-offload:slots={slots},pinned={pinned},buffers=0"])
    found: dict[str, float] = {"hbm": 0.0, "host": 0.0}
    for r in weight_residency(e.model, e.par, e.formats):
        if r.tensor == "experts":
            found[r.tier] += float(r.elements)
    everything = 32 * 8 * EXPERT
    assert found["hbm"] == pytest.approx(everything * slots / 8)
    assert found["host"] == pytest.approx(everything * (1 - slots / 8 if pinned else 1))


def test_all_on_the_device_changes_nothing():
    e, plain = built("moe-offload:slots=8"), built()
    b = np.array([1.0, 16, 64])
    assert e.decode(b, 512) == pytest.approx(plain.decode(b, 512), rel=1e-6)
    assert e.max_batch(512) == plain.max_batch(512)


def test_arrays_and_regrouping():
    e = built("moe-offload:slots=4,popularity=0.8,accuracy=0.9,cpu=balanced")
    b = np.array([1.0, 4, 64, 256])
    assert np.all(np.diff(e.decode(b, 512)) > 0)
    assert e.decode(b, 512)[2] == pytest.approx(e.decode(64, 512))
    grouped = built("moe-offload:slots=4,grouping=0.5")
    assert experts(grouped, 4) == pytest.approx(experts(built("moe-offload:slots=4"), 4) / 2, rel=1e-9)


def test_what_cannot_be():
    with pytest.raises(SpecError, match="slots=2 at least"):
        built("moe-offload:hit=0.9")
    with pytest.raises(SpecError, match="no routed experts"):
        Estimator("llama-3.1-8b", "h100-sxm", techniques=["moe-offload"])
    with pytest.raises(SpecError, match="balanced"):
        built("moe-offload:cpu=2.5")
    with pytest.raises(SpecError, match="cannot be combined"):
        built("moe-offload", "weight-offload")


def test_few_bits_are_multiplied_as_integers_on_a_cpu_that_can():
    # Xeon Platinum 8380: 256 INT8 against 64 FP32 operations per core and clock, so four times the rate.
    there = rates("cpu", machine("a40-xeon-1"))
    assert there.rate(1, 0.56) == pytest.approx(4 * there.rate(1, 2.0), rel=0.01)
    # EPYC 7742 has no such instruction in the catalogue: the general rate.
    plain = rates("cpu", machine("rtx-a6000-workstation-1"))
    assert plain.rate(1, 0.56) == plain.rate(1, 2.0)
