"""Adapters over replicas: every placement of small cases, both solvers, hand arithmetic, and what moves the pins."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import need
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import catalog
from perfmodel.errors import Infeasible, SpecError
from perfmodel.machine import machine
from perfmodel.planner.placement import adapters
from perfmodel.planner.placement.adapters import Adapter, Replicas, Rules
from perfmodel.serving.prefix_laws import zipf

MB = 1e6


def some(rates: list[float], sizes: list[float] | None = None) -> list[Adapter]:
    sizes = sizes or [100 * MB] * len(rates)
    return [Adapter(f"a{i}", r, s) for i, (r, s) in enumerate(zip(rates, sizes, strict=True))]


# 100 MB take 10 ms over a link of 10 GB/s.
ONE = Replicas(1, 2, link_rate=1e10)


def test_the_two_hottest_are_kept_by_hand() -> None:
    """Two of three slots' worth: 3 + 2 of 6 requests/s meet theirs, the third kind fetches 1/s x 10 ms."""
    pinned = adapters.pin(some([1.0, 3.0, 2.0]), ONE)
    assert pinned.on_device[:, 0].tolist() == [False, True, True]
    assert pinned.fetching == pytest.approx(0.010)
    assert pinned.hits == pytest.approx(5 / 6)


@pytest.mark.parametrize("seed", range(3))
def test_one_replica_is_a_knapsack_solved_by_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates, sizes = rng.random(7), rng.integers(20, 200, 7) * MB
    where = Replicas(1, 4, device_bytes=350 * MB, link_rate=1e10)
    best = min(
        sum(r * s / 1e10 for i, (r, s) in enumerate(zip(rates, sizes, strict=True)) if i not in kept)
        for n in range(5) for kept in itertools.combinations(range(7), n) if sum(sizes[list(kept)]) <= 350 * MB
    )  # fmt: skip
    items = some(rates.tolist(), sizes.tolist())
    for solver in ("highs", need.cbc()):
        assert adapters.pin(items, where, solver=solver).fetching == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("imbalance", [0.0, 0.3])
def test_two_replicas_equal_every_placement_tried(imbalance: float) -> None:
    """Each of the 64 placements of three adapters on two replicas, its routing solved as a linear program."""
    items = some([5.0, 2.0, 1.0], [100 * MB, 50 * MB, 200 * MB])
    where = Replicas(2, 2, device_bytes=220 * MB, request_s=0.05, imbalance=imbalance, link_rate=1e10)
    values = []
    for bits in itertools.product((False, True), repeat=6):
        kept = np.array(bits).reshape(3, 2)
        try:
            values.append(adapters.pin(items, where, Rules(fixed=kept)).fetching)
        except Infeasible:
            continue
    for solver in ("highs", need.cbc()):
        assert adapters.pin(items, where, solver=solver).fetching == pytest.approx(min(values), rel=2e-3, abs=1e-9)
    assert adapters.relaxed(items, where) <= min(values) + 1e-9


def test_a_hot_adapter_is_kept_on_as_many_replicas_as_its_load_takes() -> None:
    """8 of 10 requests/s: one of two replicas may serve 5, so both keep it; with half the load one does."""
    where = Replicas(2, 1, imbalance=0.0, request_s=0.0, link_rate=1e10)
    hot = adapters.pin(some([8.0, 1.0, 1.0]), where)
    assert hot.on_device[0].all()
    assert hot.loads == pytest.approx([5.0, 5.0])
    mild = adapters.pin(some([5.0, 4.0, 1.0]), where)
    assert mild.on_device[0].sum() == 1
    assert mild.on_device[1].sum() == 1


def test_popularity_moves_the_pins() -> None:
    rates = [4.0, 3.0, 2.0, 1.0]
    assert adapters.pin(some(rates), ONE).on_device[:, 0].tolist() == [True, True, False, False]
    assert adapters.pin(some(rates[::-1]), ONE).on_device[:, 0].tolist() == [False, False, True, True]
    # Fetching seconds count, not requests: one of 10 times the size is worth keeping at a third of the rate.
    assert adapters.pin(some(rates, [100 * MB] * 3 + [1000 * MB]), ONE).on_device[3, 0]


