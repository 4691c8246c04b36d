"""Matrix-vector products where the weights (or the cache) lie: in memory banks, or in compute-in-memory macros."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError
from perfmodel.kernels.elsewhere import Path, Rates
from perfmodel.machine import Machine
from perfmodel.ops.cache import DEVICE, Cache
from perfmodel.ops.cached import Site, copy
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op, Residency, Traffic
from perfmodel.spec.model import Block, Model
from perfmodel.symbols import maximum
from perfmodel.techniques.base import Quality, Technique, knob

PLACE = "pim"


class NearMemory(Technique):
    """Products of weights, attention or both run in `count` memory modules (PIM-GPT, arXiv:2310.09385; AttAcc).

    seconds = max(weight bytes x max(rows / reuse, 1) / (count x bank rate x utilisation), FLOPs / (count x FLOP/s)) +
    input bytes / one module's bus (every module gets all of it) + output bytes / (count x bus). Units in banks multiply
    one vector at a time, so the gain goes with the batch; CIM macros keep a tile for all vectors (`reuse`), but stream it
    from device memory (`source: device`, EdgeCIM, arXiv:2604.11512). `apart`: the modules have a capacity of their own.
    Joules beside the device's power = byte_energy x those weight bytes + mac_energy x FLOPs / 2 (perfmodel.cost.pass_energy).
    """

    kind: ClassVar[str] = "near-memory"
    reference: ClassVar[str] = "arXiv:2310.09385"
    order: ClassVar[float] = 0.6
    quality: ClassVar[Quality] = "exact"
    excludes: ClassVar[dict[str, str]] = {
        "near-memory": "a machine has one set of memory modules; place=both",
        "in-storage-attention": "both take attention from the device",
        "activation-sparsity": "banks read whole rows",
    }

    place: Literal["weights", "attention", "both"] = knob("weights", "what runs there")
    module: str = knob("gddr6-aim", "catalogue name of the memory module that computes")
    count: int = knob(8, "modules of one device", "1", low=1, high=4096)
    utilisation: float = knob(1.0, "share of the bank rate that the mapping of matrices to banks reaches", low=0.01, high=1)
    bandwidth: float = knob(0.0, "bytes/s of one module's banks; 0: the catalogue's", "byte/s", low=0, high=1e15)
    flops: float = knob(0.0, "FLOP/s of one module; 0: the catalogue's", "FLOP/s", low=0, high=1e18)
    source: Literal["banks", "device"] = knob("banks", "where weights are read: in the banks, or streamed from device memory")
    reuse: float = knob(1.0, "vectors that meet a weight once it is read", "1", low=1, high=1e9)
    passes: Literal["decode", "all"] = knob("decode", "passes that run there")
    byte_energy: float = knob(0.0, "joules per byte read in the arrays, activation of its row included; 0: not counted", "J/byte",
                              low=0, high=1)  # fmt: skip
    mac_energy: float = knob(0.0, "joules per multiply-accumulate there; 0: not counted", "J", low=0, high=1)
    apart: bool = knob(False, "weights or cache lie in the modules and not in the device's own memory")

    def cache(self, cache: Cache, site: Site) -> Cache:
        if self.place == "weights":
            return cache
        tier = PLACE if self.apart else DEVICE
        return cache.each(lambda run: replace(run, segments=tuple(
            replace(s, tier=tier, on=PLACE) if s.tier == DEVICE else s for s in run.segments)))  # fmt: skip

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        if self.place == "attention" or (self.passes == "decode" and not all(g.decode for g in shard.groups)):
            return ops
        return [x for op in ops for x in (self._moved(op) if _weighted(op) else [op])]

    def _moved(self, op: Op) -> list[Op]:
        rows = op.shape["m"]
        stored = tuple(
            Traffic(t.tensor, t.elements * maximum(rows / self.reuse, 1.0), t.width, PLACE)
            for t in op.traffic if t.tensor in ("weights", "experts")
        )  # fmt: skip
        ways = {"read": 0.0, "write": 0.0}
        for t in op.traffic:
            if t.tensor == "activations":
                ways[t.direction] = ways[t.direction] + t.elements * t.width
        flops = {unit: f for unit, f in op.flops.items() if unit not in ("vector", "exp")}
        work = replace(op, kind="elsewhere", flops=flops, traffic=stored, launches=0, on=PLACE)
        # Every module is given the whole input; each has its part of the output.
        sent = copy(f"{op.name}.in", PLACE, ways["read"], 1, tensor="activations", direction="write", contextual=op.contextual)
        back = copy(f"{op.name}.out", PLACE, ways["write"], 1, tensor="activations", contextual=op.contextual)
        return [sent, work, back]

    def stored(self, stored: list[Residency], model: Model, par: Parallelism) -> list[Residency]:
        if not self.apart or self.place == "attention":
            return stored
        return [replace(r, tier=PLACE) if "." in r.name and r.tier == DEVICE else r for r in stored]

    def machine(self, machine: Machine) -> Machine:
        module = catalog.load_device(self.module)
        port = module.links.get("host")
        if module.kind != "pim" or module.compute is None or module.memory is None or port is None:
            known = [n for n in catalog.names("hardware") if catalog.load_hardware(n).kind == "pim"]
            raise SpecError(f"near-memory: {self.module!r} is no memory that computes; known: {', '.join(known)}")
        banks = self.count * (self.bandwidth or module.memory.bandwidth)
        if self.source == "device":
            banks = machine.bandwidth
        rate = self.flops or max(module.compute.matrix.values(), default=module.compute.vector["fp32"])
        found = calibration.link_parameters(port.technology)
        bus = port.bandwidth * found["link_efficiency"].parameter.value
        there = Rates(banks * self.utilisation, self.count * rate, most_bandwidth=banks, joules_per_byte=self.byte_energy,
                      joules_per_flop=self.mac_energy / 2)  # fmt: skip
        room = self.count * module.memory.capacity if self.apart else np.inf
        way = Path(bus * self.count, bus, found["link_latency"].parameter.value, capacity=room)
        return replace(machine, elsewhere=machine.elsewhere | {PLACE: there}, paths=machine.paths | {PLACE: way})

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.apart and self.place != "attention" and self.passes == "decode":
            raise SpecError("near-memory: weights that lie apart cannot be read by the device: passes=all or apart=false")


def _weighted(op: Op) -> bool:
    """A product of stored weights."""
    products = op.kind in ("gemm", "grouped_gemm")
    return products and any(t.tensor in ("weights", "experts") for t in op.traffic)
