"""What is infeasible, and the nearest change that would be feasible."""

from __future__ import annotations

from dataclasses import replace

from perfmodel.errors import Infeasible
from perfmodel.planner import constraints
from perfmodel.planner.columns import Column, Enumerator
from perfmodel.planner.offer import Offer
from perfmodel.planner.solver import solve


def no_column(found: Enumerator) -> Infeasible:
    """No layout meets the objectives even without load, or none holds the model."""
    timed = [r for r in found.rejected if r.best == r.best]
    if not timed:
        kept = {r.layout.node: r for r in found.rejected}
        listed = "; ".join(f"{r.layout.label} {r.reason}" for r in kept.values())
        return Infeasible(
            f"no layout on the fleet list holds the model: {listed}",
            nearest="devices with more memory, a narrower weight format, or a larger tp or pp",
            binding=("memory",),
        )
    metrics = sorted({r.metric for r in timed})
    parts, changes = [], []
    for metric in metrics:
        best = min((r for r in timed if r.metric == metric), key=lambda r: r.best)
        name, p = metric.split(".")
        parts.append(f"{name.upper()} {p}: {best.layout.label}, {best.reason}")
        changes.append(f"{name.upper()} {p} of {best.best * 1.05 * 1e3:,.0f} ms ({best.layout.label})")
    return Infeasible(
        "no layout meets the objectives, the best being " + "; ".join(parts),
        nearest=" and ".join(changes),
        binding=tuple(metrics),
    )


def too_few_nodes(chosen: list[Column], fleet: list[Offer], rates: list[float], objective: str) -> Infeasible:
    """The listed nodes run out: how many it would take, or which share of the load they carry."""
    unlimited = [replace(o, max_nodes=None) for o in fleet]
    by_name = {o.node.name: o for o in unlimited}
    columns = [replace(c, offer=by_name[c.offer.node.name]) for c in chosen]
    program = constraints.build(columns, unlimited, rates, objective)
    solution = solve(program.problem, time_limit=10.0, gap=1e-2)
    limits = ", ".join(f"{o.max_nodes} {o.node.name}" for o in fleet if o.max_nodes is not None)
    if not solution.ok:
        return Infeasible("no mixture of the columns carries the load", binding=("load",))
    wanted = [
        f"{round(solution.values[f'N_{t}'])} {o.node.name} (max_nodes {o.max_nodes})"
        for t, o in enumerate(fleet)
        if o.max_nodes is not None and solution.values[f"N_{t}"] > o.max_nodes + 0.5
    ]
    return Infeasible(
        f"{sum(rates):.2f} requests/s do not fit on {limits}",
        nearest=f"{' and '.join(wanted)}",
        binding=tuple(f"available {o.node.name}" for o in fleet if o.max_nodes is not None),
    )
