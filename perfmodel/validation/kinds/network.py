"""Collectives, copies between devices, and expert exchanges, inside a node and between nodes."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from perfmodel import calibration, catalog
from perfmodel.machine import Machine, from_node
from perfmodel.ops.collective import Collective, collective, exchange, wire_share
from perfmodel.ops.moe import distinct_ranks
from perfmodel.spec.hardware import Network, Node
from perfmodel.spec.model import Moe
from perfmodel.validation.kinds.base import (
    Kind,
    Outcome,
    batched,
    column,
    engine_machine,
    rates,
    seconds_with_spread,
    times,
)  # fmt: skip
from perfmodel.validation.rows import Refused, Row

_KINDS: dict[str, Collective] = {
    "allreduce": "all_reduce", "allgather": "all_gather", "reducescatter": "reduce_scatter", "all2all": "all_to_all",
    "alltoall": "all_to_all", "p2p": "p2p", "sendrecv": "p2p",
}  # fmt: skip
# Words of a row's topology, and what the catalogue calls it.
_TOPOLOGIES = {"pair": "pairs", "nvswitch": "switch", "pcie": "pcie"}
_FP8 = 1 + 4 / 128  # a token of FP8 numbers with one scale of four bytes per 128
_BF16 = 2.0
_UNITS = 20  # SMs of normal kernels in DeepSeek-V3 (arXiv:2412.19437, 3.2.2)
# What DeepEP's published tables are measured with where a row does not say: DeepSeek-V3, 4,096 tokens a rank in training and
# prefill, 128 in decode (repository deepseek-ai/DeepEP, README).
_PUBLISHED = {"hidden": 7168.0, "topk": 8.0, "n_experts": 256.0}
_TOKENS, _TOKENS_LOW = 4096.0, 128.0
_UNSTATED = "ethernet-100g"  # between nodes whose network neither the row nor the catalogue states


class _Box(NamedTuple):
    """What the machine of a row depends on."""

    hardware: str
    engine: str
    topology: str
    local: float
    nodes: float


class _Call(NamedTuple):
    """What collectives that are priced together share."""

    box: _Box
    kind: Collective
    library: bool
    eager: bool
    metric: str


class _Exchange(NamedTuple):
    """What expert exchanges that are priced together share."""

    box: _Box
    combine: bool
    low_latency: bool | None
    metric: str


def _kind(row: Row) -> Collective | None:
    return _KINDS.get(row.text("phase").replace("_", ""))


def _regime(row: Row) -> tuple[bool, bool]:
    """(library, eager) of a row, from its kernel, else its engine.

    Engine kernels run in captured graphs unless the row says eager; a framework's all-reduce is called eagerly; all
    else is a library's own benchmark.
    """
    kernel, engine = row.text("kernel").lower(), row.text("engine").lower()
    own = kernel.split("_")[0] or engine
    if "nccl" not in own and calibration.known_engine(own):
        return False, kernel.endswith("_eager")
    return True, "(torch)" in engine and _kind(row) != "p2p"


@lru_cache(maxsize=256)
def _machine(box: _Box) -> Machine:
    """The machine of a row: of the catalogue's nodes with its devices and topology, the smallest that holds the group.

    No row names the network between its nodes: of equal boxes it gets the one with the slowest, else one common port.
    """
    m = engine_machine(box.hardware, box.engine)
    shape = next((shape for word, shape in _TOPOLOGIES.items() if word in box.topology), None)
    across = box.nodes > 1
    fitting = [
        n
        for n in catalog.nodes()
        if n.devices.device == m.device.name and n.fabric.topology == shape and n.devices.count >= box.local
        and (n.network or not across)
    ]  # fmt: skip
    if fitting and (across or m.node not in fitting):
        found = from_node(min(fitting, key=lambda n: (_share_of_network(n) if across else 0.0, n.devices.count)))
        name = calibration.known_engine(box.engine)
        m = found.with_engine(calibration.engine(name)) if name else found
    if m.network or (m.node is None and not across):
        return m
    holds = max(int(box.local), m.devices_per_node)
    port = catalog.load_hardware(_UNSTATED)
    assert isinstance(port, Network)
    return replace(m, network=port.bandwidth / holds, devices_per_node=holds)


def _share_of_network(node: Node) -> float:
    return node.network.bandwidth * node.network.count / node.devices.count if node.network else 0.0


calibration.on_change(_machine.cache_clear)


def _place(row: Row) -> tuple[float, float]:
    """Devices of the group in each node, and nodes; one node where the row does not say."""
    ranks = row.number("n_devices")
    # A group larger than the device's usual node spans several, as few as hold it.
    held = engine_machine(row.hardware, "").devices_per_node
    nodes = row.number("n_nodes", np.ceil(ranks / held) if held > 1 else 1)
    return row.number("devices_per_node", ranks / nodes), nodes


def _box_of(row: Row) -> _Box:
    return _Box(row.hardware, row.text("engine"), row.text("topology").lower(), *_place(row))


def _stride(rows: Sequence[Row], m: Machine) -> np.ndarray:
    """Distance between ranks that puts as many of a group into each node as the row says."""
    places = [_place(r) for r in rows]
    return np.array([m.devices_per_node / local if nodes > 1 else 1.0 for local, nodes in places])


def _key(row: Row) -> _Call:
    kind, metric = _kind(row), row.text("metric")
    if kind is None or metric not in ("collective_time", "busbw", "bandwidth"):
        raise Refused(f"no law for {metric} of a collective")
    return _Call(_box_of(row), kind, *_regime(row), metric)


def _price(key: Hashable, rows: list[Row]) -> list[Outcome]:
    assert isinstance(key, _Call)
    m, kind = _machine(key.box), key.kind
    if m.node is None and not m.device.links:
        raise Refused("the device has no link to another in the catalogue")
    ranks, message = column(rows, "n_devices"), column(rows, "msg_bytes")
    if np.any(ranks < 2):
        raise Refused("a collective of fewer than two devices")
    op = collective(
        kind, kind, message, 1, ranks, stride=_stride(rows, m), library=key.library, eager=key.eager
    )  # fmt: skip
    seconds, sigma = seconds_with_spread([op], m, _residual(key))
    if key.metric == "collective_time":
        return times(rows, seconds, sigma)
    # The bus bandwidth of nccl-tests counts what each rank must send; plain bandwidth the buffer.
    work = message * (wire_share(kind, ranks) if key.metric == "busbw" else 1)
    return rates(rows, work.tolist(), seconds, sigma)


def _residual(key: _Call) -> str:
    """Which spread of the law a batch has: between nodes and under a framework the unstated counts most."""
    if key.box.nodes > 1:
        return "collective_across"
    if key.kind == "p2p":
        return "p2p"
    return "collective_eager" if key.eager else "collective"


def _exchange_key(row: Row) -> _Exchange:
    op, metric = row.text("op").lower(), row.text("metric")
    if metric not in ("collective_time", "latency", "bandwidth", "bottleneck_bandwidth"):
        raise Refused(f"no law for {metric} of an expert exchange")
    low = next((flag for word, flag in (("low", True), ("normal", False)) if word in op), None)
    return _Exchange(_box_of(row), "combine" in op, low, metric)


def _exchange_price(key: Hashable, rows: list[Row]) -> list[Outcome]:
    assert isinstance(key, _Exchange)
    m = _machine(key.box)
    ranks = column(rows, "n_devices")
    tokens = _stated(rows, "num_tokens", _TOKENS_LOW if key.low_latency else _TOKENS)
    hidden, top_k, experts = (_stated(rows, name, value) for name, value in _PUBLISHED.items())
    nodes = np.array([_place(r)[1] for r in rows])
    visited, reached = (_distinct(experts, top_k, n) for n in (ranks, nodes))
    width = np.array([_width(r, key.combine) for r in rows])
    op = exchange(
        "exchange", tokens, hidden, width, top_k=top_k, experts=experts, ranks=ranks, visited=visited,
        nodes_visited=reached, combine=key.combine, stride=_stride(rows, m),
        units=np.array([_units(r) for r in rows]), low_latency=key.low_latency,
    )  # fmt: skip
    seconds, sigma = seconds_with_spread([op], m, "exchange")
    if key.metric in ("collective_time", "latency"):
        return times(rows, seconds, sigma)
    # DeepEP's tests count a copy per expert (low latency), per node (across nodes) or per rank, the own one included.
    copies = top_k if key.low_latency else np.where(nodes > 1, reached, visited)
    return rates(rows, (tokens * hidden * width * copies).tolist(), seconds, sigma)


def _stated(rows: Sequence[Row], name: str, otherwise: float) -> np.ndarray:
    return np.array([r.number(name, otherwise) for r in rows])


def _units(row: Row) -> float:
    """Units the exchange kernel takes: stated in a column, or in the note (`12 SMs`)."""
    noted = re.search(r"(\d+) SMs", row.text("note"))
    return row.number("sms", float(noted.group(1)) if noted else _UNITS)


def _width(row: Row, combine: bool) -> float:
    """Bytes per element: FP8 dispatch with its scales and BF16 combine unless the row names a format."""
    named = {"fp8": _FP8, "bf16": _BF16, "fp16": _BF16}.get(row.text("dtype").lower())
    return named or (_BF16 if combine else _FP8)


def _distinct(experts: np.ndarray, top_k: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    return np.array([_visited(int(e), int(k), float(r)) for e, k, r in zip(experts, top_k, ranks, strict=True)])


@lru_cache(maxsize=4096)
def _visited(experts: int, top_k: int, ranks: float) -> float:
    return distinct_ranks(Moe(experts=experts, top_k=top_k, inter=1), ranks)


def _collectives(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _key, _price)


def _exchanges(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _exchange_key, _exchange_price)


def _held_out(row: Row) -> Hashable:
    return row.text("n_devices"), row.text("msg_bytes")


DISPATCH = Kind(
    "expert exchange",
    lambda r: (
        any(word in r.text("op").lower() for word in ("deepep", "dispatch", "combine"))
        and (bool(r.text("topk")) or "deepep" in r.text("op").lower())
    ),
    _exchanges,
    lambda r: (r.text("hidden"), r.text("topk"), r.text("n_experts")),
    ("law.exchange_token", "law.exchange_unit_rate"),
)
COLLECTIVE = Kind(
    "collective", lambda r: _kind(r) not in (None, "p2p"), _collectives, _held_out,
    ("device.*.link_efficiency", "device.*.link_latency", "law.pipeline_stages", "law.library_hops", "law.own_copy_ratio",
     "law.in_switch_efficiency", "law.peer_kernel_hops", "law.framework_call"),
)  # fmt: skip
# What copies between peers depend on is fitted to collectives, of which there are many more rows.
P2P = Kind("p2p", lambda r: _kind(r) == "p2p", _collectives, _held_out)
