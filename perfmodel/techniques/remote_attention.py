"""Attention over parts of a context that other instances hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.errors import SpecError
from perfmodel.kernels.elsewhere import Path, Rates
from perfmodel.machine import Machine
from perfmodel.ops.cache import Cache, Run, split_oldest, stored_tokens
from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Parallelism, Shard
from perfmodel.ops.traffic import Op
from perfmodel.schedule import Node, Par, Repeat, Seq, operators
from perfmodel.spec.model import Model
from perfmodel.techniques.base import Technique, knob, require_cache

_LENDERS = "lenders"
_WAY = "lenders-link"


class RemoteAttention(Technique):
    """A share of the cached tokens, oldest first, lies in the memory of other devices that attend it there.

    Per layer queries travel and partial outputs with their softmax statistics return: n (heads d + heads (d + 2)) elements
    instead of keys and values; T = max(local part, remote bytes / (lenders x bandwidth) + 2 latencies)
    (Infinite-LLM, arXiv:2401.02669). Lenders are devices like this one; what they lose of their own batch is theirs.
    """

    kind: ClassVar[str] = "remote-attention"
    reference: ClassVar[str] = "arXiv:2401.02669"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"
    order: ClassVar[int] = 2

    share: float = knob(0.0, "share of the cached tokens held by others", low=0, high=1)
    lenders: float = knob(1.0, "devices that hold them, per device of this instance", low=0.01, high=1024)
    bandwidth: float | None = knob(None, "bytes/s per direction to them; none: the network's", "byte/s", low=1, high=1e15)
    latency: float | None = knob(None, "seconds of one message; none: the network's", "s", low=0, high=10)

    def check(self, model: Model, machine: Machine, par: Parallelism) -> None:
        require_cache(self.kind, model)
        if self.share and self.bandwidth is None and not machine.network:
            raise SpecError(f"remote-attention: {machine.name} has no network; give bandwidth and latency of the way to lenders")

    def machine(self, machine: Machine) -> Machine:
        if not self.share:
            return machine
        wide = self.bandwidth if self.bandwidth is not None else machine.network * float(machine.network_efficiency)
        latency = self.latency if self.latency is not None else float(machine.network_latency)
        lent = Rates(
            self.lenders * machine.bandwidth * float(machine.bandwidth_efficiency),
            self.lenders * machine.peak("bf16") * float(machine.attention_efficiency),
            float(machine.kernel_latency),
        )
        paths = machine.paths | ({_WAY: Path(wide, wide, latency)} if wide else {})
        return replace(machine, elsewhere=machine.elsewhere | {_LENDERS: lent}, paths=paths)

    def cache(self, cache: Cache, site: Site) -> Cache:
        return cache.each(self._lent) if self.share else cache

    def _lent(self, run: Run) -> Run:
        away, mine = split_oldest(run.segments, self.share * stored_tokens(run))
        return replace(run, segments=(*(replace(s, tier=_WAY, on=_LENDERS) for s in away), *mine))

    def arrange(self, build: Callable[[Shard], Node], shard: Shard) -> Node:
        return beside(build(shard)) if self.share else build(shard)


def beside(node: Node) -> Node:
    """Remote attention, with the messages around it, at the same time as the local one that follows it."""
    match node:
        case Repeat():
            return replace(node, body=beside(node.body))
        case Par():
            return replace(node, branches=tuple(beside(b) for b in node.branches))
        case Seq():
            items: list[Node] = []
            away: list[Node] = []
            for item in node.items:
                new = beside(item)
                if isinstance(item, Op) and (item.on == _LENDERS or any(t.path == _WAY for t in item.traffic)):
                    away.append(new)
                elif away and any(op.kind in ("attention", "latent_attention") for op, _, _ in operators(item)):
                    items.append(Par((new, Seq(tuple(away)))))
                    away = []
                else:
                    items += [*away, new]
                    away = []
            return replace(node, items=(*items, *away))
    return node
