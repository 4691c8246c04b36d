"""The sections of a plan's report. To add one, write a function here and name it in the recipe."""

from __future__ import annotations

from datetime import date

import numpy as np

from perfmodel.planner.evaluated import Evaluated, Run, Running
from perfmodel.planner.page import METRICS
from perfmodel.planner.pools import answers, promised
from perfmodel.planner.promise import percentile
from perfmodel.report import changes, figures, provenance, series, tables
from perfmodel.report.blocks import Block, Cards, Chart, Fold, Items, Table, section
from perfmodel.report.text import (
    layout,
    letter,
    money,
    number,
    percent,
    pool_names,
    seconds,
    tokens,
)


@section("loads", per="run")
def loads(run: Run) -> list[Block]:
    """All load factors side by side; nothing for a run with one."""
    return [tables.loads(run.data["plans"])] if len(run.plans) > 1 else []


@section("headline")
def headline(run: Run, p: Evaluated, *, days: int = 30) -> list[Block]:
    """What to buy and run, what it costs, and whether the limits hold."""
    d = p.data
    limited = [c for c in tables.checks(d) if c["limit_s"] is not None]
    met = sum(tables.verdict(c).mark != "fail" for c in limited)
    cost, per = d["cost_usd_per_hour"], d["usd_per_million_output_tokens"]
    cards = [
        ("Cost", f"{money(cost)} USD/h" if cost is not None else "no price known",
         f"{cost * 24 * days:,.0f} USD in {days} days" if cost is not None else ""),
        ("Output tokens", f"{money(per)} USD" if per is not None else "–", "per million, if the load lasts"),
        ("Devices", f"{d['devices']:,}", f"{d['devices_busy']:,} busy, {d['devices'] - d['devices_busy']:,} spare"),
        ("Power", f"{d['power_w'] / 1e3:,.1f} kW" if d["power_w"] else "unknown", "at this load"),
        ("Latency limits", f"{met} of {len(limited)} met", "in the worst window of the replay"),
        ("Proof", d["status"], f"gap {percent(d['gap'], 2)} to the proven bound"),
    ]  # fmt: skip
    if "served_multiple" in d:
        cards.append(("Serves", f"{money(d['objective_value'])} {d['unit']}", f"{number(d['served_multiple'])} times the load"))
    prices = [
        "" if n["price_usd_per_hour"] is None else f" at {money(n['price_usd_per_hour'])} USD/h" for n in d["nodes"]
    ]
    buy = [f"{n['count']:,} × {tables.place(n)}{price}" for n, price in zip(d["nodes"], prices, strict=True)]
    runs = [
        f"{letter(i)}: {x.replicas:,} × {layout(x)}, {number(x.rate, 4)} requests/s of {tokens(y['input_tokens'])} input tokens"
        for i, (x, y) in enumerate(zip(p.pools, d["pools"], strict=True))
    ]
    services = d.get("services", [d])
    latency = [tables.percentiles(s, f" of {s['name']}" if len(services) > 1 else "") for s in services]
    return [Cards(tuple(cards)), Items("Buy", tuple(buy)), Items("Run", tuple(runs)), *latency]


@section("plan")
def plan(run: Run, p: Evaluated) -> list[Block]:
    """Pools, nodes, prices, and what to beware of."""
    d = p.data
    beware = []
    for n in d["nodes"]:
        stale = tables.stale_price(n["node"], n["price_source"])
        if stale:
            beware.append(f"{stale[0].upper()}{stale[1:]}: check it before you buy.")
    beware += d["warnings"]
    beware += [f"Lossy: {x}. Its answers are not quite those of the checkpoint." for x in d["lossy"]]
    found: list[Block] = [
        tables.pools(p), *tables.routes(p), tables.operating_points(p), tables.nodes(p, date.today()),
    ]  # fmt: skip
    found += [make(d) for key, make in (("periods", tables.periods), ("uptime", tables.uptime)) if d.get(key)]
    return found + ([Items("Beware", tuple(beware), "warn")] if beware else [])


