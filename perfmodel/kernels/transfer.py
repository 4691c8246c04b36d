"""Time laws of transfers outside a device: copies over the host link, reads and writes of local drives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfmodel import calibration
from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.spec.hardware import Device
from perfmodel.symbols import Num


def host_copy_seconds(m: Machine, size: Num) -> Num:
    """Seconds of a copy of `size` bytes between a device and host memory: latency + bytes/(link rate x efficiency).

    Each direction has lanes of its own. Raises SpecError for a device without a host link.
    """
    port = m.device.links.get("host")
    if port is None or not m.host_link:
        raise SpecError(f"the catalogue has no link between {m.device.name} and a host")
    found = calibration.link_parameters(port.technology)
    efficiency, latency = found["link_efficiency"].parameter.value, found["link_latency"].parameter.value
    return latency + size / (m.host_link * efficiency)


@dataclass(frozen=True)
class Drives:
    """Equal drives read or written in parallel: count (or a share of them), and bytes/s and operations/s of one."""

    count: float
    rate: float
    operations: float
    latency: float

    def seconds(self, block: Num, depth: Num, random: bool) -> Num:
        """Mean seconds per request of `block` bytes with `depth` requests in flight.

        The slowest of: the drives' transfer, their random operations, the host's work on a request, and the wait of
        one request divided by those in flight (Little's law).
        """
        host = calibration.classes().memory["nand"]["storage_operation"].value
        transfer = block / (self.count * self.rate)
        seek = 1 / (self.count * self.operations) if random else 0.0
        waiting = (self.latency + block / self.rate) / depth
        return np.maximum(np.maximum(transfer, seek), np.maximum(host, waiting))


def drives(device: Device, count: float, *, write: bool) -> Drives:
    """`count` equal drives, read or written by their host. Raises SpecError for what is no drive."""
    spec = device.storage
    if spec is None:
        raise SpecError(f"{device.name!r} is not a drive")
    shared = calibration.classes().memory["nand"]["storage_latency"].value
    latency = (spec.write_latency if write else spec.read_latency) or shared
    many = np.inf if write or spec.random_read_iops is None else spec.random_read_iops
    return Drives(count, spec.write if write else spec.read, many, latency)
