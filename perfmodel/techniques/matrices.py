"""Edits of matrix products and of shares of heads that several techniques make."""

from __future__ import annotations

from dataclasses import replace

from perfmodel.ops.cached import Site
from perfmodel.ops.shard import Group
from perfmodel.ops.traffic import Op
from perfmodel.symbols import Num, ceil, minimum


def with_rows(op: Op, ratio: Num) -> Op:
    """A product with `ratio` times as many outputs: FLOPs, stored matrix and what is written follow."""
    traffic = tuple(
        replace(t, elements=t.elements * ratio) if t.tensor == "weights" or t.direction == "write" else t for t in op.traffic
    )
    flops = {unit: count * ratio for unit, count in op.flops.items()}
    return replace(op, flops=flops, traffic=traffic, shape={**op.shape, "n": op.shape["n"] * ratio})


def with_columns(op: Op, ratio: Num) -> Op:
    """A product with `ratio` times as many inputs: FLOPs, stored matrix and what is read follow."""
    traffic = tuple(
        replace(t, elements=t.elements * ratio) if t.tensor == "weights" or t.direction == "read" else t for t in op.traffic
    )
    flops = {unit: count * ratio for unit, count in op.flops.items()}
    return replace(op, flops=flops, traffic=traffic, shape={**op.shape, "k": op.shape["k"] * ratio})


def fullest_share(share: float, site: Site, balanced: bool = True) -> Num:
    """Share of a rank's KV heads that are of one kind, on the rank that has most of them.

    share x H heads, whole ones, are dealt to the ranks in turn, or (not balanced) lie next to each other.
    """
    heads = getattr(site.mixer, "kv_heads", 1)
    marked = round(share * heads)
    mine = ceil(marked * site.kv_heads / heads) if balanced else minimum(marked, site.kv_heads)
    return minimum(mine / site.kv_heads, 1.0)


def seen_share(site: Site, cached: Num, most: Num) -> Num:
    """Share of a prefill's causal query-key pairs left where no query meets more than `most` keys.

    sum of min(c + i, most) over sum of min(c + i, W), i = 1..q; W: the layer's own window, if any.
    """
    group = Group(1, site.new, cached)
    window = getattr(site.mixer, "window", None)
    return group.pairs(most if window is None else minimum(most, window), True) / group.pairs(window, True)