@settings(max_examples=8, deadline=None)
@given(st.floats(0.0, 1.5), st.floats(0.0, 1.5))
def test_a_steeper_popularity_fetches_less(low: float, more: float) -> None:
    """The same requests/s: the tail beyond two slots shrinks as the law gets steeper."""
    flat, steep = (adapters.pin(some((10 * zipf(6, s)).tolist()), ONE).fetching for s in (low, low + more))
    assert steep <= flat * (1 + 2e-3) + 1e-9


def test_requests_under_way_take_slots() -> None:
    """Two kept leave 1 request/s to fetch: 0.9 of the third slot at 0.9 s each. At 1.2 s one is kept: 1.5 x 1.2 = 1.8."""
    items = some([4.0, 0.5, 0.5, 0.5])
    assert adapters.pin(items, replace(ONE, slots=3, request_s=0.9)).on_device.sum() == 2
    assert adapters.pin(items, replace(ONE, slots=3, request_s=1.2)).on_device[:, 0].tolist() == [True, False, False, False]
    with pytest.raises(Infeasible, match="slots per replica") as error:
        adapters.pin(some([1.0] * 20), replace(ONE, request_s=10.0))
    slots = int(str(error.value.nearest).split()[0])
    adapters.pin(some([1.0] * 20), replace(ONE, request_s=10.0, slots=slots))


def test_little_host_memory_sends_the_rarest_to_disk() -> None:
    items = some([4.0, 3.0, 2.0, 1.0])
    where = replace(ONE, slots=1, host_bytes=200 * MB, disk_rate=1e9)
    pinned = adapters.pin(items, where)
    assert pinned.from_disk.sum(axis=1) == pytest.approx([0, 0, 0, 1.0], abs=1e-6)
    # 10 ms from the host for 3 + 2, 110 ms from disk for 1.
    assert pinned.fetching == pytest.approx(5 * 0.01 + 0.11)
    saved = adapters.worth(items, where)
    # A gigabyte holds the fourth as well, which then takes 10 ms; the relaxation agrees, being whole here.
    assert saved["one more GB of host memory"] == pytest.approx(0.1)
    assert saved["one more slot"] == pytest.approx(0.13)


def test_alternatives_are_no_better() -> None:
    items = some((8 * zipf(12, 0.8)).tolist())
    where = Replicas(2, 3, request_s=0.1, link_rate=1e10)
    pinned, others = adapters.pin(items, where), adapters.alternatives(items, where)
    assert min(others.values()) >= pinned.fetching * (1 - 2e-3)
    assert others["the same ones everywhere"] > pinned.fetching
    assert others["none kept"] == pytest.approx(8 * 0.01)


def test_seconds_of_a_fetch_come_from_the_catalogue() -> None:
    """PCIe 4.0 x16 at 75 %: 84 MB take 3.6 ms; a drive comes on top."""
    size = adapters.adapter_bytes(catalog.load_model("llama-3.1-8b"), 16)
    # 32 layers x 16 x (q, o 8192; k, v 5120; gate, up, down 18432) x 2 bytes.
    assert size == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) * 2
    near, far = Replicas(1, 1, machine=machine("l40s-server-4")).fetch_seconds(size)
    assert near == pytest.approx(size / (31.5e9 * 0.75), rel=0.01)
    assert near < far < math.inf


def test_bad_adapters_are_refused() -> None:
    for items in ([], some([0.0]), some([1.0], [0.0]), [Adapter("x", 1.0, 1.0)] * 2):
        with pytest.raises(SpecError):
            adapters.pin(items, ONE)
    with pytest.raises(SpecError, match="rank"):
        adapters.adapter_bytes(catalog.load_model("llama-3.1-8b"), 0)
    with pytest.raises(SpecError, match="slots"):
        Replicas(1, 0)
