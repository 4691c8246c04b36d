"""A machine as the roofline sees it: rates, capacities and achieved fractions, plain numbers in base SI."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from perfmodel import calibration, catalog
from perfmodel.calibration import Resolved
from perfmodel.errors import SpecError
from perfmodel.spec.base import UNVERIFIED
from perfmodel.spec.calibration import Engine
from perfmodel.spec.hardware import Device, Fabric, Node
from perfmodel.symbols import Num

# Priors this wide come from no measured member of the class; predictions are then no surer than x0.62 to x1.6.
_UNMEASURED = 0.37
# Spread added where a datasheet section was not verified against an opened document.
_UNVERIFIED_SIGMA = 0.03


@dataclass(frozen=True)
class Machine:
    """Peaks from the datasheet, efficiencies from calibration or class priors. Fields may be arrays."""

    name: str
    device: Device
    node: Node | None
    matrix: dict[str, float]
    """Peak FLOP/s (OP/s) by dtype."""
    vector: float
    exp: float
    """Special-function results per second."""
    units: float
    bandwidth: float
    cache: float
    """Bytes of the last-level cache."""
    capacity: float
    """Bytes of device memory a program can allocate."""
    devices_per_node: int
    link: float
    """Scale-up bytes/s per device and direction."""
    p2p: bool
    in_switch: bool
    network: float
    """Scale-out bytes/s per device and direction; 0: none."""
    host_link: float
    tdp: float
    node_overhead_power: float
    # Achieved fractions and latencies.
    matrix_efficiency: Num
    attention_efficiency: Num
    vector_efficiency: Num
    kernel_latency: Num
    bandwidth_efficiency: Num
    memory_latency: Num
    link_efficiency: Num
    link_latency: Num
    network_efficiency: Num
    network_latency: Num
    law: dict[str, Num]
    sigma: dict[str, float] = field(default_factory=dict)
    """Standard deviation of the logarithm of each uncertain parameter; law parameters by their own name."""
    evidence: dict[str, str] = field(default_factory=dict)
    provenance: str = "class prior"
    elsewhere: dict[str, Any] = field(default_factory=dict)
    """Other parts that compute, by name (kernels.elsewhere.Rates), beside the host's processors."""
    paths: dict[str, Any] = field(default_factory=dict)
    """Ways to farther memories, by name (kernels.elsewhere.Path), beside host, drive and remote."""
    least_sigma: float = 0.0
    """Spread below which no prediction for this machine may fall: that of a class without a measured member."""

    def peak(self, dtype: str) -> float:
        """Dense matrix peak of a dtype, else of the nearest wider one, else the vector rate."""
        for name in _WIDER[dtype]:
            if name in self.matrix:
                return self.matrix[name]
        return self.vector

    def native(self, dtype: str) -> bool:
        """Whether the matrix units multiply this dtype."""
        return dtype in self.matrix

    def matrix_rate(self, dtype: str) -> Num:
        """Achieved matrix FLOP/s of a dtype: peak x efficiency, and a further fraction below 16 bits."""
        narrow = dtype in _NARROW and self.native(dtype)
        return self.peak(dtype) * self.matrix_efficiency * (self.law["narrow_matrix_efficiency"] if narrow else 1.0)

    def with_engine(self, engine: Engine) -> Machine:
        """The same machine driven by an engine: its host times and what its kernels do differently join the law.

        What was calibrated on this device stays.
        """
        mine = {k: p for k, p in engine.parameters.items() if not self.evidence.get(k, "").startswith("calibrated")}
        values = {k: p.value for k, p in mine.items()}
        spread = {k: p.sigma for k, p in mine.items() if p.sigma > 0 and not k.startswith("memory_")}
        return replace(self, law=self.law | values, sigma=self.sigma | spread)

    def part(self, units: float, bandwidth: float = 1.0) -> Machine:
        """A share of the compute units with a share of the memory bandwidth.

        Units that are too few cannot draw the whole bandwidth: each has `row_bytes_per_clock` in flight (Little's law).
        """
        if not 0 < units <= 1:
            raise SpecError(f"a side needs a share of the compute units in (0, 1], got {units:g}")
        drawn = self.bandwidth
        if self.device.compute is not None:
            drawn = min(drawn, units * self.units * self.device.compute.clock * float(self.law["row_bytes_per_clock"]))
        return replace(
            self, units=self.units * units, vector=self.vector * units, exp=self.exp * units,
            matrix={k: v * units for k, v in self.matrix.items()}, bandwidth=min(drawn, self.bandwidth * bandwidth),
        )  # fmt: skip

    def perturbed(self, *, column: bool = False) -> Machine:
        """Rows: the nominal machine, then one row per uncertain parameter with its logarithm raised by one sigma.

        `column`: parameters of shape (rows, 1), to be evaluated against arrays of shapes.
        """
        own = [f.name for f in fields(self)]
        names = list(self.sigma)
        changes: dict[str, Num] = {}
        shared = dict(self.law)
        for row, name in enumerate(names, start=1):
            factor = np.ones(len(names) + 1)
            factor[row] = np.exp(self.sigma[name])
            factor = factor[:, None] if column else factor
            if name in own:
                changes[name] = getattr(self, name) * factor
            else:
                shared[name] = shared[name] * factor
        return replace(self, law=shared, **changes)


_NARROW = ("fp8", "fp6", "fp4", "int8", "int4")

