"""Nano-batches: work conserved, weights read again, overlap bounded by the busiest resource."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import roofline
from perfmodel.errors import SpecError
from perfmodel.estimator import Estimator
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group
from perfmodel.schedule import operators


def _total(e: Estimator, group: Group, tensor: Any) -> float:
    schedule = e.lower(Phase((group,))).schedule
    return float(sum(t * op.bytes("hbm", tensor) for op, t, where in operators(schedule)))


def _flops(e: Estimator, group: Group) -> float:
    schedule = e.lower(Phase((group,))).schedule
    return float(sum(t * op.flops.get("bf16", 0.0) for op, t, _ in operators(schedule)))


def _pair(text: str, **setting: Any) -> tuple[Estimator, Estimator]:
    return Estimator("llama-3-8b", "a100-sxm-80gb", **setting), Estimator("llama-3-8b", "a100-sxm-80gb", techniques=[text], **setting)


def test_one_part_changes_nothing() -> None:
    plain, one = _pair("nano-batching:parts=1", tp=2)
    assert one.decode(64, 2048) == pytest.approx(plain.decode(64, 2048))
    assert one.memory(64, 2048).total == plain.memory(64, 2048).total


def test_decode_reads_its_layers_again_and_its_cache_once() -> None:
    plain, two = _pair("nano-batching:parts=2")
    group = Group(64, 1, 2047, decode=True)
    # 32 layers of 4096 x 4096 (q, o), 4096 x 1024 (k, v) and three 4096 x 14336 matrices in bf16.
    layers = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) * 2
    assert _total(two, group, "weights") - _total(plain, group, "weights") == pytest.approx(layers)
    assert _total(two, group, "kv") == pytest.approx(_total(plain, group, "kv"))
    assert _flops(two, group) == pytest.approx(_flops(plain, group))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 4), st.integers(16, 4096), st.integers(0, 4096))
def test_prefill_pieces_conserve_query_key_pairs(parts: int, q: int, c: int) -> None:
    plain, some = _pair(f"nano-batching:parts={parts}")
    assert _flops(some, Group(1, q, c)) == pytest.approx(_flops(plain, Group(1, q, c)), rel=1e-9)


def test_a_batch_of_one_cannot_be_divided() -> None:
    plain, two = _pair("nano-batching:parts=2,interference=1.5")
    batches = np.array([1, 64])
    assert two.decode(batches, 1024)[0] == pytest.approx(plain.decode(1, 1024))
    assert two.decode(batches, 1024)[1] == pytest.approx(two.decode(64, 1024))


def test_all_hides_down_to_the_busiest_resource_and_no_further() -> None:
    _, two = _pair("nano-batching:parts=2", tp=2)
    schedule = two.lower(Phase((Group(512, 1, 1023, decode=True),))).schedule
    found = roofline.cost(schedule, two.machine)
    assert found.seconds >= max(found.busy[r] for r in ("compute", "hbm", "link")) * (1 - 1e-12)
    assert found.lower <= found.seconds <= sum(found.busy.values()) + 1e-12


def test_network_mode_is_the_longer_lane() -> None:
    e = Estimator("llama-3-70b", "a100-sxm-80gb", tp=8, techniques=["nano-batching:hide=network"])
    whole = e.lower(Phase((Group(512, 1, 1023, decode=True),))).schedule
    layers = whole.items[1]  # type: ignore[union-attr]
    found = roofline.cost(layers, e.machine)
    ops = [(op, t) for op, t, where in operators(layers)]
    exchange = sum(float(t * roofline.op_cost(op, e.machine).seconds) for op, t in ops if op.kind == "collective" and op.name != "")
    kernels = sum(float(t * roofline.op_cost(op, e.machine).seconds) for op, t in ops if op.kind != "collective")
    # The undivided layer stands beside with multiplicity zero.
    assert float(found.seconds) == pytest.approx(max(kernels, exchange))


def test_units_for_exchanges_slow_kernels() -> None:
    _, free = _pair("nano-batching:hide=network", tp=2)
    _, held = _pair("nano-batching:hide=network,units=0.15", tp=2)
    assert held.prefill(1, 8192) > free.prefill(1, 8192) * 1.05


def test_interference_stretches_layers() -> None:
    _, ideal = _pair("nano-batching", tp=2)
    _, real = _pair("nano-batching:interference=1.3", tp=2)
    assert 1.2 < real.prefill(4, 2048) / ideal.prefill(4, 2048) <= 1.3


def test_it_excludes_chunked_prefill() -> None:
    with pytest.raises(SpecError, match="cannot be combined"):
        Estimator("llama-3-8b", "a100-sxm-80gb", techniques=["nano-batching", "chunked-prefill:chunk=512"])
