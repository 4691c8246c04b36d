"""Hardware specs: datasheet facts only. One YAML is one device, one link technology or one node.

What a software stack achieves on a device is a calibration, and what it costs is a price; neither is here.
Every section carries ``source``: a key of ``sources`` (a document somebody opened) or ``unverified``.
``number_sources`` overrides it for single numbers, by path (``compute.matrix.fp8: whitepaper``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from perfmodel.spec.base import (
    UNVERIFIED,
    Bandwidth,
    Count,
    Flops,
    Frequency,
    Money,
    Natural,
    Power,
    Price,
    Size,
    Source,
    Spec,
    Time,
)

Dtype = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp6", "fp4", "int8", "int4"]
DeviceKind = Literal["accelerator", "cpu", "storage", "memory_expander", "pim"]


class Compute(Spec):
    """Peak arithmetic rates of one device, dense, with FP32 accumulation for floating point."""

    source: str
    matrix: dict[Dtype, Flops] = {}
    """Matrix (tensor) units, dense: no structured sparsity. INT8/INT4 in OP/s."""
    matrix_reduced_accumulation: dict[Dtype, Flops] = {}
    """The other published peak where accumulating in FP16 is faster (GeForce)."""
    vector: dict[Dtype, Flops]
    """Vector (CUDA, SIMD) units. At least fp32."""
    units: Count
    """How many independent units share the work: SMs, CUs, tensor cores, AI cores, CPU cores."""
    unit_name: str
    clock: Frequency
    """The clock at which the peaks are quoted (boost clock for GPUs)."""
    exp_per_unit_clock: float | None = None
    """Special-function results (exp, rsqrt) per unit and clock, where published. NVIDIA: 16."""


class Memory(Spec):
    """Main memory of a device."""

    source: str
    technology: Literal[
        "hbm2",
        "hbm2e",
        "hbm3",
        "hbm3e",
        "hbm4",
        "gddr5",
        "gddr6",
        "gddr6x",
        "gddr7",
        "lpddr4x",
        "lpddr5",
        "lpddr5x",
        "ddr4",
        "ddr5",
        "sram",
        "nand",
    ]
    capacity: Size
    """Nominal capacity as sold."""
    visible: Size | None = None
    """What the driver reports to programs, in the ECC state given by `ecc`."""
    ecc: bool | None = None
    bandwidth: Bandwidth


class Cache(Spec):
    """Last-level on-chip cache shared by the units (L2, Infinity Cache, system-level cache)."""

    source: str
    name: str = "l2"
    capacity: Size
    bandwidth: Bandwidth | None = None


class Link(Spec):
    """An external port of the device. Bandwidth is per direction, all lanes of the device together."""

    source: str
    technology: str
    """Name of a hardware/network entry (``nvlink4``, ``pcie5-x16``)."""
    bandwidth: Bandwidth


class DevicePower(Spec):
    """Board power."""

    source: str
    tdp: Power
    idle: Power | None = None


class Storage(Spec):
    """A drive, or the flash side of a computational storage drive."""

    source: str
    capacity: Size
    read: Bandwidth
    write: Bandwidth
    read_latency: Time | None = None
    write_latency: Time | None = None
    random_read_iops: float | None = None
    """4 KiB random reads per second."""
    internal_read: Bandwidth | None = None
    """Flash-to-engine bandwidth inside a computational drive."""


class _Named(Spec):
    name: str
    title: str
    vendor: str
    aliases: tuple[str, ...] = ()
    sources: dict[str, Source] = {}
    number_sources: dict[str, str] = {}
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _sources_exist(self) -> _Named:
        for path, key in self.source_keys().items():
            if key != UNVERIFIED and key not in self.sources:
                raise ValueError(f"{path} cites {key!r}, which is not under sources (nor 'unverified')")
        return self

    def source_keys(self) -> dict[str, str]:
        """Every cited source by path: sections and single numbers."""
        cited = {name: value.source for name, value in self if isinstance(value, Spec) and hasattr(value, "source")}
        for name, value in self:
            if isinstance(value, dict):
                cited |= {f"{name}.{k}": v.source for k, v in value.items() if hasattr(v, "source")}
        return cited | self.number_sources


class Device(_Named):
    """One device: an accelerator, a CPU socket, a drive, a memory expander or a PIM module."""

    kind: DeviceKind
    architecture: str
    """Generation that shares behaviour: volta, turing, ampere, ada, hopper, blackwell, cdna3, tpu-v5, da-vinci …"""
    form_factor: str | None = None
    released: str | None = None
    memory_class: str | None = None
    compute: Compute | None = None
    memory: Memory | None = None
    cache: Cache | None = None
    links: dict[str, Link] = {}
    """By role: ``scale_up`` (NVLink, Infinity Fabric, ICI, HCCS), ``host`` (PCIe, NVLink-C2C, CXL)."""
    power: DevicePower | None = None
    storage: Storage | None = None
    datacenter_licence: bool = True
    """False where the driver licence excludes datacentre use (GeForce)."""

    @model_validator(mode="after")
    def _complete(self) -> Device:
        if self.kind in ("accelerator", "cpu", "pim") and (self.compute is None or self.memory is None):
            raise ValueError(f"a device of kind {self.kind!r} needs 'compute' and 'memory'")
        if self.kind == "storage" and self.storage is None:
            raise ValueError("a device of kind 'storage' needs 'storage'")
        return self


class Network(_Named):
    """A link technology: chip-to-chip, host or cluster."""

    kind: Literal["network"]
    role: Literal["scale_up", "host", "scale_out"]
    bandwidth: Bandwidth
    """Per direction and port (or per device, as `per` says)."""
    per: Literal["port", "device", "lane"] = "port"
    latency: Time | None = None
    """One-way, small message, published figure."""
    rdma: bool = False
    source: str

    def source_keys(self) -> dict[str, str]:
        return {"bandwidth": self.source} | self.number_sources


class Members(Spec):
    """Equal devices in a node."""

    device: str
    count: Count


class Fabric(Spec):
    """How the accelerators of a node reach each other."""

    source: str
    technology: str
    topology: Literal["switch", "mesh", "ring", "torus", "pairs", "pcie", "none"]
    """switch: any-to-any at full rate; mesh: direct links to every peer; pairs: bridges between two;
    pcie: through the host tree."""
    bandwidth: Bandwidth
    """Per device and direction, all peers together."""
    p2p: bool
    """False: device-to-device copies are staged through host memory."""
    in_switch_reduction: bool = False
    """True where the switch can reduce (NVLink SHARP)."""


class Host(Spec):
    """Host CPUs and their memory, the whole node."""

    source: str
    cpu: str
    sockets: Count
    memory: Size
    memory_bandwidth: Bandwidth
    numa_nodes: Count = 1


class PcieTree(Spec):
    """Sharing of the host links."""

    source: str
    technology: str
    bandwidth: Bandwidth
    """Per device and direction."""
    devices_per_switch: Count = 1
    devices_per_root_complex: Count = 1


class Nics(Spec):
    """Cluster network ports of a node."""

    source: str
    technology: str
    count: Natural
    bandwidth: Bandwidth
    """Per NIC and direction."""


class NodePower(Spec):
    """Power of the whole node."""

    source: str
    maximum: Power
    overhead: Power = 0.0
    """What the node draws beside its accelerators (CPUs, fans, NICs), when published or derived."""


class Node(_Named):
    """What one buys or rents: devices, fabric, host, network, storage."""

    kind: Literal["node"]
    devices: Members
    fabric: Fabric
    host: Host | None = None
    pcie: PcieTree | None = None
    network: Nics | None = None
    drives: tuple[Members, ...] = ()
    power: NodePower | None = None


class PriceItem(Spec):
    """The price of one purchase unit."""

    instance: str
    node: str
    """Catalogue node (or device) that the unit contains."""
    units_per_node: Count = 1
    """How many purchase units make one node (1 when the unit is the node)."""
    term: Literal["on-demand", "1y", "3y", "spot", "purchase"]
    price: Price | None = None
    """Per purchase unit and time, for rented terms."""
    capital: Money | None = None
    """For `purchase`: the sum paid per unit."""
    quota: Count | None = None
    source: str

    @model_validator(mode="after")
    def _one_price(self) -> PriceItem:
        if (self.price is None) == (self.capital is None):
            raise ValueError("give either 'price' (rented) or 'capital' (bought)")
        return self


class PriceList(Spec):
    """Dated prices of one provider and region. Prices are not datasheet facts and age."""

    kind: Literal["prices"]
    provider: str
    region: str
    currency: Literal["USD"] = "USD"
    date: str
    """ISO date on which the prices were true."""
    sources: dict[str, Source]
    items: tuple[PriceItem, ...]
    amortisation: Time | None = None
    """For purchased nodes: straight-line life."""
    host_and_power: Price | None = None
    """Added per node-hour for owned nodes: rack, power, staff."""
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _sources_exist(self) -> PriceList:
        for item in self.items:
            if item.source != UNVERIFIED and item.source not in self.sources:
                raise ValueError(
                    f"{item.instance} cites {item.source!r}, which is not under sources (nor 'unverified')"
                )
        return self
