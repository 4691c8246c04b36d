"""A plan as plain data and as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perfmodel.planner.columns import Column
from perfmodel.planner.explain import Alternative
from perfmodel.planner.verify import Pool, promised, replayed_percentile
from perfmodel.spec.plan import PlanFile

if TYPE_CHECKING:
    from perfmodel.planner.run import Plan, PlanRun


def data(spec: PlanFile, p: Plan) -> dict[str, Any]:
    """JSON-able description in base units, prices per hour as their keys say."""
    objectives = {"ttft": spec.workload.objectives.ttft, "tpot": spec.workload.objectives.tpot}
    checks = []
    for metric, limits in objectives.items():
        for name in dict.fromkeys(("p50", *limits, "p95")):
            share = float(name[1:]) / 100
            checks.append({
                "metric": metric, "percentile": name, "limit_s": limits.get(name),
                "promised_s": promised(p.pools, metric, share, p.workload.dispersion),
                "replayed_s": replayed_percentile(p.replayed, metric, share),
            })  # fmt: skip
    hourly = sum((o.price or 0.0) * 3600 * n for o, n in zip(p.offers, p.nodes, strict=True))
    priced = all(o.price is not None for o, n in zip(p.offers, p.nodes, strict=True) if n)
    return {
        "model": spec.model,
        "engine": spec.choices.engine,
        "objective": spec.objective,
        "objective_value": p.solution.objective,
        "status": p.solution.status,
        "bound": p.solution.bound,
        "gap": p.solution.gap,
        "optimal_over": (
            f"{len(p.columns)} columns kept of {len(p.found.columns)} from {len(p.found.layouts)} layouts, "
            "and the model's own times"
        ),
        "cost_usd_per_hour": hourly if priced else None,
        "usd_per_million_output_tokens": _per_million(p, hourly) if priced else None,
        "devices": sum(o.devices * n for o, n in zip(p.offers, p.nodes, strict=True)),
        "devices_busy": sum(x.devices for x in p.pools),
        "power_w": power(p),
        "nodes": [
            {"node": o.node.name, "count": n, "devices": o.devices * n, "price_usd_per_hour": _hourly(o.price),
             "price_source": o.price_source, "max_nodes": o.max_nodes}
            for o, n in zip(p.offers, p.nodes, strict=True) if n
        ],
        "pools": [_pool(x) for x in p.pools],
        "percentiles": checks,
        "promised": {
            metric: {c["percentile"]: c["promised_s"] for c in checks if c["metric"] == metric} for metric in objectives
        },
        "warnings": p.warnings,
        "workload": {
            "described": p.workload.described, "rate_per_s": p.workload.rate, "load": p.workload.load,
            "dispersion": p.workload.dispersion,
            "buckets": [
                {"input_tokens": [b.low, b.high], "share": b.share, "rate_per_s": p.workload.rate * b.share,
                 "mean_output": float(b.output.mean())} for b in p.buckets
            ],
        },
        "binding": p.binding,
        "alternatives": [_other(a) for a in p.alternatives],
        "rejected": [{"layout": r.layout.label, "reason": r.reason} for r in p.found.rejected],
        "rounds": p.rounds,
        "solver": {"name": p.solution.solver, "seconds": p.solution.seconds, "plan_seconds": p.seconds},
    }  # fmt: skip


def _hourly(price: float | None) -> float | None:
    return None if price is None else price * 3600


def _per_million(p: Plan, hourly: float) -> float:
    tokens = p.workload.rate * 3600 * sum(b.share * float(b.output.mean()) for b in p.buckets)
    return hourly / tokens * 1e6


def power(p: Plan) -> float | None:
    """Watts of the bought nodes at this load: overhead, busy instances, idle devices; None where a limit is unknown."""
    total = 0.0
    for offer, count in zip(p.offers, p.nodes, strict=True):
        if not count:
            continue
        m = offer.machine
        mine = [x for x in p.pools if x.column.offer is offer]
        if not m.tdp or any(x.column.power_w is None for x in mine):
            return None
        idle = offer.devices * count - sum(x.devices for x in mine)
        total += count * m.node_overhead_power + idle * m.tdp * float(m.law["power_idle"])
        total += sum(x.replicas * (x.column.power_w or 0.0) for x in mine)
    return total


def _pool(x: Pool) -> dict[str, Any]:
    c, s = x.column, x.state
    return {
        "role": c.layout.role, "hardware": c.layout.node, "device": c.offer.machine.device.name,
        "tp": c.layout.tp, "pp": c.layout.pp, "ep": c.layout.ep, "dp": 1, "replicas": x.replicas, "devices": x.devices,
        "weight_dtype": _formats(c), "kv_dtype": c.estimator.formats.kv.name,
        "batch": s.batch, "step_s": s.step, "prefill_utilisation": s.utilisation, "kv_share": s.kv_share,
        "requests_per_s": x.rate, "requests_per_s_per_replica": x.rate / x.replicas,
        "highest_rate_per_replica": c.state.rate, "limited_by": c.limited_by,
        "input_tokens": [float(x.mix.input[x.mix.weight > 0].min()), float(x.mix.input[x.mix.weight > 0].max())],
        "provenance": c.estimator.machine.provenance,
    }  # fmt: skip


def _formats(c: Column) -> str:
    weight, expert = c.estimator.formats.weight.name, c.estimator.formats.expert.name
    mixed = expert != weight and c.estimator.model.expert_dtype is not None
    return f"{weight}, experts {expert}" if mixed else weight


def _other(a: Alternative) -> dict[str, Any]:
    """An alternative with its price, or why it has none."""
    found: dict[str, Any] = {"name": a.name, "reason": a.reason, "objective": None, "pools": []}
    if a.solution is not None:
        found["objective"] = a.solution.objective
        for i, c in enumerate(a.columns):
            count = round(a.solution.values.get(f"n_{i}", 0.0))
            if count and any(a.solution.values.get(f"y_{i}_{k}", 0.0) > 1e-9 for k in c.buckets):
                found["pools"].append({"layout": c.layout.label, "replicas": count})
    return found


def text(run: PlanRun) -> str:
    """Every plan of the run, one page each."""
    return "\n\n".join(_page(run.spec, p) for p in run.plans)


def _page(spec: PlanFile, p: Plan) -> str:
    d = p.data
    unit = {"cost": "USD/h", "devices": "devices", "energy": "W"}[spec.objective]
    lines = [f"Load x{p.workload.load:g}: {p.workload.rate:.2f} requests/s  ({p.workload.described})", ""]
    lines.append("  Buy    " + ", ".join(_node_line(n) for n in d["nodes"]))
    lines += [_pool_line(d["model"], x) for x in d["pools"]]
    lines += [_cost_line(d), "", f"  {'':12}{'limit':>10}{'closed form':>14}{'replayed':>12}"]
    lines += [_percentile_line(c) for c in d["percentiles"]]
    lines += [
        "",
        f"  Proof  {d['status']}: {d['objective_value']:,.2f} {unit}, bound {d['bound']:,.2f}, gap {d['gap']:.2%},",
        f"         over {d['optimal_over']};",
        f"         {len(d['rounds'])} round(s) of plan and replay, {d['solver']['plan_seconds']:.1f} s",
    ]
    lines += ["", "  Why", *(f"    {row['text']}" for row in d["binding"])]
    lines += ["", "  Instead", *(f"    {a['name']}: {a['reason']}" for a in d["alternatives"])]
    return "\n".join(lines)


def _node_line(n: dict[str, Any]) -> str:
    price = n["price_usd_per_hour"]
    return f"{n['count']} x {n['node']}" + (f" at {price:.2f} USD/h" if price is not None else "")


def _pool_line(model: str, x: dict[str, Any]) -> str:
    more = "".join(f" {k}{x[k]}" for k in ("pp", "ep") if x[k] > 1)
    low, high = x["input_tokens"]
    load = []
    if x["role"] != "prefill":
        load.append(f"decode batch {x['batch']:.1f}")
    if x["role"] != "decode":
        load.append(f"prefill {x['prefill_utilisation']:.0%} of the time")
    return (
        f"  Run    {x['replicas']} x {x['role']} {model} ({x['weight_dtype']}) tp{x['tp']}{more} on {x['hardware']}:\n"
        f"         {x['requests_per_s']:.2f} requests/s of {low:.0f}-{high:.0f} input tokens; {', '.join(load)}"
    )


def _cost_line(d: dict[str, Any]) -> str:
    parts = ["no price known"]
    if d["cost_usd_per_hour"] is not None:
        per = d["usd_per_million_output_tokens"]
        parts = [f"{d['cost_usd_per_hour']:,.2f} USD/h, {per:.2f} USD per million output tokens"]
    parts.append(f"{d['devices']} devices ({d['devices_busy']} busy)")
    if d["power_w"]:
        parts.append(f"{d['power_w'] / 1e3:.1f} kW")
    return "  Cost   " + "; ".join(parts)


def _percentile_line(c: dict[str, Any]) -> str:
    limit = f"{c['limit_s'] * 1e3:,.0f} ms" if c["limit_s"] is not None else "-"
    name = f"{c['metric'].upper()} {c['percentile']}"
    return f"  {name:12}{limit:>10}{c['promised_s'] * 1e3:>11,.0f} ms{c['replayed_s'] * 1e3:>9,.0f} ms"
