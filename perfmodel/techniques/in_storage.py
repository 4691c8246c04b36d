"""Attention inside drives that compute: the cache lies in flash, queries go there and outputs come back."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from perfmodel import calibration, catalog
from perfmodel.errors import SpecError
from perfmodel.kernels.elsewhere import Path, Rates
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache, Run, Segment, split_newest
from perfmodel.ops.cached import Site, cache_site, copy, edited
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op
from perfmodel.spec.model import Attention, Block, LatentAttention, Model
from perfmodel.symbols import Num, maximum, minimum
from perfmodel.techniques.base import Technique, knob, require_cache

PLACE = "csd"
FLASH = "csd_flash"


class InStorageAttention(Technique):
    """Decode attention runs in `drives` computational drives that hold the cache (InstInfer, arXiv:2409.04992).

    seconds = max(bytes x amplification / (drives x internal rate), FLOPs / (drives x FLOP/s), exponentials / (drives x
    exp/s)) + (q + partial o) bytes over the peer-to-peer way; new keys and values are written to flash beside the step.
    The drive reads whole pages of P bytes: rows of w bytes of which a share r is chosen at random touch
    1 - (1 - r)^(P/w) of the pages, amplification that over r; 1 where whole pages are chosen (`aligned`).
    Capacity is that of the flash: nothing of it lies in device memory.
    """

    kind: ClassVar[str] = "in-storage-attention"
    reference: ClassVar[str] = "arXiv:2409.04992"
    order: ClassVar[float] = 0.5

    drive: str = knob("instcsd", "catalogue name of the drive")
    drives: int = knob(1, "drives of one device", "1", low=1, high=64)
    flops: float = knob(12.7e9, "matrix-vector FLOP/s of one drive", "FLOP/s", low=1e6, high=1e15)
    exps: float = knob(0.0, "exponentials/s of one drive's softmax engine; 0: not a limit", "1/s", low=0, high=1e15)
    latency: float = knob(1e-4, "seconds before a call to the drives begins (command, first page)", "s", low=0, high=1)
    selected: float = knob(1.0, "share of the cached tokens that the drive chooses to attend", low=0.0001, high=1)
    aligned: bool = knob(True, "what is chosen fills whole pages")
    page: float = knob(4096.0, "bytes of a flash page", "byte", low=512, high=1e6)
    amplification: float | None = knob(None, "flash bytes read over bytes wanted; none: from pages", low=1, high=1000)
    recent: int = knob(0, "newest tokens that stay on the device", "token", low=0, high=10_000_000)
    beside: bool = knob(False, "runs beside the device's work for other requests")

    def effects(self) -> Literal["exact", "lossy"]:
        return "lossy" if self.selected < 1 else "exact"

    def cache(self, cache: Cache, site: Site) -> Cache:
        return cache.each(lambda run: self._moved(run, site))

    def _moved(self, run: Run, site: Site) -> Run:
        old, last = split_newest(run.segments, self.recent) if self.recent else (list(run.segments), [])
        return replace(run, segments=(*(self._placed(s, site) for s in old), *last))

    def _placed(self, s: Segment, site: Site) -> Segment:
        share = s.read * self.selected
        more = self.amplification
        if more is None:
            # A row is one head's key or value of a token.
            row = site.kv_elements / site.kv_heads / (1 if site.kv_heads == 1 and site.mixer.kind == "latent" else 2) * s.width
            rows = maximum(self.page / row, 1.0)
            more = 1.0 if self.aligned else (1 - (1 - share) ** rows) / share
        return replace(s, tier=PLACE, on=PLACE, aside=self.beside, read=share, amplified=s.amplified * more)

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        mixer = block.mixer
        if not isinstance(mixer, (Attention, LatentAttention)) or getattr(mixer, "shares_kv", False):
            return ops
        site = cache_site(mixer, shard.block, shard.hidden, shard.layers, shard.par, shard.formats)
        found = []
        for i, group in enumerate(shard.groups):
            before, after = (_held(edited(shard.formats, site, t), site) for t in (group.c, group.c + group.q))
            size = group.n * maximum(after - before, 0.0) / site.cp
            found.append(copy(f"kv_store_{PLACE}_{i}", FLASH, size, 1, direction="write", aside=True))
        return [*ops, *found]

    def machine(self, machine: Machine) -> Machine:
        device = catalog.load_device(self.drive)
        drive, port = device.storage, device.links.get("host")
        if drive is None or drive.internal_read is None or port is None:
            raise SpecError(f"in-storage-attention: {self.drive!r} is no drive that computes; try drive=instcsd or smartssd")
        if not machine.host_link:
            raise SpecError(f"in-storage-attention: the catalogue has no link between {machine.device.name} and drives")
        mine = machine.device.links["host"].technology if "host" in machine.device.links else port.technology
        ways = [(self.drives * port.bandwidth, port.technology), (machine.host_link, mine)]
        rate = min(r * calibration.link_parameters(t)["link_efficiency"].parameter.value for r, t in ways)
        latency = calibration.link_parameters(port.technology)["link_latency"].parameter.value
        room = self.drives * drive.capacity
        n = self.drives
        engine = Rates(n * drive.internal_read, n * self.flops, self.latency, exp=n * self.exps)
        flash = Path(n * drive.read, min(n * drive.write, rate), latency, capacity=room)
        return replace(
            machine,
            elsewhere=machine.elsewhere | {PLACE: engine},
            paths=machine.paths | {PLACE: Path(rate, rate, latency, capacity=room), FLASH: flash},
        )

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        require_cache(self.kind, model)


def _held(cache: Cache, site: Site) -> Num:
    """Bytes of one sequence and layer in the drives."""
    return sum(
        (minimum(s.tokens, np.inf) * run.heads * (1.0 if run.columns == "kv" else 0.5) * s.elements * site.kv_elements * s.width
         for run in cache.runs for s in run.segments if s.tier == PLACE and s.owned),
        start=0.0,
    )  # fmt: skip
