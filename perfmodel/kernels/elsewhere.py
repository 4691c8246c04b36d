"""Work outside the device: the host's processors, drives and memories that compute. Copies to and from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError
from perfmodel.kernels.transfer import drives, host_copy_seconds
from perfmodel.machine import Machine, from_device
from perfmodel.ops.traffic import Op
from perfmodel.spec.hardware import Node
from perfmodel.symbols import Num

_IN_FLIGHT = 64  # requests that one reader keeps at a drive
_INTEGER_WIDTH = 1.1  # bytes of an 8-bit weight with the scales of its group
_MATRIX_ROWS = 16  # rows of the matrix instruction of CPUs (Intel AMX tiles); fewer rows use part of it


@dataclass(frozen=True)
class Rates:
    """A place that computes: achieved bytes/s of its memory, FLOP/s, and seconds before a call begins.

    The fields with a zero for default: FLOP/s where many rows meet one matrix, exponentials/s, datasheet bytes/s and
    FLOP/s for the lower bound, OP/s of integer products. Zero: as the general rate. Joules: what its arrays and units
    draw beside the device, which has a power of its own; zero: not counted.
    """

    bandwidth: float
    flops: float
    latency: float = 0.0
    matrix: float = 0.0
    exp: float = 0.0
    most_bandwidth: float = 0.0
    most_flops: float = 0.0
    integer: float = 0.0
    joules_per_byte: float = 0.0
    joules_per_flop: float = 0.0

    def rate(self, rows: Num, width: Num = 2.0) -> Num:
        """FLOP/s where `rows` vectors meet one matrix of elements of `width` bytes: with many rows the matrix units serve.

        Weights of at most 8 bits are multiplied as integers with activations rounded to 8 bits (llama.cpp, ggml's Q8).
        """
        narrow = self.integer if width <= _INTEGER_WIDTH else 0.0
        return np.maximum(max(self.flops, narrow), self.matrix * np.minimum(rows / _MATRIX_ROWS, 1.0))


@dataclass(frozen=True)
class Path:
    """A way to a farther memory, both directions apart: bytes/s, seconds per copy, bytes of the least efficient piece.

    A piece of p bytes costs latency / in_flight + p / rate: with few pieces in flight small ones waste the way.
    capacity: bytes that one device may store there; infinite where nobody said.
    """

    read: float
    write: float
    latency: float
    in_flight: float = 1.0
    capacity: float = np.inf


def rates(name: str, m: Machine) -> Rates:
    """A part of the machine by name. Raises SpecError for one it does not have."""
    if name in m.elsewhere:
        return m.elsewhere[name]
    if name == "cpu" and m.node is not None and m.node.host is not None:
        return _host(m.node)
    raise SpecError(f"{m.name} has no {name!r} that could compute; known: {', '.join((*m.elsewhere, 'cpu'))}")


@lru_cache(maxsize=64)
def _processor(name: str) -> Machine:
    return from_device(catalog.load_device(name), None)


calibration.on_change(_processor.cache_clear)


def _host(node: Node) -> Rates:
    """The share of one device in all processors of its node."""
    host = node.host
    assert host is not None
    cpu = _processor(host.cpu)
    share = 1 / node.devices.count
    sockets = host.sockets * share
    matrix = cpu.peak("bf16")
    integer = cpu.device.compute.vector.get("int8", 0.0) if cpu.device.compute else 0.0
    return Rates(
        bandwidth=host.memory_bandwidth * float(cpu.bandwidth_efficiency) * share,
        flops=sockets * cpu.vector * float(cpu.vector_efficiency),
        latency=float(cpu.kernel_latency),
        matrix=sockets * matrix * float(cpu.matrix_efficiency),
        most_bandwidth=host.memory_bandwidth * share,
        most_flops=sockets * max(cpu.vector, matrix, integer),
        integer=sockets * integer * float(cpu.vector_efficiency),
    )


def work_seconds(op: Op, m: Machine) -> tuple[Num, Num]:
    """Achieved and least seconds of one operator elsewhere: max(bytes / bandwidth, FLOPs / rate, exps / rate) + latency.

    `rows` of the shape: vectors that meet one matrix; with many the matrix units serve. `lasts`: time until the last of
    uneven pieces is done over that of all in one.
    """
    r = rates(op.on, m)
    moved = sum((t.bytes for t in op.traffic if t.path == op.on), start=0.0)
    apart = ("exp", "vector") if r.exp else ()
    flops = sum((f for unit, f in op.flops.items() if unit not in apart), start=0.0)
    softmax = op.flops.get("exp", 0.0) / r.exp if r.exp else 0.0
    width = max((t.width for t in op.traffic if t.path == op.on and t.tensor in ("weights", "experts")), default=2.0)
    busy = np.maximum(np.maximum(moved / r.bandwidth, flops / r.rate(op.shape.get("rows", 0.0), width)), softmax)
    least = np.maximum(moved / (r.most_bandwidth or r.bandwidth), flops / (r.most_flops or r.flops))
    return np.where(busy > 0, busy * op.shape.get("lasts", 1.0) + r.latency, 0.0), least


def work_joules(op: Op, m: Machine) -> Num:
    """Joules of one operator elsewhere: bytes x joules per byte + FLOPs x joules per FLOP; of any other operator none."""
    if op.kind != "elsewhere":
        return 0.0
    r = rates(op.on, m)
    moved = sum((t.bytes for t in op.traffic if t.path == op.on), start=0.0)
    return r.joules_per_byte * moved + r.joules_per_flop * sum(op.flops.values(), start=0.0)


def tier_capacity(m: Machine, tier: str) -> float:
    """Bytes one device may store on a farther tier: its share of the node's; infinite where the catalogue does not say."""
    if tier in m.paths:
        return float(m.paths[tier].capacity)
    if m.node is None or tier not in ("host", "drive"):
        return float(np.inf)
    if tier == "host":
        return m.node.host.memory / m.node.devices.count if m.node.host else 0.0
    members = m.node.drives[0] if m.node.drives else None
    storage = catalog.load_device(members.device).storage if members else None
    return members.count * storage.capacity / m.node.devices.count if members and storage else 0.0


def copy_seconds(op: Op, m: Machine) -> tuple[Num, Num]:
    """Achieved seconds and least seconds of a copy between the device and a farther memory.

    Pieces of `page` bytes are requested one after the other, each at the cost of a launch, or of `issue` seconds of the host
    where that is longer; 0: one piece.
    """
    moved = [t for t in op.traffic if t.path != "hbm"]
    tier, size = moved[0].path, sum((t.bytes for t in moved), start=0.0)
    page = op.shape.get("page", 0.0)
    writing = moved[0].direction == "write"
    if tier in m.paths:
        way = m.paths[tier]
        rate = way.write if writing else way.read
        pieces = np.where(page > 0, size / np.maximum(page, 1.0), 1.0)
        return np.where(size > 0, way.latency + size / rate + pieces * way.latency / way.in_flight, 0.0), size / rate
    if tier == "host":
        pieces = np.where(page > 0, size / np.maximum(page, 1.0), 0.0)
        issued = np.maximum(m.kernel_latency, op.shape.get("issue", 0.0))
        seconds = np.maximum(host_copy_seconds(m, size), pieces * issued)
        return np.where(size > 0, seconds, 0.0), size / m.host_link
    if tier == "drive" and m.node is not None and m.node.drives:
        members = m.node.drives[0]
        # The devices of a node share its drives.
        found = drives(catalog.load_device(members.device), members.count / m.node.devices.count, write=writing)
        block = np.where(page > 0, page, 2.0**20)
        seconds = size / block * found.seconds(block, _IN_FLIGHT, random=bool(np.any(page > 0)))
        least = size / (found.count * found.rate)
        if m.host_link:
            # What a drive gives also crosses the host link, both at work at once; memory shared with the host needs none.
            seconds = np.maximum(seconds, np.where(size > 0, host_copy_seconds(m, size), 0.0))
            least = np.maximum(least, size / m.host_link)
        return np.where(size > 0, seconds, 0.0), least
    if tier == "remote" and m.network:
        rate = m.network * m.network_efficiency
        return np.where(size > 0, m.network_latency + size / rate, 0.0), size / m.network
    raise SpecError(f"{m.name} has no way to {tier!r}; known: {', '.join((*m.paths, 'host', 'drive', 'remote'))}")
