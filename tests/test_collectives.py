"""Collectives: bytes on the wire by convention, seconds by the formulas of rings, and the order of things."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import catalog
from perfmodel.machine import Machine, from_node, machine
from perfmodel.ops.collective import Collective, collective, exchange, wire_share
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


def bare(m: Machine, **changes: float) -> Machine:
    """The machine with no cost of starting, chunking or copying: hops and bytes alone, unless `changes` say more."""
    free = {"library_hops": 0.0, "pipeline_stages": 0.0, "own_copy_ratio": float("inf"), "peer_kernel_hops": 0.0}
    return replace(m, kernel_latency=0.0, law=m.law | free | changes)


def library(m: Machine, kind: Collective, message: float, ranks: int) -> float:
    return float(op_cost(collective("x", kind, message, 1, ranks, library=True), m).seconds)


def test_ring_by_hand() -> None:
    """16 ranks: two chains of 8 that meet, 7 + 1 hops up and down, 2 * 15/16 of 1 GB at 100 GB/s and 80 %."""
    m = bare(machine("gb200-nvl72"), library_hops=4)
    m = replace(m, link=100e9, link_efficiency=0.8, link_latency=2e-6, kernel_latency=3e-6, in_switch=False)
    start = 3e-6 + 4 * 2e-6
    assert library(m, "all_reduce", 1e9, 16) == pytest.approx(start + 16 * 2e-6 + 2 * 15 / 16 * 1e9 / 80e9)
    assert library(m, "all_gather", 1e9, 16) == pytest.approx(start + 8 * 2e-6 + 15 / 16 * 1e9 / 80e9)


def test_own_share_is_copied_beside_the_link() -> None:
    """Two ranks gather 1 GB: half arrives at 80 GB/s, half is copied at twice that: 6.25 + 3.125 ms."""
    m = bare(machine("hgx-h100-8"), own_copy_ratio=2)
    m = replace(m, link=100e9, link_efficiency=0.8, link_latency=0.0)
    assert library(m, "all_gather", 1e9, 2) == pytest.approx(9.375e-3)


@pytest.mark.parametrize("message", [1e4, 1e6, 1e8])
def test_chunks_are_cut_as_a_search_would(message: float) -> None:
    """Every chunk costs a hop, and filling p stages costs p chunks: the closed form is the least over chunk sizes.

    A copy to one peer has half the stages of a collective.
    """
    hop, stages, rate = 1e-6, 3.0, 80e9
    m = bare(machine("hgx-h100-8"), pipeline_stages=2 * stages)
    m = replace(m, link=rate, link_efficiency=1.0, link_latency=hop)
    whole = message / rate
    cuts = [10 ** (k / 1000) for k in range(-12000, -1000)]
    best = min(whole + whole / cut * hop + stages * cut for cut in cuts)
    assert seconds(m, "p2p", message, 2) == pytest.approx(hop + best, rel=1e-4)


def test_staged_hops_pass_two_queues() -> None:
    """8 ranks without peer-to-peer: 7 hops down and 7 up a chain, each through host memory at 2 x 1 us."""
    m = bare(replace(machine("rtx-4090-workstation-8"), link_latency=1e-6))
    assert seconds(m, "all_reduce", 1.0, 8) == pytest.approx(28e-6, rel=0.01)


def test_mesh_lends_a_group_its_own_links() -> None:
    """Of 7 links of 64 GB/s a pair of MI300X uses one, four devices three each, all eight seven."""
    m = bare(replace(machine("mi300x-8"), link_efficiency=1.0, link_latency=0.0))
    for ranks, links in ((2, 1), (4, 3), (8, 7)):
        expected = (ranks - 1) / ranks * 1e9 / (links * 64e9)
        assert library(m, "all_gather", 1e9, ranks) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_mesh_of_one_device_per_node_divides_by_nothing(kind: Collective) -> None:
    """Ranks a node apart share no link of it: only the network counts, 1 GB of it at least half at the NIC's rate."""
    m = machine("mi300x-8")
    assert 0.5e9 / m.network < seconds(m, kind, 1e9, 2, stride=8) < float("inf")


