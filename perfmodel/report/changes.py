"""Tables of what else a plan could have been: binding rows, alternatives, refusals, and what other limits and prices cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from perfmodel.planner.page import METRICS
from perfmodel.report.blocks import Cell, Items, Table
from perfmodel.report.text import money, percent, seconds, tokens


def ranked(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Alternatives, the best first; those that cannot serve come last."""
    sign = -1.0 if data["objective"] == "goodput" else 1.0
    return sorted(data["alternatives"], key=lambda a: (a["objective"] is None, sign * (a["objective"] or 0.0)))


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
    """What every other choice, and each of the next best plans, would cost."""
    best, unit = data["objective_value"], data["unit"]
    rows = []
    for a in ranked(data):
        value = a["objective"]
        extra = f"{(value - best) / best:+.1%}" if value is not None and best else "–"
        count: Counter[str] = Counter()
        for x in a["pools"]:
            count[x["layout"]] += x["replicas"]
        runs = ", ".join(f"{n} × {label}" for label, n in count.items())
        would = f"{', '.join(a['nodes'])}: {runs}" if runs else "–"
        rows.append(
            (a["name"], money(value) if value is not None else Cell("cannot", "warn"), extra, a["reason"], would)
        )
    columns = ("alternative", unit, "against this plan", "why", "would buy and run")
    return Table("Alternatives, each solved anew", columns, tuple(rows), (1, 2))


def rejected(data: dict[str, Any]) -> Table:
    """One row a layout that cannot serve some lengths, with the reason for the easiest set it was refused."""
    first: dict[str, dict[str, Any]] = {}
    count: Counter[str] = Counter()
    for r in data["rejected"]:
        count[r["layout"]] += 1
        first.setdefault(r["layout"], r)
    rows = [
        (label, "any length" if r["input_tokens"] is None else f"{tokens(r['input_tokens'])} tokens", r["reason"],
         f"{count[label]}")
        for label, r in first.items()
    ]  # fmt: skip
    columns = ("layout", "for", "first reason", "sets of lengths refused")
    return Table("Layouts refused before the integer program", columns, tuple(rows), (3,))


def rounds(data: dict[str, Any]) -> Table:
    """Plan, replay, tighten, plan again."""
    rows = [
        (f"{r['round']}", money(r["objective"]), money(r["bound"]), ", ".join(r["missed"]) or "nothing")
        for r in data["rounds"]
    ]
    columns = ("round", f"objective [{data['unit']}]", f"proven bound [{data['unit']}]", "missed in replay")
    return Table("Rounds of plan and replay", columns, tuple(rows), (0, 1, 2))


def what_if(data: dict[str, Any]) -> Table:
    """Other limits, prices and choices, each solved anew."""
    rows = [
        (name, money(x["objective"]) if x["objective"] is not None else Cell("cannot", "warn"), _change(x["change"]),
         ", ".join(x["buys"]) or "–")
        for name, x in _solved(data["what_if"], data["unit"])
    ]  # fmt: skip
    columns = ("if", data["unit"], "against this plan", "would buy")
    return Table("What other limits, prices and choices would cost", columns, tuple(rows), (1, 2))


def _change(x: float | None) -> str:
    """Relative change of the objective; positive is worse."""
    return "–" if x is None else "no change" if abs(x) < 1e-4 else f"{x:+.1%}"


def _solved(found: dict[str, Any], unit: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what is changed, the plan that follows)."""
    for x in found.get("limits", ()):
        name = f"{METRICS[x['metric']]} {x['percentile']} of {x['service']}"
        near = " (over the layouts nearest to the plan: a saving is at least this)" if x["restricted"] else ""
        yield f"{name}: {seconds(x['limit_s'])} → {seconds(x['looser_s'])}{near}", x
    for x in found.get("prices", ()):
        if "cheaper" in x:
            yield f"{x['offer']} at {money(x['cheaper']['price_usd_per_hour'])} USD/h (-10%)", x["cheaper"]
    for x in found.get("lossy", ()):
        yield f"without the lossy {x['what']}", x["without"]
    if "resilience" in found:
        yield "if nothing ever failed", found["resilience"]
    if "elasticity" in found:
        e = found["elasticity"]
        yield "a fixed fleet", {"objective": e["fixed"], "change": e["change"], "buys": ()}
    certainty = found.get("certainty", {})
    if "expected" in certainty:
        e = certainty["expected"]
        change = 1 / (1 + certainty["price_of_certainty"]) - 1
        yield f"at the expected times, which hold with {percent(e['joint_confidence'])}", e | {"change": change}
    if "hedged" in certainty:
        yield f"hedged over devices, holding with {percent(certainty['hedged']['joint_confidence'])}", certainty["hedged"]


def thresholds(data: dict[str, Any]) -> Items:
    """Where a choice tips: prices at which nodes enter, the lag at which elasticity stops paying, how sure the promises are."""
    found, lines = data["what_if"], []
    for x in found.get("prices", ()):
        if "enters_at_share" in x:
            at = x["enters_at_usd_per_hour"]
            lines.append(
                f"{x['offer']} would be bought at {money(at)} USD/h ({x['enters_at_share'] - 1:+.0%}), now "
                f"{money(x['price_usd_per_hour'])}." if at is not None
                else f"{x['offer']} would not be bought even for nothing."
            )  # fmt: skip
    if "elasticity" in found:
        e = found["elasticity"]
        lags = ", ".join(f"{seconds(x['lag_s'])}: {money(x['objective'])}" for x in e["by_lag"])
        lines.append(
            f"Elasticity stops paying at a lag of {seconds(e['stops_paying_at_s'])}; it is {seconds(e['lag_s'])} now. "
            f"{data['unit']} by lag: {lags}."
        )
    if "certainty" in found:
        c = found["certainty"]
        price = f"; certainty costs {c['price_of_certainty']:+.0%}" if "price_of_certainty" in c else ""
        lines.append(f"The promises hold with {percent(c['joint_confidence'])} (asked {percent(c['confidence'])}){price}.")
    return Items("Where the choice tips", tuple(lines))
