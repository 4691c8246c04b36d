"""A plan as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from perfmodel.catalog import load_model
from perfmodel.planner import quality
from perfmodel.planner.columns import Column, Rejected
from perfmodel.planner.constraints.uptime import enough
from perfmodel.planner.deploy import deployment
from perfmodel.planner.evaluated import Running, Served
from perfmodel.planner.explain import Alternative, proven
from perfmodel.planner.offer import Offer
from perfmodel.planner.pools import Pool, promised
from perfmodel.planner.program import UNITS, nodes_bought
from perfmodel.planner.promise import percentile
from perfmodel.planner.service import stricter
from perfmodel.planner.verify import replayed_percentile, together
from perfmodel.serving.queueing import MOST_DISPERSED
from perfmodel.spec.plan import PlanFile
from perfmodel.spec.workload import Joint, Limit

if TYPE_CHECKING:
    from perfmodel.planner.run import Plan


def data(spec: PlanFile, p: Plan) -> dict[str, Any]:
    """JSON-able description in base units, prices per hour as their keys say."""
    services = [service(c) for c in p.peak]
    checks = services[0]["percentiles"]
    hourly = spend(p)
    found = {
        "model": spec.model,
        "engine": spec.choices.engine,
        "objective": spec.objective,
        "unit": UNITS[spec.objective],
        "objective_value": abs(p.solution.objective),
        "status": p.solution.status,
        "bound": abs(p.solution.bound),
        "gap": p.solution.gap,
        "optimal_over": _scope(p),
        "heuristic": p.heuristic,
        "fewer_buckets": _fewer_buckets(p),
        "replayed_all": p.replay_all,
        "confidence": spec.confidence,
        "cost_usd_per_hour": hourly,
        "usd_per_million_output_tokens": _per_million(p, hourly) if hourly is not None else None,
        "devices": sum(o.devices * n for o, n in zip(p.offers, p.nodes, strict=True)),
        "devices_busy": sum(x.devices for x in p.pools),
        "power_w": power(p),
        "nodes": _nodes(p),
        "pools": [x for s in services for x in s["pools"]],
        "percentiles": checks,
        **({"attainment": services[0]["attainment"]} if "attainment" in services[0] else {}),
        "promised": {
            metric: {c["percentile"]: c["promised_s"] for c in checks if c["metric"] == metric} for metric in ("ttft", "tpot")
        },
        "warnings": p.warnings,
        "lossy": lossy_in_use(p),
        "workload": services[0]["workload"],
        "binding": p.binding,
        "alternatives": [_other(a) for a in p.alternatives],
        "rejected": [_rejected(r, c.service) for c in p.peak for r in c.service.rejected],
        "rounds": p.rounds,
        "solver": {"name": p.solution.solver, "seconds": p.solution.seconds, "plan_seconds": p.seconds},
        "what_if": p.what_if,
        "deployment": deployment(p.peak[0], p.fleet.choices),
    }  # fmt: skip
    if "theta" in p.values:
        found["served_multiple"] = p.values["theta"]
    if len(p.peak) > 1:
        found["services"] = [s | {"deployment": deployment(c, p.fleet.choices)} for s, c in zip(services, p.peak, strict=True)]
    if len(p.fleet.levels) > 1:
        found["periods"] = _periods(p)
        found["lag_s"] = p.fleet.lag
    elif p.fleet.profile:
        found["fixed_fleet"] = {"highest_multiple": p.fleet.levels[0].multiple, "mean_over_highest": mean_load(p)}
    if spec.resilience is not None and spec.resilience.availability is not None:
        found["uptime"] = _uptime(p)
    return found


def _scope(p: Plan) -> str:
    """What the plan is optimal over: columns that others do not dominate, of all that were enumerated for each offer."""
    kept = {(e.group, e.column.offer.label, e.column.key) for e in p.question.entries}
    every = sum(len(c.service.found[c.service.home(o).label].columns) for c in p.cells for o in p.offers)
    points = f" at {len(p.question.entries)} operating points" if len(p.question.entries) > len(kept) else ""
    layouts = sum(len(c.service.layouts) for c in p.cells)
    return f"{len(kept)} columns kept of {every} from {layouts} layouts{points}, and the model's own times"


def _fewer_buckets(p: Plan) -> str:
    """Why the plan tells fewer lengths apart than was asked for; empty where it does not."""
    count = len(p.buckets)
    if p.fleet.choices.buckets >= p.asked_buckets:
        return ""
    return (
        f"{p.asked_buckets} ranges of lengths were asked for; telling {count} apart is cheaper once replay has lowered what "
        "columns carry: parted requests come in bursts of their own"
    )


def service(cell: Running) -> dict[str, Any]:
    """One service at its highest load: pools, percentiles and workload. TTFT is at the client, its site's round trip included."""
    s, w = cell.service, cell.service.workload
    found = {
        "name": s.name, "model": s.model, "pools": [_pool(x) | {"service": s.name} for x in cell.pools],
        "percentiles": percentiles(cell),
        "workload": {
            "described": w.described, "rate_per_s": w.rate, "load": w.load, "dispersion": w.dispersion,
            "beyond_closed_forms": w.dispersion > MOST_DISPERSED,
            "buckets": [
                {"input_tokens": [b.low, b.high], "share": b.share, "rate_per_s": w.rate * b.share,
                 "mean_output": float(b.output.mean())} for b in s.buckets
            ],
        },
    }  # fmt: skip
    if s.objectives.attainment is not None:
        found["attainment"] = _attainment(cell, s.objectives.attainment)
    return found


