"""What lies between the device and others: encryption of host transfers, slower or staged paths."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel import calibration
from perfmodel.errors import SpecError
from perfmodel.kernels.elsewhere import Path, copy_seconds, tier_capacity
from perfmodel.machine import Machine
from perfmodel.ops.cached import copy
from perfmodel.ops.shard import Parallelism
from perfmodel.spec.model import Model
from perfmodel.techniques.base import Technique, knob

_LONG = 2.0**30  # bytes of a run that hides latencies


class SecureTransfer(Technique):
    """Confidential computing: processors encrypt what crosses the host link.

    Seconds per byte = max(1 / e, 1 / link + (1 - ahead) / e) with e = rate x threads: `ahead` is the share of transfers
    whose encryption was predicted and done before they were asked for (PipeLLM, arXiv:2411.03357); no prediction beats
    the encryption rate itself. `host`: host seconds over those outside the enclave. `peers` ``staged``: transfers between
    devices pass host memory too.
    """

    kind: ClassVar[str] = "secure-transfer"
    reference: ClassVar[str] = "arXiv:2411.03357"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"
    order: ClassVar[int] = -1

    rate: float = knob(0.0, "bytes one thread encrypts per second; 0: no encryption", "byte/s", low=0, high=1e13)
    threads: int = knob(1, "threads that encrypt", low=1, high=1024)
    ahead: float = knob(0.0, "share of the transfers encrypted before they are asked for", low=0, high=1)
    host: float = knob(1.0, "host seconds over those outside the enclave", low=1, high=20)
    peers: Literal["direct", "staged"] = knob("direct", "copies between devices: over their links, or through host memory")

    def machine(self, machine: Machine) -> Machine:
        if self.peers == "staged":
            machine = replace(machine, p2p=False)
        if self.host != 1:
            machine = replace(machine, law=machine.law | {"host_slowdown": machine.law["host_slowdown"] * self.host})
        if not self.rate or not machine.host_link:
            return machine
        achieved = machine.host_link * self._efficiency(machine)
        encrypting = self.rate * self.threads
        per_byte = max(1 / encrypting, 1 / achieved + (1 - self.ahead) / encrypting)
        return replace(machine, host_link=machine.host_link * min(1.0, 1 / per_byte / achieved))

    def _efficiency(self, m: Machine) -> float:
        port = m.device.links.get("host")
        found = calibration.link_parameters(port.technology if port else "pcie")
        return float(found["link_efficiency"].parameter.value)

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.rate and not machine.host_link:
            raise SpecError(f"secure-transfer: the catalogue has no host link of {machine.device.name} to encrypt")


class NetworkOverhead(Technique):
    """Paths that give less than their data sheets: shares of the rates, seconds added to each message.

    Seconds = hops x (latency + added) + bytes / (share x rate), the alpha-beta model. Links between devices of a node,
    the network between nodes, the host link and the drives. The achieved fractions of the calibration still apply to what
    is left.
    """

    kind: ClassVar[str] = "network-overhead"
    reference: ClassVar[str] = "alpha-beta model (Hockney, 1994)"
    repeats: ClassVar[bool] = True
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"
    order: ClassVar[int] = -1

    link: float = knob(1.0, "share of the link rate between devices of a node", low=0.0001, high=1)
    network: float = knob(1.0, "share of the network rate between nodes", low=0.0001, high=1)
    host: float = knob(1.0, "share of the host link's rate", low=0.0001, high=1)
    drive: float = knob(1.0, "share of the drives' rates", low=0.0001, high=1)
    link_latency: float = knob(0.0, "seconds added to each hop inside a node", "s", low=0, high=1)
    network_latency: float = knob(0.0, "seconds added to each hop between nodes", "s", low=0, high=1)
    staged: bool = knob(False, "copies between devices pass host memory")

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.drive < 1 and tier_capacity(machine, "drive") <= 0:
            raise SpecError(f"network-overhead: {machine.name} has no drives")

    def machine(self, machine: Machine) -> Machine:
        return replace(
            machine,
            link=machine.link * self.link,
            network=machine.network * self.network,
            host_link=machine.host_link * self.host,
            link_latency=machine.link_latency + self.link_latency,
            network_latency=machine.network_latency + self.network_latency,
            p2p=machine.p2p and not self.staged,
            paths=machine.paths | ({"drive": _slower_drive(machine, self.drive)} if self.drive < 1 else {}),
        )


def _slower_drive(machine: Machine, share: float) -> Path:
    """The drives of a machine at a share of the rates that they reach on long runs."""
    if machine.node is None or not machine.node.drives:
        return Path(1.0, 1.0, 0.0, capacity=0.0)
    read, write = (
        _LONG * share / float(copy_seconds(copy("drive", "drive", _LONG, 1.0, direction=d), machine)[0])
        for d in ("read", "write")
    )
    return Path(read, write, 0.0, capacity=tier_capacity(machine, "drive"))
