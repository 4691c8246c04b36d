"""Layers without a cache of their own, and values read off the keys: parameters and bytes by hand."""

from __future__ import annotations

import pytest
from cache_by_hand import bytes_per_column, estimator, kernel, named
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.errors import SpecError
from perfmodel.graph import decode
from perfmodel.parameters import parameters_total
from perfmodel.schedule import operators


def test_every_second_layer_stores() -> None:
    e = estimator("kv-sharing:group=2")
    assert sorted(e.model.block_counts().values()) == [16, 16]
    assert bytes_per_column(("kv-sharing:group=2",), 1000) == pytest.approx(1000)
    # No key and value projections of 2 x 1024 x 4096 in 16 layers.
    assert parameters_total(estimator().model) - parameters_total(e.model) == 16 * 2 * 1024 * 4096


def test_all_layers_still_read() -> None:
    e = estimator("kv-sharing:group=4")
    found = [(n, o) for o, n, _ in operators(e.lower(decode(2, 9_999)).schedule) if o.kind == "attention"]
    assert sum(n * o.bytes(tensor="kv") for n, o in found) == pytest.approx(32 * 2 * 10_000 * 2048 * 2)


@pytest.mark.parametrize(("share", "followers"), [(0.25, 8), (0.1, 3), (1.0, 31)])
def test_a_share_of_layers(share: float, followers: int) -> None:
    assert bytes_per_column((f"kv-sharing:share={share}",), 1000) == pytest.approx(2000 * (32 - followers) / 32)
    names = [n for g in estimator(f"kv-sharing:share={share}").model.layers for n in g.blocks]
    assert not names[0].endswith("-shared")


def test_first_layers_keep_theirs() -> None:
    names = estimator("kv-sharing:group=2,spare_layers=4").model.layers[0].blocks
    assert [n.endswith("-shared") for n in names[:8]] == [False] * 5 + [True, False, True]


def test_values_from_keys() -> None:
    spec = "kv-sharing:keys_as_values=true"
    assert bytes_per_column((spec,), 1000) == pytest.approx(1000)
    plain, e = estimator(), estimator(spec)
    assert kernel(e, decode(1, 999)).flops == kernel(plain, decode(1, 999)).flops
    assert named(e, decode(1, 999), "qkv_proj").shape["n"] == 4096 + 1024
    assert plain.memory(1, 1).weights - e.memory(1, 1).weights == pytest.approx(32 * 1024 * 4096 * 2, rel=0.01)


@given(batch=st.integers(1, 32), context=st.integers(1, 40_000))
@settings(max_examples=12, deadline=None)
def test_no_sharing_changes_nothing(batch: int, context: int) -> None:
    same = estimator("kv-sharing:group=1")
    assert same.decode(batch, context) == pytest.approx(estimator().decode(batch, context))
    assert same.memory(batch, context).kv == pytest.approx(estimator().memory(batch, context).kv)


@given(share=st.floats(0, 1), more=st.floats(0, 1))
@settings(max_examples=12, deadline=None)
def test_more_sharing_stores_less(share: float, more: float) -> None:
    most, least = (estimator(f"kv-sharing:share={s}") for s in (max(share, more), min(share, more)))
    assert most.memory(2, 9000).kv <= least.memory(2, 9000).kv
    assert most.prefill(1, 2048) <= least.prefill(1, 2048) * (1 + 1e-9)


def test_commutes_with_bits_and_budgets() -> None:
    parts = ["kv-sharing:group=2", "kv-quantization:bits=4,residual=64", "kv-eviction:budget=900"]
    one, two = estimator(*parts), estimator(*parts[::-1])
    assert one.decode(4, 30_000) == pytest.approx(two.decode(4, 30_000))
    assert one.memory(4, 30_000).kv == pytest.approx(two.memory(4, 30_000).kv)


def test_a_latent_is_shared_already() -> None:
    with pytest.raises(SpecError, match="no layers with keys and values"):
        estimator("kv-sharing:group=2", model="deepseek-v2-lite")