def percentiles(cell: Running) -> list[dict[str, Any]]:
    """Every limit, and the usual percentiles of TTFT and TPOT: in closed form (None where there is none), over the whole
    replay, and in its worst window. A limit that grows with the input has `limit_s_per_token`, which the values leave out."""
    checks = []
    goals = cell.service.objectives
    for metric in ("ttft", "tpot", "itl", "longest_gap", "e2e"):
        limits = getattr(goals, metric)
        usual = ("p50", *limits, "p95") if metric in ("ttft", "tpot") else limits
        for name in dict.fromkeys(usual):
            limit = limits.get(name, Limit(0.0))
            asked = (cell, metric, percentile(name), limit.per_token)
            checks.append({
                "metric": metric, "percentile": name, "limit_s": float(limit) if name in limits else None,
                "promised_s": _promised(*asked), "replayed_s": _replayed(*asked), "worst_s": _replayed(*asked, goals.window),
                "window_s": goals.window, **({"limit_s_per_token": limit.per_token} if limit.per_token else {}),
            })  # fmt: skip
    return checks


def _sites(cell: Running) -> dict[str, float]:
    """Round trip of every region in use; the percentile told is that of the worst one."""
    return {x.column.offer.region: x.column.offer.site.rtt for x in cell.pools}


def _promised(cell: Running, metric: str, share: float, per_token: float) -> float | None:
    worst = 0.0
    for region in _sites(cell):
        mine = [x for x in cell.pools if x.column.offer.region == region]
        found = promised(mine, metric, share, cell.service.workload.dispersion, per_token)
        if found is None:
            return None
        worst = max(worst, found)
    return worst


def _replayed(cell: Running, metric: str, share: float, per_token: float, window: float = math.inf) -> float:
    found = []
    for region, rtt in _sites(cell).items():
        mine = [x for x in cell.replayed if x.pool.column.offer.region == region]
        far = rtt if metric in ("ttft", "e2e") else 0.0
        found.append(replayed_percentile(mine, metric, share, window, per_token) + far)
    return max(found, default=0.0)


def _attainment(cell: Running, joint: Joint) -> dict[str, Any]:
    """Share of requests that meet both limits, over the whole replay and in its worst window, in the worst region."""
    goals, whole, worst = cell.service.objectives, 1.0, 1.0
    for region, rtt in _sites(cell).items():
        every = together([x for x in cell.replayed if x.pool.column.offer.region == region])
        near = stricter(goals, rtt).attainment
        if every is not None and near is not None:
            met = every.met(near.ttft, near.tpot)
            whole, worst = min(whole, float(met.mean())), min(worst, every.worst_share(met, joint.share, goals.window))
    limits = {m: None if x is None else str(x) for m, x in (("ttft", joint.ttft), ("tpot", joint.tpot))}
    return {"share": joint.share, "replayed_share": whole, "worst_share": worst, "window_s": goals.window, **limits}


def _rejected(r: Rejected, s: Served) -> dict[str, Any]:
    """A refused layout; input_tokens: the lengths it was refused for, None for any."""
    ends = [s.buckets[min(r.buckets)].low, s.buckets[max(r.buckets)].high] if r.buckets else None
    return {"layout": r.layout.label, "reason": r.reason, "input_tokens": ends}


def spend(p: Plan) -> float | None:
    """USD/h over all periods and tariffs, electricity where a region charges it; None where a price is missing."""
    total = 0.0
    for t, offer in enumerate(p.offers):
        for period, share in enumerate(p.question.shares):
            bought = nodes_bought(p.question, p.values, t, period)
            for n, tariff in zip(bought, offer.paid, strict=True):
                if n and tariff.price is None:
                    return None
                total += share * n * (tariff.price or 0.0) * 3600
            if offer.site.electricity is not None:
                cells = [c for c in p.cells if c.service.period == period]
                total += share * offer.site.electricity * 3600 * (_watts(offer, sum(bought), cells) or 0.0)
    return total


def _nodes(p: Plan) -> list[dict[str, Any]]:
    rows = []
    for t, offer in enumerate(p.offers):
        for n, tariff in zip(nodes_bought(p.question, p.values, t, 0), offer.paid, strict=True):
            if n:
                rows.append({
                    "node": offer.node.name, "count": n, "devices": offer.devices * n,
                    "price_usd_per_hour": _hourly(tariff.price), "price_source": tariff.source, "max_nodes": offer.max_nodes,
                    "term": tariff.term, "region": offer.region,
                })  # fmt: skip
    return rows


