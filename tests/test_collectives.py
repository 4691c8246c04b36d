"""Collectives: bytes on the wire by convention, seconds by the formulas of rings, and the order of things."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.machine import Machine, machine
from perfmodel.ops.collective import Collective, collective, wire_share
from perfmodel.roofline import op_cost

KINDS: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
NODES = ("hgx-h100-8", "hgx-a100-8", "l40s-server-8", "rtx-4090-workstation-8", "mi300x-8", "gb200-nvl72", "tpu-v5e-8")


def seconds(m: Machine, kind: Collective, message: float, ranks: int, stride: int = 1) -> float:
    """Expected time of a collective over a buffer of `message` bytes."""
    return float(op_cost(collective("x", kind, message, 1, ranks, stride=stride), m).seconds)


@pytest.mark.parametrize(
    ("kind", "ranks", "share"),
    [
        ("all_reduce", 8, 2 * 7 / 8),
        ("all_reduce", 2, 1),
        ("all_gather", 4, 3 / 4),
        ("reduce_scatter", 4, 3 / 4),
        ("all_to_all", 8, 7 / 8),
        ("p2p", 2, 1),
    ],
)
def test_wire_share_of_a_message(kind: Collective, ranks: int, share: float) -> None:
    """Bus-bandwidth factors as in the documentation of nccl-tests."""
    assert wire_share(kind, ranks) == share


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_all_reduce_is_a_reduce_scatter_and_an_all_gather(ranks: int) -> None:
    assert wire_share("all_reduce", ranks) == wire_share("reduce_scatter", ranks) + wire_share("all_gather", ranks)


def test_ring_by_hand() -> None:
    """16 ranks without peer-to-peer shortcuts or switch: 2 * 15 hops and one start, 2 * 15/16 of 1 GB at 100 GB/s and 80 %."""
    m = replace(
        machine("gb200-nvl72"), link=100e9, link_efficiency=0.8, link_latency=2e-6, kernel_latency=3e-6, in_switch=False
    )
    assert seconds(m, "all_reduce", 1e9, 16) == pytest.approx(3e-6 + 2e-6 + 30 * 2e-6 + 2 * 15 / 16 * 1e9 / 80e9)
    assert seconds(m, "all_gather", 1e9, 16) == pytest.approx(3e-6 + 2e-6 + 15 * 2e-6 + 15 / 16 * 1e9 / 80e9)


def test_staged_small_messages_take_a_tree() -> None:
    """8 ranks, 1 KB: up and down 3 levels, four queue latencies each, beats 14 hops around a ring."""
    m = replace(machine("rtx-4090-workstation-8"), link_latency=1e-6, kernel_latency=0.0)
    assert seconds(m, "all_reduce", 1e3, 8) == pytest.approx((1 + 2 * 3) * 4e-6, rel=0.02)


def test_large_all_reduce_of_eight_reaches_the_link() -> None:
    """1 GiB over 8 A100: 2 * 7/8 at 300 GB/s per direction is 6.26 ms at best; measured bus bandwidths are 70-90 % of it."""
    best = 2 * 7 / 8 * 2**30 / 300e9
    assert 1.1 < seconds(machine("hgx-a100-8"), "all_reduce", 2**30, 8) / best < 1.5


def test_small_all_reduce_is_latency() -> None:
    """8 KiB among 8 H100 takes some microseconds, as custom kernels measure (3-15 us), not the 30 of a ring of hops."""
    assert 3e-6 < seconds(machine("hgx-h100-8"), "all_reduce", 8192, 8) < 15e-6


def test_switch_that_adds_is_faster_on_large_messages_and_never_slower() -> None:
    m = machine("hgx-h100-8")
    plain = replace(m, in_switch=False)
    assert m.in_switch
    assert seconds(m, "all_reduce", 1e9, 8) < 0.9 * seconds(plain, "all_reduce", 1e9, 8)
    for size in (1e3, 1e5, 1e7):
        assert seconds(m, "all_reduce", size, 8) <= seconds(plain, "all_reduce", size, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_costs_nothing(kind: Collective) -> None:
    assert seconds(machine("hgx-h100-8"), kind, 1e6, 1) == 0


@settings(max_examples=60)
@given(
    node=st.sampled_from(NODES),
    kind=st.sampled_from(KINDS),
    ranks=st.sampled_from([2, 4, 8, 16, 32]),
    stride=st.sampled_from([1, 2, 8]),
    message=st.floats(1e2, 1e9),
    factor=st.floats(1.01, 100),
)
def test_larger_messages_take_longer(
    node: str, kind: Collective, ranks: int, stride: int, message: float, factor: float
) -> None:
    m = machine(node)
    if ranks * stride > m.devices_per_node and not m.network:
        return
    assert 0 < seconds(m, kind, message, ranks, stride) < seconds(m, kind, message * factor, ranks, stride)


@settings(max_examples=40)
@given(
    node=st.sampled_from([n for n in NODES if n != "gb200-nvl72"]),
    kind=st.sampled_from(KINDS),
    message=st.floats(1e3, 1e9),
)
def test_leaving_the_node_is_slower(node: str, kind: Collective, message: float) -> None:
    """Eight ranks in one node against the same eight spread two devices apart over two.

    Staged nodes are left out: seven hops through host memory can outlast three and one over the network.
    """
    m = machine(node)
    if m.network and m.p2p:
        assert seconds(m, kind, message, 8, stride=2) > seconds(m, kind, message, 8)


def test_two_nodes_by_hand() -> None:
    """16 ranks on 2 nodes of 8: reduce-scatter and all-gather of 7/8 inside, an exchange of 1/8 between, 2 network latencies.

    1 GB, links at 400 GB/s, NIC at 40 GB/s each: 2 * 0.875 / 400 + 2 * 1/2 * 0.125 / 40 GB/(GB/s) = 7.5 ms.
    """
    m = replace(
        machine("hgx-h100-8"), link=400e9, link_efficiency=1.0, network=40e9, network_efficiency=1.0, link_latency=0.0,
        kernel_latency=0.0, network_latency=5e-6,
    )  # fmt: skip
    assert seconds(m, "all_reduce", 1e9, 16) == pytest.approx(7.5e-3 + 2 * 5e-6)


def test_data_parallel_ranks_of_full_nodes_meet_on_the_network() -> None:
    """Two ranks 8 devices apart share no node: 1 GB gathered crosses half at 50 GB/s and 85 %, not at NVLink's 450 GB/s."""
    m = machine("hgx-h100-8")
    wire = 1e9 / 2 / (m.network * float(m.network_efficiency))
    assert seconds(m, "all_gather", 1e9, 2, stride=8) == pytest.approx(wire, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message", [1e3, 1e6, 1e9])
def test_staging_through_the_host_is_slower_than_peer_to_peer(kind: Collective, message: float) -> None:
    staged = machine("rtx-4090-workstation-8")
    assert not staged.p2p
    assert seconds(staged, kind, message, 8) > seconds(replace(staged, p2p=True), kind, message, 8)


@settings(max_examples=80)
@given(
    node=st.sampled_from(NODES),
    kind=st.sampled_from(KINDS),
    ranks=st.sampled_from([2, 4, 8, 16, 64]),
    message=st.floats(1e2, 1e10),
)
def test_datasheet_rates_bound_every_algorithm(node: str, kind: Collective, ranks: int, message: float) -> None:
    m = machine(node)
    if ranks > m.devices_per_node and not m.network:
        return
    found = op_cost(collective("x", kind, message, 1, ranks), m)
    assert 0 < found.lower <= found.seconds <= found.upper


@settings(max_examples=40)
@given(
    node=st.sampled_from(NODES), kind=st.sampled_from(KINDS), ranks=st.sampled_from([2, 8, 16]), faster=st.floats(1, 10)
)
def test_faster_links_are_never_slower(node: str, kind: Collective, ranks: int, faster: float) -> None:
    m = machine(node)
    if ranks > m.devices_per_node and not m.network:
        return
    better = replace(m, link=m.link * faster, network=m.network * faster, host_link=m.host_link * faster)
    assert seconds(better, kind, 1e7, ranks) <= seconds(m, kind, 1e7, ranks)
