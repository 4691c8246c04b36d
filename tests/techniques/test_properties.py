"""Properties of techniques at random parameters: what grows with a knob, what is conserved, what commutes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.estimator import Estimator
from perfmodel.graph import cache_residency, decode, weight_residency
from perfmodel.ops.traffic import Residency
from perfmodel.schedule import operators

few = settings(max_examples=12, deadline=None)
share = st.floats(0.0, 1.0)
positive = st.floats(0.05, 1.0)
DENSE, MIXTURE = "llama-3.1-8b", "mixtral-8x7b"


def built(*texts: str, model: str = DENSE, **degrees: int) -> Estimator:
    return Estimator(model, "hgx-h100-8", techniques=texts, **degrees)


def read(e: Estimator, batch: float = 16, context: float = 20_000) -> float:
    """Stored bytes that one decode step moves on any path."""
    stored = ("weights", "experts", "kv")
    return sum(
        float(times * t.elements * t.width)
        for op, times, _ in operators(e.lower(decode(batch, context)).schedule) for t in op.traffic if t.tensor in stored
    )  # fmt: skip


def cached(e: Estimator, tokens: float, sequences: float = 4) -> list[Residency]:
    return cache_residency(e.model, e.par, e.formats, sequences, tokens)


def size(found: list[Residency], tiers: set[str] | None = None) -> float:
    return sum(float(r.bytes) for r in found if tiers is None or r.tier in tiers)


# A knob's text, its lowest and highest value: more of it never stores or reads less.
MORE = [
    ("kv-quantization:bits={:.3f},group=64", 1, 16), ("kv-quantization:bits=2,residual={:.0f}", 0, 30_000),
    ("kv-quantization:bits=2,salient={:.3f}", 0, 1), ("kv-quantization:bits=2,wide_heads={:.3f}", 0, 1),
    ("kv-eviction:budget={:.0f}", 16, 40_000), ("kv-eviction:share={:.3f}", 0.01, 1),
    ("kv-selection:budget={:.0f}", 16, 40_000), ("kv-selection:budget=1024,summaries={:.3f}", 0, 4),
    ("streaming-heads:share=0.5,recent={:.0f}", 1, 40_000), ("streaming-heads:share=0.5,kept={:.3f}", 0, 1),
    ("kv-low-rank:key_rank={0:.3f},value_rank={0:.3f}", 0.05, 1), ("kv-rematerialisation:bits={:.3f}", 1, 16),
    ("weight-quantization:bits={:.3f},group=128", 1, 15.9), ("kv-allocation:reserve=block,block={:.0f}", 1, 4096),
    ("layer-skip:share={:.3f}", 0.05, 1),
]  # fmt: skip


@pytest.mark.parametrize(("knob", "low", "high"), MORE, ids=[m[0] for m in MORE])
@few
@given(a=share, b=share)
def test_more_of_it_is_never_fewer_bytes(knob: str, low: float, high: float, a: float, b: float) -> None:
    less, more = (built(knob.format(low + (high - low) * x)) for x in sorted((a, b)))
    assert read(less) <= read(more) * (1 + 1e-9)
    if "block=" not in knob:  # pages are rounded up: 100 tokens take 128 in blocks of 64, 112 in blocks of 56
        assert size(cached(less, 20_000)) <= size(cached(more, 20_000)) * (1 + 1e-9)
    assert size(cached(less, 20_000)) > 0


@few
@given(outside=share, far=share, hit=share, by=st.sampled_from(["tokens", "requests"]), columns=st.sampled_from(["kv", "k", "v"]),
       sinks=st.integers(0, 100), recent=st.integers(0, 5000))  # fmt: skip
def test_an_offloaded_cache_is_all_there(
    outside: float, far: float, hit: float, by: str, columns: str, sinks: int, recent: int
) -> None:
    given_ = f"share={outside},far_share={far},hit={hit},by={by},columns={columns},sinks={sinks},recent={recent}"
    found = [r for r in cached(built(f"kv-offload:{given_}"), 20_000) if not r.name.endswith(".copy")]
    whole = size(cached(built(), 20_000))
    assert size(found) == pytest.approx(whole, rel=1e-9)
    assert all(float(r.elements) >= 0 for r in found)
    moved = size(found, {"host", "drive"})
    assert moved <= whole * (outside if columns == "kv" else outside / 2) * (1 + 1e-9)


@few
@given(outside=share, attention=share, experts=share, window=st.integers(1, 4))
def test_offloaded_weights_are_all_there(outside: float, attention: float, experts: float, window: int) -> None:
    e = built(f"weight-offload:share={outside},attention={attention},experts={experts},window={window}", model=MIXTURE)
    found, plain = (weight_residency(x.model, x.par, x.formats) for x in (e, built(model=MIXTURE)))
    whole = size(plain)
    # The device keeps what stays and room for a window of the layers that come.
    near, away = size(found, {"hbm"}), size(found, {"host"})
    layers = e.model.n_layers
    assert near + away == pytest.approx(whole + away * min(window / layers, 1.0), rel=1e-9)


@few
@given(slots=st.floats(0, 8), pinned=st.booleans())
def test_offloaded_experts_are_all_there(slots: float, pinned: bool) -> None:
    e = built(f"moe-offload:slots={slots},buffers=0,pinned={str(pinned).lower()}", model=MIXTURE)
    found, plain = (weight_residency(x.model, x.par, x.formats) for x in (e, built(model=MIXTURE)))
    experts = size([r for r in plain if r.tensor == "experts"])
    assert size(found, {"host"}) == pytest.approx(experts * (1 - slots / 8 if pinned else 1), rel=1e-9)
    assert size(found, {"hbm"}) == pytest.approx(size(plain) - experts * (1 - slots / 8), rel=1e-9)


CACHES = [
    "kv-quantization:bits=4,residual=64", "kv-eviction:budget=1000,sinks=4", "kv-selection:budget=512", "kv-offload:share=0.5",
    "streaming-heads:share=0.5,recent=300", "kv-low-rank:key_rank=0.5,value_rank=0.5", "shared-prefix:tokens=512,group=4",
    "kv-allocation:reserve=doubled", "in-storage-attention:recent=32", "token-reduction:tokens=300,after=50,keep=0.5",
    "tree-search:width=8,prompt=256,distinct=0.5", "remote-attention:share=0.3", "kv-sharing:group=2", "kv-offload:codes=2",
]  # fmt: skip


@pytest.mark.parametrize("degree", ["cp", "tp", "dp"])
@pytest.mark.parametrize("one", CACHES)
def test_ranks_hold_together_what_one_device_holds(one: str, degree: str) -> None:
    whole = cached(built(one), 2000, 64)  # groups that share tokens fit into every rank
    ranks = cached(built(one, **{degree: 4}), 2000, 64)
    for tier in {r.tier for r in whole}:
        assert 4 * size(ranks, {tier}) == pytest.approx(size(whole, {tier}), rel=1e-9)


@pytest.mark.parametrize("one", CACHES)
def test_ranks_of_a_context_read_together_what_one_device_reads(one: str) -> None:
    def kv(e: Estimator) -> float:
        return sum(
            float(times * t.elements * t.width) for op, times, _ in operators(e.lower(decode(8, 2000)).schedule)
            for t in op.traffic if t.tensor == "kv" and t.direction == "read" and op.name != "rope_and_cache"
        )  # fmt: skip

    assert 4 * kv(built(one, cp=4)) == pytest.approx(kv(built(one)), rel=1e-9)


CACHE_SIDE = st.one_of(
    st.builds("kv-quantization:bits={:.2f},residual={},group=64".format, st.floats(1, 8), st.integers(0, 500)),
    st.builds("kv-eviction:budget={},sinks={}".format, st.integers(64, 4000), st.integers(0, 32)),
    st.builds("kv-selection:budget={},page={}".format, st.integers(64, 4000), st.sampled_from([1, 8, 16, 64])),
    st.builds("kv-offload:share={:.3f},hit={:.3f}".format, share, share),
    st.builds("streaming-heads:share={:.3f},recent={}".format, share, st.integers(16, 2000)),
)
OTHER_SIDE = st.one_of(
    st.builds("weight-quantization:bits={:.2f},group=128".format, st.floats(2, 8)),
    st.builds("activation-sparsity:ffn={:.3f},attention={:.3f}".format, share, share),
    st.builds("power-cap:clock={:.3f}".format, st.floats(0.3, 1)),
    st.builds("kernel-launch:elementwise={:.2f},merged={:.3f}".format, st.floats(0, 4), share),
    st.builds("lora-adapters:adapters={},rank={}".format, st.integers(0, 50), st.sampled_from([8, 64])),
    st.builds("weight-offload:share={:.3f}".format, share),
    st.builds("batch-padding:prompt={:.2f},output={:.2f}".format, st.floats(1, 3), st.floats(1, 3)),
)


@settings(max_examples=20, deadline=None)
@given(one=CACHE_SIDE, other=OTHER_SIDE)
def test_what_touches_different_things_commutes_and_adds_up(one: str, other: str) -> None:
    first, second, alone = built(one, other), built(other, one), built(one)
    assert first.decode(8, 5000) == pytest.approx(second.decode(8, 5000), rel=1e-12)
    assert first.prefill(2, 1000, 500) == pytest.approx(second.prefill(2, 1000, 500), rel=1e-12)
    assert float(first.memory(8, 5000).total) == pytest.approx(float(second.memory(8, 5000).total), rel=1e-12)
    padded = "batch-padding" in other
    if not padded:  # what is done to weights, clocks or kernels leaves the cache as it is
        assert size(cached(first, 5000)) == pytest.approx(size(cached(alone, 5000)), rel=1e-12)


@few
@given(found=positive, more=positive)
def test_a_larger_found_share_is_never_a_longer_prefill(found: float, more: float) -> None:
    low, high = sorted((found, more))
    less, much = built(f"prefix-cache:device={low}"), built(f"prefix-cache:device={high}")
    # Kernels run in whole tiles, so a few tokens fewer can cost a little more.
    assert much.prefill(1, 4000) <= less.prefill(1, 4000) * 1.02
    assert much.request(4000).new <= less.request(4000).new
    for e in (less, much):
        assert e.request(4000).new + e.request(4000).cached == pytest.approx(4000)
