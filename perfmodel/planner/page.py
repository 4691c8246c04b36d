"""A plan as a page for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perfmodel.planner.program import UNITS
from perfmodel.spec.plan import PlanFile

if TYPE_CHECKING:
    from perfmodel.planner.run import Plan, PlanRun

METRICS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "longest_gap": "longest gap", "e2e": "end to end"}


def text(run: PlanRun) -> str:
    """Every plan of the run, one page each."""
    return "\n\n".join(_page(run.spec, p) for p in run.plans)


def _page(spec: PlanFile, p: Plan) -> str:
    d = p.data
    unit = UNITS[spec.objective]
    lines = [f"Load x{p.workload.load:g}: {p.workload.rate:.2f} requests/s  ({p.workload.described})", ""]
    lines.append("  Buy    " + ", ".join(_node_line(n) for n in d["nodes"]))
    lines += [_period_line(x) for x in d.get("periods", ())]
    models = {s["name"]: s["model"] for s in d.get("services", ())}
    lines += [_pool_line(models.get(x["service"], d["model"]), x) for x in d["pools"]]
    lines += [_cost_line(d), *_extra_lines(d)]
    lines += ["", *_percentile_lines(d)]
    lines += [
        "",
        f"  Proof  {d['status']}: {d['objective_value']:,.2f} {unit}, bound {d['bound']:,.2f}, gap {d['gap']:.2%},",
        f"         over {d['optimal_over']};",
        f"         {len(d['rounds'])} round(s) of plan and replay, {d['solver']['plan_seconds']:.1f} s",
    ]
    lines += [f"         heuristic: {d['heuristic']}"] if d["heuristic"] else []
    lines += [f"         {d['fewer_buckets']}"] if d["fewer_buckets"] else []
    lines += ["", "  Why", *(f"    {row['text']}" for row in d["binding"])]
    also = "" if d["replayed_all"] else "  (the plan was replayed, these and what-ifs were not: add --replay-all)"
    also += "  (what-ifs by the closed forms, which do not reach these bursts)" if d["heuristic"] and d["what_if"] else ""
    lines += ["", f"  Instead{also}", *(f"    {a['name']}: {a['reason']}{replayed(a)}" for a in d["alternatives"])]
    changes = [f"    {x}" for x in what_if_lines(d["what_if"], unit)]
    lines += ["", "  What if", *changes] if changes else []
    return "\n".join(lines)


def _node_line(n: dict[str, Any]) -> str:
    price = n["price_usd_per_hour"]
    where = f" in {n['region']}" if n["region"] else ""
    how = f" ({n['term']})" if n["term"] != "on-demand" else ""
    return f"{n['count']} x {n['node']}{where}{how}" + (f" at {price:.2f} USD/h" if price is not None else "")


def _pool_line(model: str, x: dict[str, Any]) -> str:
    more = "".join(f" {k}{x[k]}" for k in ("pp", "dp", "ep") if x[k] > 1) + "".join(f" with {t}" for t in x["techniques"])
    low, high = x["input_tokens"]
    load = []
    if x["role"] not in ("prefill", "encode"):
        load.append(f"decode batch {x['batch']:.1f}")
    if x["role"] != "decode":
        load.append(f"{'encode' if x['role'] == 'encode' else 'prefill'} {x['prefill_utilisation']:.0%} of the time")
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


def percentiles(d: dict[str, Any]) -> str:
    """The load of a plan, and its limits with closed forms and replay."""
    w = d["workload"]
    return "\n".join((f"Load x{w['load']:g}: {w['rate_per_s']:.2f} requests/s  ({w['described']})", "", *_percentile_lines(d)))


def _percentile_lines(d: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for s in d.get("services", [d]):
        title = s["name"] if "services" in d else ""
        lines += [""] if lines else []
        lines += [f"  {title[:22]:22}{'limit':>10}{'closed form':>14}{'replayed':>12}{'worst window':>14}"]
        lines += [_percentile_line(c) for c in s["percentiles"]]
        lines += [_attainment_line(s["attainment"])] if "attainment" in s else []
        if s["workload"].get("beyond_closed_forms"):
            lines.append("  Arrivals come in bursts beyond the closed forms, which only began the search: the replay decided.")
    return lines


def _percentile_line(c: dict[str, Any]) -> str:
    limit = "-" if c["limit_s"] is None else _ms(c["limit_s"])
    name = f"{METRICS[c['metric']]} {c['percentile']}"
    more = f"  + {c['limit_s_per_token'] * 1e3:g} ms per input token" if "limit_s_per_token" in c else ""
    return f"  {name:22}{limit:>10}{_ms(c['promised_s']):>14}{_ms(c['replayed_s']):>12}{_ms(c['worst_s']):>14}{more}"


def _ms(x: float | None) -> str:
    return "-" if x is None else f"{x * 1e3:,.0f} ms"


def _attainment_line(x: dict[str, Any]) -> str:
    limits = ", ".join(f"{METRICS[m]} {x[m]}" for m in ("ttft", "tpot") if x[m] is not None)
    return (
        f"  {limits} together: {x['replayed_share']:.2%} of the requests in the replay, {x['worst_share']:.2%} in its worst "
        f"window (asked {x['share']:.0%})"
    )


def _period_line(x: dict[str, Any]) -> str:
    nodes = ", ".join(f"{n} x {name}" for name, n in x["nodes"].items() if n)
    return f"         {x['share_of_time']:.0%} of the time, up to x{x['multiple']:.2g} of the load: {nodes or 'nothing'}"


def _extra_lines(d: dict[str, Any]) -> list[str]:
    lines = []
    if "served_multiple" in d:
        lines.append(f"  Serves {d['served_multiple']:.3g} times the load: {d['objective_value']:,.2f} requests/s")
    lines += [f"  Lossy  {x}" for x in d["lossy"]]
    if "fixed_fleet" in d:
        x = d["fixed_fleet"]
        lines.append(
            f"  Day    one fleet for the highest load, x{x['highest_multiple']:.2g}, paid all day; the mean load is "
            f"{x['mean_over_highest']:.0%} of that, and so are the tokens that the price per token counts"
        )
    for x in d.get("uptime", ()):
        lines.append(
            f"  Up     {x['needed']} of {x['bought']} {x['node']} are needed: {x['availability']:.5%} of the time "
            f"(each {x['up']:.3%})"
        )
    return lines


def what_if_lines(found: dict[str, Any], unit: str) -> list[str]:
    """Sensitivities, one a line."""
    lines = []
    for x in found.get("limits", ()):
        name = f"{METRICS[x['metric']]} {x['percentile']}"
        now, then = _seconds(x["limit_s"]), _seconds(x["looser_s"])
        near = " (time was short: over the layouts nearest to the plan)" if x["restricted"] else ""
        lines.append(f"{name} {now} -> {then}: {_change(x, unit, least=x['restricted'])}{near}")
    for x in found.get("prices", ()):
        if "cheaper" in x:
            cheaper = x["cheaper"]
            lines.append(f"{x['offer']} at {cheaper['price_usd_per_hour']:.2f} USD/h (-10%): {_change(cheaper, unit)}")
        elif "enters_at_share" in x:
            at = x["enters_at_usd_per_hour"]
            lines.append(
                f"{x['offer']} would be bought at {at:.2f} USD/h ({x['enters_at_share'] - 1:+.0%})" if at is not None
                else f"{x['offer']} would not be bought even for nothing"
            )  # fmt: skip
    lines += [f"without {x['what']} (lossy): {_change(x['without'], unit)}" for x in found.get("lossy", ())]
    if "resilience" in found:
        lines.append(f"if nothing ever failed: {_change(found['resilience'], unit)}")
    if "elasticity" in found:
        e = found["elasticity"]
        lines.append(f"a fixed fleet: {e['fixed']:,.2f} {unit}, {e['change']:+.0%}; elasticity stops paying at a lag of "
                     f"{_seconds(e['stops_paying_at_s'])} (now {_seconds(e['lag_s'])})")  # fmt: skip
    return lines + _certainty_lines(found.get("certainty", {}), unit)


def _certainty_lines(c: dict[str, Any], unit: str) -> list[str]:
    if not c:
        return []
    lines = [f"promises hold with {c['joint_confidence']:.0%} (asked {c['confidence']:.0%})"]
    if "expected" in c:
        e = c["expected"]
        lines.append(
            f"at the expected times: {e['objective']:,.2f} {unit} ({', '.join(e['buys'])}), holds with "
            f"{e['joint_confidence']:.0%}: certainty costs {c['price_of_certainty']:+.0%}"
        )
    if "hedged" in c:
        h = c["hedged"]
        lines.append(
            f"hedged over devices: {h['objective']:,.2f} {unit}, {h['change']:+.0%} ({', '.join(h['buys'])}), holds with "
            f"{h['joint_confidence']:.0%}"
        )
    return lines


def replayed(x: dict[str, Any]) -> str:
    """What replay says of another plan; nothing where it was not replayed."""
    found = x.get("replayed")
    if found is None:
        return ""
    return "; replayed: keeps every promise" if found["kept"] else f"; replayed: misses {', '.join(found['missed'])}"


def _change(x: dict[str, Any], unit: str, *, least: bool = False) -> str:
    if x["objective"] is None:
        return "cannot be served"
    if abs(x["change"]) < 1e-4:
        return f"no change{replayed(x)}"
    verb = "saves" if x["change"] < 0 else "costs"
    if unit == "requests/s":
        verb = "gains" if x["change"] < 0 else "loses"
    verb += " at least" if least else ""
    return f"{verb} {abs(x['change']):.1%} ({x['objective']:,.2f} {unit}: {', '.join(x['buys'])}){replayed(x)}"


def _seconds(x: float) -> str:
    return f"{x * 1e3:,.0f} ms" if x < 10 else f"{x:,.0f} s" if x < 7200 else f"{x / 3600:.1f} h"
