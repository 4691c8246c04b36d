"""Why this plan: binding rows, shadow prices, and what every alternative would have cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perfmodel.planner import constraints
from perfmodel.planner.columns import Column, Enumerator, Layout, unserved
from perfmodel.planner.infeasible import too_few_nodes
from perfmodel.planner.offer import Offer
from perfmodel.planner.solver import Solution, solve
from perfmodel.planner.verify import Pool
from perfmodel.serving.workload import Bucket

_TIGHT = 0.01
_UNIT = {"cost": "USD/h", "devices": "devices", "energy": "W"}


def binding(
    columns: list[Column],
    offers: list[Offer],
    chosen: list[Pool],
    values: dict[str, float],
    rates: list[float],
    buckets: list[Bucket],
    objective: str,
) -> list[dict[str, Any]]:
    """Rows without slack in the chosen plan, and shadow prices of the relaxed program."""  # fmt: skip
    program = constraints.build(columns, offers, rates, objective, relaxed=True)
    relaxed = solve(program.problem)
    unit = _UNIT[objective]
    rows: list[dict[str, Any]] = []
    for k, rate in enumerate(rates):
        price = relaxed.duals.get(f"serve_{k}", 0.0)
        rows.append({
            "constraint": f"serve {buckets[k].label}", "shadow_price": price, "unit": f"{unit} per request/s",
            "text": f"{rate:.2f} requests/s of {buckets[k].label}: one more per second costs {price:.2f} {unit}",
        })  # fmt: skip
    for t, offer in enumerate(offers):
        bought = round(values.get(f"N_{t}", 0.0))
        if offer.max_nodes is not None and bought >= offer.max_nodes:
            price = -relaxed.duals.get(f"available_{t}", 0.0)
            rows.append({
                "constraint": f"available {offer.node.name}", "shadow_price": price, "unit": f"{unit} per node",
                "text": f"all {offer.max_nodes} {offer.node.name} are taken; one more would save {price:.2f} {unit}",
            })  # fmt: skip
    for pool in chosen:
        rows += _pool_rows(pool)
    return rows


def _pool_rows(pool: Pool) -> list[dict[str, Any]]:
    c, n = pool.column, pool.replicas
    finite = [k for k in c.buckets if pool.rates[k] > 0]
    names = {
        "prefill time": (sum(pool.rates[k] * c.prefill_s[k] for k in finite), c.state.utilisation * n),
        "decode batch": (sum(pool.rates[k] * c.decode_s[k] for k in finite), c.state.batch * n),
        "cached tokens": (sum(pool.rates[k] * c.kv_token_s[k] for k in finite), c.kv_limit * n),
    }
    rows = []
    for name, (used, have) in names.items():
        if have > 0 and used > 0 and used >= have * (1 - _TIGHT):
            rows.append({
                "constraint": f"{name} of {c.layout.label}", "shadow_price": None, "unit": "",
                "text": f"{c.layout.label}: {name} at the limit ({used / have:.0%}); its rate is limited by {c.limited_by}",
            })  # fmt: skip
    if not rows:
        spare = min((1 - used / have for used, have in names.values() if have > 0 and used > 0), default=0.0)
        rows.append({
            "constraint": f"whole instances of {c.layout.label}", "shadow_price": None, "unit": "",
            "text": f"{c.layout.label}: {spare:.0%} spare because instances and nodes are whole; "
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


def alternatives(
    found: Enumerator, offers: list[Offer], chosen: list[Pool], rates: list[float], objective: str, best: float
) -> list[Alternative]:
    """Each device type alone, each role mix, each format and each other layout of the winners, re-solved; and the runner-up."""
    options: list[tuple[str, Callable[[Layout], bool]]] = []
    for offer in offers:
        options.append((f"only {offer.node.name}", lambda x, o=offer: x.node == o.node.name))  # type: ignore[misc]
    roles = {c.layout.role for c in found.columns.values()}
    if roles > {"colocated"}:
        options.append(("only colocated", lambda x: x.role == "colocated"))
        options.append(("only disaggregated", lambda x: x.role != "colocated"))
    formats = sorted({c.layout.weight_dtype for c in found.columns.values()})
    if len(formats) > 1:
        options += [(f"only {f} weights", lambda x, f=f: x.weight_dtype == f) for f in formats]  # type: ignore[misc]
    winners = {(p.column.layout.node, p.column.layout.tp) for p in chosen}
    nodes = {node for node, _ in winners}
    for node, tp in sorted({(c.layout.node, c.layout.tp) for c in found.columns.values() if c.layout.node in nodes}):
        options.append((f"only {node} with tp{tp}", lambda x, n=node, t=tp: (x.node, x.tp) == (n, t)))  # type: ignore[misc]
    used = {p.column.layout for p in chosen}
    options.append(("without any layout of this plan (runner-up)", lambda x: x not in used))
    return [_alternative(name, test, found, offers, chosen, rates, objective, best) for name, test in options]


def _alternative(name: str, test: Callable[[Layout], bool], found: Enumerator, offers: list[Offer], chosen: list[Pool],
                 rates: list[float], objective: str, best: float) -> Alternative:  # fmt: skip
    columns = found.select(lambda c: test(c.layout))
    unit = _UNIT[objective]
    if not columns:
        return Alternative(name, None, [], _why_none(test, found, range(len(rates))))
    program = constraints.build(columns, offers, rates, objective)
    solution = solve(program.problem, time_limit=10.0, gap=5e-3)
    if not solution.ok:
        return Alternative(name, None, columns, _why_short(test, found, columns, offers, rates))
    extra = solution.objective - best
    if extra <= max(1e-6, 1e-4 * abs(best)):
        same = (
            "this is the chosen plan" if all(test(p.column.layout) for p in chosen) else "same, with more devices busy"
        )
        return Alternative(name, solution, columns, f"{solution.objective:,.2f} {unit}: {same}")
    rate = sum(rates)
    limits = sorted({c.limited_by for c in columns if round(solution.values.get(f"n_{columns.index(c)}", 0))})
    return Alternative(
        name, solution, columns,
        f"{solution.objective:,.2f} {unit}, {extra / max(best, 1e-9):+.0%}: "
        f"{solution.objective / rate:,.2f} {unit} per request/s against {best / rate:,.2f}; limited by {', '.join(limits)}",
    )  # fmt: skip


def _why_none(test: Callable[[Layout], bool], found: Enumerator, missing: Any) -> str:
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


def _why_short(
    test: Callable[[Layout], bool], found: Enumerator, columns: list[Column], offers: list[Offer], rates: list[float]
) -> str:
    """Which buckets nobody serves, or which nodes run out and how many it would take."""
    missing = unserved(columns, len(rates))
    if missing:
        return _why_none(test, found, missing)
    error = too_few_nodes(columns, offers, rates, "devices")
    return f"{error.reason}; it would take {error.nearest}" if error.nearest else error.reason
