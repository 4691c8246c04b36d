"""Attention here, feed-forward there: weights move, records divide, lanes overlap."""

from __future__ import annotations

import pytest

from perfmodel import roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase, weight_residency
from perfmodel.ops.shard import Group
from perfmodel.schedule import operators

STEP = Group(64, 1, 8191, decode=True)


def _with(*texts: str, model: str = "llama-3-8b") -> Estimator:
    return Estimator(model, "h100-sxm", techniques=list(texts))


def test_weights_move_and_are_conserved() -> None:
    plain, split = _with(), _with("attention-ffn-split")
    stored = weight_residency(split.model, split.par, split.formats)
    away = sum(r.elements for r in stored if r.tier == "ffn-pool")
    assert away == 32 * 3 * 4096 * 14336
    assert sum(r.elements for r in stored) == sum(r.elements for r in weight_residency(plain.model, plain.par, plain.formats))
    assert plain.memory(1, 1).weights - split.memory(1, 1).weights == pytest.approx(2 * away, rel=1e-3)


@pytest.mark.parametrize("ffn", [0.5, 1, 4])
def test_the_pool_does_the_work_once_per_micro_batch(ffn: float) -> None:
    e = _with(f"attention-ffn-split:ffn={ffn},micro=4")
    found = list(operators(e.lower(Phase((STEP,))).schedule))
    flops = sum(t * op.flops.get("bf16", 0.0) for op, t, _ in found if op.on == "ffn-pool")
    assert float(flops) == pytest.approx(2 * 64 * 32 * 3 * 4096 * 14336 / ffn)
    weights = sum(t * op.bytes("ffn-pool", "weights") for op, t, _ in found)
    assert float(weights) == pytest.approx(4 * 32 * 3 * 4096 * 14336 * 2 / ffn)
    sent = sum(t * op.bytes("ffn-link") for op, t, _ in found)
    assert float(sent) == pytest.approx(2 * 32 * 64 * 4096 * 2)


def test_more_overlap_is_faster_per_weight_read() -> None:
    one = _with("attention-ffn-split:micro=1,latency=1e-4")
    three = _with("attention-ffn-split:micro=3,latency=1e-4")
    found = [roofline.cost(e.lower(Phase((STEP,))).schedule, e.machine) for e in (one, three)]
    assert found[0].seconds > sum(found[0].busy[r] for r in ("hbm", "ffn-pool", "ffn-link"))
    assert found[1].seconds >= max(found[1].busy[r] for r in ("hbm", "ffn-pool", "ffn-link"))
    assert all(x.lower <= x.seconds for x in found)


def test_more_devices_in_the_pool_are_no_slower() -> None:
    times = [_with(f"attention-ffn-split:ffn={x}").decode(64, 8192) for x in (0.25, 0.5, 1, 2, 8)]
    assert times == sorted(times, reverse=True)


def test_what_it_cannot_split_is_refused() -> None:
    with pytest.raises(SpecError, match="no feed-forward part"):
        _with("attention-ffn-split", model="gpt-j-6b")
    with pytest.raises(SpecError, match="no experts"):
        _with("attention-ffn-split:copies=4")
