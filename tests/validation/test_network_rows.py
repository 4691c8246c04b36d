"""Measured collectives, copies between devices and expert exchanges: which regime, which box, and how far off."""

from __future__ import annotations

import pytest

from perfmodel.validation.kinds import kind_of, network
from perfmodel.validation.rows import Predicted, Refused, Row

H100, A100, B200 = "H100-SXM-80GB", "A100-SXM-80GB", "B200-SXM-180GB"


def row(**cells: str | float) -> Row:
    base = {
        "hardware": H100, "phase": "allreduce", "op": "all_reduce", "engine": "nccl", "metric": "collective_time",
        "unit": "us", "n_devices": 8, "msg_bytes": 2**20, "value": 1,
    }  # fmt: skip
    return Row("f.csv", 2, {k: str(v) for k, v in (base | cells).items()})


def exchange(**cells: str | float) -> Row:
    base = {
        "phase": "all2all", "op": "deepep_normal_dispatch", "engine": "deepep(sglang)", "msg_bytes": "",
        "num_tokens": 4096, "hidden": 7168, "topk": 8, "n_experts": 256, "n_nodes": 1, "sms": 20,
    }  # fmt: skip
    return row(**(base | cells))


def outcome_of(r: Row) -> Predicted | Refused:
    kind = network.DISPATCH if network.DISPATCH.claims(r) else kind_of(r)
    assert kind in (network.DISPATCH, network.COLLECTIVE, network.P2P)
    return kind.predict([r])[0]


def value(r: Row) -> float:
    outcome = outcome_of(r)
    assert isinstance(outcome, Predicted), outcome
    assert 0 < outcome.low < outcome.value < outcome.high
    return outcome.value


def refusal(r: Row) -> str:
    outcome = outcome_of(r)
    assert isinstance(outcome, Refused), outcome
    return str(outcome)


@pytest.mark.parametrize(
    ("measured", "cells"),
    [
        # AIConfigurator (Apache-2.0): NCCL 2.27, then engines' own kernels.
        (323, {"msg_bytes": 2**26}),
        (15.6, {"msg_bytes": 1024}),
        (595, {"hardware": A100, "msg_bytes": 2**26}),
        (1340, {"hardware": B200, "msg_bytes": 2**29}),
        (209, {"phase": "allgather", "op": "all_gather", "msg_bytes": 2**26}),
        (6.5, {"phase": "all2all", "op": "alltoall", "msg_bytes": 2048, "n_devices": 2}),
        (4.3, {"engine": "vllm", "kernel": "vllm_graph", "msg_bytes": 1024, "n_devices": 2}),
        (45, {"engine": "vllm", "kernel": "vllm_eager", "msg_bytes": 1024, "hardware": A100}),
        (3920, {"engine": "vllm", "kernel": "vllm_eager", "msg_bytes": 2**30, "n_devices": 2}),
        # apex_plus, Vidur (MIT).
        (196, {"phase": "p2p", "op": "sendrecv", "msg_bytes": 2**26, "n_devices": 2}),
        (1871, {"phase": "p2p", "op": "send_recv", "engine": "nccl(torch)", "msg_bytes": 2**26, "n_devices": 2,
                "n_nodes": 2, "devices_per_node": 1, "topology": "DGX NVSwitch"}),
        (11439, {"hardware": A100, "engine": "nccl(torch)", "msg_bytes": 2**26, "n_devices": 2, "n_nodes": 2,
                 "devices_per_node": 1, "topology": "DGX NVSwitch"}),
    ],
)  # fmt: skip
def test_measured_collectives(measured: float, cells: dict[str, str | float]) -> None:
    """Also where nothing was fitted to the device itself: one latency of a class serves its members within 40 %."""
    assert value(row(**cells)) == pytest.approx(measured, rel=0.4)


@pytest.mark.parametrize(
    ("measured", "cells"),
    [
        # DeepEP of SGLang 0.5.6 and 0.5.12, AIConfigurator (Apache-2.0).
        (491, {}),
        (515, {"hardware": B200}),
        (883, {"hardware": B200, "op": "deepep_normal_combine"}),
        (116, {"op": "deepep_lowlatency_dispatch", "num_tokens": 512, "sms": ""}),
        (
            156,
            {
                "op": "deepep_lowlatency_dispatch",
                "num_tokens": 512,
                "sms": "",
                "hidden": 4096,
                "topk": 2,
                "n_experts": 8,
            },
        ),
        (264, {"op": "deepep_lowlatency_dispatch", "num_tokens": 256, "sms": "", "n_devices": 32, "n_nodes": 4}),
        (580, {"op": "deepep_lowlatency_combine", "num_tokens": 256, "sms": "", "n_devices": 64, "n_nodes": 8}),
        (3586, {"num_tokens": 8192, "n_devices": 32, "n_nodes": 4}),
    ],
)
def test_measured_exchanges(measured: float, cells: dict[str, str | float]) -> None:
    assert value(exchange(**cells)) == pytest.approx(measured, rel=0.3)