_ROOFLINE = (
    "Solid lines are the datasheet's roofs, dotted ones what large kernels reach. Left of a ridge an operator waits for memory, "
    "right of it for the matrix units; the further below the roof, the more is lost to small shapes, launches and latency. "
    "Circles are prefill, diamonds decode; letters are pools; area is the share of the step. Collectives, norms and casts "
    "multiply no matrices: see the table."
)


@section("roofline")
def roofline(run: Run, p: Evaluated) -> list[Block]:
    """One roofline a device type, with the operators of its pools' steps; every operator as a table."""
    every = series.steps(p.pools)
    found: list[Block] = []
    for node in dict.fromkeys(x.column.layout.node for x in p.pools):
        mine = [s for s in every if p.pools[s.pool].column.layout.node == node]
        m = p.pools[mine[0].pool].column.estimator.machine
        top = [(s, max(s.rows, key=lambda r: r["share"])) for s in mine]
        told = "; ".join(
            f"pool {letter(s.pool)} {s.phase}: {r['name']} takes {percent(r['share'])}"
            + (
                f" at {number(r['intensity'])} FLOP/byte and {number(r['achieved'] / 1e12)} TFLOP/s"
                if r["intensity"]
                else ""
            )
            for s, r in top
        )
        found.append(Chart(
            f"Roofline of {m.device.title} in {node}", figures.roofline(m, mine),
            _ROOFLINE if not found else "Read as above.",
            f"Roofline of {m.device.name}, memory {number(m.bandwidth / 1e12)} TB/s. Largest operators: {told}.",
        ))  # fmt: skip
    return [*found, Fold("Every operator, in numbers", tuple(tables.operators(s) for s in every))]


@section("breakdown")
def breakdown(run: Run, p: Evaluated) -> list[Block]:
    """Where the time of each pool's steps goes."""
    every = series.steps(p.pools)
    labels = [f"{letter(s.pool)} {s.described}" for s in every]
    totals = [seconds(s.seconds) for s in every]
    groups, resources = [series.by_group(s) for s in every], [series.by_resource(s) for s in every]

    def told(parts: list[dict[str, float]], names: dict[str, str]) -> str:
        most = [max(x, key=lambda k: x[k]) for x in parts]
        return "; ".join(
            f"{label}, {total}: most in {names[k]} ({percent(x[k] / sum(x.values()))})"
            for label, total, k, x in zip(labels, totals, most, parts, strict=True)
        )

    plain_groups = {g: g for g in series.GROUPS}
    return [
        Chart("Time by part of the model", figures.stacked(labels, totals, groups, plain_groups, figures.GROUP_COLOURS),
              "Each bar is one step of one pool, split by what it computes. Parts add up to the step's time, above the bar.",
              told(groups, plain_groups)),
        Chart("Time by what it waits for", figures.stacked(labels, totals, resources, series.RESOURCES, figures.RESOURCE_COLOURS),
              "The same steps, split by the resource that is busy longest in each operator; launches and fixed latencies count "
              "on their own. A faster part helps at most by its share.", told(resources, series.RESOURCES)),
    ]  # fmt: skip


