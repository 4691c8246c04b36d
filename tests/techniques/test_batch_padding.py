"""Ragged static batches: what padding computes, stores and reads."""

from __future__ import annotations

import numpy as np
import pytest

from perfmodel.estimator import Estimator
from perfmodel.graph import Phase
from perfmodel.ops.shard import Group
from perfmodel.schedule import operators


def _with(*texts: str) -> Estimator:
    return Estimator("llama-3-8b", "a100-sxm-80gb", techniques=list(texts))


def _read(e: Estimator, group: Group) -> float:
    found = operators(e.lower(Phase((group,))).schedule)
    return float(next(op.bytes("hbm", "kv") for op, _, _ in found if op.name == "attention"))


def test_defaults_change_nothing() -> None:
    plain, same = _with(), _with("batch-padding")
    assert same.decode(8, 4096) == pytest.approx(plain.decode(8, 4096))
    assert same.prefill(1, 4096) == pytest.approx(plain.prefill(1, 4096))
    assert same.memory(8, 4096).total == plain.memory(8, 4096).total


def test_padding_computes_stores_and_reads_the_longest() -> None:
    plain, padded = _with(), _with("batch-padding:prompt=2")
    assert padded.prefill(1, 2048) == pytest.approx(plain.prefill(1, 4096))
    assert float(padded.memory(4, 2048).kv) == pytest.approx(float(plain.memory(4, 4096).kv))
    read = [_read(e, Group(4, 1, 2047, decode=True)) for e in (plain, padded)]
    assert read[1] / read[0] == pytest.approx((2 * 2047 + 1) / 2048)


def test_a_batch_waits_for_its_longest_answer() -> None:
    plain, padded = _with(), _with("batch-padding:output=2.5")
    batch = np.array([1, 16])
    assert padded.decode(batch, 1024) == pytest.approx(2.5 * plain.decode(batch, 1024))


def test_padding_and_eviction_commute() -> None:
    one = _with("batch-padding:prompt=2", "kv-eviction:budget=512")
    other = _with("kv-eviction:budget=512", "batch-padding:prompt=2")
    assert one.decode(4, 4096) == other.decode(4, 4096)
    assert one.memory(4, 4096).kv == other.memory(4, 4096).kv
