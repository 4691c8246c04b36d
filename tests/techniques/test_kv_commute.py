"""Any two techniques of the cache in either order: the same seconds and bytes, bounds in place, or one line that says why."""

from __future__ import annotations

import itertools

import pytest
from cache_by_hand import estimator

from perfmodel.errors import SpecError
from perfmodel.graph import decode
from perfmodel.schedule import operators

KINDS = (
    "kv-quantization:bits=2,residual=64,sinks=4,wide_heads=0.25,fused=false,probes=0.1",
    "kv-eviction:share=0.3,transient=true,generated=false,prompt=500,generated_budget=100,state=4",
    "kv-selection:budget=1024,sinks=4,recent=64,hash_bits=128,prefill_budget=1024",
    "streaming-heads:share=0.75,recent=300",
    "kv-low-rank:key_rank=0.5,value_rank=0.5,recent=32",
    "kv-sharing:group=2,keys_as_values=true",
    "attention-layout:kv_heads=4,q_rank=512",
    "kv-rematerialisation:bits=4,recent=32",
)
NOT_TOGETHER = {("kv-quantization", "kv-rematerialisation"), ("kv-low-rank", "kv-rematerialisation"),
                ("attention-layout", "kv-rematerialisation")}  # fmt: skip


@pytest.mark.parametrize(("one", "other"), tuple(itertools.combinations(KINDS, 2)))
def test_order_does_not_matter(one: str, other: str) -> None:
    if (one.split(":")[0], other.split(":")[0]) in NOT_TOGETHER:
        with pytest.raises(SpecError, match="cannot be combined"):
            estimator(one, other)
        return
    first, second = estimator(one, other), estimator(other, one)
    assert first.decode(4, 20_000) == pytest.approx(second.decode(4, 20_000), rel=1e-12)
    assert first.prefill(2, 3000, 500) == pytest.approx(second.prefill(2, 3000, 500), rel=1e-12)
    assert first.memory(4, 20_000).total == pytest.approx(second.memory(4, 20_000).total, rel=1e-12)


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("how", [{"tp": 1}, {"tp": 4}])
def test_bounds_hold(spec: str, how: dict[str, int]) -> None:
    e = estimator(spec, **how)
    for parts in (e.parts(8, 1, 20_000, is_decode=True), e.parts(1, 4096, 0, is_decode=False)):
        assert parts.lower <= parts.seconds <= parts.upper


@pytest.mark.parametrize("spec", KINDS)
def test_a_lower_bound_still_reads_what_the_kernel_reads(spec: str) -> None:

    e = estimator(spec)
    read = sum(n * o.bytes(tensor="kv") for o, n, _ in operators(e.lower(decode(16, 20_000)).schedule))
    assert e.parts(16, 1, 20_000, is_decode=True).lower >= read / e.machine.bandwidth