@section("frontier")
def frontier(run: Run, p: Evaluated, *, metrics: tuple[str, ...] = ("tpot", "ttft")) -> list[Block]:
    """Latency against throughput per dollar of every layout that holds the model."""
    unit = "requests per USD" if run.spec.objective == "cost" else "requests/s per device"
    names = [o.label for o in p.offers]
    labels = {id(x): (i, label) for i, (x, label) in enumerate(zip(p.pools, pool_names(p.pools), strict=True))}
    found: list[Block] = []
    for c in p.peak:
        curves = series.curves(c.service, run.spec.objective)
        for metric in metrics:
            name, limit = series.strictest(getattr(c.service.objectives, metric))
            chosen = []
            for x in c.pools:
                at = promised([x], metric, percentile(name), c.service.workload.dispersion)
                if answers(x.column.layout.role, metric) and at is not None:
                    value = series.worth(x.rate / x.replicas, x.column.layout, x.column.offer, run.spec.objective)
                    i, label = labels[id(x)]
                    chosen.append((i, x.column.layout.role, label, at, value))
            other = "prefill" if metric == "ttft" else "decode"
            told = "; ".join(f"{label}: {seconds(at)} at {number(value)} {unit}" for _, _, label, at, value in chosen)
            found.append(Chart(
                f"{METRICS[metric]} {name}{_of(p, c)} against throughput",
                figures.frontier(curves, chosen, metric, name, limit, names, unit),
                f"Each thin line is one layout, from idle (left) to saturation, for the mix of all requests; up and left is "
                f"better. Thick lines join the best of them. Circles with a letter are the plan's pools at their own mix and "
                f"load. A {other} instance does half of the work only: a pair of roles serves 1/(1/prefill + 1/decode) {unit}.",
                f"{METRICS[metric]} {name} limit {seconds(limit)}. The plan's pools: {told}.",
            ))  # fmt: skip
    return found


def _of(p: Evaluated, c: Running) -> str:
    """The service's name where there are several."""
    return f" of {c.service.name}" if len(p.peak) > 1 else ""


@section("memory")
def memory(run: Run, p: Evaluated) -> list[Block]:
    """What fills each pool's devices."""
    parts = [series.memory_parts(x) for x in p.pools]
    capacities = [x.column.estimator.machine.capacity for x in p.pools]
    labels = pool_names(p.pools)
    told = "; ".join(
        f"{label}: weights {number(x['weights'] / 1e9)} GB, keys and values {number(x['cached'] / 1e9)} GB, "
        f"free {number(x['free'] / 1e9)} GB of {number(c / 1e9)} GB"
        for label, x, c in zip(labels, parts, capacities, strict=True)
    )  # fmt: skip
    return [Chart(
        "Memory of one device", figures.memory(labels, parts, capacities),
        "The red mark is what a program can allocate. Keys and values in use are their mean plus two standard deviations at this "
        "load; what is left to the system is the share the engine does not plan with.", told,
    )]  # fmt: skip


@section("replay")
def replay(run: Run, p: Evaluated) -> list[Block]:
    """Distributions of the simulated requests beside the closed form."""
    places = {id(x): i for i, x in enumerate(p.pools)}
    found: list[Block] = []
    for c in p.peak:
        for metric in ("ttft", "tpot"):
            values = series.replayed_values(c.replayed, metric)
            if not values:
                continue
            whole = series.cumulative([(v, x.weight) for x, v in values])
            parts = [(places[id(x.pool)], series.cumulative([(v, 1.0)])) for x, v in values]
            limits = {k: float(v) for k, v in getattr(c.service.objectives, metric).items() if not v.per_token}
            told = "; ".join(
                f"{name} {seconds(float(np.interp(percentile(name), whole[1], whole[0])))}" for name in ("p50", "p95", "p99")
            )
            found.append(Chart(
                f"{METRICS[metric]}{_of(p, c)}, replayed and in closed form",
                figures.distribution(metric, whole, parts, series.closed_form(c, metric), limits),
                "Share of requests that are served within a time. A limit holds when the thick line crosses the dotted share "
                "before the red limit. The dashed line is what the planner counted with.",
                f"Cumulative distribution of {METRICS[metric]}, replayed: {told}.",
            ))  # fmt: skip
    sizes = ", ".join(f"pool {letter(places[id(x.pool)])} {x.outcome.ttft.size:,}" for x in p.replayed)
    lost = sum(x.outcome.preempted for x in p.replayed)
    note = f"Simulated requests: {sizes}. Preempted for lack of memory: {lost:,}. Seed {run.spec.seed}."
    return [*found, Items("", (note,))]


@section("workload")
def workload(run: Run, p: Evaluated, *, bins: int = 60) -> list[Block]:
    """What arrives."""
    return [block for c in p.peak for block in _arriving(c, _of(p, c), bins)]


