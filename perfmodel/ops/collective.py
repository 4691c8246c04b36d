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
    name: str, kind: Collective, elements: Num, width: Num, ranks: Num, *, sent: Num | None = None, stride: Num = 1
) -> Op:
    """One collective over `ranks` devices. `sent` overrides the elements each rank sends (sparse all-to-all).

    `stride` is how many devices lie between neighbouring ranks: tensor-parallel ranks are neighbours, context- and
    data-parallel ranks are tp apart, stages tp * dp * cp. It decides whether the group leaves its node.
    """
    share = wire_share(kind, ranks) * elements if sent is None else sent
    return Op(
        name,
        "p2p" if kind == "p2p" else "collective",
        {},
        (Traffic("activations", share, width, path="fabric", direction="write"),),
        {kind: elements * width, "ranks": ranks, "stride": stride},
        launches=1,
        reference="Thakur 2005",
    )
