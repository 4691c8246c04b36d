"""Tables of a report: the plan's own data, one row a fact."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import Any

from perfmodel import prices
from perfmodel.planner.columns import percentile
from perfmodel.planner.run import Plan
from perfmodel.report import series
from perfmodel.report.blocks import Cell, Table
from perfmodel.report.text import METRICS, OBJECTIVE_UNITS, age, letter, money, number, percent, seconds, tokens
from perfmodel.spec.workload import Objectives


def verdict(check: dict[str, Any]) -> Cell:
    """Pass or fail of one percentile, by the replay and by the closed form."""
    limit = check["limit_s"]
    if limit is None:
        return Cell("no limit")
    replayed, promised = check["replayed_s"] <= limit, check["promised_s"] <= limit
    if replayed and promised:
        return Cell("PASS", "pass")
    if replayed:
        return Cell("PASS in replay, closed form above", "warn")
    return Cell("FAIL in replay" if promised else "FAIL", "fail")


def percentiles(data: dict[str, Any]) -> Table:
    """Promised and replayed percentiles against their limits."""
    rows = []
    for c in data["percentiles"]:
        limit = c["limit_s"]
        used = percent(c["replayed_s"] / limit) if limit else "–"
        rows.append((
            f"{METRICS[c['metric']]} {c['percentile']}", seconds(limit), seconds(c["promised_s"]), seconds(c["replayed_s"]), used,
            verdict(c),
        ))  # fmt: skip
    return Table(
        "Latency: closed form and replay against the limits",
        ("percentile", "limit", "closed form", "replayed", "of the limit", "verdict"), tuple(rows), (1, 2, 3, 4),
    )  # fmt: skip


def loads(plans: Sequence[dict[str, Any]]) -> Table:
    """One row a load factor."""
    rows = []
    for d in plans:
        worst = max((c["replayed_s"] / c["limit_s"] for c in d["percentiles"] if c["limit_s"]), default=None)
        failed = any(verdict(c).mark == "fail" for c in d["percentiles"])
        rows.append((
            f"×{d['workload']['load']:g}", number(d["workload"]["rate_per_s"]),
            " + ".join(f"{n['count']} × {n['node']}" for n in d["nodes"]), f"{d['devices']:,} ({d['devices_busy']:,})",
            money(d["cost_usd_per_hour"]), money(d["usd_per_million_output_tokens"]), "–" if worst is None else percent(worst),
            Cell("FAIL", "fail") if failed else Cell("PASS", "pass"),
        ))  # fmt: skip
    columns = (
        "load", "requests/s", "buy", "devices (busy)", "USD/h", "USD per million output tokens", "tightest latency, of its limit",
        "limits",
    )  # fmt: skip
    return Table("Plans by load", columns, tuple(rows), (1, 3, 4, 5, 6))


def pools(data: dict[str, Any]) -> Table:
    """What runs."""
    rows = [
        (letter(i), f"{x['replicas']} × {x['role']}", f"tp{x['tp']}" + (f" pp{x['pp']}" if x["pp"] > 1 else ""), x["hardware"],
         f"{x['devices']:,}", f"{x['weight_dtype']} / {x['kv_dtype']}", number(x["requests_per_s"], 4), tokens(x["input_tokens"]))
        for i, x in enumerate(data["pools"])
    ]  # fmt: skip
    columns = ("pool", "instances", "layout", "node", "devices", "weights / KV", "requests/s", "input tokens")
    return Table("Pools", columns, tuple(rows), (4, 6, 7))


def operating_points(p: Plan, goals: Objectives) -> Table:
    """One instance of each pool at its load, with what its own simulated requests saw."""
    seen = {id(r.pool): r.outcome for r in p.replayed}
    names = {metric: series.strictest(getattr(goals, metric))[0] for metric in METRICS}
    rows = []
    for i, (pool, x) in enumerate(zip(p.pools, p.data["pools"], strict=True)):
        prefills, decodes, outcome = x["role"] != "decode", x["role"] != "prefill", seen.get(id(pool))
        first, further = (
            seconds(outcome.percentile(metric, percentile(names[metric]))) if has and outcome is not None else "–"
            for metric, has in (("ttft", prefills), ("tpot", decodes))
        )
        rows.append((
            letter(i), number(x["requests_per_s_per_replica"], 4), percent(x["prefill_utilisation"]) if prefills else "–",
            number(x["batch"]) if decodes else "–", seconds(x["step_s"]) if decodes else "–", percent(x["kv_share"]),
            first, further, x["limited_by"],
        ))  # fmt: skip
    return Table(
        "One instance of each pool",
        ("pool", "requests/s", "prefilling", "decode batch", "token every", "KV memory",
         f"own TTFT {names['ttft']}", f"own TPOT {names['tpot']}", "limited by"),
        tuple(rows), (1, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip


def nodes(p: Plan, today: date) -> Table:
    """What is bought, and where its price is from."""
    rows: list[tuple[str | Cell, ...]] = []
    for n in p.data["nodes"]:
        price, most, source = n["price_usd_per_hour"], n["max_nodes"], n["price_source"]
        day, days = age(source, today)
        stale = Cell(
            f"{day}, {days} days old" if days is not None else "–", "warn" if stale_price(n["node"], source) else ""
        )
        rows.append((
            n["node"], f"{n['count']:,}", f"{n['devices']:,}", "–" if most is None else f"{most:,}", money(price),
            money(price * n["count"]) if price is not None else "–", source, stale,
        ))  # fmt: skip
    columns = ("node", "count", "devices", "at most", "USD/h each", "USD/h together", "source of the price", "dated")
    return Table("Nodes to buy or rent", columns, tuple(rows), (1, 2, 3, 4, 5))


def stale_price(node: str, source: str) -> str:
    """What the price list says of an outdated price; empty for a fresh one or the user's own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = prices.on_demand(node)
    if found is None or found.source != source:
        return ""
    return next((str(w.message) for w in caught if issubclass(w.category, prices.StalePrice)), "")


