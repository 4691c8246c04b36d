"""Streamed weights: bytes per pass by hand, buffers, shared loads of a block, conservation."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode, prefill, weight_residency
from perfmodel.schedule import operators


@lru_cache(maxsize=64)
def built(*techniques: str, model: str = "llama-3.1-8b", device: str = "h100-sxm", tp: int = 1) -> Estimator:
    return Estimator(model, device, techniques=techniques, tp=tp)


def streamed(e: Estimator, phase, path: str = "host") -> float:
    return float(sum(
        t.bytes * n for op, n, _ in operators(e.lower(phase).schedule) for t in op.traffic
        if t.path == path and t.tensor in ("weights", "experts")
    ))


def by_tier(e: Estimator) -> dict[str, float]:
    found: dict[str, float] = {}
    for r in weight_residency(e.model, e.par, e.formats):
        found[r.tier] = found.get(r.tier, 0.0) + float(r.elements)
    return found


LAYERS = 2 * 6_979_321_856  # bytes of the matrices of 32 layers: 32 x (41,943,040 + 3 x 4,096 x 14,336) x 2


def test_every_layer_crosses_the_link_once_per_pass():
    e = built("weight-offload")
    assert streamed(e, decode(8, 512)) == pytest.approx(LAYERS, rel=1e-9)
    assert streamed(e, prefill(4, 512)) == pytest.approx(LAYERS, rel=1e-9)
    # 13.96 GB over 63 GB/s: no faster than 221.6 ms; two devices stream half each.
    assert e.parts(8, 1, 511, is_decode=True).lower == pytest.approx(LAYERS / 63e9, rel=1e-6)
    assert streamed(built("weight-offload", tp=2), decode(8, 512)) == pytest.approx(LAYERS / 2, rel=1e-9)


def test_a_window_of_layers_stays():
    # 2 of 32 layers of 436 MB beside norms, table and head (2 x 1.05 GB).
    e, wide = built("weight-offload"), built("weight-offload:window=16")
    assert float(e.memory(1, 1).weights) == pytest.approx(LAYERS / 16 + 2.10e9, rel=0.02)  # a table of positions beside
    assert float(wide.memory(1, 1).weights) == pytest.approx(LAYERS / 2 + 2.10e9, rel=0.02)  # a table of positions beside


def test_a_batch_amortises_the_stream():
    # Time hardly moves while the link binds, so tokens a second grow with the batch.
    e = built("weight-offload")
    assert e.decode(32, 256) < 1.05 * e.decode(1, 256)
    # Eight parts read the layers eight times from device memory, and stream them once.
    block = built("weight-offload:block=8")
    assert streamed(block, decode(64, 256)) == pytest.approx(LAYERS, rel=1e-9)
    hbm = [streamed(x, decode(64, 256), "hbm") for x in (block, e)]
    head = 128_256 * 4096 * 2
    assert hbm[0] - hbm[1] == pytest.approx(7 * LAYERS, rel=1e-6)
    assert hbm[1] > LAYERS + head
    assert block.decode(64, 256) >= e.decode(64, 256)


def test_experts_stream_whole():
    # Mixtral-8x7B: 32 layers x 8 experts x 3 x 4,096 x 14,336 x 2 B = 90.2 GB, whichever two a token reaches.
    e = built("weight-offload:share=0,experts=1", model="mixtral-8x7b", device="h200-sxm")
    assert streamed(e, decode(1, 128)) == pytest.approx(32 * 8 * 3 * 4096 * 14336 * 2, rel=1e-9)


def test_ahead_hides_what_on_demand_adds():
    a, b = built("weight-offload"), built("weight-offload:ahead=false")
    plain = built().prefill(8, 2048)
    assert b.prefill(8, 2048) > a.prefill(8, 2048)
    assert a.prefill(8, 2048) == pytest.approx(plain, rel=0.02)  # 32,768 tokens of work hide the stream


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 1), outer=st.floats(0, 1))
def test_elements_are_conserved(share, outer):
    e = Estimator("llama-3.1-8b", "h100-sxm", techniques=[f"weight-offload:share={share},outer={outer},window=1"])
    tiers, plain = by_tier(e), by_tier(built())["hbm"]
    buffer = share * (LAYERS / 2 + 32 * 8192) / 32  # one layer's worth of the streamed share, its norms included
    assert sum(tiers.values()) - buffer == pytest.approx(plain, rel=1e-4)
    assert streamed(e, decode(1, 64)) <= 2 * sum(tiers.values())


def test_nothing_outside_changes_nothing():
    e, plain = built("weight-offload:share=0"), built()
    b = np.array([1.0, 16, 64])
    assert e.decode(b, 1024) == pytest.approx(plain.decode(b, 1024))
    assert e.max_batch(1024) == plain.max_batch(1024)


@pytest.mark.parametrize(("better", "worse"), [
    ("share=0.3", "share=0.6"), ("tier=host", "tier=drive"), ("share=1,attention=0", "share=1"), ("share=1,ffn=0.5", "share=1"),
    ("outer=0", "outer=1"),
])  # fmt: skip
def test_knobs_move_the_right_way(better, worse):
    assert built(f"weight-offload:{better}").decode(4, 512) < built(f"weight-offload:{worse}").decode(4, 512)


def test_with_other_techniques():
    a = built("weight-offload", "kv-quantization:bits=4").decode(8, 4096)
    b = built("kv-quantization:bits=4", "weight-offload").decode(8, 4096)
    assert a == pytest.approx(b)
    # 4-bit weights cross as 4 bits, unpacked in the product or before it.
    for fused in ("true", "false"):
        e = built(f"weight-quantization:bits=4,fused={fused}", "weight-offload")
        assert streamed(e, decode(8, 512)) == pytest.approx(LAYERS / 4, rel=1e-9)
    with pytest.raises(SpecError, match="no way to 'tape'"):
        built("weight-offload:tier=tape")


def test_swapped_memory_is_written_out_before_it_comes_back():
    files, memory = built("weight-offload:ahead=false"), built("weight-offload:ahead=false,swapped=1")
    assert streamed(memory, decode(1, 64)) == pytest.approx(2 * LAYERS, rel=1e-9)
    # What a host link carries one way it carries the other way as fast: the pushed-out layers take as long as the fetched ones.
    plain = built().decode(1, 64)
    assert memory.decode(1, 64) - plain == pytest.approx(2 * (files.decode(1, 64) - plain), rel=0.05)
