"""Keys and values outside device memory: which tier holds what, and how a step gets at it."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.kernels.elsewhere import rates, tier_capacity
from perfmodel.machine import Machine
from perfmodel.ops.cache import DEVICE, Cache, Run, Scan, Segment, split_newest, split_oldest
from perfmodel.ops.cached import Site, cache_site, copy, edited
from perfmodel.ops.shard import Group, Parallelism, Shard
from perfmodel.ops.traffic import Op
from perfmodel.spec.model import Attention, Block, LatentAttention, Model
from perfmodel.symbols import Num, maximum, minimum
from perfmodel.techniques.base import Technique, edit_ops, knob, require_cache


class KvOffload(Technique):
    """A share of the cached tokens (the oldest) or of the requests lies in a farther tier, and a step fetches what it reads.

    Bytes on the link per step = tokens x read x (1 - hit) x width x wire; a piece of `page` bytes costs what the path
    costs at that size. `ahead` of them are asked for a layer early and hide behind its other work, the rest make it wait.
    New keys and values of what lies outside are written out, beside the reads where the link is `duplex`. The device
    keeps `buffers` layers (FlexGen, arXiv:2303.06865) or groups of `head_group` KV heads (HeadInfer, arXiv:2502.12574)
    to fetch into, and the copies that serve hits. With `on: cpu` attention runs where the keys are and only queries and
    partial outputs travel, in line (MagicPIG, arXiv:2410.16179) or `beside` the device's work for others (FastDecode,
    arXiv:2403.11421). `recompute`: of this share the layer's inputs are fetched instead and projected again (ALISA,
    arXiv:2403.17312), 2 x hidden x kv elements FLOPs a token. `far_share` lies in a third tier; `summary` elements per
    `chunk` tokens stand beside it and are fetched to choose (LeoAM, arXiv:2506.20187). `codes`: low-bit copies of all
    keys on the device, scanned to choose the share `read`. `columns: v` leaves the keys (ShadowKV, arXiv:2410.21465).
    `packed`: processors gather scattered rows into one buffer before they leave, so many bytes of host memory traffic each.
    """

    kind: ClassVar[str] = "kv-offload"
    reference: ClassVar[str] = "arXiv:2303.06865"
    order: ClassVar[float] = 0.5
    excludes: ClassVar[dict[str, str]] = {"in-storage-attention": "both say where the cache lies"}

    share: float = knob(1.0, "share of the tokens (or requests) outside device memory", low=0, high=1)
    by: Literal["tokens", "requests"] = knob("tokens", "what is divided: the oldest tokens of each sequence, or requests")
    tier: str = knob("host", "where they lie: host, drive, remote, or a path the machine was given")
    columns: Literal["kv", "k", "v"] = knob("kv", "what goes outside: keys and values, or one of them")
    read: float = knob(1.0, "share of the outside tokens that one step reads", low=0.00001, high=1)
    recent: int = knob(0, "newest tokens that always stay on the device", "token", low=0, high=10_000_000)
    sinks: int = knob(0, "first tokens that always stay on the device", "token", low=0, high=100_000)
    hit: float = knob(0.0, "share of what is read outside that copies on the device serve", low=0, high=1)
    copies: float | None = knob(None, "share of the outside tokens with such a copy; none: the hits of one step", low=0, high=1)
    page: float = knob(0.0, "bytes of one contiguous piece; 0: a layer's at once", "byte", low=0, high=1e9)
    packed: float = knob(0.0, "host memory traffic of gathering, over the bytes fetched (read, written: 3 with the line filled)",
                         low=0, high=100)  # fmt: skip
    ahead: float = knob(1.0, "share of the fetches asked for a layer ahead", low=0, high=1)
    duplex: bool = knob(True, "new keys and values go out beside what comes in")
    wire: float = knob(1.0, "bytes on the way over stored bytes (compressed on the way)", low=0.01, high=1)
    wire_unpack: float = knob(0.0, "vector operations per element to expand what arrived compressed", "op", low=0, high=256)
    buffers: int = knob(2, "buffers on the device that fetches go to", "1", low=0, high=256)
    head_group: int = knob(0, "KV heads fetched and attended at a time; 0: the whole layer", "1", low=0, high=1024)
    on: Literal["", "cpu"] = knob("", "where attention over them runs; empty: on the device")
    beside: bool = knob(False, "attention on the CPU runs beside the device's work for other requests")
    gather: float = knob(1.0, "share of the memory rate that the CPU reaches on the rows it reads", low=0.01, high=1)
    recompute: float = knob(0.0, "share of the outside tokens restored from the layer's inputs", low=0, high=1)
    far: str = knob("drive", "third tier")
    far_share: float = knob(0.0, "share of the tokens outside (the oldest) in the third tier", low=0, high=1)
    chunk: int = knob(0, "tokens of one chunk with a summary; 0: no summaries", "token", low=0, high=65536)
    summary: float = knob(0.5, "elements of a summary over those of one token's keys and values", low=0.001, high=4)
    codes: float = knob(0.0, "bits per coded element of copies on the device; 0: none", "bit", low=0, high=16)
    coded: float = knob(0.5, "share of a token's cached elements that are coded (keys: 0.5)", low=0.001, high=1)

    def effects(self) -> Literal["exact", "lossy"]:
        # Where things lie changes no answer; what is chosen by codes or summaries does.
        return "lossy" if self.codes or self.chunk or self.read < 1 else "exact"

    def cache(self, cache: Cache, site: Site) -> Cache:
        if self.share == 0:
            return cache
        cache = cache if self.columns == "kv" else cache.apart()
        if self.by == "requests" and self.share < 1:
            outside, here = cache.divided(self.share)
            cache = replace(cache, runs=(*(self._moved(r, 1.0, site) for r in outside), *here))
        else:
            share = 1.0 if self.by == "requests" else self.share
            cache = cache.each(lambda run: self._moved(run, share, site))
        if self.chunk:
            tier = self.far if self.far_share else self.tier
            cache = cache.with_scan(Scan("summaries", self.summary / self.chunk, site.width, tier=tier,
                                         heads=self.share * (self.far_share or 1.0), pick=1 / self.chunk))  # fmt: skip
        if self.codes:
            cache = cache.with_scan(Scan("codes", self.coded, self.codes / 8, heads=self.share))
        return cache

    def _moved(self, run: Run, share: float, site: Site) -> Run:
        """The run with its old tokens outside; the first `sinks` and newest `recent` stay."""
        if self.columns not in ("kv", run.columns):
            return replace(run, segments=tuple(replace(s, read=s.read * self.read) for s in run.segments))
        first, rest = split_oldest(run.segments, self.sinks) if self.sinks else ([], list(run.segments))
        rest, last = split_newest(tuple(rest), self.recent) if self.recent else (rest, [])
        tokens = sum((s.tokens for s in rest), start=0.0)
        outside, here = split_oldest(tuple(rest), share * tokens) if share < 1 else (rest, [])
        far, near = split_oldest(tuple(outside), self.far_share * share * tokens) if self.far_share else ([], outside)
        placed = [part for s, tier in ((*((s, self.far) for s in far), *((s, self.tier) for s in near)))
                  for part in self._placed(s, tier, site)]  # fmt: skip
        return replace(run, segments=(*first, *placed, *here, *last))

    def _placed(self, s: Segment, tier: str, site: Site) -> list[Segment]:
        s = replace(s, read=s.read * self.read)
        if self.on:
            return [replace(s, tier=tier, on=self.on, aside=self.beside, amplified=s.amplified / self.gather)]
        streamed = self.buffers / site.layers * (minimum(self.head_group / site.kv_heads, 1.0) if self.head_group else 1.0)
        moved = replace(
            s, tier=tier, near=self.hit, page=self.page, wire=s.wire * self.wire, unpack=s.unpack + self.wire_unpack,
            held=minimum((self.copies if self.copies is not None else self.hit * s.read) + streamed, 1.0),
        )  # fmt: skip
        parts = []
        for again, some in ((False, 1 - self.recompute), (True, self.recompute)):
            for ahead, part in ((True, self.ahead), (False, 1 - self.ahead)):
                if some * part > 0:
                    split = replace(moved, tokens=s.tokens * some * part, ahead=ahead)
                    parts.append(self._inputs(split, site) if again else split)
        return parts

    def _inputs(self, s: Segment, site: Site) -> Segment:
        """The layer's inputs of these tokens, from which keys and values are projected again."""
        return replace(s, elements=site.hidden / site.kv_elements, width=site.wide, rebuild=2 * site.hidden * site.kv_elements)

    def layer(self, ops: list[Op], block: Block, shard: Shard) -> list[Op]:
        mixer = block.mixer
        if self.share == 0 or not isinstance(mixer, (Attention, LatentAttention)) or getattr(mixer, "shares_kv", False):
            return ops
        site = cache_site(mixer, shard.block, shard.hidden, shard.layers, shard.par, shard.formats)
        stores = [op for i, group in enumerate(shard.groups) for op in self._written(group, site, shard, i)]
        if self.packed:
            ops = [x for op in ops for x in (*self._gathered(op), op)]
        if self.head_group and not self.on:
            passes = maximum(site.kv_heads / self.head_group, 1.0)
            ops = edit_ops(ops, lambda op: op.kind == "attention" and op.name.startswith("attention"),
                           lambda op: replace(op, launches=op.launches * passes))  # fmt: skip
        return [*ops, *stores]

    def _gathered(self, op: Op) -> list[Op]:
        """What the processors do before a fetch from host memory."""
        if op.kind != "copy" or op.traffic[0].tensor != "kv" or (op.traffic[0].path, op.traffic[0].direction) != ("host", "read"):
            return []
        traffic = (replace(op.traffic[0], elements=op.traffic[0].elements * self.packed, path="cpu"),)
        return [Op(f"{op.name}_packed", "elsewhere", {}, traffic, {}, launches=0, contextual=op.contextual, on="cpu",
                   aside=op.aside)]  # fmt: skip

    def _written(self, group: Group, site: Site, shard: Shard, i: int) -> list[Op]:
        """New keys and values of this rank on their way out: what the tiers store more of after this pass than before."""
        before = self._outside(edited(shard.formats, site, group.c), site)
        after = self._outside(edited(shard.formats, site, group.c + group.q), site)
        ops = []
        for tier, (elements, size) in after.items():
            earlier = before.get(tier, (0.0, 0.0))
            fresh, moved = maximum(elements - earlier[0], 0.0), maximum(size - earlier[1], 0.0)
            out = copy(f"kv_store_{tier}_{i}", tier, group.n * fresh / site.cp, moved / maximum(fresh, 1e-9), direction="write",
                       aside=True)  # fmt: skip
            # Half duplex: writes wait for the reads.
            ops.append(out if self.duplex else replace(out, aside=False))
        return ops

    def _outside(self, cache: Cache, site: Site) -> dict[str, tuple[Num, Num]]:
        """Elements and bytes of one sequence by farther tier."""
        found: dict[str, tuple[Num, Num]] = {}
        for run in cache.runs:
            for s in run.segments:
                if s.tier != DEVICE and s.owned:
                    elements = s.tokens * run.heads * (1.0 if run.columns == "kv" else 0.5) * s.elements * site.kv_elements
                    had = found.get(s.tier, (0.0, 0.0))
                    found[s.tier] = (had[0] + elements, had[1] + elements * s.width * s.wire)
        return found

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.share == 0:
            return
        require_cache(self.kind, model)
        if self.on or self.packed:
            rates(self.on or "cpu", machine)
        for tier in {self.tier} | ({self.far} if self.far_share else set()):
            require_path(machine, tier)


def require_path(machine: Machine, tier: str) -> None:
    """Raise SpecError where this machine has no way to a tier, naming those it has."""
    ways = [*machine.paths]
    node = machine.node
    ways += ["host"] if machine.device.links.get("host") is not None and machine.host_link else []
    # A node without a host of its own shares the device's memory with it: its drives read into that memory.
    ways += ["drive"] if node is not None and node.drives and (machine.host_link or node.host is None) else []
    ways += ["remote"] if machine.network else []
    if tier not in ways or tier_capacity(machine, tier) <= 0:
        raise SpecError(f"{machine.name} has no way to {tier!r}; known: {', '.join(ways) or 'none'}")
