"""Collectives and point-to-point copies between the devices of an instance.

`message` is the buffer in bytes: per rank for all-reduce and all-to-all, the gathered whole for all-gather and
reduce-scatter. The traffic is what each rank must put on its link in one direction (Thakur et al., "Optimization of
Collective Communication Operations in MPICH", 2005; NCCL's bus-bandwidth convention); the algorithm and
its latency are chosen by the roofline from message, ranks and topology.
"""

from __future__ import annotations

from typing import Literal

from perfmodel.ops.traffic import Op, Traffic
from perfmodel.symbols import Num

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"]


def wire_share(kind: Collective, ranks: Num) -> Num:
    """Bytes each rank sends per byte of message (as measured by `busbw` conventions)."""
    match kind:
        case "all_reduce":
            return 2 * (ranks - 1) / ranks
        case "all_gather" | "reduce_scatter" | "all_to_all":
            return (ranks - 1) / ranks
        case "p2p":
            return 1


def collective(
    name: str,
    kind: Collective,
    elements: Num,
    width: Num,
    ranks: Num,
    *,
    sent: Num | None = None,
    stride: Num = 1,
    library: bool = False,
    eager: bool = False,
) -> Op:
    """One collective over `ranks` devices. `sent` overrides the elements each rank sends (sparse all-to-all).

    `stride` is how many devices lie between neighbouring ranks: tensor-parallel ranks are neighbours, context- and
    data-parallel ranks are tp apart, stages tp * dp * cp. It decides whether the group leaves its node. The launch
    regime: inside a captured graph with the engine's own kernels at hand; `library`: a collective library alone;
    `eager`: called by a framework without a graph, so that the host's call takes its time too.
    """
    share = wire_share(kind, ranks) * elements if sent is None else sent
    regime = {k: 1 for k, on in (("library", library), ("eager", eager)) if on}
    return Op(
        name,
        "p2p" if kind == "p2p" else "collective",
        {},
        (Traffic("activations", share, width, path="fabric", direction="write"),),
        {kind: elements * width, "ranks": ranks, "stride": stride, **regime},
        launches=1,
        reference="Thakur 2005",
    )


def exchange(
    name: str,
    tokens: Num,
    hidden: Num,
    width: Num,
    *,
    top_k: Num,
    experts: Num,
    ranks: Num,
    visited: Num,
    nodes_visited: Num,
    combine: bool,
    stride: Num = 1,
    units: Num = 20,
    low_latency: bool | None = None,
) -> Op:
    """Expert dispatch (or combine) of `tokens` tokens of each rank, `hidden` elements of `width` bytes each.

    `visited` and `nodes_visited`: distinct ranks and nodes a token reaches (`ops.moe.distinct_ranks`). `units`: SMs the
    normal kernels may use, 20 in DeepSeek-V3. `low_latency`: those kernels (True), the normal ones (False), or the
    faster (None).
    """
    away = tokens * hidden * visited * (ranks - 1) / ranks
    kernel = {} if low_latency is None else {"low_latency": int(low_latency)}
    return Op(
        name,
        "collective",
        {},
        (Traffic("activations", away, width, path="fabric", direction="write"),),
        {
            "exchange": tokens * hidden * width, "tokens": tokens, "top_k": top_k, "experts": experts, "ranks": ranks,
            "visited": visited, "nodes_visited": nodes_visited, "combine": int(combine), "stride": stride,
            "units": units, **kernel,
        },
        reference="arXiv:2412.19437, 3.2",
    )  # fmt: skip
