"""Tiers that can hold a prefix cache: what fits in each, how fast its content reaches a device, from the catalogue.

Amounts are in tokens of the model's cache and for the whole fleet. A replica that takes part of a node gets that part of the
node's host memory and drives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from perfmodel import calibration, catalog, memory, units
from perfmodel.errors import SpecError, did_you_mean
from perfmodel.estimator import Estimator
from perfmodel.kernels.transfer import drives, host_copy_seconds
from perfmodel.spec.hardware import Device, Node

NAMES = ("hbm", "dram", "cxl", "ssd", "csd", "remote")
_DAY = 86400.0


@dataclass(frozen=True)
class Tier:
    """One place for cached blocks. hbm is what a hit costs nothing from."""

    name: str
    title: str
    capacity: float
    """Tokens, the fleet together."""
    read: float
    """Tokens per second, the fleet together."""
    write: float
    """The same, into the tier; what the drives' endurance allows, where given, is included."""
    fetch: float
    """Seconds per token for one request alone."""
    latency: float
    """Seconds before the first byte of a request's fetch."""
    token_bytes: float
    """Bytes a token takes here."""
    usd_per_gb_month: float | None = None

    @property
    def bytes(self) -> float:
        return self.capacity * self.token_bytes


@dataclass(frozen=True)
class Path:
    """What moves a cached token of one instance."""

    devices: int
    """Devices among which a rank's cache is cut."""
    device_bytes: float
    """Bytes of a token on each of them."""
    token_bytes: float
    """Bytes of a token stored once."""
    node_share: float
    """Nodes (or part of one) that an instance takes."""

    @staticmethod
    def of(e: Estimator, block: int) -> Path:
        ranks = int(e.par.dp)
        held = float(memory.cache_bytes(e.model, e.par, e.formats, ranks, block))
        per_node = e.machine.devices_per_node
        once = memory.kv_bytes_per_token(e.model, e.formats)
        return Path(int(e.par.devices) // ranks, held / block, once, int(e.par.devices) / per_node)


def tiers(
    e: Estimator, replicas: int, block: int, hbm_tokens: float, wanted: Mapping[str, str] | None = None,
    *, gb_prices: Mapping[str, float] | None = None, drive_writes_per_day: float | None = None,
) -> list[Tier]:  # fmt: skip
    """Tiers of `replicas` instances, fastest first.

    block: tokens that one transfer holds at least. hbm_tokens: room beside the running batch of one replica. wanted: by
    tier name, a size ("1 TB") or drives or expanders of the catalogue ("8xsmartssd") per node; of hbm per replica, of
    remote the whole pool; "0" leaves one out. Host memory and drives of the node are there unless left out. gb_prices: USD
    per GB-month. drive_writes_per_day: full writes that the drives' endurance allows.
    """
    wanted, gb_prices = dict(wanted or {}), dict(gb_prices or {})
    for name in (*wanted, *gb_prices):
        if name not in NAMES:
            raise SpecError(f"no tier is called {name!r}{did_you_mean(name, NAMES)}; there are: {', '.join(NAMES)}")
    path = Path.of(e, block)
    if path.token_bytes <= 0:
        raise SpecError(f"{e.model.name} caches no keys and values, so there is no prefix to place")
    found = [_hbm(path, replicas, hbm_tokens, wanted.get("hbm"))]
    node = e.machine.node
    defaults = {"dram": "node", "ssd": "node"} if node is not None else {}
    for name in NAMES[1:]:
        text = wanted.get(name, defaults.get(name, "0")).strip()
        if text == "0":
            continue
        if node is None:
            raise SpecError(f"tier {name}: {e.machine.name} stands in no node of the catalogue; name a node")
        made = _remote(e, path, replicas, text) if name == "remote" else _local(name, e, node, path, replicas, text, block)
        if made is not None:
            found.append(_worn(made, name, drive_writes_per_day))
    priced = [replace(t, usd_per_gb_month=gb_prices.get(t.name)) for t in found if t.capacity > 0]
    return sorted(priced, key=lambda t: t.fetch)


def _worn(t: Tier, name: str, writes_per_day: float | None) -> Tier:
    """Flash may be written its capacity so many times a day."""
    if writes_per_day is None or name not in ("ssd", "csd"):
        return t
    return replace(t, write=min(t.write, t.capacity * writes_per_day / _DAY))


def _hbm(path: Path, replicas: int, tokens: float, text: str | None) -> Tier:
    held = path.device_bytes * path.devices
    each = tokens if text is None else _size("hbm", text) / held
    return Tier("hbm", "device memory beside the running batch", replicas * each, np.inf, np.inf, 0.0, 0.0, held)


def _size(name: str, text: str) -> float:
    try:
        value = 0.0 if text == "0" else units.parse(text, "size")
    except ValueError as error:
        raise SpecError(f"tier {name}: {error}") from None
    if value < 0:
        raise SpecError(f"tier {name}: {text!r} is negative")
    return value


@dataclass(frozen=True)
class _Store:
    """What stands behind the host link of a node: bytes, bytes/s out and in, seconds before the first byte."""

    title: str
    capacity: float
    read: float
    write: float
    latency: float


def _local(name: str, e: Estimator, node: Node, path: Path, replicas: int, text: str, block: int) -> Tier | None:
    """Host memory, expanders and drives: a fetch takes the slower of the store and the host links."""
    store = _store(name, node, text, path.token_bytes * block / e.model.n_layers)
    if store is None:
        return None
    uplinks = node.pcie.devices_per_switch if node.pcie else 1
    start = float(host_copy_seconds(e.machine, 0.0))
    per_byte = float(host_copy_seconds(e.machine, 1.0)) - start
    # Devices behind one switch share its uplink: those of the rank alone, or all of the node's.
    alone = path.device_bytes * per_byte * min(path.devices, uplinks)
    together = path.device_bytes * per_byte * min(e.machine.devices_per_node, uplinks)
    ranks, nodes = replicas * int(e.par.dp), replicas * path.node_share
    read, write = (nodes * rate / path.token_bytes for rate in (store.read, store.write))
    return Tier(
        name, store.title, nodes * store.capacity / path.token_bytes, min(read, ranks / together), min(write, ranks / together),
        max(alone, path.token_bytes / store.read), start + store.latency, path.token_bytes,
    )  # fmt: skip


_COUNTED = re.compile(r"(?:(\d+)\s*x\s*)?([A-Za-z][\w.-]*)")


def _store(name: str, node: Node, text: str, message: float) -> _Store | None:
    if name == "dram":
        if node.host is None:
            if text == "node":
                return None
            raise _missing(name, node, "host memory")
        size = node.host.memory if text == "node" else _size(name, text)
        reach = node.host.memory_bandwidth * _ddr_efficiency()
        return _Store(f"host memory of {node.name}", size, reach, reach, 0.0)
    counted = _COUNTED.fullmatch(text) if text != "node" else None
    if counted:
        count, device = int(counted[1] or 1), catalog.load_device(counted[2])
    else:
        if name == "cxl":
            raise SpecError(f"tier cxl: write expanders of the catalogue, such as 8xcxl-expander, got {text!r}")
        mine = [(m.count, catalog.load_device(m.device)) for m in node.drives]
        mine = [(n, d) for n, d in mine if d.architecture.endswith("csd") == (name == "csd")]
        if not mine:
            if text == "node":
                return None
            raise _missing(name, node, "such drives")
        count, device = mine[0]
    made = _expander(device, count) if name == "cxl" else _flash(name, device, count, message)
    size = made.capacity if counted or text == "node" else _size(name, text)
    if size > made.capacity * (1 + 1e-9):
        raise SpecError(f"tier {name}: {text} is more than the {units.show(made.capacity, 'size')} of {made.title}")
    return _Store(made.title, size, made.read, made.write, made.latency)


def _missing(name: str, node: Node, what: str) -> SpecError:
    return SpecError(f"tier {name}: {node.name} has no {what} in the catalogue; write COUNTxDEVICE, such as 8xnvme-gen4")


def _flash(name: str, device: Device, count: int, message: float) -> _Store:
    """Drives behind their own ports, each request `message` bytes and many in flight."""
    if device.storage is None:
        raise SpecError(f"tier {name}: {device.name!r} is not a drive")
    out, into = drives(device, count, write=False), drives(device, count, write=True)
    port = count * device.links["host"].bandwidth if "host" in device.links else np.inf
    read, write = (min(message / float(d.seconds(message, np.inf, False)), port) for d in (out, into))
    return _Store(f"{count} x {device.name}", count * device.storage.capacity, read, write, out.latency)


def _expander(device: Device, count: int) -> _Store:
    port = device.links.get("host")
    if device.kind != "memory_expander" or device.memory is None or port is None:
        raise SpecError(f"tier cxl: {device.name!r} is no memory expander")
    found = calibration.link_parameters(port.technology)
    rate = count * min(device.memory.bandwidth * _ddr_efficiency(), port.bandwidth * found["link_efficiency"].parameter.value)
    return _Store(
        f"{count} x {device.name}", count * device.memory.capacity, rate, rate, found["link_latency"].parameter.value
    )


@lru_cache(maxsize=1)
def _ddr_efficiency() -> float:
    return float(calibration.classes().memory["ddr"]["bandwidth_efficiency"].value)


calibration.on_change(_ddr_efficiency.cache_clear)


def _remote(e: Estimator, path: Path, replicas: int, text: str) -> Tier:
    """A pool of memory on other machines, reached over the replicas' own ports; its own ports are taken to be enough."""
    m = e.machine
    if not m.network:
        raise SpecError(f"tier remote: {m.name} has no network to another node")
    rate = float(m.network * m.network_efficiency)
    seconds = path.device_bytes / rate
    ranks = replicas * int(e.par.dp)
    return Tier(
        "remote", "pool over the network", _size("remote", text) / path.token_bytes, ranks / seconds, ranks / seconds, seconds,
        float(m.network_latency), path.token_bytes,
    )  # fmt: skip
