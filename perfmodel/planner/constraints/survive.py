"""Loss of a failure domain: what is left still serves everything."""

from __future__ import annotations

from dataclasses import replace

import pulp

from perfmodel.planner.columns import Column
from perfmodel.planner.constraints.capacity import define_cache, define_decode_batch, define_prefill_time
from perfmodel.planner.constraints.nodes import footprint, most_instances
from perfmodel.planner.constraints.serve import (
    define_embeddings,
    define_encoding,
    define_handover,
    define_serve_all,
    define_transfer,
)
from perfmodel.planner.program import Program, Question, start
from perfmodel.spec.fleet import Limits

_MOST = 1e3  # an LP must be bounded


def lost(c: Column, domain: str) -> float:
    """Instances of a column that the loss of one domain takes down, if the domain holds nothing else.

    device: 1, since an instance needs all its devices. node: D/d, or 1 of an instance that spans nodes. rack: as many for each
    of its nodes (an offer without racks loses a node).
    """
    if domain == "device":
        return 1.0
    on_node = max(c.offer.devices / footprint(c), 1.0)
    return on_node * (c.offer.rack_nodes or 1) if domain == "rack" else on_node


def define_survival(p: Program, i: int, domain: str) -> None:
    """Without the instances l that the loss of a domain full of entry i takes, the load of its demand is still served.

    l >= min(n[i], L): l >= L z, l >= n[i] - M z with z in {0, 1}; and with flows w of this failure (re-routed at will) every
    row of service, hand-over, transfer and capacity, with n[i] - l in place of n[i].

    A domain that holds several entries loses a convex combination of such losses, and the same combination of their flows
    serves then: pure losses suffice.
    """
    if (i, domain) in p.survived:
        return
    p.survived.add((i, domain))
    name = f"{i}_{domain}"
    worst = lost(p.entries[i].column, domain)
    most = most_instances(p, i) + worst
    down = p.problem.add_variable(f"down_{name}", lowBound=0)
    full = p.problem.add_variable(f"full_{name}", lowBound=0, upBound=1, cat=p.integer)
    p.problem += down >= worst * full, f"lost_{name}"
    p.problem += down >= p.n[i] - most * full, f"fewer_{name}"
    p.problem += p.n[i] <= most, f"most_instances_{name}"
    mine = [j for j, _ in p.of(p.entries[i].group)]
    flows = {(j, k): p.problem.add_variable(f"w_{name}_{j}_{k}", lowBound=0) for j, k in p.y if j in set(mine)}
    left = {j: p.n[j] - down if j == i else p.n[j] for j in mine}
    group = p.entries[i].group
    define_service(replace(p, keep=mine, groups=[group], n=left, y=flows, suffix=f"_without_{name}"))


def define_service(p: Program) -> None:
    """Every row between instances and the load they serve."""
    define_serve_all(p)
    define_handover(p)
    define_encoding(p)
    define_prefill_time(p)
    define_decode_batch(p)
    define_cache(p)
    define_transfer(p)
    define_embeddings(p)


def served_by(question: Question, group: int, counts: dict[int, float]) -> pulp.LpProblem:
    """The LP of the largest multiple `theta` of one demand that so many instances of each of its entries serve."""
    asked = replace(question, objective="goodput", limits=Limits(), resilience=None)
    p = start(asked, relaxed=True, elastic=False, keep=[i for i, n in counts.items() if n > 0])
    for i, v in p.n.items():
        v.upBound = counts[i]
    p.groups = [group]
    p.theta.upBound = _MOST  # type: ignore[union-attr]
    define_service(p)
    p.problem.setObjective(-1.0 * p.theta)  # type: ignore[operator]
    return p.problem