def test_four_gpu_mesh_against_measured_pairs() -> None:
    """Four A100 with 100 GB/s between any two: apex_plus measured 1044 us for 64 MiB over two, 540 over four."""
    full = catalog.load_node("hgx-a100-8")
    members = full.devices.model_copy(update={"count": 4})
    fabric = full.fabric.model_copy(update={"topology": "mesh"})
    m = from_node(full.model_copy(update={"devices": members, "fabric": fabric}))
    assert library(m, "all_reduce", 2**26, 2) == pytest.approx(1044e-6, rel=0.2)
    assert library(m, "all_reduce", 2**26, 4) == pytest.approx(540e-6, rel=0.2)


@pytest.mark.parametrize("name", ["a100-pcie-8", "a30"])
def test_bridged_pairs_meet_others_over_pcie(name: str) -> None:
    """Cards joined by bridges, in a catalogued node or alone: the third rank costs the bridge."""
    m = bare(machine(name))
    bridge, pcie = m.link * float(m.link_efficiency), m.host_link * float(m.link_efficiency)
    assert library(m, "all_gather", 1e9, 2) == pytest.approx(1e9 / 2 / bridge, rel=0.01)
    assert library(m, "all_gather", 1e9, 4) == pytest.approx(1e9 * 3 / 4 / pcie, rel=0.01)


def test_eager_call_waits_for_the_host_then_for_a_copy() -> None:
    """A small message costs the framework's call; 1 GiB the graph's time and a copy, 2 GiB of memory traffic."""
    m = machine("hgx-h100-8")
    for message in (1e3, 2**30):
        graph, eager = (
            float(op_cost(collective("x", "all_reduce", message, 1, 8, eager=e), m).seconds) for e in (False, True)
        )
        copied = 2 * message / (3.35e12 * float(m.bandwidth_efficiency))
        assert eager == pytest.approx(max(float(m.law["framework_call"]), graph + copied))


@settings(max_examples=40)
@given(
    node=st.sampled_from(NODES),
    kind=st.sampled_from(KINDS),
    ranks=st.sampled_from([2, 4, 8]),
    message=st.floats(1e2, 1e9),
)
def test_engines_are_never_slower_than_the_library_they_may_call(
    node: str, kind: Collective, ranks: int, message: float
) -> None:
    m = machine(node)
    assert seconds(m, kind, message, ranks) <= library(m, kind, message, ranks)


def test_arrays_are_priced_as_their_elements() -> None:
    """Groups inside and across nodes, of several sizes and messages, in one array and under many parameter sets."""
    m = machine("hgx-h100-8")
    ranks, message = np.array([2, 8, 16, 64]), np.array([1e3, 1e6, 1e7, 1e9])
    for kind in KINDS:
        together = op_cost(collective("x", kind, message, 1, ranks), m).seconds
        alone = [seconds(m, kind, float(b), int(n)) for b, n in zip(message, ranks, strict=True)]
        assert together == pytest.approx(alone)
        shaken = op_cost(collective("x", kind, message, 1, ranks), m.perturbed(column=True)).seconds
        assert np.shape(shaken) == (len(m.sigma) + 1, 4)
        assert np.asarray(shaken)[0] == pytest.approx(alone)


def test_large_all_reduce_of_eight_reaches_the_link() -> None:
    """1 GiB over 8 A100: 2 * 7/8 at 300 GB/s per direction is 6.26 ms at best; 70-90 % of it are measured."""
    best = 2 * 7 / 8 * 2**30 / 300e9
    assert 1.1 < seconds(machine("hgx-a100-8"), "all_reduce", 2**30, 8) / best < 1.5


def test_small_all_reduce_is_latency() -> None:
    """8 KiB among 8 H100 takes some microseconds, as custom kernels measure (3-15 us), not the 30 of a ring of hops."""
    assert 3e-6 < seconds(machine("hgx-h100-8"), "all_reduce", 8192, 8) < 15e-6


