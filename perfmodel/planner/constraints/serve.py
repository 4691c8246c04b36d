"""What must be served, and how embeddings get from encode to prefill and caches from prefill to decode."""

from __future__ import annotations

import numpy as np
import pulp

from perfmodel.planner.columns import Column, carries_images
from perfmodel.planner.program import Program


def define_serve_all(p: Program) -> None:
    """For every demand and bucket k: sum over colocated and prefill entries of y[i,k] = theta rate_k.

    theta is 1 unless the objective is goodput.
    """
    for g in p.groups:
        demand = p.question.demands[g]
        flows = _flows(p, g, ("colocated", "prefill"))
        for k, rate in enumerate(demand.rates):
            if rate > 0:
                served = pulp.lpSum(flows.get((k, region), []) for region in p.regions)
                wanted = rate if p.theta is None else rate * p.theta
                p.problem += served == wanted, f"serve_{g}_{k}{p.suffix}"


def define_handover(p: Program) -> None:
    """For every demand, bucket k and region: sum over prefill entries of y[i,k] = sum over decode entries of y[i,k].

    Cache does not leave a region.
    """
    for g in p.groups:
        demand = p.question.demands[g]
        before, after = _flows(p, g, ("prefill",)), _flows(p, g, ("decode",))
        for k in range(len(demand.rates)):
            for r, region in enumerate(p.regions):
                given, taken = before.get((k, region), []), after.get((k, region), [])
                if given or taken:
                    p.problem += pulp.lpSum(given) == pulp.lpSum(taken), f"handover_{g}_{k}_{r}{p.suffix}"


def define_transfer(p: Program) -> None:
    """For every prefill and decode entry i: sum_k y[i,k] kv_bytes[k] <= achieved NIC bytes/s of its devices x n[i].

    Both ends are rows of their own, so a pair of unequal node types moves no more than the slower end.
    """
    for g in p.groups:
        demand = p.question.demands[g]
        sent = [c.moved_bytes for _, c in p.of(g) if c.layout.role == "prefill"]
        if not sent:
            continue
        # What a decode entry receives depends on the sender's format; the widest one is counted.
        received = np.max(sent, axis=0)
        for i, c in p.of(g):
            if c.layout.role in ("prefill", "decode"):
                moved = c.moved_bytes if c.layout.role == "prefill" else received
                flow = pulp.lpSum(moved[k] / 1e9 * p.y[i, k] for k in c.buckets if demand.rates[k] > 0)
                p.problem += flow <= port_rate(c) / 1e9 * p.n[i], f"transfer_{i}{p.suffix}"


def define_encoding(p: Program) -> None:
    """For every demand, bucket k with images, region and share f of TTFT: sum over entries that encode pools of that share feed
    of y[i,k] = sum over those encode entries of y[i,k].

    So the images that are encoded are those that are prefilled. An entry without such requests needs no encode entry.
    """
    for g in p.groups:
        rates = p.question.demands[g].rates
        sides: dict[tuple[int, str, float], tuple[list[pulp.LpVariable], list[pulp.LpVariable]]] = {}
        for i, c in p.of(g):
            for k in c.buckets:
                if rates[k] > 0 and carries_images(c, k):
                    pair = sides.setdefault((k, c.offer.region, c.layout.encode_share), ([], []))
                    pair[c.layout.role == "encode"].append(p.y[i, k])
        for (k, region, share), (fed, encoding) in sides.items():
            name = f"encode_{g}_{k}_{p.regions.index(region)}_{round(1000 * share)}{p.suffix}"
            p.problem += pulp.lpSum(fed) == pulp.lpSum(encoding), name


def define_embeddings(p: Program) -> None:
    """For every encode entry i, and every one that it feeds: sum_k y[i,k] embedding_bytes[k] <= achieved NIC bytes/s of its
    devices x n[i]."""
    for i in p.keep:
        c = p.entries[i].column
        if c.embedded_bytes is not None:
            flow = pulp.lpSum(c.embedded_bytes[k] / 1e9 * p.y[i, k] for k in c.buckets if (i, k) in p.y)
            p.problem += flow <= port_rate(c) / 1e9 * p.n[i], f"embeddings_{i}{p.suffix}"


def port_rate(c: Column) -> float:
    """Bytes per second that the NICs of one instance's devices achieve."""
    m = c.offer.machine
    return float(m.network * m.network_efficiency * c.layout.devices)


def _flows(p: Program, group: int, roles: tuple[str, ...]) -> dict[tuple[int, str], list[pulp.LpVariable]]:
    """Flow variables of some roles by bucket and region."""
    found: dict[tuple[int, str], list[pulp.LpVariable]] = {}
    rates = p.question.demands[group].rates
    for i, c in p.of(group):
        if c.layout.role in roles:
            for k in c.buckets:
                if rates[k] > 0:
                    found.setdefault((k, c.offer.region), []).append(p.y[i, k])
    return found