def _periods(p: Plan) -> list[dict[str, Any]]:
    return [
        {"multiple": level.multiple, "share_of_time": level.share,
         "nodes": {o.label: sum(nodes_bought(p.question, p.values, t, i)) for t, o in enumerate(p.offers)}}
        for i, level in enumerate(p.fleet.levels)
    ]  # fmt: skip


def _uptime(p: Plan) -> list[dict[str, Any]]:
    """Of every node type that can fail: nodes needed, bought, and the probability that enough are up."""
    rows = []
    for t, offer in enumerate(p.offers):
        bought = sum(nodes_bought(p.question, p.values, t, 0))
        if bought and offer.up is not None:
            needed = round(p.values.get(f"K_{t}_0", bought))
            rows.append({
                "node": offer.label, "needed": needed, "bought": bought, "up": offer.up,
                "availability": enough(offer.up, needed, bought),
            })  # fmt: skip
    return rows


def lossy_in_use(p: Plan) -> list[str]:
    """Lossy formats that the plan runs."""
    found = []
    for c in p.cells:
        model = load_model(c.service.model)
        for x in c.pools:
            name = x.column.layout.weight_dtype
            if quality.weights(name, model) == "lossy":
                found.append(f"{name} weights of {model.name}")
            found += [f"{t} on {model.name}" for t in x.column.layout.techniques if quality.technique(t) == "lossy"]
        kv = p.fleet.choices.kv_dtype
        if kv not in (None, "auto") and quality.cache(kv, model) == "lossy":
            found.append(f"KV cache in {kv} of {model.name}")
    return list(dict.fromkeys(found))


def _hourly(price: float | None) -> float | None:
    return None if price is None else price * 3600


def _per_million(p: Plan, hourly: float) -> float:
    tokens = sum(
        p.question.shares[c.service.period] * c.service.workload.rate * 3600 * b.share * float(b.output.mean())
        for c in p.cells for b in c.service.buckets
    ) * mean_load(p)  # fmt: skip
    return hourly / (tokens * p.values.get("theta", 1.0)) * 1e6


def mean_load(p: Plan) -> float:
    """Mean load of the day over the highest, where a fixed fleet stands all day; 1 where every period was planned for itself."""
    if len(p.fleet.levels) > 1 or not p.fleet.profile:
        return 1.0
    seconds = sum(s for s, _ in p.fleet.profile)
    return sum(s * m for s, m in p.fleet.profile) / seconds / p.fleet.levels[0].multiple


def power(p: Plan) -> float | None:
    """Watts of the bought nodes at the highest load, PUE included; None where a device's limit is unknown."""
    total = 0.0
    for offer, count in zip(p.offers, p.nodes, strict=True):
        watts = _watts(offer, count, p.peak)
        if watts is None:
            return None
        total += watts
    return total


def _watts(offer: Offer, count: int, cells: Sequence[Running]) -> float | None:
    """Watts of the nodes of an offer: at rest, and what running instances add."""
    mine = [x for c in cells for x in c.pools if x.column.offer is offer]
    if not count:
        return 0.0
    if offer.idle_power is None or any(x.column.power_w is None for x in mine):
        return None
    busy = sum(x.replicas * ((x.column.power_w or 0.0) - x.column.layout.devices * offer.idle_device) for x in mine)
    return offer.site.pue * (count * offer.idle_power + busy)


def _pool(x: Pool) -> dict[str, Any]:
    c, s = x.column, x.state
    return {
        "role": c.layout.role, "hardware": c.layout.node, "offer": c.offer.label, "device": c.offer.machine.device.name,
        "tp": c.layout.tp, "pp": c.layout.pp, "ep": c.layout.ep, "dp": c.layout.dp, "replicas": x.replicas, "devices": x.devices,
        "techniques": list(c.layout.techniques), "weight_dtype": _formats(c), "kv_dtype": c.estimator.formats.kv.name,
        "batch": s.batch, "step_s": s.step, "prefill_utilisation": s.utilisation, "kv_share": s.kv_share,
        "requests_per_s": x.rate, "requests_per_s_by_bucket": x.rates.tolist(), "requests_per_s_per_replica": x.rate / x.replicas,
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
    found: dict[str, Any] = {"name": a.name, "reason": a.reason, "objective": None, "nodes": list(a.nodes), "pools": []}
    if a.confirmed is not None:
        found["replayed"] = a.confirmed.data
    if a.solution is not None:
        found["objective"] = abs(a.solution.objective)
        found |= {"bound": abs(a.solution.bound), "gap": a.solution.gap, "proven": proven(a.solution)}
        for i, c in enumerate(a.columns):
            count = round(a.solution.values.get(f"n_{i}", 0.0))
            if count and any(a.solution.values.get(f"y_{i}_{k}", 0.0) > 1e-9 for k in c.buckets):
                found["pools"].append({"layout": c.layout.label, "replicas": count})
    return found