def _arriving(c: Running, of: str, bins: int) -> list[Block]:
    w, r = c.service.workload, c.service.workload.requests
    starts, rates = series.arrivals(w, bins)
    inputs, outputs = series.lengths(r.input), series.lengths(r.output)
    told = (
        f"{w.described}; {number(w.rate, 4)} requests/s, "
        f"squared coefficient of variation of the gaps {number(w.dispersion)} (Poisson: 1)."
    )
    return [
        Items(of.removeprefix(" of "), (told,)),
        Chart(f"Arrivals{of}", figures.arrivals(starts, rates, w.rate),
              "Requests that arrive in each slice of the window that was replayed.",
              f"Between {number(min(rates))} and {number(max(rates))} requests/s, mean {number(w.rate)}."),
        Chart(f"Lengths{of}", figures.lengths(inputs, outputs, c.service.buckets),
              "Share of requests in logarithmic bins of tokens. Dotted lines part the buckets that a router can tell apart.",
              f"Mean input {number(float(r.input.mean()), 4)}, mean output {number(float(r.output.mean()), 4)} tokens."),
        tables.buckets(c),
    ]  # fmt: skip


@section("why")
def why(run: Run, p: Evaluated) -> list[Block]:
    """What binds, what the alternatives cost, and the proof."""
    d = p.data
    unit, best = d["unit"], d["objective_value"]
    # A runner-up's name goes on with what it buys and runs, which the table shows.
    able = [(a["objective"], a["name"].partition(":")[0]) for a in changes.ranked(d) if a["objective"] is not None]
    names, values = ["this plan", *(n for _, n in able)], [best, *(v for v, _ in able)]
    proof = (
        f"{d['solver']['name']}: {d['status']}, {money(best)} {unit}, proven bound {money(d['bound'])}, "
        f"gap {percent(d['gap'], 2)}, over {d['optimal_over']}. The proof holds for these columns, not beyond them."
    )
    told = "; ".join(f"{n}: {money(v)} {unit}" for n, v in zip(names, values, strict=True))
    found: list[Block] = [
        changes.binding(d),
        Chart("The alternatives", figures.alternatives(names, values, best, unit),
              "The same load, solved again with one choice taken away, and the next best plans. A bar as long as the first says "
              "the choice makes no difference at this load, because nodes are bought whole.", told),
        changes.alternatives(d), Items("Proof", (proof,)), changes.rounds(d),
    ]  # fmt: skip
    refused = changes.rejected(d)
    more = Fold(f"{len(refused.rows)} layouts refused for some or all lengths", (refused,))
    return [*found, more] if refused.rows else found


@section("what_if")
def what_if(run: Run, p: Evaluated) -> list[Block]:
    """What other limits, prices and choices would cost; nothing for a quick plan, which asks none of it."""
    if not p.data["what_if"]:
        return []
    tips = changes.thresholds(p.data)
    return [changes.what_if(p.data), *([tips] if tips.items else [])]


@section("uncertainty")
def uncertainty(run: Run, p: Evaluated, *, parameters: int = 4) -> list[Block]:
    """How far each pool's step may lie from its estimate, and which parameters matter most."""
    rows: list[tuple[str, ...]] = []
    for s in series.steps(p.pools):
        x = p.pools[s.pool].column.estimator.parts(s.batch, s.new, s.context, is_decode=s.is_decode)
        most = sorted(x.sensitivity.items(), key=lambda kv: -abs(kv[1]))[:parameters]
        rows.append((
            f"{letter(s.pool)} {s.described}", seconds(x.seconds), f"{seconds(x.interval[0])}–{seconds(x.interval[1])}",
            seconds(x.lower), seconds(x.upper), ", ".join(f"{k} ({v:+.1%})" for k, v in most),
        ))  # fmt: skip
    return [Table(
        "Steps, their error bands and what the bands come from",
        ("step", "expected", "p10–p90", "no step is faster", "without overlap", "one standard deviation moves it by"),
        tuple(rows), (1, 2, 3, 4),
    )]  # fmt: skip


@section("provenance", per="run")
def origin(run: Run) -> list[Block]:
    """Where every number is from."""
    return provenance.blocks(run)