def test_switch_that_adds_is_faster_on_large_messages_and_never_slower() -> None:
    m = machine("hgx-h100-8")
    plain = replace(m, in_switch=False)
    assert m.in_switch
    assert seconds(m, "all_reduce", 1e9, 8) < 0.95 * seconds(plain, "all_reduce", 1e9, 8)
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
    """16 ranks on 2 nodes of 8: rings leave a node over 8 NICs, so that each carries an eighth of a ring's bytes.

    1 GB, NICs at 40 GB/s: 2 * 15/16 / 8 / 40 = 5.86 ms; links at 400 GB/s need 4.69 ms meanwhile; 2 network latencies.
    """
    m = replace(
        bare(machine("hgx-h100-8")), link=400e9, link_efficiency=1.0, network=40e9, network_efficiency=1.0,
        link_latency=0.0, network_latency=5e-6,
    )  # fmt: skip
    assert seconds(m, "all_reduce", 1e9, 16) == pytest.approx(5.859375e-3 + 2 * 5e-6)


def test_data_parallel_ranks_of_full_nodes_meet_on_the_network() -> None:
    """Two ranks 8 devices apart share no node: 1 GB gathered crosses half at the NIC's rate, not at NVLink's."""
    m = bare(machine("hgx-h100-8"))
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


def dispatch(
    m: Machine, tokens: float, *, experts: int = 256, ranks: int = 8, combine: bool = False, **how: object
) -> float:
    """Seconds of a DeepEP exchange of 7168-wide FP8 (combine: BF16) tokens to 8 experts, each on another rank."""
    op = exchange(
        "x", tokens, 7168, 2 if combine else 1 + 4 / 128, top_k=8, experts=experts, ranks=ranks, visited=min(8, ranks),
        nodes_visited=max(ranks / 8, 1), combine=combine, **how,  # type: ignore[arg-type]
    )  # fmt: skip
    return float(op_cost(op, m).seconds)


def test_exchange_uses_the_faster_kernels() -> None:
    """Few tokens go by the low-latency kernels, a prefill's by the normal ones."""
    m = machine("hgx-h100-8")
    for tokens in (4, 8192):
        low, normal = (dispatch(m, tokens, low_latency=flag) for flag in (True, False))
        assert dispatch(m, tokens) == min(low, normal)
        assert (low < normal) == (tokens == 4)


def test_exchange_needs_its_units_until_the_link_is_full() -> None:
    """Twice the SMs nearly halve a B200's normal exchange; on H100 links of half the rate they hide behind the link."""
    gain = {
        name: dispatch(machine(name), 8192, low_latency=False, units=24)
        / dispatch(machine(name), 8192, low_latency=False, units=48)
        for name in ("hgx-b200-8", "hgx-h100-8")
    }
    assert gain["hgx-b200-8"] > 1.3
    assert gain["hgx-h100-8"] < gain["hgx-b200-8"]


def test_few_experts_leave_blocks_idle() -> None:
    """8 experts on 8 blocks cast 512 tokens 16 times as slowly as 128 experts: DeepEP rows show 150 and 72 us."""
    m = machine("hgx-h100-8")
    slow, fast = (dispatch(m, 512, experts=e, low_latency=True) for e in (8, 128))
    assert slow - fast == pytest.approx(float(m.law["exchange_token"]) * 512 * (1 / 8 - 1 / 128))


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 8192),
    ranks=st.sampled_from([2, 8, 16, 64]),
    combine=st.booleans(),
    low=st.sampled_from([None, True, False]),
)
def test_more_tokens_take_longer_and_the_wire_bounds_them(
    tokens: int, ranks: int, combine: bool, low: bool | None
) -> None:
    m = machine("hgx-h100-8")
    once, twice = (dispatch(m, n, ranks=ranks, combine=combine, low_latency=low) for n in (tokens, 2 * tokens))
    assert 0 < once < twice
