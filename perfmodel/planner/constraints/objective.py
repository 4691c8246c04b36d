"""What is minimised, as expressions that limits share."""

from __future__ import annotations

import pulp

from perfmodel.planner.program import USD_PER_HOUR, Program


def define_objective(p: Program) -> None:
    """Set the objective: one of `money`, `devices`, `power` (mean), `carbon`, `latency`, or -goodput; excesses if elastic."""
    if p.elastic:
        p.problem.setObjective(pulp.lpSum(p.excess.values()))
        return
    p.problem.setObjective(expression(p, p.question.objective))


def expression(p: Program, objective: str) -> pulp.LpAffineExpression:
    """An objective of the program by name, in the unit of `program.UNITS`."""
    if objective == "cost":
        return money(p)
    if objective == "devices":
        return devices(p)
    if objective == "power":
        return _mean(p, [power(p, period) for period in p.periods])
    if objective == "carbon":
        return carbon(p)
    if objective == "latency":
        return latency(p)
    assert p.theta is not None
    return -p.question.rate * p.theta


def _mean(p: Program, parts: list[pulp.LpAffineExpression]) -> pulp.LpAffineExpression:
    return pulp.lpSum(share * part for share, part in zip(p.question.shares, parts, strict=True))


def money(p: Program) -> pulp.LpAffineExpression:
    """sum_p share_p (sum_t,m price[t,m] N[t,m,p] + sum_t electricity_t W[t,p]) [USD/h]."""
    total = []
    for t, offer in enumerate(p.question.offers):
        for period in p.periods:
            share = p.question.shares[period]
            for m, tariff in enumerate(offer.paid):
                hourly = (tariff.price or 0.0) * USD_PER_HOUR * offer.block
                total.append(share * hourly * p.nodes[t, m, period])
            if offer.site.electricity is not None:
                total.append(share * offer.site.electricity * USD_PER_HOUR * watts(p, t, period))
    return pulp.lpSum(total)


def devices(p: Program) -> pulp.LpAffineExpression:
    """sum_p share_p sum_t D_t N[t,p]."""
    every = [
        pulp.lpSum(o.devices * p.bought(t, period) for t, o in enumerate(p.question.offers)) for period in p.periods
    ]
    return _mean(p, every)


def watts(p: Program, t: int, period: int) -> pulp.LpAffineExpression:
    """W[t,p] = PUE (idle_t N[t,p] + sum_i (P_i - d_i idle device) n[i]): nodes idle, and what running instances add [W].

    idle_t is the node's overhead and its devices at rest; P_i are the devices of an instance at its operating point.
    """
    offer = p.question.offers[t]
    busy = pulp.lpSum(
        ((c.power_w or 0.0) - c.layout.devices * offer.idle_device) * p.n[i] for i, c in p.on(t, period)
    )
    return offer.site.pue * ((offer.idle_power or 0.0) * p.bought(t, period) + busy)


def power(p: Program, period: int, region: str | None = None) -> pulp.LpAffineExpression:
    """sum_t W[t,p] over the offers of a region, or all of them [W]."""
    chosen = [t for t, o in enumerate(p.question.offers) if region is None or o.region == region]
    return pulp.lpSum(watts(p, t, period) for t in chosen)


def carbon(p: Program) -> pulp.LpAffineExpression:
    """sum_p share_p sum_t intensity_t W[t,p] [g/h]."""
    total = []
    for t, offer in enumerate(p.question.offers):
        for period in p.periods:
            rate = p.question.shares[period] * 3600 * (offer.site.carbon or 0.0)
            total.append(rate * watts(p, t, period))
    return pulp.lpSum(total)


def latency(p: Program) -> pulp.LpAffineExpression:
    """sum_p share_p sum_i,k y[i,k] L[i,k] / mean rate: the mean over requests of a percentile of their pool's latency [s].

    L is TTFT and the steps of the bucket's mean output x TPOT, each at the percentile; of a prefill entry the first, of a
    decode entry the second.
    """
    total = []
    places: dict[int, int] = {}
    for i, entry in enumerate(p.entries):
        j = places.get(entry.group, 0)
        places[entry.group] = j + 1
        share = p.question.shares[entry.period] / p.question.rate
        total += [share * float(entry.demand.latency[j][k]) * p.y[i, k] for k in entry.column.buckets if (i, k) in p.y]
    return pulp.lpSum(total)
