"""Limits on the whole fleet and on each site."""

from __future__ import annotations

import pulp

from perfmodel.planner.constraints import objective
from perfmodel.planner.program import USD_PER_HOUR, LimitRow, Program


def define_budget(p: Program) -> None:
    """Mean spend: `objective.money` <= budget [USD/h]."""
    budget = p.question.limits.budget
    if budget is not None:
        p.limit(objective.money(p), LimitRow("budget", budget * USD_PER_HOUR, "USD/h"), "budget")


def define_devices(p: Program) -> None:
    """In every period: sum_t D_t N[t,p] <= devices."""
    most = p.question.limits.devices
    if most is not None:
        for period in p.periods:
            used = pulp.lpSum(o.devices * p.bought(t, period) for t, o in enumerate(p.question.offers))
            p.limit(used, LimitRow("devices", most, "devices"), f"devices_{period}")


def define_power(p: Program) -> None:
    """In every period: watts of all offers <= power, and watts of each region's offers <= its power [kW, PUE included]."""
    caps: list[tuple[str | None, str, float | None]] = [(None, "power", p.question.limits.power)]
    regions = dict.fromkeys(o.region for o in p.question.offers)
    sites = {o.region: o.site for o in p.question.offers}
    caps += [(r, f"power of {r}", sites[r].power) for r in regions]
    for j, (region, label, most) in enumerate(caps):
        if most is not None:
            for period in p.periods:
                row = LimitRow(label, most / 1e3, "kW")
                p.limit(objective.power(p, period, region) * 1e-3, row, f"power_{j}_{period}")


def define_carbon(p: Program) -> None:
    """`objective.carbon` <= carbon [kg/h]."""
    most = p.question.limits.carbon
    if most is not None:
        p.limit(objective.carbon(p) * 1e-3, LimitRow("carbon", most * 3.6, "kg/h"), "carbon")


def define_spot_share(p: Program) -> None:
    """For every demand and role: sum over its spot entries and buckets of y[i,k] <= share x sum of all that role's y[i,k].

    Colocated and prefill entries count as one role: each request starts at one of them.
    """
    share = p.question.limits.spot_share
    if share >= 1 or not any(o.spot for o in p.question.offers):
        return
    for g, demand in enumerate(p.question.demands):
        for name, roles in (("first token", ("colocated", "prefill")), ("decode", ("decode",)), ("encode", ("encode",))):
            mine = [(c.offer.spot, v) for i, c in p.of(g) if c.layout.role in roles for v in _flows(p, i)]
            spot = pulp.lpSum(v for is_spot, v in mine if is_spot)
            whole = pulp.lpSum(v for _, v in mine)
            if any(is_spot for is_spot, _ in mine):
                # Counted in shares of the demand, so that one per cent more reads as such.
                row = LimitRow(f"spot share of {demand.service or 'requests'} ({name})", share, "of the requests", row=0.0)
                total = sum(demand.rates)
                p.limit((spot - share * whole) * (1 / total), row, f"spot_{g}_{roles[0]}")


def _flows(p: Program, i: int) -> list[pulp.LpVariable]:
    return [p.y[i, k] for k in p.entries[i].column.buckets if (i, k) in p.y]