def buckets(p: Plan) -> Table:
    """Length buckets of the workload."""
    work = [b.share * float(b.input.mean()) for b in p.buckets]
    rows = [
        (tokens([b.low, b.high]), percent(b.share, 1), percent(w / sum(work), 1), number(p.workload.rate * b.share, 4),
         number(float(b.input.mean()), 4), number(float(b.output.mean()), 4))
        for b, w in zip(p.buckets, work, strict=True)
    ]  # fmt: skip
    columns = ("input tokens", "share of requests", "share of input tokens", "requests/s", "mean input", "mean output")
    return Table("Buckets of input length", columns, tuple(rows), (0, 1, 2, 3, 4, 5))


def operators(step: series.Step) -> Table:
    """Operators of one step by falling share of its time."""
    rows = []
    for row in sorted(step.rows, key=lambda r: -r["share"]):
        rows.append((
            row["name"], row["part"], f"{row['times']:,.0f}", row["dtype"] or "–", number(row["flops"] / 1e9),
            number(row["bytes"] / 1e6), number(row["intensity"]), number(row["achieved"] / 1e12) if row["flops"] else "–",
            seconds(row["seconds"]),
            percent(row["share"], 1), series.RESOURCES.get(row["bound_by"], "–"),
        ))  # fmt: skip
    return Table(
        f"Pool {letter(step.pool)}, {step.described}, per device",
        ("operator", "part", "times", "dtype", "GFLOP", "MB", "FLOP/byte", "TFLOP/s", "each", "share", "waits for"),
        tuple(rows), (2, 4, 5, 6, 7, 8, 9),
    )  # fmt: skip


def binding(data: dict[str, Any]) -> Table:
    """Rows of the integer program without slack, and shadow prices."""
    rows = [
        (b["constraint"], f"{b['shadow_price']:,.2f} {b['unit']}" if b["shadow_price"] is not None else "–", b["text"])
        for b in data["binding"]
    ]
    return Table(
        "What binds, and what one more would cost", ("constraint", "shadow price", "meaning"), tuple(rows), (1,)
    )


def alternatives(data: dict[str, Any]) -> Table:
    """Alternatives, cheapest first; those that cannot serve come last."""
    best, unit = data["objective_value"], OBJECTIVE_UNITS[data["objective"]]
    rows = []
    for a in sorted(data["alternatives"], key=lambda a: (a["objective"] is None, a["objective"] or 0.0)):
        value = a["objective"]
        extra = f"{(value - best) / best:+.1%}" if value is not None and best else "–"
        count: Counter[str] = Counter()
        for x in a["pools"]:
            count[x["layout"]] += x["replicas"]
        runs = ", ".join(f"{n} × {label}" for label, n in count.items()) or "–"
        rows.append(
            (a["name"], money(value) if value is not None else Cell("cannot", "warn"), extra, a["reason"], runs)
        )
    return Table(
        "Alternatives, each solved anew",
        ("alternative", unit, "against this plan", "why", "would run"),
        tuple(rows),
        (1, 2),
    )


def rejected(p: Plan) -> Table:
    """One row a layout that cannot serve some lengths, with the reason for the easiest set it was refused."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    spans: dict[str, str] = {}
    for r in p.found.rejected:
        label = r.layout.label
        count[label] += 1
        first.setdefault(label, r.reason)
        whole = not r.buckets
        low, high = (0, len(p.buckets) - 1) if whole else (min(r.buckets), max(r.buckets))
        spans.setdefault(
            label, "any length" if whole else f"{tokens([p.buckets[low].low, p.buckets[high].high])} tokens"
        )
    rows = [(label, spans[label], reason, f"{count[label]}") for label, reason in first.items()]
    columns = ("layout", "for", "first reason", "sets of lengths refused")
    return Table("Layouts refused before the integer program", columns, tuple(rows), (3,))


def rounds(data: dict[str, Any]) -> Table:
    """Plan, replay, tighten, plan again."""
    rows = [
        (f"{r['round']}", money(r["objective"]), money(r["bound"]), ", ".join(r["missed"]) or "nothing")
        for r in data["rounds"]
    ]
    unit = OBJECTIVE_UNITS[data["objective"]]
    columns = ("round", f"objective [{unit}]", f"proven bound [{unit}]", "missed in replay")
    return Table("Rounds of plan and replay", columns, tuple(rows), (0, 1, 2))