def test_kinds() -> None:
    assert kind_of(row()) is network.COLLECTIVE
    assert kind_of(row(phase="p2p", op="send_recv")) is network.P2P
    assert network.DISPATCH.claims(exchange())
    assert not network.DISPATCH.claims(row())


def test_bus_bandwidth_counts_what_a_rank_sends() -> None:
    """2 x 7/8 of the buffer over the time of an all-reduce, 7/8 of an all-gather's; plain bandwidth the buffer."""
    for phase, share in (("allreduce", 1.75), ("all_gather", 0.875)):
        seconds = value(row(phase=phase)) * 1e-6
        assert value(row(phase=phase, metric="busbw", unit="GB/s")) == pytest.approx(share * 2**20 / seconds / 1e9)
        assert value(row(phase=phase, metric="bandwidth", unit="GB/s")) == pytest.approx(2**20 / seconds / 1e9)


def test_exchange_bandwidth_counts_copies() -> None:
    """Low latency: 8 copies of each of 128 tokens, 7168 FP8 numbers with a 4-byte scale per 128, over the time."""
    low = {"op": "deepep_lowlatency_dispatch", "num_tokens": 128, "sms": ""}
    moved = 128 * 8 * 7168 * (1 + 4 / 128)
    assert value(exchange(**low, metric="bandwidth", unit="GB/s")) == pytest.approx(
        moved / value(exchange(**low)) / 1e3
    )  # bytes per microsecond are 1e-3 GB/s


def test_regimes_are_told_apart() -> None:
    """A small all-reduce: an engine's kernel in a graph, then the library, then a call of a framework."""
    small = {"msg_bytes": 4096, "n_devices": 8}
    graph, library, eager, torch = (
        value(row(**small, **named))
        for named in ({"engine": "vllm"}, {}, {"engine": "vllm", "kernel": "vllm_eager"}, {"engine": "nccl(torch)"})
    )
    assert graph < library < eager
    assert torch == eager
    assert value(row(**small, engine="vllm", kernel="vllm_graph")) == graph
    assert value(row(**small, engine="pytorch/nccl")) == library


def test_a_box_is_found_by_its_topology() -> None:
    """Four A100 PCIe in pairs gather over PCIe what two gather over a bridge, whether or not the row says pairs."""
    for topology in ("pairwise NVLink", ""):
        two, four = (
            value(
                row(
                    hardware="A100-PCIe-80GB",
                    phase="all_gather",
                    msg_bytes=2**28,
                    n_devices=n,
                    topology=topology,
                    devices_per_node=n,
                )
            )
            for n in (2, 4)
        )
        # 1/2 at 300 GB/s against 3/4 at 31.5 GB/s: 14 times, less what copying the own share adds.
        assert 8 < four / two < 14.3


def test_nodes_slow_a_group_down() -> None:
    inside = value(row(n_devices=4, msg_bytes=2**26, devices_per_node=4, n_nodes=1, topology="DGX NVSwitch"))
    across = value(row(n_devices=4, msg_bytes=2**26, devices_per_node=2, n_nodes=2, topology="DGX NVSwitch"))
    assert across > 3 * inside
    # A40 boxes: no network is stated anywhere, and they get one port of 12.5 GB/s.
    far = value(
        row(hardware="A40", n_devices=2, devices_per_node=1, n_nodes=2, msg_bytes=2**26, topology="pairwise NVLink")
    )
    assert far * 1e-6 > 2**26 / 12.5e9


@pytest.mark.parametrize(
    ("reason", "cells"),
    [
        ("fewer than two", {"n_devices": 1}),
        ("msg_bytes not stated", {"msg_bytes": ""}),
        ("n_devices not stated", {"n_devices": ""}),
        ("no law for latency", {"metric": "latency"}),
        ("unknown hardware", {"hardware": "no such card"}),
    ],
)
def test_rows_that_cannot_be_predicted_say_why(reason: str, cells: dict[str, str | float]) -> None:
    assert reason in refusal(row(**cells))


def test_an_exchange_without_its_routing_is_that_of_the_published_tables() -> None:
    """DeepEP's README measures DeepSeek-V3: 8 of 256 experts, hidden 7168, 4,096 tokens a rank."""
    assert value(exchange(n_experts="", hidden="", topk="", num_tokens="")) == value(exchange())
    assert value(exchange(n_experts="", num_tokens=512)) < value(exchange())
    assert "no law for ttft" in refusal(exchange(metric="ttft"))
