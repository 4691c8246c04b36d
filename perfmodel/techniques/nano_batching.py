"""Parts of a batch that go through a layer side by side, so that what one computes hides what another moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.machine import Machine
from perfmodel.ops.shard import Group, Shard
from perfmodel.ops.traffic import Op
from perfmodel.schedule import EVERYTHING, Node, Par, Repeat, Seq
from perfmodel.symbols import Num, floor, maximum, minimum
from perfmodel.techniques.base import Technique, knob


class NanoBatching(Technique):
    """`parts` nano-batches run through each layer at once; every one reads the weights again.

    hide ``all``: T = max(one part alone, sum over parts of each resource's seconds) x interference (NanoFlow,
    arXiv:2408.12757). hide ``network``: the device takes the parts in turn while exchanges of another travel,
    T = max(sum of kernels, sum of exchanges) x interference (two-batch overlap: DeepSeek-V3, arXiv:2412.19437, 3.2;
    CloudMatrix384, arXiv:2506.12708). Decode divides its sequences, causal prefill its tokens (a later part attends the
    earlier ones); a batch with fewer of them than `parts` divides into as many as there are. `units`: share of the
    compute units that exchange kernels hold, which other kernels lack [20 of 132 in DeepSeek-V3].
    """

    kind: ClassVar[str] = "nano-batching"
    reference: ClassVar[str] = "arXiv:2408.12757"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"
    order: ClassVar[int] = 5
    excludes: ClassVar[dict[str, str]] = {
        "chunked-prefill": "both cut a prompt's tokens: give the chunk alone",
    }

    parts: int = knob(2, "nano-batches", low=1, high=8)
    hide: Literal["all", "network"] = knob("all", "what overlaps: every resource, or exchanges only")
    interference: float = knob(1.0, "time of kernels that share a device over the ideal overlap", low=1, high=4)
    units: float = knob(0.0, "share of the compute units held by exchange kernels", low=0, high=0.9)

    def machine(self, machine: Machine) -> Machine:
        return machine.part(1 - self.units) if self.units else machine

    def arrange(self, build: Callable[[Shard], Node], shard: Shard) -> Node:
        if self.parts == 1:
            return build(shard)
        many = self._parts(shard)
        pieces: list[Node] = [
            Repeat(build(replace(shard, groups=tuple(piece(g, many, i, shard.causal) for g in shard.groups))),
                   minimum(maximum(many - i, 0), 1))
            for i in range(self.parts)
        ]  # fmt: skip
        if self.hide == "all":
            beside: Node = Par(tuple(pieces), EVERYTHING, self.interference, "nano-batches")
        else:
            lanes = (Seq(tuple(only(p, exchange=own) for p in pieces)) for own in (False, True))
            beside = Par(tuple(lanes), (), self.interference, "two-batch")
        # One part alone has nothing to hide behind.
        divided = minimum(many - 1, 1)
        return Seq((Repeat(beside, divided), Repeat(pieces[0], 1 - divided)))

    def _parts(self, shard: Shard) -> Num:
        """Whole parts that every group can be divided into."""
        many: Num = self.parts
        for g in shard.groups:
            many = minimum(many, maximum(floor(g.n if by_sequence(g, shard.causal) else g.q), 1))
        return many


def by_sequence(group: Group, causal: bool) -> bool:
    """Whether a group is divided by sequences: where each token attends every other, and in decode."""
    return group.decode or not causal


def piece(group: Group, many: Num, i: int, causal: bool) -> Group:
    """Part i of `many` of a group; what is fetched for the group is fetched with the first."""
    loads = group.loads if i == 0 else ()
    if by_sequence(group, causal):
        return replace(group, n=group.n / many, loads=group.loads)
    return replace(group, q=group.q / many, c=group.c + i * group.q / many, loads=loads)


def only(node: Node, *, exchange: bool) -> Node:
    """A part of a schedule with its collectives alone, or without them."""
    match node:
        case Op():
            return node if (node.kind in ("collective", "p2p")) == exchange else Seq(())
        case Repeat():
            return replace(node, body=only(node.body, exchange=exchange))
        case Seq():
            parts = (only(x, exchange=exchange) for x in node.items)
            return replace(node, items=tuple(x for x in parts if x != Seq(())))
        case Par():
            return replace(node, branches=tuple(only(x, exchange=exchange) for x in node.branches))
