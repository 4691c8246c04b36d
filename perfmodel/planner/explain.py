"""Why this plan: binding rows, shadow prices, and what every alternative would have cost."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from perfmodel.planner import constraints
from perfmodel.planner.cells import Cell, Fleet, ask
from perfmodel.planner.columns import Column, unserved
from perfmodel.planner.confirm import Confirmed, confirm
from perfmodel.planner.constraints.capacity import rooms, row_title
from perfmodel.planner.infeasible import nearest_change
from perfmodel.planner.layout import Layout
from perfmodel.planner.optimum import Optimum, optimise
from perfmodel.planner.pools import Pool
from perfmodel.planner.program import UNITS, Program, Question, nodes_bought
from perfmodel.planner.service import Service
from perfmodel.planner.solver import Solution, solve

_TIGHT = 0.01
_ROUGH = 5e-3
"""Gap to which alternatives are solved."""
_SECONDS = 3.0
RUNNERS_UP = 3
_MOST_OPENED = 24
"""Programs after which the search for runners-up ends."""


def binding(question: Question, best: Optimum, values: dict[str, float], cells: list[Cell]) -> list[dict[str, Any]]:
    """Rows without slack in the chosen plan, and shadow prices of the relaxed program."""
    unit = UNITS[question.objective]
    duals = solve(constraints.build(question, relaxed=True, linked=False).problem).duals
    rows: list[dict[str, Any]] = []
    for g, (demand, cell) in enumerate(zip(question.demands, cells, strict=True)):
        of = f" of {demand.service}" if len({d.service for d in question.demands}) > 1 else ""
        of += f" at x{cell.level.multiple:g}" if len(question.shares) > 1 else ""
        for k, rate in enumerate(demand.rates):
            # A period's rows are paid for its share of the time; the price is per request/s while it lasts.
            price = duals.get(f"serve_{g}_{k}", 0.0)
            label = f"{cell.service.buckets[k].label}{of}"
            rows.append({
                "constraint": f"serve {label}", "shadow_price": price, "unit": f"{unit} per request/s",
                "text": f"{rate:.2f} requests/s of {label}: one more per second costs {price:.4g} {unit}",
            })  # fmt: skip
    rows += _limit_rows(best.program, values, duals, unit)
    for domain in sorted({d for _, d in best.program.survived}):
        mine = [best.program.entries[i].column.layout.label for i, d in sorted(best.program.survived) if d == domain]
        rows.append({
            "constraint": f"survive {domain}", "shadow_price": None, "unit": "",
            "text": f"the loss of any one {domain} binds: without it {', '.join(dict.fromkeys(mine))} would be fewer",
        })  # fmt: skip
    for cell in cells:
        for pool in cell.pools if cell.service.period == 0 else ():
            rows += _pool_rows(pool)
    return rows


def _limit_rows(program: Program, values: dict[str, float], duals: dict[str, float], unit: str) -> list[dict[str, Any]]:
    """Limits that the plan reaches, each with what one more unit would save in the relaxation."""
    rows = []
    by_name = {c.name: c for c in program.problem.constraints()}
    for name, limit in program.limits.items():
        row = by_name[name]
        used = sum(factor * values.get(v.name, 0.0) for v, factor in row.items())
        have = limit.limit if limit.row is None else limit.row
        if used < have - _TIGHT * max(abs(limit.limit), 1e-9):
            continue
        price = -duals.get(name, 0.0)
        kind = limit.label
        text = (
            f"all {limit.limit:g} {kind.removeprefix('max_nodes of ')} are taken; one more would save {price:.2f} {unit}"
            if kind.startswith("max_nodes") else
            f"{kind} is used up ({limit.limit:,.4g} {limit.unit}); one more would save {price:.4g} {unit}"
        )  # fmt: skip
        rows.append({
            "constraint": kind.replace("max_nodes of", "available"), "shadow_price": price,
            "unit": f"{unit} per {limit.unit.removesuffix('s')}", "text": text,
        })  # fmt: skip
    return rows


def _pool_rows(pool: Pool) -> list[dict[str, Any]]:
    c, n = pool.column, pool.replicas
    served = [k for k in c.buckets if pool.rates[k] > 0]
    used = {
        row_title(c, name): sum(pool.rates[k] * need[k] for k in served) / (room * n) for name, need, room in rooms(c) if room > 0
    }  # fmt: skip
    used = {name: u for name, u in used.items() if u > 0}
    rows = []
    for name, share in used.items():
        if share >= 1 - _TIGHT:
            rows.append({
                "constraint": f"{name} of {c.layout.label}", "shadow_price": None, "unit": "",
                "text": f"{c.layout.label}: {name} at the limit ({share:.0%}); its rate is limited by {c.limited_by}",
            })  # fmt: skip
    if not rows:
        spare = 1 - max(used.values(), default=1.0)
        rows.append({
            "constraint": f"whole instances of {c.layout.label}", "shadow_price": None, "unit": "",
            "text": f"{c.layout.label}: {spare:.0%} spare because instances and nodes are whole, or a limit says so; "
                    f"its rate would be limited by {c.limited_by}",
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Alternative:
    """Another way to serve the load, with what it would cost."""

    name: str
    solution: Solution | None
    columns: list[Column]
    reason: str
    nodes: tuple[str, ...] = ()
    question: Question | None = None
    """What it solves; None where it cannot serve."""
    confirmed: Confirmed | None = None
    """What replay says of it; None where it was not replayed."""


def alternatives(fleet: Fleet, question: Question, best: Optimum, cells: list[Cell]) -> list[Alternative]:
    """Each node type alone, each role mix, each format, each term and each other layout of the winners, re-solved."""
    options: list[tuple[str, Callable[[Layout], bool]]] = []
    every = [c.layout for s in fleet.services for c in s.columns.values()]
    for label in dict.fromkeys(o.label.removesuffix(" (spot)") for o in fleet.offers):
        options.append((f"only {label}", lambda x, o=label: x.node.removesuffix(" (spot)") == o))  # type: ignore[misc]
    roles = {x.role for x in every}
    if roles > {"colocated"}:
        options.append(("only colocated", lambda x: x.role == "colocated"))
        options.append(("only disaggregated", lambda x: x.role != "colocated"))
    if "encode" in roles:
        options.append(("without encode pools", lambda x: not x.encode_share))
    formats = sorted({x.weight_dtype for x in every})
    if len(formats) > 1:
        options += [(f"only {f} weights", lambda x, f=f: x.weight_dtype == f) for f in formats]  # type: ignore[misc]
    if any(x.techniques for x in every):
        options.append(("without techniques", lambda x: not x.techniques))
    pools = [p for c in cells for p in c.pools]
    nodes = {p.column.layout.node for p in pools}
    for node, tp in sorted({(x.node, x.tp) for x in every if x.node in nodes}):
        options.append((f"only {node} with tp{tp}", lambda x, n=node, t=tp: (x.node, x.tp) == (n, t)))  # type: ignore[misc]
    used = {p.column.layout for p in pools}
    options.append(("without any layout of this plan", lambda x: x not in used))
    result = [_alternative(name, test, fleet, question, best, used) for name, test in options]
    terms = dict.fromkeys(t.term for o in fleet.offers for t in o.paid)
    if len(terms) > 1:
        result += [_on_term(term, question, best) for term in terms]
    return result


def _alternative(
    name: str, test: Callable[[Layout], bool], fleet: Fleet, question: Question, best: Optimum, used: set[Layout]
) -> Alternative:
    asked = ask(fleet, lambda c: test(c.layout))
    for service, demand in zip(fleet.services, asked.demands, strict=True):
        missing = unserved(list(demand.columns), len(demand.rates))
        if missing:
            return Alternative(name, None, [], _why_none(test, service, missing))
    found = optimise(asked, gap=_ROUGH, time_limit=_SECONDS)
    if not found.solution.ok:
        error = nearest_change(asked)
        reason = f"{error.reason}; it would take {error.nearest}" if error.nearest else error.reason
        return Alternative(name, None, [], reason)
    return priced(name, asked, found, best, same=all(test(x) for x in used))


def priced(name: str, asked: Question, found: Optimum, best: Optimum, *, same: bool = False) -> Alternative:
    """An alternative with its price against the best, and how far from optimal it may be where that is not proven."""
    unit, rate = UNITS[asked.objective], asked.rate
    value, against = found.solution.objective, best.solution.objective
    extra = value - against
    columns = [e.column for e in asked.entries]
    bought = tuple(bought_text(asked, found.values))
    if extra <= max(1e-6, 1e-4 * abs(against)):
        what = "this is the chosen plan" if same else "as good, but for the devices it keeps busy"
        return Alternative(name, found.solution, columns, f"{abs(value):,.2f} {unit}: {what}", bought, asked)
    limits = sorted({c.limited_by for i, c in enumerate(columns) if round(found.values.get(f"n_{i}", 0))})
    return Alternative(
        name, found.solution, columns,
        f"{abs(value):,.2f} {unit}, {(abs(value) - abs(against)) / max(abs(against), 1e-9):+.0%}: "
        f"{abs(value) / rate:,.2f} {unit} per request/s against {abs(against) / rate:,.2f}; limited by {', '.join(limits)}"
        + unproven(found.solution, unit),
        bought, asked,
    )  # fmt: skip


def confirmed(a: Alternative, fleet: Fleet) -> Alternative:
    """An alternative with what replay says of it."""
    if a.solution is None or a.question is None:
        return a
    return replace(a, confirmed=confirm(fleet, a.question, a.solution.values))


def proven(solution: Solution) -> bool:
    """Whether an alternative is within the gap to which alternatives are solved."""
    return solution.gap <= _ROUGH * 1.01


def unproven(solution: Solution, unit: str) -> str:
    """What to add to the price of a solution that the time limit cut short."""
    if proven(solution):
        return ""
    return f"; not proven: its bound is {abs(solution.bound):,.2f} {unit}, gap {solution.gap:.1%}"


def bought_text(question: Question, values: dict[str, float]) -> list[str]:
    """``17 x hgx-h100-8`` for every offer in the period of the highest load, terms named where there is a choice."""
    parts = []
    for t, offer in enumerate(question.offers):
        for n, tariff in zip(nodes_bought(question, values, t, 0), offer.paid, strict=True):
            if n:
                how = f" ({tariff.term})" if len(offer.paid) > 1 else ""
                parts.append(f"{n} x {offer.label}{how}")
    return parts


def _on_term(term: str, question: Question, best: Optimum) -> Alternative:
    def forbid(program: Program) -> None:
        for (t, m, p), v in program.nodes.items():
            if question.offers[t].paid[m].term != term:
                program.problem += v <= 0, f"not_{t}_{m}_{p}"

    name = f"only {term}"
    found = optimise(question, gap=_ROUGH, time_limit=_SECONDS, extra=forbid)
    if not found.solution.ok:
        return Alternative(name, None, [], "cannot serve: the limits leave too few nodes on this term alone")
    return priced(name, question, found, best, same=True)


def runners_up(fleet: Fleet, best: Optimum, cells: list[Cell]) -> list[Alternative]:
    """The next best plans, the cheapest first, each without at least one main layout of every plan before it (a tenth of its
    devices or more).

    What comes after a plan with main layouts S leaves out one of S: each choice is a program of its own over fewer columns,
    with a bound of its own, and the cheapest of all that are open is the next plan (Lawler, Management Science 18, 1972, p. 401).
    """
    asked = ask(fleet, by_layout=True)
    devices: dict[Layout, float] = {}
    for pool in (p for c in cells for p in c.pools):
        devices[pool.column.layout] = devices.get(pool.column.layout, 0.0) + pool.devices
    earlier = [_main(devices)]
    opened: set[frozenset[Layout]] = set()
    waiting: list[tuple[float, int, frozenset[Layout], Question, Optimum]] = []

    def leave_out_one(left: frozenset[Layout], mains: set[Layout]) -> None:
        for layout in sorted(mains, key=lambda x: x.label):
            if (banned := left | {layout}) not in opened:
                opened.add(banned)
                question = _without(asked, banned)
                if any(unserved(list(d.columns), len(d.rates)) for d in question.demands):
                    continue
                found = optimise(question, gap=_ROUGH, time_limit=_SECONDS)
                if found.solution.ok:
                    heapq.heappush(waiting, (found.solution.objective, len(opened), banned, question, found))

    leave_out_one(frozenset(), earlier[0])
    listed: list[Alternative] = []
    while waiting and len(listed) < RUNNERS_UP and len(opened) < _MOST_OPENED:
        _, _, banned, question, found = heapq.heappop(waiting)
        mains = _main(_devices(question, found))
        if not any(before <= mains for before in earlier):
            earlier.append(mains)
            shown = ", ".join(sorted(x.label for x in mains))
            name = f"{', '.join(bought_text(question, found.values))}, mainly {shown}"
            listed.append(priced(name, question, found, best))
        leave_out_one(banned, mains)
    # Within the gap to which they are solved, one may be found before a cheaper one.
    listed.sort(key=lambda a: a.solution.objective if a.solution else 0.0)
    return [replace(a, name=f"runner-up {place}: {a.name}") for place, a in enumerate(listed, start=1)]


def _without(question: Question, banned: Collection[Layout]) -> Question:
    """The question over the columns of all other layouts."""
    demands = []
    for d in question.demands:
        kept = [j for j, c in enumerate(d.columns) if c.layout not in banned]
        latency = tuple(d.latency[j] for j in kept) if d.latency else ()
        demands.append(replace(d, columns=tuple(d.columns[j] for j in kept), latency=latency))
    return replace(question, demands=tuple(demands))


def _devices(question: Question, found: Optimum) -> dict[Layout, float]:
    """Busy devices of each layout."""
    devices: dict[Layout, float] = {}
    for i, e in enumerate(question.entries):
        busy = round(found.values.get(f"n_{i}", 0.0)) * e.column.layout.devices
        devices[e.column.layout] = devices.get(e.column.layout, 0.0) + busy
    return devices


def _main(devices: dict[Layout, float]) -> set[Layout]:
    return {x for x, n in devices.items() if n >= 0.1 * sum(devices.values()) and n > 0}


def _why_none(test: Callable[[Layout], bool], found: Service, missing: Iterable[int]) -> str:
    """Why none of the layouts that pass a test serves some buckets: the one that comes nearest."""
    refused = [r for r in found.rejected if test(r.layout) and (not r.buckets or set(r.buckets) & set(missing))]
    timed = [r for r in refused if r.best == r.best]
    if timed:
        # A layout is judged by the easiest set that holds a missing bucket.
        nearest = min(timed, key=lambda r: r.best)
        low, high = found.buckets[min(nearest.buckets)].low, found.buckets[max(nearest.buckets)].high
        return f"cannot serve: at best {nearest.layout.label}, {nearest.reason} for {low:.0f}-{high:.0f} input tokens"
    reasons = dict.fromkeys(f"{r.layout.label} {r.reason}" for r in refused)
    return "cannot serve: " + (next(reversed(reasons), "no layout of this kind was enumerated"))
