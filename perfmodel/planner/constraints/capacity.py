"""What an instance can do at its operating point: three linear rows that carry the physics."""

from __future__ import annotations

import numpy as np
import pulp

from perfmodel.planner.columns import Column
from perfmodel.planner.program import Program


def rooms(c: Column) -> list[tuple[str, np.ndarray, float]]:
    """(row, demand per request [bucket], capacity of one instance) of a column; rows that its role lacks are left out.

    Static batches have the first alone: their places and their cache are reserved until the longest answer ends. So have
    encode instances, which keep no cache.
    """
    if c.layout.policy == "static" or c.layout.role == "encode":
        return [("prefill", c.prefill_s, c.state.utilisation)]
    found = []
    if c.layout.role != "decode":
        found.append(("prefill", c.prefill_s, c.state.utilisation))
    if c.layout.role != "prefill":
        found.append(("decode", c.decode_s, c.state.batch))
    return [*found, ("cache", c.kv_token_s, c.kv_limit)]


def row_title(c: Column, row: str) -> str:
    """What a row of a column is called where it binds."""
    if row == "prefill":
        return "encode time" if c.layout.role == "encode" else "batch time" if c.layout.policy == "static" else "prefill time"
    return {"decode": "decode batch", "cache": "cached tokens"}[row]


def define_prefill_time(p: Program) -> None:
    """For every entry i that prefills or encodes: sum_k y[i,k] prefill_s[i,k] <= u_i n[i]."""
    _define(p, "prefill")


def define_decode_batch(p: Program) -> None:
    """For every entry i that decodes: sum_k y[i,k] (output - 1) tau_i <= b_i n[i] (Little's law)."""
    _define(p, "decode")


def define_cache(p: Program) -> None:
    """For every entry i: sum_k y[i,k] kv_token_seconds[i,k] <= M_i n[i]."""
    _define(p, "cache")


def _define(p: Program, name: str) -> None:
    for i in p.keep:
        for row, demand, room in rooms(p.entries[i].column):
            if row == name:
                # Scaled so that one instance is one: the solver then sees rows of like size.
                flow = pulp.lpSum(v * (demand[k] / room) for k, v in flows(p, i)) if room > 0 else None
                p.problem += (flow <= p.n[i] if flow is not None else p.n[i] == 0), f"{name}_{i}{p.suffix}"


def define_link(p: Program) -> None:
    """For every entry i and bucket k whose whole rate is less than one instance's work: y[i,k] <= theta rate_k n[i].

    It follows from n being whole, and tells the relaxation so: small fleets are proved much faster. Left out where theta varies.
    """
    if p.theta is not None:
        return
    for i in p.keep:
        entry = p.entries[i]
        needs = rooms(entry.column)
        for k, v in flows(p, i):
            rate = entry.demand.rates[k]
            if all(need[k] * rate < room for _, need, room in needs):
                p.problem += v <= rate * p.n[i], f"link_{i}_{k}{p.suffix}"


def flows(p: Program, i: int) -> list[tuple[int, pulp.LpVariable]]:
    """(bucket, flow variable) of one entry."""
    return [(k, p.y[i, k]) for k in p.entries[i].column.buckets if (i, k) in p.y]
