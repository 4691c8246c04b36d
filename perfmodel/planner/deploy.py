"""A plan as what runs: the deployments that `replay`, `emit`, `estimate` and `report` read."""

from __future__ import annotations

from typing import Any

import numpy as np

from perfmodel.planner.evaluated import Running
from perfmodel.planner.pools import Pool
from perfmodel.spec.choices import Choices
from perfmodel.spec.deployment import Deployment, PoolSpec, Route


def deployment(cell: Running, choices: Choices) -> dict[str, Any]:
    """The pools of one service as a `Deployment`, checked by its own rules."""
    pools = tuple(_pool(x, cell, choices) for x in cell.pools)
    whole = Deployment(
        model=cell.service.model, engine=choices.engine, pools=pools, routing=choices.dealt,
        prefix_caching=choices.prefix_caching, mem_fraction=choices.mem_fraction,
        image=cell.service.workload.image,
    )  # fmt: skip
    return whole.model_dump(mode="json")


def _pool(x: Pool, cell: Running, choices: Choices) -> PoolSpec:
    """A pool, and with which weight each range of inputs comes to it."""
    layout = x.column.layout
    served = [int(k) for k in np.flatnonzero(x.rates > 0)]
    buckets = cell.service.buckets
    # Lengths that the window did not show go to the nearest range.
    ranges: dict[tuple[float, float], float] = {}
    for k in served:
        ends = (buckets[k].low, buckets[k].high)
        ranges[ends] = ranges.get(ends, 0.0) + float(x.rates[k])
    return PoolSpec(
        role=layout.role, hardware=x.column.offer.node.name, replicas=x.replicas, tp=layout.tp, pp=layout.pp, ep=layout.ep,
        dp=layout.dp, cp=layout.cp, weight_dtype=None if layout.weight_dtype == "checkpoint" else layout.weight_dtype,
        kv_dtype=choices.kv_dtype, techniques=layout.techniques, policy=layout.policy, chunk=layout.chunk,
        prefill_share=layout.prefill_share or 0.5,
        encodes=not layout.fed if cell.service.workload.image and layout.role in ("colocated", "prefill") else None,
        encode_share=layout.encode_share,
        input_tokens=(min(buckets[k].low for k in served), max(buckets[k].high for k in served)),
        routes=tuple(Route(input_tokens=ends, share=rate) for ends, rate in ranges.items()),
    )  # fmt: skip
