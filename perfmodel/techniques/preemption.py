"""Requests that give way: their caches leave the device and come back, move to another instance, or are rebuilt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.machine import Machine
from perfmodel.ops.cached import cache_site, edited, stored_cache
from perfmodel.ops.shard import Group, Parallelism, Shard
from perfmodel.ops.traffic import Op, Traffic, read, write
from perfmodel.schedule import Node, Par, Repeat, Seq
from perfmodel.spec.model import Model
from perfmodel.symbols import Num
from perfmodel.techniques.base import Draft, Quality, Round, Technique, knob


class Preemption(Technique):
    """Each running sequence is preempted `rate` times per decode pass: n x rate events a step.

    swap: its cached bytes go to `tier` and come back, in pieces of `piece` bytes that the host asks for every `issue` seconds
    at most; the share `kept` of them that the tier still holds from before is not written again (FastSwitch,
    arXiv:2411.18424). migrate: they go to another instance once, over the network (Llumnix, arXiv:2406.03243). recompute:
    the context is computed again. `overlap`: share of the copying beside the pass: step = max(pass, overlapped) + the rest.
    """

    kind: ClassVar[str] = "preemption"
    reference: ClassVar[str] = "arXiv:2411.18424"
    by_layer: ClassVar[bool] = False
    quality: ClassVar[Quality] = "exact"

    how: Literal["swap", "migrate", "recompute"] = knob("swap", "what becomes of the cache")
    rate: float = knob(0.0, "preemptions per sequence and decode pass", low=0, high=1)
    piece: float = knob(0.0, "bytes of one copy; 0: a layer at once", "byte", low=0, high=1e12)
    issue: float = knob(0.0, "seconds the host takes to ask for one piece; 0: those of a launch", "s", low=0, high=1)
    kept: float = knob(0.0, "share of the cache that the tier still holds", low=0, high=1)
    overlap: float = knob(0.0, "share of the copying that runs beside the pass", low=0, high=1)
    tier: Literal["host", "drive", "remote"] = knob("host", "where a swapped cache goes")

    def whole(self, items: list[Node], shard: Shard) -> list[Node]:
        if not self.rate or self.how == "recompute":
            return items
        events: list[Node] = []
        for group in shard.groups:
            if group.decode:
                events.append(Repeat(Seq(tuple(self._copies(group, shard))), group.n * self.rate, "preemption"))
        if not events:
            return items
        beside = [Repeat(e, self.overlap) for e in events]
        waiting = [Repeat(e, 1 - self.overlap) for e in events]
        whole = Seq(tuple(items), "pass")
        together = Par((whole, Seq(tuple(beside))), ("hbm", "host_link")) if self.overlap else whole
        return [together, *waiting]

    def _copies(self, group: Group, shard: Shard) -> Iterator[Op]:
        """One sequence's cache, layer by layer, on its way out and back."""
        tier = "remote" if self.how == "migrate" else self.tier
        for name, count in shard.model.block_counts().items():
            size = count * _held(shard, name, count, group.c)
            out, back = Traffic("kv", size * (1 - self.kept), 1, tier, "write"), Traffic("kv", size, 1, tier)
            shape = {"page": self.piece if self.piece else size / count, "issue": self.issue}
            yield Op(f"preempt_{name}", "copy", {}, (out, read("kv", size * (1 - self.kept), 1)), shape, contextual=True)
            if self.how == "swap":
                yield Op(f"resume_{name}", "copy", {}, (back, write("kv", size, 1)), shape, contextual=True)

    def round(self, round_: Round, batch: Num) -> Round:
        if not self.rate or self.how != "recompute":
            return round_
        again = Draft("", batch * self.rate, techniques=None, prompt=True)
        return replace(round_, before=(*round_.before, again))

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        if self.rate and self.how == "migrate" and not machine.network:
            raise SpecError(f"preemption: {machine.name} has no network to another instance; how=swap or how=recompute")


def _held(shard: Shard, name: str, layers: Num, tokens: Num) -> Num:
    """Bytes on the device of one layer's cache of one sequence."""
    mixer = shard.model.blocks[name].mixer
    if mixer is None or mixer.kind not in ("attention", "latent"):
        return 0.0
    site = cache_site(mixer, name, shard.hidden, layers, shard.par, shard.formats)
    cache = edited(shard.formats, site, tokens, owned=not getattr(mixer, "shares_kv", False))
    return sum((r.bytes for r in stored_cache(cache, site) if r.tier == "hbm"), start=0.0)
