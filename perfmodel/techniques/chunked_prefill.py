"""A prompt in chunks: what cutting one prefill costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

from perfmodel.ops.shard import Shard
from perfmodel.schedule import Node, Repeat, Seq
from perfmodel.symbols import Num, maximum
from perfmodel.techniques.base import Technique, knob


class ChunkedPrefill(Technique):
    """q prompt tokens pass each layer in q / chunk pieces; every piece reads the weights and all earlier keys again.

    FLOPs and query-key pairs stay; bytes = (q / chunk) x weights + keys and values of c + q / 2 tokens for each later
    chunk (Sarathi-Serve, arXiv:2403.02310). A view of the work of one prompt: which decode steps carry the chunks, and
    layered prefill, are policies of perfmodel.serving (batching, layered). Host time is that of one step.
    """

    kind: ClassVar[str] = "chunked-prefill"
    reference: ClassVar[str] = "arXiv:2403.02310"
    quality: ClassVar[Literal["exact", "lossy"]] = "exact"
    order: ClassVar[int] = 5

    chunk: int = knob(0, "tokens of one chunk; 0: the whole prompt at once", "token", low=0, high=10_000_000)

    def arrange(self, build: Callable[[Shard], Node], shard: Shard) -> Node:
        if not self.chunk or not shard.causal or all(g.decode for g in shard.groups):
            return build(shard)
        many: Num = 1.0
        for g in shard.groups:
            if not g.decode:
                many = maximum(many, g.q / self.chunk)
        first = tuple(g if g.decode else replace(g, q=g.q / many) for g in shard.groups)
        # Chunk i attends c + i chunk cached tokens: all but the first, at their mean of c + q / 2.
        later = tuple(
            replace(a, c=g.c + g.q / 2, loads=()) for a, g in zip(first, shard.groups, strict=True) if not g.decode
        )
        return Seq((build(replace(shard, groups=first)), Repeat(build(replace(shard, groups=later)), many - 1)))
