"""Attention at lenders: elements conserved, messages by hand, the longer side waits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase, cache_residency
from perfmodel.ops.shard import Group
from perfmodel.schedule import operators

WAY = "bandwidth=50e9,latency=1e-5"
STEP = Group(8, 1, 32767, decode=True)


def _with(*texts: str) -> Estimator:
    return Estimator("llama-3-8b", "h100-sxm", techniques=list(texts))


def test_nothing_lent_changes_nothing() -> None:
    plain, same = _with(), _with("remote-attention")
    assert same.machine == plain.machine
    assert same.decode(8, 32768) == pytest.approx(plain.decode(8, 32768))
    assert same.memory(8, 32768).total == plain.memory(8, 32768).total


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 1))
def test_lending_conserves_elements(share: float) -> None:
    e = _with(f"remote-attention:share={share},{WAY}")
    stored = cache_residency(e.model, e.par, e.formats, 8, 32768)
    assert sum(r.elements for r in stored) == pytest.approx(8 * 32768 * 32 * 2 * 8 * 128)
    here = sum(r.elements for r in stored if r.tier == "hbm")
    assert here == pytest.approx((1 - share) * 8 * 32768 * 32 * 2 * 8 * 128)


def test_queries_and_partial_outputs_travel() -> None:
    e = _with(f"remote-attention:share=0.5,{WAY}")
    found = [op for op, _, _ in operators(e.lower(Phase((STEP,))).schedule)]
    sent = next(op for op in found if op.name.startswith("queries"))
    back = next(op for op in found if op.name.startswith("outputs"))
    # 8 sequences x 32 heads x 128, and two softmax statistics with each output.
    assert sent.bytes("lenders-link") == 8 * 32 * 128 * 2
    assert back.bytes("lenders-link") == 8 * 32 * 130 * 2
    work = next(op for op in found if op.on == "lenders")
    assert work.bytes("lenders") == pytest.approx(8 * 16384 * 2 * 8 * 128 * 2)


def test_the_slower_side_sets_the_pace() -> None:
    fast, slow = (_with(f"remote-attention:share=0.9,lenders={x},{WAY}") for x in (8, 0.1))
    assert fast.decode(8, 32768) < _with().decode(8, 32768) < slow.decode(8, 32768)
    # A tenth of a lender reads 0.9 x 8 x 32768 x 128 KiB in 32 layers, beside everything else.
    remote = 0.9 * 8 * 32768 * 131072 / (0.1 * 3.35e12)
    assert slow.decode(8, 32768) > remote
    found = roofline.cost(slow.lower(Phase((STEP,))).schedule, slow.machine)
    assert found.lower <= found.seconds


def test_a_longer_way_takes_longer() -> None:
    near, far = (_with(f"remote-attention:share=0.5,bandwidth=50e9,latency={x}") for x in ("1e-5", "1e-3"))
    # Two messages in each of 32 layers.
    assert far.decode(1, 1024) - near.decode(1, 1024) == pytest.approx(32 * 2 * (2e-3 - 2e-5), rel=0.05)


def test_it_commutes_with_quantization() -> None:
    texts = (f"remote-attention:share=0.5,{WAY}", "kv-quantization:bits=4")
    assert _with(*texts).decode(8, 32768) == pytest.approx(_with(*texts[::-1]).decode(8, 32768))


def test_no_way_is_refused() -> None:
    with pytest.raises(SpecError, match="no network"):
        Estimator("llama-3.2-1b", "m2-ultra", techniques=["remote-attention:share=0.5"])
