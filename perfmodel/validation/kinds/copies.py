"""Copies inside a device, to its host and to a peer, and reads and writes of local drives."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from perfmodel import calibration, catalog
from perfmodel.kernels.transfer import Drives, drives, host_copy_seconds
from perfmodel.machine import Machine, machine
from perfmodel.ops.collective import collective
from perfmodel.ops.elementwise import pointwise
from perfmodel.spec.hardware import Device, Node
from perfmodel.symbols import Num
from perfmodel.validation.kinds.base import Kind, Outcome, batched, engine_machine, rates, seconds_with_spread, times
from perfmodel.validation.rows import Refused, Row

_LARGE = 2.0**29  # bytes of an array or buffer whose size is not stated: far beyond any cache
# Arrays that the kernels of STREAM (McCalpin 1995; BabelStream) read and write.
_STREAM = {"copy": (1, 1), "mul": (1, 1), "scale": (1, 1), "add": (2, 1), "triad": (2, 1), "dot": (2, 0)}


def _copy_key(row: Row) -> Hashable:
    op = row.text("op").lower()
    sized = bool(row.text("msg_bytes"))
    if re.search(r"host|h2d|d2h|htod|dtoh", op):
        return row.hardware, row.text("engine"), "host", 2 if "bidirectional" in op else 1, sized
    # nvbandwidth's device-to-device tests run both directions at once and report their sum.
    if re.search(r"device_to_device|d2d|p2p|peer", op):
        return row.hardware, row.text("engine"), "peer", 2 if re.search("_read|_write|bidirectional", op) else 1, sized
    kernel = next((k for k in _STREAM if re.search(rf"(^|_){k}$", op)), None)
    if kernel is None and not re.search(r"memcpy|local", op):
        raise Refused(f"unknown copy {op!r}")
    return row.hardware, row.text("engine"), "memory", kernel or "copy", sized


def _price_copy(key: Any, rows: list[Row]) -> list[Outcome]:
    hardware, engine, path, detail, _ = key
    m = engine_machine(hardware, engine)
    size = np.array([r.number("msg_bytes", _LARGE) for r in rows])
    if path == "memory":
        reads, writes = _STREAM[detail]
        op = pointwise(detail, size, 1, reads=reads, writes=writes, flops=0)
        return _answers(rows, size * (reads + writes), *seconds_with_spread([op], m, "copy"))
    if path == "peer":
        op = collective("copy", "p2p", size, 1, 2)
        return _answers(rows, size * detail, *seconds_with_spread([op], m, "copy"))
    return _answers(rows, size * detail, *_host_copy(m, size))


def _host_copy(m: Machine, size: Num) -> tuple[Any, Any]:
    """Seconds and spread of a copy over the host link."""
    port = m.device.links.get("host")
    if port is None or not m.host_link:
        raise Refused("no link to the host in the catalogue")
    found = calibration.link_parameters(port.technology)
    efficiency, latency = found["link_efficiency"].parameter, found["link_latency"].parameter
    seconds = host_copy_seconds(m, size)
    parts = np.hypot(latency.sigma * latency.value, efficiency.sigma * (seconds - latency.value)) / seconds
    return seconds, np.hypot(parts, calibration.law().residual["copy"])


def _answers(rows: list[Row], moved: Any, seconds: Any, sigma: Any) -> list[Outcome]:
    """Times of rows that give times; else bytes over seconds."""
    if rows[0].text("metric") == "bandwidth":
        return rates(rows, np.broadcast_to(moved, len(rows)).tolist(), seconds, sigma)
    return times(rows, seconds, sigma)


def _copy(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _copy_key, _price_copy)


def _drives(hardware: str, write: bool) -> Drives:
    """The drives that a drive's, a device's or a node's name stands for. Raises Refused where the catalogue has none."""
    spec = catalog.load_hardware(hardware)
    if isinstance(spec, Device) and spec.storage:
        return drives(spec, 1, write=write)
    node = spec if isinstance(spec, Node) else machine(hardware).node
    if node is None or not node.drives:
        raise Refused("no local drives in the catalogue")
    return drives(catalog.load_device(node.drives[0].device), node.drives[0].count, write=write)


def _block(row: Row) -> float:
    """Bytes of one request: the `msg_bytes` cell, else the last word of the operator (`random_read_4k`)."""
    if row.text("msg_bytes"):
        return row.number("msg_bytes")
    found = re.search(r"_(\d+)(k|m)(?:i?b)?$", row.text("op").lower())
    if found is None:
        raise Refused("size of a request not stated")
    return float(found[1]) * (1024.0 if found[2] == "k" else 1024.0**2)


def _depth(row: Row) -> float:
    """Requests in flight as a note states them (`iodepth=32`, `QD 32`); a bandwidth is measured with many."""
    found = re.search(r"(?:io_?depth|queue depth|qd)[ =:]*(\d+)", row.text("note").lower())
    if found:
        return float(found[1])
    return float("inf") if row.text("metric") == "bandwidth" else 1.0


def _storage_key(row: Row) -> Hashable:
    op = row.text("op").lower()
    if not re.search("read|write", op):
        raise Refused(f"unknown storage operation {op!r}")
    return row.hardware, "write" in op, "rand" in op, row.text("metric")


def _price_storage(key: Any, rows: list[Row]) -> list[Outcome]:
    hardware, write, random, _ = key
    block, depth = np.array([_block(r) for r in rows]), np.array([_depth(r) for r in rows])
    seconds = _drives(hardware, write).seconds(block, depth, random)
    return _answers(rows, block, seconds, calibration.law().residual["storage"])


def _storage(rows: Sequence[Row]) -> list[Outcome]:
    return batched(rows, _storage_key, _price_storage)


def _held_out(row: Row) -> Hashable:
    return row.text("op")


COPY = Kind("copy", lambda r: r.text("phase") == "memcpy", _copy, _held_out)
STORAGE = Kind("storage", lambda r: r.text("phase") == "storage", _storage, _held_out, ("memory.nand.storage_operation",))
