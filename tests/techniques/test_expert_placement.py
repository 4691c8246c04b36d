"""Imbalance, locality and redundancy of expert-parallel ranks."""

from functools import lru_cache

import pytest

from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import decode
from perfmodel.ops.moe import slowest
from perfmodel.schedule import operators


@lru_cache(maxsize=32)
def built(*techniques: str) -> Estimator:
    return Estimator("qwen3-30b-a3b", "hgx-h100-8", ep=8, dp=8, techniques=techniques)


def pick(e: Estimator, batch: float, wanted: str, what):
    return sum(float(what(op)) * n for op, n, _ in operators(e.lower(decode(batch, 255)).schedule) if op.name.endswith(wanted))


def test_the_fullest_rank_by_hand():
    # 512 sequences x 8 choices / 8 ranks = 512 pairs on average; random routing: 512 + sqrt(1,024 ln 8) = 558.1.
    def flops(op):
        return op.flops["bf16"]

    plain, even = built(), built("expert-placement:imbalance=1")
    per_pair = 2 * 2048 * 768 * 48
    assert pick(plain, 512, "experts.down_proj", flops) == pytest.approx(float(slowest(512, 8)) * per_pair)
    assert pick(even, 512, "experts.down_proj", flops) == pytest.approx(512 * per_pair)
    assert pick(built("expert-placement:imbalance=2"), 512, "experts.down_proj", flops) == pytest.approx(1024 * per_pair)


def test_locality_is_bytes_on_the_way():
    def sent(op):
        return sum(t.bytes for t in op.traffic)

    near = built("expert-placement:locality=0.5")
    for name in ("dispatch", "combine"):
        assert pick(near, 512, name, sent) == pytest.approx(pick(built(), 512, name, sent) / 2)
    assert near.prefill(64, 1024) < built().prefill(64, 1024)


def test_redundant_experts_cost_memory_and_reads():
    # Two more beside 16: an eighth more of the rank's 16 x 48 x 3 x 2,048 x 768 x 2 B = 7.25 GB.
    e = built("expert-placement:redundant=2")
    assert float(e.memory(8, 1).weights - built().memory(8, 1).weights) == pytest.approx(2 * 48 * 3 * 2048 * 768 * 2)
    assert pick(e, 512, "experts.down_proj", lambda op: op.bytes("hbm", "experts")) == pytest.approx(
        pick(built(), 512, "experts.down_proj", lambda op: op.bytes("hbm", "experts")) * 18 / 16
    )
    assert e.max_batch(4096) < built().max_batch(4096)


def test_random_placement_changes_nothing():
    assert built("expert-placement").decode(64, 1024) == pytest.approx(built().decode(64, 1024))
    times = [built(f"expert-placement:imbalance={x}").prefill(64, 512) for x in (1, 1.5, 3)]
    assert times == sorted(times)


def test_what_cannot_be():
    with pytest.raises(SpecError, match="--ep 2"):
        Estimator("mixtral-8x7b", "h200-sxm", techniques=["expert-placement"])
    with pytest.raises(SpecError, match="no routed experts"):
        Estimator("llama-3.1-8b", "h100-sxm", techniques=["expert-placement"])
    with pytest.raises(SpecError, match="largest value"):
        built("expert-placement:imbalance=9")
