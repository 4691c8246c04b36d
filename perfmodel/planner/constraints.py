"""The integer program, one function per family of constraints; each docstring is the equation.

Variables: n[c] instances of column c (integer), y[c,k] requests/s of bucket k served by c, N[t] nodes of type t (integer).
"""

from __future__ import annotations

from dataclasses import dataclass

import pulp

from perfmodel.planner.columns import Column
from perfmodel.planner.offer import Offer


@dataclass
class Program:
    """A problem with its variables."""

    problem: pulp.LpProblem
    n: list[pulp.LpVariable]
    y: dict[tuple[int, int], pulp.LpVariable]
    nodes: list[pulp.LpVariable]
    columns: list[Column]
    offers: list[Offer]
    rates: list[float]
    cost: pulp.LpAffineExpression


def build(
    columns: list[Column], offers: list[Offer], rates: list[float], objective: str, *, relaxed: bool = False
) -> Program:
    """The whole program. `relaxed` drops integrality, for shadow prices."""
    problem = pulp.LpProblem("plan", pulp.LpMinimize)
    kind = pulp.LpContinuous if relaxed else pulp.LpInteger
    n = [problem.add_variable(f"n_{c}", lowBound=0, cat=kind) for c in range(len(columns))]
    y = {
        (c, k): problem.add_variable(f"y_{c}_{k}", lowBound=0)
        for c, column in enumerate(columns)
        for k in column.buckets
    }
    nodes = [problem.add_variable(f"N_{t}", lowBound=0, cat=kind) for t in range(len(offers))]
    program = Program(
        problem, n, y, nodes, columns, offers, rates, define_objective(objective, columns, offers, n, nodes)
    )
    problem += program.cost
    define_serve_all(program)
    define_handover(program)
    define_prefill_time(program)
    define_decode_batch(program)
    define_cache(program)
    define_transfer(program)
    define_whole_nodes(program)
    define_availability(program)
    return program


def define_objective(
    objective: str, columns: list[Column], offers: list[Offer], n: list[pulp.LpVariable], nodes: list[pulp.LpVariable]
) -> pulp.LpAffineExpression:
    """cost: sum_t price_t N_t [USD/h]; devices: sum_t D_t N_t; energy: sum_t overhead_t N_t + sum_c P_c n_c [W]."""
    if objective == "cost":
        return pulp.lpSum((o.price or 0.0) * 3600 * v for o, v in zip(offers, nodes, strict=True))
    if objective == "devices":
        return pulp.lpSum(o.devices * v for o, v in zip(offers, nodes, strict=True))
    overhead = pulp.lpSum(o.machine.node_overhead_power * v for o, v in zip(offers, nodes, strict=True))
    return overhead + pulp.lpSum((c.power_w or 0.0) * v for c, v in zip(columns, n, strict=True))


def _flow(p: Program, k: int, roles: tuple[str, ...]) -> pulp.LpAffineExpression:
    return pulp.lpSum(v for (c, bucket), v in p.y.items() if bucket == k and p.columns[c].layout.role in roles)


def define_serve_all(p: Program) -> None:
    """For every bucket k: sum over colocated and prefill columns of y[c,k] = rate_k."""
    for k, rate in enumerate(p.rates):
        p.problem += _flow(p, k, ("colocated", "prefill")) == rate, f"serve_{k}"


def define_handover(p: Program) -> None:
    """For every bucket k: sum over prefill columns of y[c,k] = sum over decode columns of y[c,k]."""
    if any(c.layout.role != "colocated" for c in p.columns):
        for k in range(len(p.rates)):
            p.problem += _flow(p, k, ("prefill",)) == _flow(p, k, ("decode",)), f"handover_{k}"


def _demand(p: Program, c: int, per_request: object) -> pulp.LpAffineExpression:
    return pulp.lpSum(per_request[k] * p.y[c, k] for k in p.columns[c].buckets)  # type: ignore[index]


def define_prefill_time(p: Program) -> None:
    """For every column c: sum_k y[c,k] prefill_s[c,k] <= u_c n[c]."""
    for c, column in enumerate(p.columns):
        if column.layout.role != "decode":
            p.problem += _demand(p, c, column.prefill_s) <= column.state.utilisation * p.n[c], f"prefill_{c}"


def define_decode_batch(p: Program) -> None:
    """For every column c: sum_k y[c,k] (output - 1) tau_c <= b_c n[c] (Little's law)."""
    for c, column in enumerate(p.columns):
        if column.layout.role != "prefill":
            p.problem += _demand(p, c, column.decode_s) <= column.state.batch * p.n[c], f"decode_{c}"


def define_cache(p: Program) -> None:
    """For every column c: sum_k y[c,k] kv_token_seconds[c,k] <= M_c n[c]."""
    for c, column in enumerate(p.columns):
        p.problem += _demand(p, c, column.kv_token_s) <= column.kv_limit * p.n[c], f"cache_{c}"


def define_transfer(p: Program) -> None:
    """For every prefill column c: sum_k y[c,k] kv_bytes[k] <= achieved NIC bytes/s of its devices x n[c]."""
    for c, column in enumerate(p.columns):
        if column.layout.role == "prefill":
            m = column.offer.machine
            rate = float(m.network * m.network_efficiency * column.layout.devices)
            p.problem += _demand(p, c, column.moved_bytes) / 1e9 <= rate / 1e9 * p.n[c], f"transfer_{c}"


def footprint(c: Column) -> float:
    """Devices of a node that one instance occupies, what cannot be shared included: D/floor(D/d), or whole nodes."""
    have, need = c.offer.devices, c.layout.devices
    return have / (have // need) if need <= have else -(-need // have) * have


def define_whole_nodes(p: Program) -> None:
    """For every node type t: sum over its columns of footprint_c n[c] <= D_t N[t]; nodes are bought whole."""
    for t, offer in enumerate(p.offers):
        used = pulp.lpSum(footprint(c) * v for c, v in zip(p.columns, p.n, strict=True) if c.offer is offer)
        p.problem += used <= offer.devices * p.nodes[t], f"nodes_{t}"


def define_availability(p: Program) -> None:
    """For every node type t with a limit: N[t] <= max_nodes_t."""
    for t, offer in enumerate(p.offers):
        if offer.max_nodes is not None:
            p.problem += p.nodes[t] <= offer.max_nodes, f"available_{t}"
