"""Tables of a report: the plan's own data, one row a fact."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import date
from typing import Any

from perfmodel import prices
from perfmodel.planner.evaluated import Evaluated, Running
from perfmodel.planner.page import METRICS
from perfmodel.planner.promise import percentile
from perfmodel.report import series
from perfmodel.report.blocks import Cell, Table
from perfmodel.report.text import age, degrees, letter, money, number, percent, seconds, tokens


def verdict(check: dict[str, Any]) -> Cell:
    """Pass or fail of one percentile, by the replay's worst window and by the closed form where there is one."""
    limit, promised = check["limit_s"], check["promised_s"]
    if limit is None:
        return Cell("no limit")
    kept, foreseen = check["worst_s"] <= limit, promised is None or promised <= limit
    if kept and foreseen:
        return Cell("PASS", "pass")
    if kept:
        return Cell("PASS in replay, closed form above", "warn")
    return Cell("FAIL in replay" if foreseen else "FAIL", "fail")


def checks(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Percentiles of every service."""
    return [c for s in data.get("services", [data]) for c in s["percentiles"]]


def percentiles(data: dict[str, Any], of: str = "") -> Table:
    """Promised and replayed percentiles against their limits; `data` of one service, named `of` where there are several."""
    rows: list[tuple[str | Cell, ...]] = []
    for c in data["percentiles"]:
        limit = c["limit_s"]
        used = percent(c["worst_s"] / limit) if limit else "–"
        grows = f" + {seconds(c['limit_s_per_token'])}/token" if "limit_s_per_token" in c else ""
        rows.append((
            f"{METRICS[c['metric']]} {c['percentile']}", seconds(limit) + grows, seconds(c["promised_s"]),
            seconds(c["replayed_s"]), seconds(c["worst_s"]), used, verdict(c),
        ))  # fmt: skip
    if "attainment" in data:
        a = data["attainment"]
        limits = ", ".join(f"{METRICS[m]} {a[m]}" for m in ("ttft", "tpot") if a[m] is not None)
        good = a["worst_share"] >= a["share"]
        rows.append((
            f"share within {limits}", percent(a["share"], 1), "–", percent(a["replayed_share"], 1), percent(a["worst_share"], 1),
            "–", Cell("PASS", "pass") if good else Cell("FAIL in replay", "fail"),
        ))  # fmt: skip
    window = seconds(data["percentiles"][0]["window_s"])
    return Table(
        f"Latency{of}: closed form and replay against the limits",
        ("percentile", "limit", "closed form", "replayed", f"in the worst {window}", "of the limit", "verdict"),
        tuple(rows), (1, 2, 3, 4, 5),
    )  # fmt: skip


def loads(plans: Sequence[dict[str, Any]]) -> Table:
    """One row a load factor."""
    rows = []
    for d in plans:
        worst = max((c["worst_s"] / c["limit_s"] for c in checks(d) if c["limit_s"]), default=None)
        failed = any(verdict(c).mark == "fail" for c in checks(d))
        rows.append((
            f"×{d['workload']['load']:g}", number(d["workload"]["rate_per_s"]),
            " + ".join(f"{n['count']} × {place(n)}" for n in d["nodes"]), f"{d['devices']:,} ({d['devices_busy']:,})",
            money(d["cost_usd_per_hour"]), money(d["usd_per_million_output_tokens"]), "–" if worst is None else percent(worst),
            Cell("FAIL", "fail") if failed else Cell("PASS", "pass"),
        ))  # fmt: skip
    columns = (
        "load", "requests/s", "buy", "devices (busy)", "USD/h", "USD per million output tokens", "tightest latency, of its limit",
        "limits",
    )  # fmt: skip
    return Table("Plans by load", columns, tuple(rows), (1, 3, 4, 5, 6))


def place(n: dict[str, Any]) -> str:
    """hgx-h100-8 in us (spot): a row of nodes by type, region and term."""
    return n["node"] + (f" in {n['region']}" if n["region"] else "") + (f" ({n['term']})" if n["term"] != "on-demand" else "")


def pools(p: Evaluated) -> Table:
    """What runs."""
    several = len(p.peak) > 1
    rows = [
        (letter(i), *([x["service"]] if several else []), f"{x['replicas']} × {x['role']}", degrees(pool.column.layout),
         x["offer"], f"{x['devices']:,}", f"{x['weight_dtype']} / {x['kv_dtype']}", number(x["requests_per_s"], 4),
         tokens(x["input_tokens"]))
        for i, (pool, x) in enumerate(zip(p.pools, p.data["pools"], strict=True))
    ]  # fmt: skip
    columns = ("pool", *(["service"] if several else []), "instances", "layout", "node", "devices", "weights / KV", "requests/s",
               "input tokens")  # fmt: skip
    n = len(columns)
    return Table("Pools", columns, tuple(rows), (n - 4, n - 2, n - 1))


def routes(p: Evaluated) -> list[Table]:
    """Requests per second of each range of lengths to each pool, where a service has more than one pool."""
    found = []
    names = {id(x): letter(i) for i, x in enumerate(p.pools)}
    for c in p.peak:
        if len(c.pools) < 2:
            continue
        rows = [
            (names[id(x)], x.column.layout.role, *(number(r, 4) if r else "–" for r in x.rates.tolist())) for x in c.pools
        ]
        columns = ("pool", "role", *(b.label for b in c.service.buckets))
        of = f" of {c.service.name}" if len(p.peak) > 1 else ""
        found.append(Table(f"Where requests{of} go [requests/s]", columns, tuple(rows), tuple(range(2, len(columns)))))
    return found


def operating_points(p: Evaluated) -> Table:
    """One instance of each pool at its load, with what its own simulated requests saw."""
    seen = {id(r.pool): r.outcome for r in p.replayed}
    rows = []
    every = [(c.service.objectives, x) for c in p.peak for x in c.pools]
    for i, ((goals, pool), x) in enumerate(zip(every, p.data["pools"], strict=True)):
        prefills, decodes, outcome = x["role"] != "decode", x["role"] != "prefill", seen.get(id(pool))
        names = {metric: series.strictest(getattr(goals, metric))[0] for metric in ("ttft", "tpot")}
        first, further = (
            f"{seconds(outcome.percentile(metric, percentile(names[metric])))} ({names[metric]})"
            if has and outcome is not None else "–"
            for metric, has in (("ttft", prefills), ("tpot", decodes))
        )  # fmt: skip
        rows.append((
            letter(i), number(x["requests_per_s_per_replica"], 4), percent(x["prefill_utilisation"]) if prefills else "–",
            number(x["batch"]) if decodes else "–", seconds(x["step_s"]) if decodes else "–", percent(x["kv_share"]),
            first, further, x["limited_by"],
        ))  # fmt: skip
    return Table(
        "One instance of each pool",
        ("pool", "requests/s", "prefilling", "decode batch", "token every", "KV memory", "own TTFT on site",
         "own TPOT", "limited by"),
        tuple(rows), (1, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip


def periods(data: dict[str, Any]) -> Table:
    """Nodes held over the day."""
    rows = [
        (f"×{x['multiple']:.3g}", percent(x["share_of_time"]),
         ", ".join(f"{n} × {name}" for name, n in x["nodes"].items() if n) or "none")
        for x in data["periods"]
    ]  # fmt: skip
    lag = seconds(data["lag_s"])
    return Table(f"Capacity over the day, decided {lag} ahead", ("up to load", "of the time", "nodes"), tuple(rows), (0, 1))


def uptime(data: dict[str, Any]) -> Table:
    """Nodes bought for those that fail."""
    rows = [
        (x["node"], f"{x['needed']}", f"{x['bought']}", percent(x["up"], 3), percent(x["availability"], 4))
        for x in data["uptime"]
    ]  # fmt: skip
    columns = ("node", "needed", "bought", "each is up", "enough are up")
    return Table("Spares against failures", columns, tuple(rows), (1, 2, 3, 4))


def nodes(p: Evaluated, today: date) -> Table:
    """What is bought, and where its price is from."""
    rows: list[tuple[str | Cell, ...]] = []
    for n in p.data["nodes"]:
        price, most, source = n["price_usd_per_hour"], n["max_nodes"], n["price_source"]
        day, days = age(source, today)
        stale = Cell(
            f"{day}, {days} days old" if days is not None else "–", "warn" if stale_price(n["node"], source) else ""
        )
        rows.append((
            n["node"], n["region"] or "–", n["term"], f"{n['count']:,}", f"{n['devices']:,}",
            "–" if most is None else f"{most:,}", money(price),
            money(price * n["count"]) if price is not None else "–", source, stale,
        ))  # fmt: skip
    columns = (
        "node", "region", "term", "count", "devices", "at most", "USD/h each", "USD/h together", "source of the price", "dated",
    )  # fmt: skip
    return Table("Nodes to buy or rent", columns, tuple(rows), (3, 4, 5, 6, 7))


def stale_price(node: str, source: str) -> str:
    """What the price list says of an outdated price; empty for a fresh one or the user's own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = prices.on_demand(node)
    if found is None or found.source != source:
        return ""
    return next((str(w.message) for w in caught if issubclass(w.category, prices.StalePrice)), "")


def buckets(c: Running) -> Table:
    """Length buckets of a service's workload."""
    every, rate = c.service.buckets, c.service.workload.rate
    work = [b.share * float(b.input.mean()) for b in every]
    rows = [
        (b.label, percent(b.share, 1), percent(w / sum(work), 1), number(rate * b.share, 4),
         number(float(b.input.mean()), 4), number(float(b.output.mean()), 4))
        for b, w in zip(every, work, strict=True)
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