_WIDER = {
    "fp4": ("fp4", "fp8", "bf16", "fp16"),
    "fp6": ("fp6", "fp8", "bf16", "fp16"),
    "fp8": ("fp8", "bf16", "fp16"),
    "int4": ("int4", "int8"),
    "int8": ("int8", "bf16", "fp16"),
    "bf16": ("bf16", "fp16", "tf32"),
    "fp16": ("fp16", "bf16", "tf32"),
    "tf32": ("tf32", "bf16", "fp32"),
    "fp32": ("fp32",),
    "fp64": ("fp64",),
}


@lru_cache(maxsize=256)
def machine(name: str) -> Machine:
    """Build the machine of a device or node by catalogue name, alias or path."""
    spec = catalog.load_hardware(name)
    if isinstance(spec, Node):
        return from_node(spec)
    if not isinstance(spec, Device) or spec.compute is None or spec.memory is None:
        raise SpecError(f"{name!r} is a {spec.kind}: it cannot run a model by itself")
    node = catalog.node_of(spec.name)
    return from_node(catalog.load_node(node)) if node else from_device(spec, None)


calibration.on_change(machine.cache_clear)


def from_node(node: Node) -> Machine:
    """The machine of one node: its devices and how they reach each other."""
    return from_device(catalog.load_device(node.devices.device), node)


def from_device(device: Device, node: Node | None) -> Machine:
    """The machine of a device, alone or in a node. Without a node its own scale-up link is used."""
    c, m = device.compute, device.memory
    if c is None or m is None:
        raise SpecError(f"{device.name!r} is a {device.kind}: it cannot run a model by itself")
    scale_up, host = device.links.get("scale_up"), device.links.get("host")
    fabric, nics = (node.fabric, node.network) if node else (None, None)
    _, link = _fabric(fabric, device)
    found = achieved(device, node)
    shared = calibration.law().everything
    count = node.devices.count if node else 1
    sigma = {k: v.sigma for k, v in shared.items()} | {k: v.parameter.sigma for k, v in found.items()}
    mine = {f.name for f in fields(Machine)}
    own: dict[str, Any] = {k: v.parameter.value for k, v in found.items() if k in mine}
    general = {k: v.parameter.value for k, v in found.items() if k not in mine}
    unknown = set(general) - calibration.kernel_parameter_names()
    if unknown:
        raise SpecError(
            f"the calibration of {device.name} names {sorted(unknown)}: no parameter of a device or the law"
        )
    for key, section in (("bandwidth_efficiency", m), ("matrix_efficiency", c)):
        if section.source == UNVERIFIED:
            sigma[key] = float(np.hypot(sigma[key], _UNVERIFIED_SIGMA))
    return Machine(
        name=node.name if node else device.name,
        device=device,
        node=node,
        matrix={str(k): v for k, v in c.matrix.items()},
        vector=c.vector["fp32"],
        exp=c.units * c.clock * (c.exp_per_unit_clock or c.vector["fp32"] / (c.units * c.clock * 16)),
        units=float(c.units),
        bandwidth=m.bandwidth,
        cache=device.cache.capacity if device.cache else 0.0,
        capacity=m.visible or m.capacity,
        devices_per_node=count,
        link=link,
        p2p=fabric.p2p if fabric else scale_up is not None or device.datacenter_licence,
        in_switch=bool(fabric and fabric.in_switch_reduction),
        network=nics.bandwidth * nics.count / count if nics else 0.0,
        host_link=_to_host(host, node),
        tdp=device.power.tdp if device.power else 0.0,
        node_overhead_power=node.power.overhead if node and node.power else 0.0,
        law={k: p.value for k, p in shared.items()} | general,
        # Power parameters move no time.
        sigma={k: s for k, s in sigma.items() if s > 0 and not k.startswith("power_")},
        evidence={k: v.evidence for k, v in found.items()},
        provenance=_provenance(found),
        least_sigma=_UNMEASURED if found["matrix_efficiency"].parameter.sigma >= _UNMEASURED else 0.0,
        **own,
    )


def achieved(device: Device, node: Node | None) -> dict[str, Resolved]:
    """What the device and its links to others achieve, each number with its evidence."""
    technology, _ = _fabric(node.fabric if node else None, device)
    nics = node.network if node else None
    network = calibration.link_parameters(nics.technology if nics else "ethernet")
    found = calibration.class_parameters(device) | calibration.link_parameters(technology)
    found |= {k.replace("link", "network"): v for k, v in network.items()}
    return found | calibration.own_parameters(device)


def _to_host(port: Any, node: Node | None) -> float:
    """Bytes/s of the link to the host: the device's, or that of the slot a node gives it."""
    if port is None:
        return 0.0
    slot = node.pcie.bandwidth if node and node.pcie else np.inf
    return float(min(port.bandwidth, slot))


def _fabric(fabric: Fabric | None, device: Device) -> tuple[str, float]:
    """Technology and bytes/s per direction of the paths between devices."""
    if fabric is not None and fabric.topology != "none":
        return fabric.technology, fabric.bandwidth
    port = device.links.get("scale_up") or device.links.get("host")
    return (port.technology, port.bandwidth) if port else ("none", 1.0)


def _provenance(found: dict[str, Resolved]) -> str:
    if all(v.evidence.startswith("calibrated") for v in found.values()):
        return "calibrated"
    partly = any(v.evidence.startswith("calibrated") for v in found.values())
    return "partly calibrated" if partly else "datasheet with class priors"
